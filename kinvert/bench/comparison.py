"""Two sets of results, told apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinvert.bench.store import dumps, load
from kinvert.checks import is_number

Record = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """What differs in one cell.

    Attributes:
        cell: its settings.
        what: the name of the metric, or another key of the record.
        a, b: the medians of the metric over the samples, or the values of the key.
    """

    cell: dict[str, Any]
    what: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Comparison:
    """The outcome of a comparison.

    Attributes:
        equal: number of cells with the same result in both.
        only_a, only_b: settings of the cells that only one of them has.
        differences: what differs in the others.
        versions: versions and machines that differ: name -> (values in a, values in b).
    """

    equal: int
    only_a: list[dict[str, Any]]
    only_b: list[dict[str, Any]]
    differences: list[Difference]
    versions: dict[str, tuple[str, str]]

    @property
    def same(self) -> bool:
        """Whether both have the same cells with the same results."""
        return not (self.only_a or self.only_b or self.differences)


def compare(a: Path | str, b: Path | str, *, rtol: float = 0.0) -> Comparison:
    """Compare two folders of results, or `results.jsonl` files, cell by cell.

    Args:
        a, b: folders or files, as `load` takes them.
        rtol: relative difference up to which two numbers are the same; 0 wants them identical. Versions are reported
            apart and do not count as a difference.

    Raises:
        ValueError: as `load`; rtol that is negative or not a number.
    """
    if not (is_number(rtol) and rtol >= 0):
        raise ValueError(f"rtol must be a number >= 0, got {rtol!r}")
    left, right = ({record["key"]: record for record in load(place)} for place in (a, b))
    common = sorted(left.keys() & right.keys())
    differences = [d for key in common for d in _differences(left[key], right[key], rtol)]
    return Comparison(
        equal=len(common) - len({dumps(d.cell) for d in differences}),
        only_a=[left[key]["cell"] for key in sorted(left.keys() - right.keys())],
        only_b=[right[key]["cell"] for key in sorted(right.keys() - left.keys())],
        differences=differences,
        versions=_versions(left.values(), right.values()),
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


def _versions(a: Iterable[Record], b: Iterable[Record]) -> dict[str, tuple[str, str]]:
    def collected(records: Iterable[Record]) -> dict[str, str]:
        found: dict[str, set[str]] = {}
        for record in records:
            for name, version in record.get("versions", {}).items():
                found.setdefault(name, set()).add(version)
        return {name: ", ".join(sorted(versions)) for name, versions in found.items()}

    left, right = collected(a), collected(b)
    pairs = {name: (left.get(name, "-"), right.get(name, "-")) for name in sorted(left.keys() | right.keys())}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
