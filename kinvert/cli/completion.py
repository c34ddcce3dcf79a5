"""What the shell offers after TAB: names of samplers, schedules, methods, presets, models and devices.

Names are those of the registries, so that nothing is listed twice. docs/command-line.md says how a shell is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import click
from click.shell_completion import CompletionItem

import kinvert as ki
from kinvert import bench
from kinvert.bench.grid import PRESETS
from kinvert.devices import available

__all__ = ["devices", "methods", "presets", "problems", "samplers", "schedules"]

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _names(names: Callable[[], Mapping[str, str]]) -> Complete:
    """Return a completion of names with their help; in a list with commas, of its last name."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the names that begin like `incomplete`."""
        before, comma, last = incomplete.rpartition(",") if _is_list(param) else ("", "", incomplete)
        taken = before.split(",")
        return [
            CompletionItem(f"{before}{comma}{name}", help=text or None)
            for name, text in names().items()
            if name.startswith(last) and name not in taken
        ]

    return complete


def _is_list(param: click.Parameter) -> bool:
    return str(param.metavar).endswith(",...")


def _plain(names: Iterable[str]) -> dict[str, str]:
    return dict.fromkeys(names, "")


samplers = _names(lambda: {name: entry.summary for name, entry in ki.SAMPLERS.items()})
schedules = _names(lambda: {name: entry.summary for name, entry in ki.SCHEDULES.items()})
methods = _names(lambda: _plain(bench.METHODS))
presets = _names(lambda: _plain(path.stem for path in sorted(PRESETS.glob("*.toml"))))
problems = _names(lambda: _plain(bench.PROBLEMS))
devices = _names(lambda: _plain(available()))
