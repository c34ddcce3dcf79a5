"""Small cells of the benchmark, which many tests measure."""

from __future__ import annotations

from typing import Any

from kinvert import bench
from kinvert.bench import Cell, Grid

SMALL = {"model": "gaussian", "steps": 3, "count": 2}


def cells(**lists: Any) -> list[Cell]:
    return list(Grid(**SMALL | lists))


def measured(**settings: Any) -> dict[str, Any]:
    return bench.measure(Cell(**SMALL | settings))[0]
