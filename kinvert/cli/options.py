"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import click

import kinvert as ki
from kinvert.cli import completion

__all__ = [
    "LEVELS",
    "as_json",
    "check_matplotlib",
    "device",
    "imports",
    "model_levels",
    "pairs",
    "parse_pairs",
    "parse_where",
    "threads",
    "wheres",
    "workers",
]

LEVELS: dict[str, Callable[[], ki.levels.Levels]] = {
    "sd15": ki.levels.stable_diffusion,
    "sdxl": ki.levels.stable_diffusion,
    "svd": lambda: ki.levels.edm(sigma_max=700.0),
    "edm": ki.levels.edm,
    "sd3": lambda: ki.levels.flow(shift=3.0),
    "flux": ki.levels.flux,
}
model_levels = click.option(
    "--model", type=click.Choice(list(LEVELS)), default="sd15", help="Whose noise levels; sd3 and flux have flow times."
)
device = click.option(
    "--device",
    default="cpu",
    metavar="NAME",
    shell_complete=completion.devices,
    help="Where to compute, e.g. cuda or cuda:1.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
workers = click.option("--workers", type=int, default=1, help="Processes on this machine; or start it with torchrun.")
threads = click.option(
    "--threads",
    type=int,
    help="torch's threads in each process, for a model of your own. By default torch's, shared among the workers.",
)
imports = click.option(
    "--import",
    "imports",
    multiple=True,
    metavar="MODULE",
    help="Module that registers your own samplers, methods or models; repeatable.",
)


def pairs(name: str, text: str) -> Callable[[Any], Any]:
    """Return an option that takes KEY=VALUE, several times, as `<name>s`."""
    return click.option(f"--{name}", f"{name}s", multiple=True, metavar="KEY=VALUE", help=text)


def parse_pairs(flag: str, texts: Sequence[str]) -> dict[str, Any]:
    """Parse the values of an option made by `pairs`: numbers and other JSON as such, the rest as strings.

    Raises:
        ValueError: a text without "=".
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            example = "eta=0.5" if flag == "--option" else "label=3"
            raise ValueError(f"{flag} must be KEY=VALUE, e.g. {example}, got {text!r}")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def wheres(does: str) -> Callable[[Any], Any]:
    """Return the option `--where`, whose values `parse_where` parses, as `wheres`."""
    return click.option(
        "--where",
        "wheres",
        multiple=True,
        metavar="KEY=VALUE,...",
        help=f"{does} cells with this setting, or one of several, e.g. method=unsample,invert; repeatable.",
    )


def parse_where(texts: Sequence[str]) -> dict[str, list[str]]:
    """Parse the values of --where; a comma inside the parentheses of a sampler's options does not part values."""
    found: dict[str, list[str]] = {}
    for given in texts:
        key, equals, values = given.partition("=")
        if not equals:
            raise ValueError(f"--where must be KEY=VALUE, e.g. method=unsample,invert, got {given!r}")
        found.setdefault(key.strip(), []).extend(value.strip() for value in re.split(r",(?![^(]*\))", values))
    return found


def check_matplotlib() -> None:
    """Check before the work, not after it, that pictures can be drawn.

    Raises:
        ValueError: matplotlib is missing, or does not start.
    """
    try:
        import matplotlib.figure  # noqa: F401 - not at the top: its import takes half as long as torch's
    except ModuleNotFoundError as error:
        raise ValueError(f"pictures need {error.name}, which is not here: pip install 'kinvert[cli]'") from error
    except ValueError as error:
        raise ValueError(f"matplotlib does not start: {error}; is the variable MPLBACKEND right?") from error
