"""Turn records into rows of a table, and choose among them.

A row is one combination of settings. The samples of all its seeds are pooled, and every number is their median, except
for shares of samples, whose columns show percent. A median with a NaN among its values is NaN. Every number has its
interval, see `kinvert.bench.report.intervals`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kinvert.bench.report.intervals import LEVEL, Unit, holds, interval, lower_share, resampled, units, wilson
from kinvert.bench.results import Record
from kinvert.checks import check_integer, unknown

__all__ = [
    "COLUMNS",
    "SETTINGS",
    "Column",
    "Row",
    "Samples",
    "as_columns",
    "better",
    "choose",
    "column",
    "contest",
    "distinct",
    "evaluations",
    "leaders",
    "median",
    "plain",
    "rows",
    "sampler_name",
    "settings",
    "top",
]

SETTINGS = ("model", "question", "method", "sampler", "schedule", "steps", "cfg", "dtype")
"""The settings that tell rows apart; "sampler" includes its options, "dtype" a device that is not the CPU."""


@dataclass(frozen=True)
class Column:
    """A number of a row: its title, its format specification, and whether the smallest or the largest is best."""

    title: str
    spec: str
    best: Callable[[Iterable[float]], float] | None = None

    @property
    def is_share(self) -> bool:
        """Tell whether the number is a share of samples: such numbers are shown in percent."""
        return self.spec.endswith("%")


COLUMNS = {
    "evaluations": Column("evaluations", ".0f"),
    "nmse_db": Column("NMSE (dB)", ".1f", min),
    "psnr": Column("PSNR (dB)", ".1f", max),
    "ssim": Column("SSIM", ".3f", max),
    "max_error": Column("max error", ".1e", min),
    "distance_to_ode": Column("to ODE", ".1e", min),
    "latent_std": Column("latent std", ".3f"),
    "latent_ks": Column("latent KS", ".3f", min),
    "bits": Column("bits right", ".3f", max),
    "message": Column("messages right", ".0%", max),
    "detected": Column("detected", ".0%", max),
    "edit_error": Column("edit error", ".3f", min),
    "edit_gain_db": Column("edit gain (dB)", ".1f", max),
    "edit_closer": Column("edits closer", ".0%", max),
    "bits_per_value": Column("bits a value", ".3f"),
    "prefers_own": Column("prefers its own label", ".0%", max),
    "latents": Column("latents", ".1f"),
    "unique": Column("unique", ".0%"),
    "likeliest": Column("true one likeliest", ".0%"),
    "edit_took": Column("edits took", ".0%", max),
    "edit_ssim": Column("edited SSIM", ".3f", max),
    "converged": Column("converged", ".0%"),
    "samples": Column("samples", ".0f"),
}


@dataclass(frozen=True)
class Samples:
    """The values of one number over the samples of a row, and the unit that each belongs to (see `intervals.units`)."""

    values: tuple[float, ...]
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class Row:
    """One combination of settings.

    Attributes:
        settings: values of `SETTINGS`.
        values: medians of the metrics by name (means of those that are shares, such as `edit_took`), `evaluations` (up
            and down together), `up_per_step` (those on the way up, for each step), `samples` and, if the method makes a
            claim, `converged` (a share too).
        intervals: the lower and upper end of the interval of a value, by the same names; none for `samples`, for values
            that are NaN, and for those of one sample.
        samples: what the values and intervals are made of.
    """

    settings: dict[str, Any]
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    samples: dict[str, Samples] = field(default_factory=dict, repr=False)


def rows(records: Iterable[Record]) -> list[Row]:
    """Pool records that differ in seed alone, and leave out those that failed.

    Returns:
        Rows by model and question, the best reconstruction (lowest NMSE) first.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in distinct(records):
        groups.setdefault(tuple(settings(record).values()), []).append(record)
    found = [_row(group) for group in groups.values()]

    def place(row: Row) -> tuple[Any, ...]:
        error = row.values.get("nmse_db", math.inf)
        return *contest(row), math.isnan(error), error, str(row.settings)

    return sorted(found, key=place)


def distinct(records: Iterable[Record]) -> list[Record]:
    """Leave out failed records, and of those that differ in count alone, which share samples, all but the largest."""
    largest: dict[tuple[Any, ...], Record] = {}
    for record in records:
        if record["error"] is None:
            key = (*settings(record).values(), record["cell"]["seed"])
            if key not in largest or record["cell"]["count"] > largest[key]["cell"]["count"]:
                largest[key] = record
    return list(largest.values())


def settings(record: Record) -> dict[str, Any]:
    """Return the values of `SETTINGS` of a record."""
    cell = record["cell"]
    dtype = f"{cell['dtype']} on {cell['device']}" if "device" in cell else cell["dtype"]
    return {name: cell[name] for name in SETTINGS} | {"sampler": sampler_name(cell), "dtype": dtype}


def sampler_name(cell: dict[str, Any]) -> str:
    """Return the sampler with its options, e.g. `bdia (gamma=0.5)`."""
    options = ", ".join(f"{key}={value}" for key, value in cell["options"].items())
    return f"{cell['sampler']} ({options})" if options else str(cell["sampler"])


def median(values: Sequence[float]) -> float:
    """Compute the median; NaN if a value is NaN or there are no values."""
    return math.nan if not values or any(math.isnan(v) for v in values) else float(statistics.median(values))


def evaluations(record: Record) -> list[float]:
    """Return the denoiser evaluations per sample, up and down together."""
    up, down = record["inversion_evaluations"], record["sampling_evaluations"]
    return [a + b for a, b in zip(up, down, strict=True)]


def plain(value: Any) -> str:
    """Return a setting as text, floats without zeros at the end."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def column(name: str) -> Column:
    """Return how to show a metric, which `COLUMNS` need not have."""
    return COLUMNS.get(name, Column(name.replace("_", " "), ".3g"))


def contest(row: Row) -> tuple[str, str]:
    """Return what rows must have in common to be compared: model and question."""
    return row.settings["model"], row.settings["question"]


# -- comparing rows ----------------------------------------------------------------------------------------------------
def better(a: Row, b: Row, name: str) -> bool:
    """Tell whether row a is better than b in a number beyond doubt: the interval of their difference excludes 0.

    With fewer than 6 units no interval holds a median in 95% of cases, and nothing is beyond doubt.
    """
    ours, theirs = a.samples.get(name), b.samples.get(name)
    if ours is None or theirs is None or min(holds(len(set(one.units))) for one in (ours, theirs)) < LEVEL:
        return False
    low, high = (resampled(one.values, one.units, share=column(name).is_share) for one in (ours, theirs))
    if column(name).best is max:
        low, high = high, low
    return not bool(np.isnan(low).any() or np.isnan(high).any()) and lower_share(low, high) >= (1 + LEVEL) / 2


def leaders(found: Sequence[Row], name: str) -> dict[tuple[str, str], Row]:
    """Return the row with the best value of a column, by model and question, if it is `better` than every other."""
    best = column(name).best
    leading = {}
    for key in dict.fromkeys(map(contest, found)) if best is not None else ():
        known = [row for row in found if contest(row) == key and not math.isnan(row.values.get(name, math.nan))]
        known.sort(key=lambda row: row.values[name], reverse=best is max)
        if len(known) > 1 and all(better(known[0], other, name) for other in known[1:]):
            leading[key] = known[0]
    return leading


# -- choosing ----------------------------------------------------------------------------------------------------------
def choose(records: Sequence[Record], where: Mapping[str, str | Sequence[str]]) -> list[Record]:
    """Return the records whose settings have one of the given values, e.g. `{"method": ["unsample", "invert"]}`.

    Args:
        records: what to choose from.
        where: names of `SETTINGS` with one value or several, as the report writes them; numbers may be written in any
            way.

    Raises:
        ValueError: a setting that does not exist; a value that no record has.
    """
    kept = list(records)
    for name, given in where.items():
        if name not in SETTINGS:
            raise ValueError(unknown("setting", name, SETTINGS))
        wanted = [_normal(value) for value in ([given] if isinstance(given, str) else given)]
        have = {_normal(plain(settings(record)[name])): plain(settings(record)[name]) for record in records}
        for value in wanted:
            if value not in have:
                raise ValueError(f"no record has {name} {value}; there are {', '.join(sorted(have.values()))}")
        kept = [record for record in kept if _normal(plain(settings(record)[name])) in wanted]
    if not kept:
        chosen = " and ".join(f"{name}={value}" for name, value in where.items())
        raise ValueError(f"no record has all of {chosen}; leave one out")
    return kept


def _normal(value: str) -> str:
    try:
        return f"{float(value):g}"
    except ValueError:
        return value.strip()


def top(found: Sequence[Row], count: int | None) -> list[Row]:
    """Return the first rows of each model and question, those with the lowest NMSE; all of them if `count` is None."""
    if count is None:
        return list(found)
    check_integer("top", count, 1)
    kept = []
    for key in dict.fromkeys(map(contest, found)):
        kept += [row for row in found if contest(row) == key][:count]
    return kept


def as_columns(found: Sequence[Row], columns: Sequence[str] | None) -> list[str]:
    """Return the names of the numbers to show: `columns`, or those of `COLUMNS` that some row has.

    Raises:
        ValueError: a name that no row has.
    """
    have = dict.fromkeys(name for row in found for name in row.values)
    if columns is None:
        return [name for name in COLUMNS if name in have]
    for name in columns:
        if name not in have and name not in COLUMNS:
            raise ValueError(unknown("column", name, sorted({*have, *COLUMNS})))
    return list(columns)


# -- parts -------------------------------------------------------------------------------------------------------------
def _row(group: Sequence[Record]) -> Row:
    samples = _samples(group)
    values = {name: _value(name, one.values) for name, one in samples.items()}
    intervals = {name: _interval(name, one, values[name]) for name, one in samples.items()}
    return Row(
        settings(group[0]),
        values | {"samples": float(len(samples["evaluations"].values))},
        {name: ends for name, ends in intervals.items() if ends is not None},
        samples,
    )


def _samples(group: Sequence[Record]) -> dict[str, Samples]:
    """Pool the values of each number, with their units."""
    pools: dict[str, tuple[list[float], list[Unit]]] = {}
    for record in group:
        up = [spent / record["cell"]["steps"] for spent in record["inversion_evaluations"]]
        numbers = {**record["metrics"], "evaluations": evaluations(record), "up_per_step": up}
        numbers["converged"] = record["converged"]
        of = units(record)
        for name, values in numbers.items():
            if values:
                pool = pools.setdefault(name, ([], []))
                pool[0].extend(map(float, values))
                pool[1].extend(of)
    return {name: Samples(tuple(values), tuple(of)) for name, (values, of) in pools.items()}


def _value(name: str, values: Sequence[float]) -> float:
    return statistics.fmean(values) if column(name).is_share else median(values)


def _interval(name: str, samples: Samples, value: float) -> tuple[float, float] | None:
    if column(name).is_share:
        return wilson(value, len(set(samples.units)))
    return interval(samples.values, samples.units)
