"""Tasks shared out to processes, with the files that they leave as the only state.

A task that has left its file is done and never computed again, so a run that was stopped, or lost a worker, goes on
where it was when the same command is given again. Process r of n takes every n-th task from the r-th on:

* `workers` processes on this machine, started here;
* under `torchrun`, the processes that it started (`RANK` of `WORLD_SIZE`), on any number of machines with a common
  folder; they do not talk to each other;
* the jobs of a Slurm array, by `submit`.

Tasks depend on nothing but themselves, so results do not depend on the number of processes, as long as every process
computes with the same number of threads: rounding depends on it. It is the caller's choice. Without one a single
process leaves torch's threads as they are, and `workers` share them, so that they do not fight over the cores.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from kinvert.bench import store
from kinvert.bench.grid import import_modules
from kinvert.checks import is_integer


class Task(Protocol):
    """A piece of work. `str(task)` says what it is."""

    @property
    def key(self) -> str:
        """Its name, a hash of its content."""

    def run(self, folder: Path) -> None:
        """Do it, and leave `<key>.json` in the folder, last and at once."""


class UnfinishedError(RuntimeError):
    """Some tasks were not done; the message says which and why. The same run again does what is left."""


@contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """Set torch's number of threads for a while, for operations in this process; None leaves it."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads is not None:
            torch.set_num_threads(before)


def run_tasks(
    tasks: Sequence[Task],
    folder: Path,
    *,
    workers: int = 1,
    threads: int | None = None,
    imports: Sequence[str] = (),
    progress: bool = False,
) -> None:
    """Do the tasks that are not done yet.

    Args:
        tasks: what to do.
        folder: where the results are and go.
        workers: number of processes on this machine; must be 1 under torchrun.
        threads: torch's threads in each process; None leaves them as they are where workers is 1, and gives each of
            several workers its share, at least one. A task may still choose for itself.
        imports: modules that register what the tasks need, imported in every process.
        progress: show a bar with the time left, on stderr.

    Raises:
        ValueError: workers that cannot be; a folder that cannot be written.
        UnfinishedError: tasks failed, or processes ended early.
    """
    rank, world = _place()
    if not is_integer(workers) or workers < 1:
        raise ValueError(f"workers must be a positive int, got {workers!r}")
    if workers > 1 and world > 1:
        raise ValueError(f"workers must be 1 under torchrun, which started {world} processes, got {workers}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {str(folder)!r}: {error.strerror}; choose another folder") from error
    if workers == 1:  # by position, not by what is left: the others may have begun
        failures = _work(tasks[rank::world], folder, imports, threads, progress and rank == 0)
        if failures:
            raise UnfinishedError(_complaint(failures, len(tasks)))
        return
    left = [task for task in tasks if not store.is_done(folder, task.key)]
    context = multiprocessing.get_context("spawn")
    shares = [left[r::workers] for r in range(min(workers, len(left)))]
    each = threads or max(1, torch.get_num_threads() // workers)  # not of what is left: a resumed run has the same
    processes = [context.Process(target=_worker, args=(share, folder, tuple(imports), each)) for share in shares]
    _wait(processes, tasks, folder, progress)
    failures = [f"{task}" for task in left if not store.is_done(folder, task.key)]
    if failures:
        ends = ", ".join(str(process.exitcode) for process in processes)
        raise UnfinishedError(_complaint(failures, len(tasks)) + f"\nexit codes of the workers: {ends}")


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
        cluster: None for Slurm where there is one; "local" for processes on this machine.
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
        _worker,
        *zip(*((list(tasks[r::workers]), folder, tuple(imports), threads) for r in range(workers)), strict=True),
    )
    return jobs


def _place() -> tuple[int, int]:
    """This process and the number of them, as torchrun tells."""
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise ValueError("the environment variables RANK and WORLD_SIZE must be ints, as torchrun sets them") from error
    if not 0 <= rank < world:
        raise ValueError(f"RANK={rank} and WORLD_SIZE={world} are no place in a group; unset both, or use torchrun")
    return rank, world


def _work(
    tasks: Sequence[Task], folder: Path, imports: Sequence[str], threads: int | None, progress: bool
) -> list[str]:
    """Do tasks in this process; returns what failed and why."""
    import_modules(imports)
    failures = []
    with computing_with(threads):
        done = [task for task in tasks if store.is_done(folder, task.key)]
        skip = {task.key for task in done}
        with tqdm(total=len(tasks), initial=len(done), unit="cell", disable=None if progress else True) as bar:
            for task in tasks:
                if task.key in skip:
                    continue
                if (parent := multiprocessing.parent_process()) is not None and not parent.is_alive():
                    break  # nobody waits any more, and another run may have begun
                try:
                    task.run(folder)
                except Exception as error:  # the others can still be done
                    failures.append(f"{task}: {type(error).__name__}: {error}")
                bar.update()
    return failures


def _worker(tasks: Sequence[Task], folder: Path, imports: Sequence[str], threads: int | None) -> None:
    """A process of its own."""
    failures = _work(tasks, folder, imports, threads, progress=False)
    if failures:
        sys.exit("\n".join(failures))


def _wait(processes: Sequence[BaseProcess], tasks: Sequence[Task], folder: Path, progress: bool) -> None:
    """Start the processes and watch the files that they leave; a pipe could be broken by one that is killed."""

    def done() -> int:
        return sum(store.is_done(folder, task.key) for task in tasks)

    try:
        for process in processes:
            process.start()
        with tqdm(total=len(tasks), initial=done(), unit="cell", disable=None if progress else True) as bar:
            while any(process.is_alive() for process in processes):
                time.sleep(0.2)
                bar.update(done() - bar.n)
            bar.update(done() - bar.n)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            if process.pid is not None:
                process.join()


def _complaint(failures: Sequence[str], total: int) -> str:
    shown = "\n".join(f"  {failure}" for failure in failures[:10])
    more = f"\n  and {len(failures) - 10} more" if len(failures) > 10 else ""
    return f"{len(failures)} of {total} are not done; the same command again does what is left:\n{shown}{more}"
