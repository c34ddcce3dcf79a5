"""Results on disk: one JSON file a cell, named by the cell's hash, complete or absent.

A folder of results is a set: to merge two, copy the files of one to the other. JSON has no infinite numbers; they are
written as the strings "inf", "-inf" and "nan", and read back as floats.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kinvert.files import write_file

NON_FINITE = {str(value): value for value in (math.inf, -math.inf, math.nan)}
MERGED = "results.jsonl"


def load(*places: Path | str) -> list[dict[str, Any]]:
    """The records of folders of results, and of `results.jsonl` files, sorted by key; the same cell is taken once.

    Raises:
        ValueError: a place that does not exist, a file that is damaged, with its name and what to do; two places with
            different results for one cell.
    """
    records: dict[str, dict[str, Any]] = {}
    origin: dict[str, Path] = {}
    for place in map(Path, places):
        for path, record in _read_place(place):
            key = record["key"]
            if key in records and dumps(records[key]) != dumps(record):
                raise ValueError(
                    f"{origin[key]} and {path} have different results for one cell; load one of them, or see "
                    "`kinvert bench compare`"
                )
            records[key], origin[key] = record, path
    return [records[key] for key in sorted(records)]


def is_done(folder: Path, key: str) -> bool:
    """Whether the result of a task is there."""
    return (folder / f"{key}.json").exists()


def read(path: Path) -> dict[str, Any]:
    """One result file.

    Raises:
        ValueError: a file that is damaged, or holds the result of another cell than its name says.
    """
    fix = f"delete it, and the same `kinvert bench` computes it again: rm {path}"
    record = _parse(path.read_bytes(), path, fix)
    if record["key"] != path.stem:
        raise ValueError(f"{path} holds the result of another cell, {record['key']}; {fix}")
    return record


def content_key(content: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the canonical JSON of `content`."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def dumps(record: Any) -> str:
    """Canonical JSON on one line: equal records give equal text."""
    return json.dumps(_encoded(record), sort_keys=True, separators=(",", ":"), allow_nan=False)


def merge(folder: Path, keys: Iterable[str]) -> bool:
    """Write `results.jsonl`, every record of the folder on a line, sorted by key, once all of `keys` are there."""
    if not all(is_done(folder, key) for key in keys):
        return False
    write_file(folder / MERGED, "".join(dumps(record) + "\n" for record in load(folder)).encode())
    return True


def _read_place(place: Path) -> Iterable[tuple[Path, dict[str, Any]]]:
    if place.is_dir():
        return ((path, read(path)) for path in sorted(place.glob("[0-9a-f]*.json")) if len(path.stem) == 16)
    if not place.exists():
        raise ValueError(f"there are no results at {str(place)!r}; run `kinvert bench --out {place}` first")
    fix = "it must have a record on each line, as results.jsonl has"
    return ((place, _parse(line, place, fix)) for line in place.read_bytes().splitlines())


def _parse(content: bytes, path: Path, fix: str) -> dict[str, Any]:
    try:
        record = _decoded(json.loads(content))
        if not isinstance(record["cell"], dict) or not isinstance(record["metrics"], dict):
            raise TypeError("its cell and metrics are of the wrong type")
        if record["key"] != content_key(record["cell"]):
            raise ValueError("its key is not that of its cell")
        return dict(record)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result ({type(error).__name__}: {error}); {fix}") from error


def _encoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encoded(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(member) for member in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decoded(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_decoded(member) for member in value]
    return NON_FINITE.get(value, value) if isinstance(value, str) else value
