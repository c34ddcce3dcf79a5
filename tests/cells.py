"""Small cells of the benchmark, which many tests measure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kinvert import bench
from kinvert.bench import Cell, Grid
from kinvert.jsontext import canonical_json
from kinvert.resultfiles import sealed

SMALL = {"model": "gaussian", "steps": 3, "count": 2}


def cells(**lists: Any) -> list[Cell]:
    return list(Grid(**SMALL | lists))


def measured(**settings: Any) -> dict[str, Any]:
    return bench.measure(Cell(**SMALL | settings))[0]


def rewrite(path: Path, change: Callable[[dict[str, Any]], object], seal: bool = True) -> None:
    """Change a record in its file; with a checksum that fits, unless told otherwise."""
    record = json.loads(path.read_text())
    change(record)
    path.write_text(canonical_json(sealed(record) if seal else record))
