"""What to measure: a `Cell` is one combination of settings, a `Grid` is all combinations of lists of settings.

A grid file is TOML. Its keys are the fields of `Cell`, each with a value or a list of values; a key that is left out
has the default of `Cell`. A sampler with options is a table: `sampler = ["euler", {name = "bdia", gamma = 0.5}]`.
Several blocks `[[grid]]` make several grids, and `imports = ["my_module"]` at the top names modules that register
samplers, methods or problems of the user's own. The presets are such files, in `kinvert/bench/presets`.
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import kinvert as ki
from kinvert.bench.methods import METHODS
from kinvert.bench.problems import find_problem, most_images
from kinvert.bench.questions import QUESTIONS
from kinvert.checks import MOST_STEPS, check_choice, check_integer, check_number, unknown
from kinvert.devices import check_device
from kinvert.jobs import import_modules
from kinvert.jsontext import content_key
from kinvert.rules import Rule
from kinvert.rules.names import unknown_sampler, unknown_schedule

__all__ = ["DTYPES", "QUESTIONS", "Cell", "Grid", "check_size", "describe", "preset", "read_grid", "unique"]

MOST_CELLS = 100_000  # of a grid: at a second each, a day
MOST_SAMPLES = 100_000  # of a cell: its record has each of them as text
MOST_SEEDS = 2**62  # generators of torch take 64 bits, and images, latents and noises have seeds near this one
DTYPES = ("float64", "float32", "float16", "bfloat16")
PRESETS = Path(__file__).parent / "presets"
CFG_FIX = (
    "1 turns guidance off; a record holds numbers, so bind a function to the denoiser of a problem of your own, "
    "ki.denoisers.guide(denoiser, cfg, positive, negative)"
)


@dataclass(frozen=True)
class Cell:
    """One measurement: all settings that its result depends on.

    Attributes:
        model: a name of `PROBLEMS`, or a Python entry point "module:function" (see `Problem`).
        question: "reconstruction", data -> latent -> data, "recovery", latent -> data -> latent, or another name of
            `kinvert.bench.questions.QUESTIONS`.
        method: how data becomes a latent, a name of `METHODS`.
        sampler, options: how a latent becomes data. Methods that invert a sampler invert this one.
        schedule: a name of `ki.SCHEDULES`.
        steps: number of steps between the model's largest and smallest noise level; the smallest is above 0.
        cfg: guidance scale, in both directions.
        dtype: floating point format of the states and of the model.
        seed: seed of the images, latents and noises.
        count: number of samples.
        device: where to compute, e.g. "cuda".

    Raises:
        ValueError, TypeError: an unknown name, with the nearest known one; a number that cannot work.
    """

    model: str
    question: str = "reconstruction"
    method: str = "unsample"
    sampler: str = "euler"
    options: tuple[tuple[str, Any], ...] = ()
    schedule: str = "karras"
    steps: int = 20
    cfg: float = 1.0
    dtype: str = "float64"
    seed: int = 0
    count: int = 8
    device: str = "cpu"

    def __post_init__(self) -> None:
        find_problem(self.model)
        named = (
            *(("question", QUESTIONS), ("method", METHODS), ("sampler", ki.SAMPLERS)),
            *(("schedule", ki.SCHEDULES), ("dtype", DTYPES)),
        )
        for name, known in named:
            got = getattr(self, name)
            if not isinstance(got, str) or got not in known:
                elsewhere = {"sampler": unknown_sampler, "schedule": unknown_schedule}
                raise ValueError(elsewhere[name](got) if name in elsewhere else unknown(name, got, known))
        images = most_images(self.model)
        limits = (
            *(("steps", 1, MOST_STEPS, ""), ("seed", 0, MOST_SEEDS, "")),
            ("count", 1, images or MOST_SAMPLES, f", the images there are of {self.model}" if images else ""),
        )
        for name, low, high, fix in limits:
            value = check_integer(name, getattr(self, name), low)
            if value > high:
                raise ValueError(f"{name} must be at most {high}{fix}, got {value}")
            object.__setattr__(self, name, value)
        if self.device != "cpu":  # what needs no check is not checked, because there may be many cells
            object.__setattr__(self, "device", str(check_device(self.device)))
        object.__setattr__(self, "cfg", check_number("cfg", self.cfg, fix=CFG_FIX))
        object.__setattr__(self, "options", self._canonical_options())

    def _canonical_options(self) -> tuple[tuple[str, Any], ...]:
        """Return the options that differ from the sampler's defaults, in its types: equal samplers have equal keys."""
        given = dict(self.options)
        if not given:  # building a rule takes long
            return ()
        options, defaults = ki.sampler(self.sampler, **given).options, ki.SAMPLERS[self.sampler].options
        return tuple((key, options[key]) for key in sorted(given) if options[key] != defaults[key])

    @property
    def rule(self) -> Rule:
        """The sampler with its options."""
        return ki.sampler(self.sampler, **dict(self.options))

    @property
    def settings(self) -> dict[str, Any]:
        """The fields, ready for JSON; the device only if it is not the CPU."""
        found = {f.name: getattr(self, f.name) for f in fields(self)} | {"options": dict(self.options)}
        if self.device == "cpu":
            del found["device"]
        return found

    @property
    def key(self) -> str:
        """A hash of the settings, 16 hexadecimal digits, which names the result file."""
        return content_key(self.settings)

    def __str__(self) -> str:
        return describe(self.settings)


@dataclass(frozen=True)
class Grid:
    """Lists of settings; iterate over it for the cells that all their combinations make.

    Attributes:
        model, question, method, schedule, steps, cfg, dtype, seed, count, device: values of the field of `Cell`, or
            one.
        sampler: names, or mappings `{"name": ..., option: value, ...}` for samplers with options.
    """

    model: Any
    question: Any = field(default=("reconstruction",))
    method: Any = field(default=("unsample",))
    sampler: Any = field(default=("euler",))
    schedule: Any = field(default=("karras",))
    steps: Any = field(default=(20,))
    cfg: Any = field(default=(1.0,))
    dtype: Any = field(default=("float64",))
    seed: Any = field(default=(0,))
    count: Any = field(default=(8,))
    device: Any = field(default=("cpu",))

    def __iter__(self) -> Iterator[Cell]:
        check_size(self.size)
        lists = self._lists
        for values in itertools.product(*lists.values()):
            settings = dict(zip(lists, values, strict=True))
            yield Cell(**settings | _sampler(settings["sampler"]))

    @property
    def size(self) -> int:
        """The number of combinations."""
        return math.prod(map(len, self._lists.values()))

    @property
    def _lists(self) -> dict[str, list[Any]]:
        return {f.name: _listed(f.name, getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Grid:
        """Make a grid from a table of a TOML file.

        Raises:
            ValueError: a key is not a setting; the model is missing.
        """
        known = [f.name for f in fields(cls)]
        if not isinstance(table, Mapping):
            raise ValueError(f"a grid must be a table of settings, e.g. model = 'gaussian', got {table!r}")
        for key in table:
            if key not in known:
                hint = "; an option belongs to its sampler: sampler = [{name = ..., option = ...}]"
                raise ValueError(f"{unknown('key of a grid', key, known)}{hint if key == 'options' else ''}")
        if missing := [f.name for f in fields(cls) if f.default is MISSING and f.name not in table]:
            raise ValueError(f"a grid needs the key {missing[0]!r}, e.g. model = ['mixture', 'digits']")
        return cls(**table)


def read_grid(path: Path | str) -> tuple[list[Cell], tuple[str, ...]]:
    """Read the cells of a grid file, each once, and the modules that it imports.

    Raises:
        ValueError: the file is not TOML or not a grid; the message has its name and what is wrong.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read the grid {str(path)!r}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply for a grid of names, numbers and lists") from error
    imports = table.pop("imports", [])
    blocks = table.pop("grid", None) if isinstance(table.get("grid"), list) else None
    try:
        if not (isinstance(imports, list) and all(isinstance(name, str) for name in imports)):
            raise ValueError(f"imports must be a list of names of modules, got {imports!r}")
        if blocks is not None and table:
            raise ValueError(f"the key {next(iter(table))!r} stands outside of the blocks [[grid]]; move it into them")
        import_modules(imports)
        grids = [Grid.of(block) for block in ([table] if blocks is None else blocks)]
        check_size(sum(grid.size for grid in grids))
        return unique(itertools.chain.from_iterable(grids)), tuple(imports)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error


def preset(name: str) -> list[Cell]:
    """Return the cells of a preset: "quick" (a minute on two cores), "inversion", "budgets", "standard" or "full".

    Raises:
        ValueError: an unknown name.
    """
    known = [path.stem for path in sorted(PRESETS.glob("*.toml"))]
    check_choice("preset", name, known)
    return read_grid(PRESETS / f"{name}.toml")[0]


def describe(settings: Mapping[str, Any]) -> str:
    """Return the settings of a cell as one line of text."""
    options = "".join(f", {key}={value}" for key, value in settings["options"].items())
    return (
        "{model} {question} {method} {sampler}{options} {schedule} {steps} steps cfg {cfg:g} {dtype} seed {seed} "
        "count {count}"
    ).format_map({**settings, "options": options}) + (f" on {settings['device']}" if "device" in settings else "")


def check_size(cells: int) -> None:
    """Raise ValueError if a grid has more cells than can be measured."""
    if cells > MOST_CELLS:
        raise ValueError(
            f"a grid must have at most {MOST_CELLS:,} cells, got {cells:,}, which would take "
            f"{cells / 86400:,.0f} days at a second each; shorten its lists, or split it into several"
        )


def unique(cells: Iterable[Cell]) -> list[Cell]:
    """Return each cell once, in the order of first appearance.

    Raises:
        TypeError: what was given are no cells.
    """
    if not isinstance(cells, Iterable) or isinstance(cells, (str, Mapping)):
        raise TypeError(f"cells must be a Grid or a list of Cells, got {cells!r}; for a file use read_grid(path)")
    return list(dict.fromkeys(cells))


def _listed(name: str, values: Any) -> list[Any]:
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    if not values:
        raise ValueError(f"{name} is an empty list; leave the key out for the default, or name at least one")
    return values


def _sampler(value: Any) -> dict[str, Any]:
    """Return the fields `sampler` and `options` of a cell."""
    if isinstance(value, str):
        return {"sampler": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError(f"sampler must be a name or a table like {{name = 'bdia', gamma = 0.5}}, got {value!r}")
    return {"sampler": value["name"], "options": tuple((k, v) for k, v in value.items() if k != "name")}
