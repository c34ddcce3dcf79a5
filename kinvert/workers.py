"""Processes of this machine that share out tasks, and what is said of those that die.

Each worker keeps notes in a file of its own, because a pipe would break if it is killed: which task it has begun,
which it has done, and which failed and why. A worker that dies costs the task that it was doing; another one goes on
with the rest of its share.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm.auto import tqdm

from kinvert.files import is_without_room
from kinvert.stops import holding_ctrl_c
from kinvert.tasks import Failure, Task, do_tasks, import_modules, is_done

__all__ = ["do_in_processes", "serve"]

PAUSE = 0.2  # seconds between two looks at the workers
PATIENCE = 5.0  # seconds that a worker has to end when it is told to
FULL = 74  # exit status of a worker that found no room on the disk; EX_IOERR of sysexits.h
DEATHS = 3  # in a row, after which nobody goes on with a share


def do_in_processes(
    tasks: Sequence[Task],
    folder: Path,
    *,
    workers: int,
    threads: int,
    imports: Sequence[str],
    bar: tqdm[None],
) -> list[Failure]:
    """Do tasks in `workers` processes, and return which failed and why.

    Args:
        tasks: what to do, nothing of it done yet.
        folder: where their results go.
        workers: number of processes.
        threads: torch's threads in each.
        imports: modules that each imports first.
        bar: is moved on as results appear.

    Raises:
        OSError: a worker found no room on the disk; the others are ended too.
    """
    left = {task.key for task in tasks}
    with TemporaryDirectory(prefix="kinvert-") as notes:
        shares = [tasks[r::workers] for r in range(min(workers, len(tasks)))]
        crew = [_Worker(share, folder, threads, tuple(imports), Path(notes) / str(r)) for r, share in enumerate(shares)]
        try:
            for worker in crew:
                worker.start()
            busy = True
            while busy:
                time.sleep(PAUSE)
                busy = sum(worker.goes_on() for worker in crew) > 0
                found = {key for key in left if is_done(folder, key)}
                left -= found
                bar.update(len(found))
        finally:
            for worker in crew:
                worker.end()
    return [failure for worker in crew for failure in worker.failures]


@dataclass(eq=False)
class _Worker:
    """A share of the tasks, and the process that does it.

    Attributes:
        share: the tasks that no process has begun, but for those of the process that runs.
        folder, threads, imports: as in `do_in_processes`.
        notes: path of its notes, without a suffix.
        failures: what failed so far.
        deaths: processes that died one after the other, with no task done between.
    """

    share: Sequence[Task]
    folder: Path
    threads: int
    imports: tuple[str, ...]
    notes: Path
    failures: list[Failure] = field(default_factory=list)
    deaths: int = 0
    process: BaseProcess | None = None

    def start(self) -> None:
        """Start a process for the share."""
        arguments = (self.share, self.folder, self.imports, self.threads, self.notes)
        self.process = multiprocessing.get_context("spawn").Process(target=serve, args=arguments)
        with holding_ctrl_c():
            self.process.start()

    def goes_on(self) -> bool:
        """Tell whether work is going on; take down what an ended process left, and start another one if it died."""
        if self.process is None or self.process.is_alive():
            return self.process is not None
        status, self.process = self.process.exitcode, None
        events = [json.loads(line) for line in self._read(".jsonl").splitlines() if line.endswith("]")]
        self.failures += [Failure(str(self.share[i]), why, where) for kind, i, why, where in events if kind == "failed"]
        if events and events[-1][0] == "ended":
            return False
        if status == FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._bury(_end_in_words(status or 0), events)
        if self.share:
            self.start()
        return bool(self.share)

    def _bury(self, how: str, events: list[list[Any]]) -> None:
        """Say what the dead process was doing, and keep what is left of the share."""
        kind, index, why, _ = events[-1] if events else ("", 0, how, "")
        if kind in ("begun", "done", "failed"):
            died_at_once = kind == "begun" and index == 0
            self.deaths = self.deaths + 1 if died_at_once else 0
            if kind == "begun":
                self.failures.append(Failure(str(self.share[index]), how, self._read(".fault").strip()))
            self.share = self.share[index + 1 :]
            if self.deaths < DEATHS:
                return
            why = f"not tried, because {DEATHS} processes died at the tasks before it"
        self.failures += [Failure(str(task), why, self._read(".fault").strip()) for task in self.share]
        self.share = ()

    def end(self) -> None:
        """End the process, if it is there."""
        if self.process is None or self.process.pid is None:
            return
        self.process.terminate()
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _read(self, suffix: str) -> str:
        with suppress(FileNotFoundError):
            return self.notes.with_suffix(suffix).read_text(errors="replace")
        return ""


def serve(tasks: Sequence[Task], folder: Path, imports: Sequence[str], threads: int, notes: Path) -> None:
    """Do tasks in a process of their own, and keep notes; end with status `FULL` if there is no room on the disk."""
    try:
        _serve(tasks, folder, imports, threads, notes)
    except Exception as error:
        if not is_without_room(error):
            raise
        sys.exit(FULL)


def _serve(tasks: Sequence[Task], folder: Path, imports: Sequence[str], threads: int, notes: Path) -> None:
    with notes.with_suffix(".jsonl").open("w", buffering=1) as file, notes.with_suffix(".fault").open("w") as faults:
        faulthandler.enable(faults, all_threads=False)

        def note(kind: str, index: int = 0, why: str = "", where: str = "") -> None:
            file.write(json.dumps([kind, index, why, where]) + "\n")

        try:
            import_modules(imports)
        except ValueError as error:
            note("refused", why=str(error))
            return
        for index, failure in enumerate(do_tasks(tasks, folder, threads, begun=lambda index: note("begun", index))):
            if failure is None:
                note("done", index)
            else:
                note("failed", index, failure.why, failure.where)
        note("ended")


def _end_in_words(status: int) -> str:
    """Say how a process ended."""
    if status >= 0:
        return f"it ended its process, with exit status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return f"its process was killed by {name}" + (", as by a system without memory" if name == "SIGKILL" else "")
