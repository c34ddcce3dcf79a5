"""Tasks whose results are files: what one is, and how it is done in this process."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from kinvert.files import is_without_room
from kinvert.resultfiles import set_aside
from kinvert.telling import warn_user

__all__ = [
    "Failure",
    "Task",
    "UnfinishedError",
    "complaint",
    "computing_with",
    "do_tasks",
    "import_modules",
    "is_done",
    "tell_of_damage",
    "undone",
]

SHOWN = 10  # failures in a message
FRAMES = 6  # lines of a traceback in a message


class Task(Protocol):
    """A piece of work. `str(task)` says what it is."""

    @property
    def key(self) -> str:
        """Its name, a hash of its content."""

    def run(self, folder: Path) -> None:
        """Do it, and leave `<key>.json` in the folder: whole, and after all other files."""

    def check(self, folder: Path) -> None:
        """Raise ValueError if the result that it left in the folder is not whole, with the reason."""


class UnfinishedError(RuntimeError):
    """Some tasks were not done; the message says which and why. The same run again does what is left."""


@dataclass(frozen=True)
class Failure:
    """A task that was not done.

    Attributes:
        task: what it is.
        why: what happened.
        where: the innermost lines of code that ran, one a line; empty if nobody knows.
    """

    task: str
    why: str
    where: str = ""


def is_done(folder: Path, key: str) -> bool:
    """Tell whether the task with that key has left its result in the folder."""
    return (folder / f"{key}.json").exists()


def undone(tasks: Iterable[Task], folder: Path) -> list[Task]:
    """Return the tasks whose results are not there, or are damaged; tell of those, and set their records aside.

    Warns:
        RuntimeWarning: results that are damaged.
    """
    left, damaged = [], []
    for task in tasks:
        path = folder / f"{task.key}.json"
        if path.exists():
            try:
                task.check(folder)
                continue
            except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
                damaged.append(f"{task}: {error}; see {set_aside(path)}")
        left.append(task)
    tell_of_damage(damaged, "and computed again")
    return left


def tell_of_damage(damaged: Sequence[str], what: str) -> None:
    """Tell which results were damaged, and `what` happens to them."""
    if damaged:
        are = "damaged result is" if len(damaged) == 1 else "damaged results are"
        lines = [f"{len(damaged)} {are} set aside, {what}:", *damaged[:SHOWN]]
        lines += [f"and {len(damaged) - SHOWN} more"] * (len(damaged) > SHOWN)
        warn_user("\n  ".join(lines))


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
    """Set torch's number of threads inside the `with` block, for operations in this process; None leaves it.

    The number is set back, also if something else changed it.
    """
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def do_tasks(
    tasks: Sequence[Task], folder: Path, threads: int | None, begun: Callable[[int], None] = lambda index: None
) -> Iterator[Failure | None]:
    """Do tasks in this process, one after the other, and yield for each its failure or None.

    Args:
        tasks: what to do.
        folder: where their results go.
        threads: as in `computing_with`.
        begun: is told the index of each task before it is done.

    Raises:
        Exception: a task found no room on the disk, see `kinvert.files.is_without_room`: nothing else can be done.
    """
    with computing_with(threads):
        for index, task in enumerate(tasks):
            if (parent := multiprocessing.parent_process()) is not None and not parent.is_alive():
                return  # nobody waits any more, and another run may have begun
            if is_done(folder, task.key) and not undone([task], folder):  # by another run in the same folder
                yield None
                continue
            begun(index)
            try:
                task.run(folder)
            except (Exception, SystemExit) as error:  # the others can still be done
                if is_without_room(error):
                    raise
                why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                yield Failure(str(task), why, _lines_of(error.__traceback__))
            else:
                yield None


def _lines_of(trace: TracebackType | None) -> str:
    """Return the innermost lines of a traceback, the last call last."""
    frames = traceback.extract_tb(trace)[-FRAMES:]
    return "\n".join(f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames)


def complaint(failures: Sequence[Failure], total: int) -> str:
    """Return the message about tasks that were not done, with the lines of code of the first."""
    lines = [f"{len(failures)} of {total} are not done; the same command again does what is left:"]
    lines += [f"  {failure.task}: {failure.why}" for failure in failures[:SHOWN]]
    if len(failures) > SHOWN:
        lines.append(f"  and {len(failures) - SHOWN} more")
    known = [failure for failure in failures if failure.where]
    if known:
        lines.append(f"where it happened in {known[0].task}:")
        lines += [f"  {line}" for line in known[0].where.splitlines()]
    return "\n".join(lines)
