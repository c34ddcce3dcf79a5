"""Grids of cells, run and kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save

from kinvert.bench import store
from kinvert.bench.grid import Cell, unique
from kinvert.bench.questions import check_threads
from kinvert.bench.record import measure
from kinvert.bench.tasks import run_tasks, submit
from kinvert.files import write_file


@dataclass(frozen=True)
class Measurement:
    """A cell as a task."""

    cell: Cell

    @property
    def key(self) -> str:
        """The cell's."""
        return self.cell.key

    def run(self, folder: Path) -> None:
        """Measure, and write the arrays, then the record."""
        record, arrays = measure(self.cell)
        if arrays:
            write_file(folder / f"{self.key}.safetensors", save(arrays))
        write_file(folder / f"{self.key}.json", (store.dumps(record) + "\n").encode())

    def __str__(self) -> str:
        return str(self.cell)


def run(
    cells: Iterable[Cell],
    folder: Path | str,
    *,
    workers: int = 1,
    threads: int | None = None,
    imports: Sequence[str] = (),
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Measure the cells that the folder does not have yet, and merge everything that it has into `results.jsonl`.

    Args:
        cells: e.g. a `Grid`, `preset("quick")` or the cells of `read_grid`.
        folder: where each cell leaves `<key>.json` (and images `<key>.safetensors`).
        workers: processes on this machine; or run under `torchrun`. Modules that start processes need the guard
            `if __name__ == "__main__":`.
        threads: torch's threads in each process, for models of your own; None leaves torch's where there is one
            process, and shares them out among the workers. Models that come with kinvert take one.
        imports: modules that register samplers, methods or problems of your own.
        progress: show a bar with the time left.

    Returns:
        The records of these cells that are there, sorted by key: all of them, unless other processes of torchrun are
        not ready yet.

    Raises:
        ValueError: as `run_tasks`; a damaged file in the folder.
        UnfinishedError: a cell failed, or a worker ended early. The same call again does what is left.
    """
    folder, cells = Path(folder), unique(cells)
    check_threads(threads, cells)
    tasks = [Measurement(cell) for cell in cells]
    run_tasks(tasks, folder, workers=workers, threads=threads, imports=imports, progress=progress)
    keys = [task.key for task in tasks]
    store.merge(folder, keys)
    return [store.read(folder / f"{key}.json") for key in sorted(keys) if store.is_done(folder, key)]


def submit_cells(
    cells: Iterable[Cell],
    folder: Path | str,
    *,
    workers: int,
    threads: int | None = None,
    imports: Sequence[str] = (),
    **parameters: Any,
) -> list[Any]:
    """Submit cells to Slurm; see `submit`. `run` with the same cells merges the results once the jobs have ended."""
    cells = unique(cells)
    check_threads(threads, cells)
    tasks = [Measurement(cell) for cell in cells]
    return submit(tasks, Path(folder), workers=workers, threads=threads, imports=imports, **parameters)
