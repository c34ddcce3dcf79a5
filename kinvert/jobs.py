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

import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from kinvert.checks import is_integer

__all__ = ["Task", "UnfinishedError", "computing_with", "import_modules", "is_done", "run_tasks", "submit"]


class Task(Protocol):
    """A piece of work. `str(task)` says what it is."""

    @property
    def key(self) -> str:
        """Its name, a hash of its content."""

    def run(self, folder: Path) -> None:
        """Do it, and leave `<key>.json` in the folder: whole, and after all other files."""


class UnfinishedError(RuntimeError):
    """Some tasks were not done; the message says which and why. The same run again does what is left."""


def is_done(folder: Path, key: str) -> bool:
    """Tell whether the task with that key has left its result in the folder."""
    return (folder / f"{key}.json").exists()


def import_modules(names: Iterable[str]) -> None:
    """Import modules that register samplers, methods or problems; the current folder is searched too.

    Raises:
        ValueError: a module cannot be imported.
    """
    if "" not in sys.path and str(Path.cwd()) not in sys.path:  # a console script does not look here
        sys.path.append(str(Path.cwd()))
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise ValueError(f"cannot import {name!r}: {type(error).__name__}: {error}") from error


@contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """Set torch's number of threads inside the `with` block, for operations in this process; None leaves it."""
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
        threads: torch's threads in each process. None leaves them as they are if workers is 1, and otherwise gives each
            worker its share of them, at least one. A task may still choose for itself.
        imports: modules that register what the tasks need, imported in every process.
        progress: show a bar with the time left, on stderr.

    Raises:
        ValueError: workers is not a positive int, or more than 1 under torchrun; the folder cannot be written.
        UnfinishedError: tasks failed, or processes ended early.
    """
    rank, world = _place_in_group()
    if not is_integer(workers) or workers < 1:
        raise ValueError(f"workers must be a positive int, got {workers!r}")
    if workers > 1 and world > 1:
        raise ValueError(f"workers must be 1 under torchrun, which started {world} processes, got {workers}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {str(folder)!r}: {error.strerror}; choose another folder") from error
    if workers > 1:
        _run_in_processes(tasks, folder, workers, threads, imports, progress)
        return
    # Shares go by position, not by what is left: the other processes may have begun already.
    failures = _work(tasks[rank::world], folder, imports, threads, progress and rank == 0)
    if failures:
        raise UnfinishedError(_complaint(failures, len(tasks)))


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
        _worker,
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


def _run_in_processes(
    tasks: Sequence[Task], folder: Path, workers: int, threads: int | None, imports: Sequence[str], progress: bool
) -> None:
    """Do what is left in `workers` processes of this machine."""
    left = [task for task in tasks if not is_done(folder, task.key)]
    context = multiprocessing.get_context("spawn")
    shares = [left[r::workers] for r in range(min(workers, len(left)))]
    # The share of threads does not depend on what is left, so that a resumed run computes with the same number.
    each = threads or max(1, torch.get_num_threads() // workers)
    processes = [context.Process(target=_worker, args=(share, folder, tuple(imports), each)) for share in shares]
    _wait(processes, tasks, folder, progress)
    failures = [f"{task}" for task in left if not is_done(folder, task.key)]
    if failures:
        ends = ", ".join(str(process.exitcode) for process in processes)
        raise UnfinishedError(_complaint(failures, len(tasks)) + f"\nexit codes of the workers: {ends}")


def _work(
    tasks: Sequence[Task], folder: Path, imports: Sequence[str], threads: int | None, progress: bool
) -> list[str]:
    """Do tasks in this process, and return which failed and why."""
    import_modules(imports)
    failures = []
    with computing_with(threads):
        done = {task.key for task in tasks if is_done(folder, task.key)}
        initial = sum(task.key in done for task in tasks)
        with tqdm(total=len(tasks), initial=initial, unit="cell", disable=None if progress else True) as bar:
            for task in tasks:
                if task.key in done:
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
    """Do tasks in a process of their own, which ends with the failures as its message."""
    failures = _work(tasks, folder, imports, threads, progress=False)
    if failures:
        sys.exit("\n".join(failures))


def _wait(processes: Sequence[BaseProcess], tasks: Sequence[Task], folder: Path, progress: bool) -> None:
    """Start the processes and count the files that they leave: a pipe would break if one of them is killed."""

    def done() -> int:
        return sum(is_done(folder, task.key) for task in tasks)

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
