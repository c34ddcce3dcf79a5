"""Read, merge and compare results: one JSON file for each cell, named by the cell's hash, complete or absent.

A folder of results is a set: to merge two, copy the files of one to the other. JSON has no infinite numbers; they are
written as the strings "inf", "-inf" and "nan", and read back as floats.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinvert.checks import is_number
from kinvert.files import write_file
from kinvert.jobs import is_done
from kinvert.jsontext import canonical_json, content_key, from_canonical_json
from kinvert.showing.brief import brief, never_fails
from kinvert.showing.html import card, html_never_fails, paragraph, table

__all__ = ["MERGED", "Comparison", "Difference", "Record", "Records", "compare", "load", "merge", "read"]

Record = dict[str, Any]
MERGED = "results.jsonl"
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
            if key in records and canonical_json(records[key]) != canonical_json(record):
                raise ValueError(
                    f"{origin[key]} and {path} have different results for one cell; load one of them, or see "
                    "`kinvert bench compare`"
                )
            records[key], origin[key] = record, path
    return Records(records[key] for key in sorted(records))


def read(path: Path) -> Record:
    """Read one result file.

    Raises:
        ValueError: the file is damaged, or holds the result of another cell than its name says.
    """
    fix = f"delete it, and the same `kinvert bench` computes it again: rm {path}"
    record = _parse(path.read_bytes(), path, fix)
    if record["key"] != path.stem:
        raise ValueError(f"{path} holds the result of another cell, {record['key']}; {fix}")
    return record


def merge(folder: Path, keys: Iterable[str]) -> bool:
    """Write `results.jsonl`, one line for each record of the folder, sorted by key, once all of `keys` are there.

    Returns:
        True if the file was written, False if a result is missing.
    """
    if not all(is_done(folder, key) for key in keys):
        return False
    write_file(folder / MERGED, "".join(canonical_json(record) + "\n" for record in load(folder)).encode())
    return True


def _read_place(place: Path) -> Iterable[tuple[Path, Record]]:
    if place.is_dir():
        return ((path, read(path)) for path in sorted(place.glob("[0-9a-f]*.json")) if len(path.stem) == 16)
    if not place.exists():
        raise ValueError(f"there are no results at {str(place)!r}; run `kinvert bench --out {place}` first")
    fix = "it must have a record on each line, as results.jsonl has"
    return ((place, _parse(line, place, fix)) for line in place.read_bytes().splitlines())


def _parse(content: bytes, path: Path, fix: str) -> Record:
    try:
        record = from_canonical_json(content)
        if not isinstance(record["cell"], dict) or not isinstance(record["metrics"], dict):
            raise TypeError("its cell and metrics are of the wrong type")
        if record["key"] != content_key(record["cell"]):
            raise ValueError("its key is not that of its cell")
        return dict(record)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result ({type(error).__name__}: {error}); {fix}") from error


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
    for key in sorted((a.keys() | b.keys()) - {"key", "cell", "versions", "metrics"}):
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
