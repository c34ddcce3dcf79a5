"""Read, merge and compare results: one JSON file for each cell, named by the cell's hash, complete or absent.

A folder of results is a set: to merge two, copy the files of one to the other. JSON has no infinite numbers; they are
written as the strings "inf", "-inf" and "nan", and read back as floats.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinvert.checks import is_integer, is_number
from kinvert.files import write_file
from kinvert.jsontext import canonical_json, content_key
from kinvert.resultfiles import measured, parse_result, read_result, set_aside
from kinvert.showing.brief import brief, never_fails
from kinvert.showing.html import card, html_never_fails, paragraph, table
from kinvert.tasks import is_done, tell_of_damage

__all__ = [
    "FIX",
    "MERGED",
    "Comparison",
    "Difference",
    "Record",
    "Records",
    "check_record",
    "compare",
    "load",
    "merge",
    "read",
]

Record = dict[str, Any]
MERGED = "results.jsonl"
FIX = "the `kinvert bench` that measured it sets it aside and computes it again"
SHOWN = 50  # records in the table of a notebook


class Records(list[Record]):
    """A list of records that shows itself in one line, and in a notebook as a table."""

    @never_fails
    def __repr__(self) -> str:
        failed = sum(record["error"] is not None for record in self)
        parts = [f"{len(self)} records", *([f"{failed} failed"] if failed else [])]
        for name in ("model", "method", "sampler", "steps"):
            values = [str(value) for value in sorted({record["cell"][name] for record in self})]
            parts.append(f"{name} {', '.join(values if len(values) <= 4 else [*values[:3], '...', values[-1]])}")
        return f"Records({'; '.join(parts)})"

    @html_never_fails
    def _repr_html_(self) -> str:
        names = ("model", "question", "method", "sampler", "schedule", "steps", "cfg", "dtype", "seed")
        rows = [(*(record["cell"][name] for name in names), _outcome(record)) for record in self[:SHOWN]]
        rest = f"the first {SHOWN}; kinvert.bench.report shows them all" if len(self) > SHOWN else ""
        return card(repr(self), table((*names, "NMSE (dB)"), rows), paragraph("", rest) if rest else "")


def _outcome(record: Record) -> str:
    """Return the median error of a record, or why it failed, in a few words."""
    if record["error"] is not None:
        return brief(str(record["error"]))
    values = record["metrics"].get("nmse_db") or ()
    return f"{statistics.median(values):.1f}" if values else ""


# -- reading -----------------------------------------------------------------------------------------------------------
def load(*places: Path | str) -> Records:
    """Read the records of folders of results, and of `results.jsonl` files, sorted by key; each cell is taken once.

    Raises:
        ValueError: a place does not exist; a file is damaged, with its name and what to do; two places have different
            results for one cell.
    """
    records: dict[str, Record] = {}
    origin: dict[str, Path] = {}
    for place in map(Path, places):
        for path, record in _read_place(place):
            key = record["key"]
            if key in records and canonical_json(measured(records[key])) != canonical_json(measured(record)):
                raise ValueError(
                    f"{origin[key]} and {path} have different results for one cell; load one of them, or see "
                    "`kinvert bench compare`"
                )
            records[key], origin[key] = record, path
    return Records(records[key] for key in sorted(records))


def read(path: Path) -> Record:
    """Read one result file.

    Raises:
        ValueError: the file cannot be read, is damaged, or holds the result of another cell than its name says.
    """
    try:
        record = read_result(path)
        check_record(record)
        if record["key"] != path.stem:
            raise ValueError(f"it is that of another cell, {record['key']}")
    except ValueError as error:
        raise ValueError(f"{path} is no result of its cell, {error}; {FIX}") from error
    return record


def merge(folder: Path, keys: Iterable[str]) -> bool:
    """Write `results.jsonl`, one line for each record of the folder, sorted by key, once all of `keys` are there.

    Returns:
        True if the file was written, False if a result is missing.

    Warns:
        RuntimeWarning: damaged records, which are set aside.
    """
    keys = list(keys)
    if not all(is_done(folder, key) for key in keys):
        return False
    records, damaged = [], []
    for path in _record_files(folder):
        try:
            records.append(read(path))
        except ValueError as error:
            damaged.append(f"{error}; see {set_aside(path)}")
    tell_of_damage(damaged, "and the command that measured them computes them again")
    if not all(is_done(folder, key) for key in keys):
        return False
    write_file(folder / MERGED, "".join(canonical_json(record) + "\n" for record in records).encode())
    return True


def _record_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("[0-9a-f]*.json")) if len(path.stem) == 16]


def _read_place(place: Path) -> Iterable[tuple[Path, Record]]:
    if place.is_dir():
        return ((path, read(path)) for path in _record_files(place))
    if not place.exists():
        raise ValueError(f"there are no results at {str(place)!r}; run `kinvert bench --out {place}` first")
    return ((place, _parse(line, place, number)) for number, line in enumerate(place.read_bytes().splitlines(), 1))


def _parse(line: bytes, path: Path, number: int) -> Record:
    try:
        record = parse_result(line)
        check_record(record)
    except ValueError as error:
        raise ValueError(
            f"line {number} of {path} is no result, {error}; a file must have a record on each line, as {MERGED} has"
        ) from error
    return record


# -- the form of a record ----------------------------------------------------------------------------------------------
_CELL: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        ("model", "question", "method", "sampler", "schedule", "dtype"), lambda name: isinstance(name, str)
    ),
    **dict.fromkeys(("steps", "seed", "count"), is_integer),
    "cfg": is_number,
    "options": lambda value: isinstance(value, dict),
}
_PAIRS = {"trajectory": ("sigma", "error"), "residuals": ("sigma", "error"), "spectrum": ("frequency", "power")}


def check_record(record: Any) -> None:
    """Raise ValueError if something that a report needs is missing in a record, is cut short or of another type."""
    try:
        cell, count = record["cell"], record["cell"]["count"]
        for name, fits in _CELL.items():
            _demand(fits(cell[name]), f"the setting {name} of its cell is {cell[name]!r}")
        _demand(record["key"] == content_key(cell), "its key is not that of its cell")
        _demand(all(isinstance(version, str) for version in record["versions"].values()), "its versions are no text")
        for name, values in record["metrics"].items():
            _demand(_is_list(values, count), f"its metric {name} is no list of {count} numbers")
        if record["error"] is None:
            for name in ("inversion_evaluations", "sampling_evaluations"):
                _demand(_is_list(record[name], count), f"its {name} are no list of {count} numbers")
        else:
            _demand(isinstance(record["error"], str), "its error is no text")
        claims = record["converged"]
        _demand(claims is None or (_is_list(claims, count, bool)), f"converged is no list of {count} truth values")
        latent = record["latent"] or {"histogram": {"edges": [0.0], "counts": []}, "spectrum": None}
        for name, pair in _PAIRS.items():
            curve = (latent if name == "spectrum" else record)[name]
            _demand(curve is None or _fits(curve[pair[0]], curve[pair[1]]), f"the lists of its {name} do not fit")
        edges, counts = (latent["histogram"][name] for name in ("edges", "counts"))
        _demand(_is_list(edges, len(counts) + 1) and _is_list(counts, len(edges) - 1), "its histogram is cut short")
    except KeyError as error:
        raise ValueError(f"it has no {error.args[0]}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"something in it is of the wrong type ({error})") from error


def _demand(true: bool, complaint: str) -> None:
    if not true:
        raise ValueError(complaint)


def _is_list(values: Any, length: int, kind: type = float) -> bool:
    fits = is_number if kind is float else lambda value: isinstance(value, kind)
    return isinstance(values, list) and len(values) == length and all(map(fits, values))


def _fits(a: Any, b: Any) -> bool:
    return _is_list(a, len(b)) and _is_list(b, len(a))


# -- comparing ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Difference:
    """One difference between two results of the same cell.

    Attributes:
        cell: the settings of the cell.
        what: the name of the metric, or another key of the record.
        a, b: the medians of the metric over the samples, or the values of the key.
    """

    cell: dict[str, Any]
    what: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Comparison:
    """The outcome of a comparison of two sets of results.

    Attributes:
        equal: number of cells with the same result in both.
        only_a, only_b: settings of the cells that only one of them has.
        differences: the differences in the other cells.
        versions: versions and machines that differ: name -> (values in a, values in b).
    """

    equal: int
    only_a: list[dict[str, Any]]
    only_b: list[dict[str, Any]]
    differences: list[Difference]
    versions: dict[str, tuple[str, str]]

    @property
    def same(self) -> bool:
        """Tell whether both have the same cells with the same results."""
        return not (self.only_a or self.only_b or self.differences)


def compare(a: Path | str, b: Path | str, *, rtol: float = 0.0) -> Comparison:
    """Compare two folders of results, or `results.jsonl` files, cell by cell.

    Args:
        a, b: folders or files, as `load` takes them.
        rtol: relative difference up to which two numbers count as equal; 0 wants them identical. Different versions are
            reported apart and do not count as a difference.

    Raises:
        ValueError: as `load`; rtol is negative or not a number.
    """
    if not (is_number(rtol) and rtol >= 0):
        raise ValueError(f"rtol must be a number >= 0, got {rtol!r}")
    left, right = ({record["key"]: record for record in load(place)} for place in (a, b))
    common = sorted(left.keys() & right.keys())
    differences = [d for key in common for d in _differences(left[key], right[key], rtol)]
    return Comparison(
        equal=len(common) - len({canonical_json(d.cell) for d in differences}),
        only_a=[left[key]["cell"] for key in sorted(left.keys() - right.keys())],
        only_b=[right[key]["cell"] for key in sorted(right.keys() - left.keys())],
        differences=differences,
        versions=_different_versions(left.values(), right.values()),
    )


def _differences(a: Record, b: Record, rtol: float) -> Iterable[Difference]:
    for key in sorted((measured(a).keys() | measured(b).keys()) - {"key", "cell", "versions", "metrics"}):
        if not _close(a.get(key), b.get(key), rtol):
            yield Difference(a["cell"], key, a.get(key), b.get(key))
    for name in sorted(a["metrics"].keys() | b["metrics"].keys()):
        values = a["metrics"].get(name), b["metrics"].get(name)
        if not _close(*values, rtol):
            yield Difference(a["cell"], name, *(None if v is None else statistics.median(v) for v in values))


def _close(a: Any, b: Any, rtol: float) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[key], b[key], rtol) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_close(p, q, rtol) for p, q in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=rtol) or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


def _different_versions(a: Iterable[Record], b: Iterable[Record]) -> dict[str, tuple[str, str]]:
    left, right = _collect_versions(a), _collect_versions(b)
    pairs = {name: (left.get(name, "-"), right.get(name, "-")) for name in sorted(left.keys() | right.keys())}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _collect_versions(records: Iterable[Record]) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for record in records:
        for name, version in record.get("versions", {}).items():
            found.setdefault(name, set()).add(version)
    return {name: ", ".join(sorted(versions)) for name, versions in found.items()}
