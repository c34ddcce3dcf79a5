"""Share out tasks to processes, with the files that they leave as the only state.

A task that has left its file is done and never computed again. A run that was stopped, or lost a worker, therefore goes
on where it was when the same command is given again. Process r of n takes every n-th task from the r-th on:

* `workers` processes on this machine, started here;
* under `torchrun`, the processes that it started (`RANK` of `WORLD_SIZE`), on any number of machines with a common
  folder; they do not talk to each other;
* the jobs of a Slurm array, by `submit`.

Tasks depend on nothing but themselves, so results do not depend on the number of processes, as long as every process
computes with the same number of threads: rounding depends on it. The caller chooses that number. If the caller does
not, a single process leaves torch's threads as they are, and `workers` share them: they do not fight over the cores.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from kinvert.checks import is_integer
from kinvert.files import is_without_room, make_folder, remove_leftovers
from kinvert.stops import keeping, raising_stops
from kinvert.tasks import (
    Failure,
    Task,
    UnfinishedError,
    complaint,
    computing_with,
    do_tasks,
    import_modules,
    is_done,
    undone,
)
from kinvert.workers import do_in_processes

__all__ = ["Task", "UnfinishedError", "computing_with", "import_modules", "is_done", "kept_in", "run_tasks", "submit"]


def run_tasks(
    tasks: Sequence[Task],
    folder: Path,
    *,
    workers: int = 1,
    threads: int | None = None,
    imports: Sequence[str] = (),
    progress: bool = False,
    unit: str = "cell",
) -> None:
    """Do the tasks that are not done yet. A result that is damaged is not done: it is told of, and computed again.

    Ctrl-C raises `Stopped`, a KeyboardInterrupt that says how many are kept.

    Args:
        tasks: what to do.
        folder: where the results are and go.
        workers: number of processes on this machine; must be 1 under torchrun.
        threads: torch's threads in each process. None leaves them as they are if workers is 1, and otherwise gives each
            worker its share of them, at least one. A task may still choose for itself.
        imports: modules that register what the tasks need, imported in every process.
        progress: show a bar with the time left, on stderr.
        unit: what a task is called.

    Raises:
        ValueError: workers is not a positive int, or more than 1 under torchrun; the folder cannot be written.
        UnfinishedError: tasks failed, or processes ended early; no room is left on the disk, with what is kept.

    Warns:
        RuntimeWarning: damaged results.
    """
    rank, world = _place_in_group()
    if not is_integer(workers) or workers < 1:
        raise ValueError(f"workers must be a positive int, got {workers!r}")
    if workers > 1 and world > 1:
        raise ValueError(f"workers must be 1 under torchrun, which started {world} processes, got {workers}")
    try:
        make_folder(folder)
    except OSError as error:
        raise ValueError(f"cannot write to {str(folder)!r}: {error.strerror}; choose another folder") from error
    import_modules(imports)

    # Shares go by position, not by what is left: the other processes may have begun already.
    mine, shown = tasks[rank::world], progress and rank == 0
    with raising_stops(signal.SIGINT), kept_in(folder, tasks, unit):
        left = undone(mine, folder)
        with tqdm(total=len(mine), initial=len(mine) - len(left), unit=unit, disable=None if shown else True) as bar:
            if workers > 1:
                # The share of threads does not depend on what is left, so that a resumed run has the same number.
                each = threads or max(1, torch.get_num_threads() // workers)
                failures = do_in_processes(left, folder, workers=workers, threads=each, imports=imports, bar=bar)
            else:
                failures = _do_here(left, folder, threads, bar)
    if failures:
        raise UnfinishedError(complaint(failures, len(tasks)))


@contextmanager
def kept_in(folder: Path, tasks: Sequence[Task], unit: str) -> Iterator[None]:
    """Let a stop and a full disk in this context say how many results are kept, and delete what killed processes left.

    Raises:
        Stopped: for a KeyboardInterrupt.
        UnfinishedError: no room is left on the disk.
    """

    def kept() -> str:
        found = sum(is_done(folder, task.key) for task in tasks)
        return f"{found} of {len(tasks)} {unit}s are kept in {folder}; the same command goes on"

    remove_leftovers(folder)
    try:
        with keeping(kept):
            yield
    except Exception as error:
        if not is_without_room(error):
            raise
        raise UnfinishedError(f"no room is left on the disk: {kept()} once there is some ({error})") from error
    finally:
        remove_leftovers(folder)


def submit(
    tasks: Sequence[Task],
    folder: Path,
    *,
    workers: int,
    threads: int | None = None,
    imports: Sequence[str] = (),
    cluster: str | None = None,
    **parameters: Any,
) -> list[Any]:
    """Submit the tasks to Slurm as an array of `workers` jobs.

    Args:
        tasks, folder, imports: as in `run_tasks`; the folder must be common to all machines.
        workers: number of jobs.
        threads: torch's threads in each job; None leaves what they are on its machine, e.g. all cores of the job.
        cluster: None for Slurm if this machine has it; "local" for processes on this machine.
        **parameters: of `submitit.AutoExecutor.update_parameters`, e.g. `timeout_min=60, slurm_partition="gpu"`.

    Returns:
        The jobs of submitit, whose `result()` waits.

    Raises:
        ModuleNotFoundError: submitit is not installed.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "submitting needs submitit, which is not here: pip install 'kinvert[slurm]'"
        ) from error
    executor = submitit.AutoExecutor(folder=folder / "slurm", cluster=cluster)
    executor.update_parameters(name="kinvert", **parameters)
    jobs: list[Any] = executor.map_array(
        _serve,
        *zip(*((list(tasks[r::workers]), folder, tuple(imports), threads) for r in range(workers)), strict=True),
    )
    return jobs


def _place_in_group() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, as torchrun sets them."""
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise ValueError("the environment variables RANK and WORLD_SIZE must be ints, as torchrun sets them") from error
    if not 0 <= rank < world:
        raise ValueError(f"RANK={rank} and WORLD_SIZE={world} are no place in a group; unset both, or use torchrun")
    return rank, world


def _do_here(tasks: Sequence[Task], folder: Path, threads: int | None, bar: tqdm[Any]) -> list[Failure]:
    """Do tasks in this process, and return the failures."""
    failures = []
    for failure in do_tasks(tasks, folder, threads):
        failures += [] if failure is None else [failure]
        bar.update()
    return failures


def _serve(tasks: Sequence[Task], folder: Path, imports: Sequence[str], threads: int | None) -> None:
    """Do tasks in a job of Slurm, which ends with the failures as its message."""
    import_modules(imports)
    left = undone(tasks, folder)
    failures = [failure for failure in do_tasks(left, folder, threads) if failure is not None]
    if failures:
        sys.exit(complaint(failures, len(tasks)))
