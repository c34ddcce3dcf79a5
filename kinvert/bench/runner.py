"""Measure grids of cells, and keep the results in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save

from kinvert.bench import results
from kinvert.bench.grid import Cell, unique
from kinvert.bench.measurement import measure
from kinvert.bench.problems import is_built_in
from kinvert.checks import is_integer
from kinvert.jobs import is_done, kept_in, run_tasks, submit
from kinvert.resultfiles import DATA, check_data, write_result

__all__ = ["CellTask", "check_threads", "run", "submit_cells"]


@dataclass(frozen=True)
class CellTask:
    """The measurement of a cell, as a task."""

    cell: Cell

    @property
    def key(self) -> str:
        """The key of the cell."""
        return self.cell.key

    def run(self, folder: Path) -> None:
        """Measure, and write the arrays, then the record."""
        record, arrays = measure(self.cell)
        write_result(folder, self.key, record, save(arrays) if arrays else None)

    def check(self, folder: Path) -> None:
        """Raise ValueError if the record or its arrays are damaged."""
        record = results.read(folder / f"{self.key}.json")
        if DATA in record or (folder / f"{self.key}.safetensors").exists():
            check_data(folder / f"{self.key}.safetensors", record)

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
) -> results.Records:
    """Measure the cells that the folder does not have yet, and merge everything that it has into `results.jsonl`.

    Args:
        cells: e.g. a `Grid`, `preset("quick")` or the cells of `read_grid`.
        folder: each cell leaves `<key>.json` here (and images in `<key>.safetensors`).
        workers: processes on this machine; or run under `torchrun`. Modules that start processes need the guard
            `if __name__ == "__main__":`.
        threads: torch's threads in each process, for models of your own. None leaves torch's if there is one process,
            and shares them out among several workers. Models that come with kinvert take one.
        imports: modules that register samplers, methods or problems of your own.
        progress: show a bar with the time left.

    Returns:
        The records of these cells that are there, sorted by key: all of them, unless other processes of torchrun are
        not ready yet.

    Raises:
        ValueError: as `kinvert.jobs.run_tasks`.
        UnfinishedError: a cell failed, a worker ended early, or the disk is full. The same call again does what is
            left.

    Warns:
        RuntimeWarning: results in the folder that are damaged: of these cells, which are computed again, or of others.
            Their records are set aside as `<key>.json.damaged`.
    """
    folder, cells = Path(folder), unique(cells)
    check_threads(threads, cells)
    tasks = [CellTask(cell) for cell in cells]
    run_tasks(tasks, folder, workers=workers, threads=threads, imports=imports, progress=progress)
    keys = [task.key for task in tasks]
    with kept_in(folder, tasks, "cell"):
        results.merge(folder, keys)
    return results.Records(results.read(folder / f"{key}.json") for key in sorted(keys) if is_done(folder, key))


def submit_cells(
    cells: Iterable[Cell],
    folder: Path | str,
    *,
    workers: int,
    threads: int | None = None,
    imports: Sequence[str] = (),
    **parameters: Any,
) -> list[Any]:
    """Submit cells to Slurm, as `kinvert.jobs.submit` does.

    Once the jobs have ended, `run` with the same cells merges the results.
    """
    cells = unique(cells)
    check_threads(threads, cells)
    tasks = [CellTask(cell) for cell in cells]
    return submit(tasks, Path(folder), workers=workers, threads=threads, imports=imports, **parameters)


def check_threads(threads: int | None, cells: Iterable[Cell]) -> None:
    """Refuse a number of threads that no cell would be computed with.

    Raises:
        ValueError: `threads` is not a positive int; all models come with kinvert and take one thread.
    """
    if threads is None:
        return
    if not is_integer(threads) or threads < 1:
        raise ValueError(f"threads must be a positive int, or None to leave torch's, got {threads!r}")
    models = sorted({cell.model for cell in cells})
    if models and all(is_built_in(model) for model in models):
        raise ValueError(
            f"threads is for models of your own, got {threads} for {', '.join(models)}; what comes with kinvert is "
            "computed with one thread, so that records are equal to the byte: leave threads out"
        )
