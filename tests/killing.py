"""Jobs that leave files, killed at random moments and resumed: run as a program, which prints its counts as JSON.

Each attempt is a fork of this process, so that it begins at once: `kill -9` then strikes while it computes and writes,
and not while it loads PyTorch. A job is done when an attempt ends by itself; then its folder must have the same files as
that of a job that nobody disturbed, to the byte.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import scipy.stats  # noqa: F401 (of the metrics; an attempt would load it again)
from digits import write_digits

from kinvert import bench
from kinvert.bench import Cell, Grid
from kinvert.files import HIDDEN
from kinvert.folder import invert_folder

MOST = 4  # kills of one job, after which it is left alone
Job = Callable[[Path, int], object]


def measure(out: Path, workers: int) -> None:
    """Measure cells that leave images."""
    bench.run(
        Grid(model="digits", steps=[2, 3], count=2, seed=[0, 1], dtype="float32"),
        out,
        workers=workers,
    )


def invert(out: Path, workers: int) -> None:
    """Invert a folder, in three shards."""
    images = out.parent / "images"
    invert_folder(images, out, Cell("digits", steps=3, dtype="float32"), shard_size=2, workers=workers)


JOBS: dict[str, Job] = {"bench": measure, "invert": invert}


@dataclass
class Counts:
    """What happened."""

    repeats: int = 0
    kills: int = 0
    hidden: int = 0
    wrong: list[str] = field(default_factory=list)


def start(job: Job, out: Path, workers: int) -> int:
    """Begin an attempt, in a process group of its own."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    status = 1
    try:
        job(out, workers)
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def finish(pid: int, delay: float | None, whole_group: bool) -> int:
    """Kill an attempt after a time, or let it end; return its status, -9 if it was killed."""
    if delay is not None:
        time.sleep(delay)
        with suppress(ProcessLookupError):
            (os.killpg if whole_group else os.kill)(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def wait_for_orphans(groups: list[int]) -> None:
    """Wait for workers whose parent was killed: they end after the task that they are doing."""
    for group in groups:
        with suppress(ProcessLookupError):
            for _ in range(1200):
                os.killpg(group, 0)
                time.sleep(0.05)


def torture(job: Job, place: Path, repeats: int, workers: int, pair: bool, dice: random.Random) -> Counts:
    """Kill a job at random moments and resume it, many times over; `pair` has a second one beside it."""
    counts, undisturbed = Counts(), place / "undisturbed"
    begin = time.monotonic()
    if status := finish(start(job, undisturbed, workers), None, False):
        raise SystemExit(f"the undisturbed job ended with status {status}")
    lasts, expected = time.monotonic() - begin, content(undisturbed)
    for repeat in range(repeats):
        out, groups, status = place / str(repeat), list[int](), -1
        for attempt in range(MOST + 1):
            beside = start(job, out, workers) if pair else None
            groups.append(start(job, out, workers))
            delay = dice.uniform(0, lasts) if attempt < MOST else None
            status = finish(groups[-1], delay, dice.random() < 0.5)
            if beside is not None and finish(beside, None, False):
                counts.wrong.append(f"{repeat}: the process beside failed")
            counts.kills += status == -signal.SIGKILL
            counts.hidden += any(out.glob(f"{HIDDEN}*"))
            if status != -signal.SIGKILL:
                break
        wait_for_orphans(groups)
        counts.repeats += 1
        if status or (found := content(out)) != expected:
            differ = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
            counts.wrong.append(f"{repeat}: status {status}, {differ}")
    return counts


def main(name: str, repeats: str, workers: str, pair: str, seed: str) -> None:
    """Torture a job of `JOBS`."""
    with tempfile.TemporaryDirectory() as place:
        write_digits(Path(place) / "images")
        counts = torture(JOBS[name], Path(place), int(repeats), int(workers), pair == "pair", random.Random(int(seed)))
    print(json.dumps(vars(counts)))


if __name__ == "__main__":
    main(*sys.argv[1:])
