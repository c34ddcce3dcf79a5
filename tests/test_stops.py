"""Ctrl-C and SIGTERM: a sentence that says what is kept, the right status, and no traceback."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import cells

from kinvert import bench, stops
from kinvert.bench import METHODS, Setup
from kinvert.stops import Stopped, holding_ctrl_c, is_command, keeping, raising_stops

ROOT = Path(__file__).parent.parent
SLOW = """
import time
from dataclasses import replace
from pathlib import Path
from kinvert.bench.problems import PROBLEMS

def slow(count, seed, dtype):
    if seed >= 2:
        (Path(__file__).parent / f"waits-{seed}").touch()
        time.sleep(600)
    return replace(PROBLEMS["gaussian"](count, seed, dtype), exact=False)
"""


def until(true: Callable[[], object]) -> None:
    """Wait until something is true, at most for two minutes."""
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a module, whose model waits from seed 2 on, and a grid."""
    (tmp_path / "own.py").write_text(SLOW)
    (tmp_path / "grid.toml").write_text("model = 'own:slow'\nseed = [0, 1, 2, 3]\nsteps = 2\ncount = 2\n")
    return tmp_path


class Command:
    """`python -m kinvert` in a terminal of its own: what it prints, and its process group."""

    def __init__(self, place: Path, *args: str, path: Path | None = None) -> None:
        ours, theirs = pty.openpty()
        search = os.pathsep.join(map(str, [*([path] if path else []), place, ROOT]))
        environment = os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        command = [sys.executable, "-m", "kinvert", *args]
        self.process = subprocess.Popen(
            command, cwd=place, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        self.terminal = ours

    def send(self, number: int) -> tuple[int, str]:
        """Send a signal to the group, as a terminal does, and return the status and the output."""
        os.killpg(self.process.pid, number)
        status, said = self.process.wait(120), b""
        while chunk := self._read():
            said += chunk
        os.close(self.terminal)
        return status, " ".join(said.decode().split())

    def _read(self) -> bytes:
        try:
            return os.read(self.terminal, 65536)
        except OSError:  # the terminal is closed
            return b""

    def children(self) -> list[int]:
        """The processes that it started."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(word) for word in path.read_text().split()] if path.exists() else []


def waits(place: Path, *seeds: int) -> bool:
    return all((place / f"waits-{seed}").exists() for seed in seeds)


@pytest.mark.parametrize(
    ("workers", "number", "status"), [(1, signal.SIGINT, 130), (2, signal.SIGINT, 130), (1, signal.SIGTERM, 143)]
)
def test_a_stopped_benchmark_says_what_it_keeps(place: Path, workers: int, number: int, status: int) -> None:
    """Two of four cells are done: one by each worker, and the third and the fourth wait."""
    command = Command(place, "bench", "grid.toml", "--out", "out", "--workers", str(workers))
    until(lambda: waits(place, *range(2, 2 + workers)))
    got, said = command.send(number)
    assert "Stopped: 2 of 4 cells are kept in out; the same command goes on." in said
    assert "Traceback" not in said and "Aborted" not in said and got == status
    assert len(list((place / "out").glob("*.json"))) == 2


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are counted in /proc")
def test_workers_that_still_load_pytorch_print_no_traceback(place: Path) -> None:
    command = Command(place, "bench", "grid.toml", "--out", "out", "--workers", "2")
    until(lambda: len(command.children()) == 3)  # two, and the tracker of resources
    children = command.children()
    got, said = command.send(signal.SIGINT)
    assert said.removeprefix("^C").endswith("Stopped: 0 of 4 cells are kept in out; the same command goes on.")
    assert "Traceback" not in said and got == 130
    until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_waits_until_a_process_is_started_whichever_thread_is_sent_it(number: int) -> None:
    end, reached = threading.Event(), []
    other = threading.Thread(target=end.wait)
    other.start()
    before = signal.getsignal(number)
    try:
        with raising_stops(signal.SIGINT, signal.SIGTERM), pytest.raises(Stopped) as stop, holding_ctrl_c():
            signal.pthread_kill(other.ident, number)  # type: ignore[arg-type]
            time.sleep(0.1)
            reached.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    finally:
        end.set()
        other.join()
    assert stop.value.number == number and signal.SIGINT in reached[0]
    assert signal.getsignal(number) is before and signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_while_pytorch_is_loaded(tmp_path: Path, number: int, status: int) -> None:
    stand_in = tmp_path / "stand_in" / "torch"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").write_text(
        "import pathlib, time\npathlib.Path(__file__).with_name('loads').touch()\ntime.sleep(600)\n"
    )
    command = Command(tmp_path, "samplers", path=stand_in.parent)
    until((stand_in / "loads").exists)
    assert command.send(number) == (
        status,
        "Stopped: nothing was done yet. What earlier runs left is as it was.",
    )


def test_an_interrupted_inversion_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`invert` alone returns its best so far; as a cell it must not be taken as done."""

    calls: list[int] = []

    def interrupted(setup: Setup, x: torch.Tensor) -> Any:
        def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            calls.append(len(x))
            if len(calls) == 8:
                os.kill(os.getpid(), signal.SIGINT)
            return setup.denoiser(x, sigma)

        return METHODS["invert"](replace(setup, denoiser=denoiser), x)

    monkeypatch.setitem(METHODS, "interrupted", interrupted)
    with pytest.raises(Stopped, match="1 of 2 cells are kept in .*; the same command goes on"):
        bench.run(cells(method=["unsample", "interrupted"]), tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_inner_context_has_the_word_and_other_handlers_stay() -> None:
    with pytest.raises(Stopped, match="^inner$"), keeping(lambda: "outer"), keeping(lambda: "inner"):
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with raising_stops(signal.SIGINT, signal.SIGTERM):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_signal_at_once_is_the_same_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    with raising_stops(signal.SIGINT):
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(stops, "TWICE", 0.0)
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.status == 130 and Stopped(signal.SIGTERM).status == 143


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["python", "/usr/bin/kinvert", "bench"], True),
        (["python", "C:\\kinvert.exe"], os.name == "nt"),
        (["python", "-u", "-m", "kinvert.cli", "bench"], True),
        (["python", "-m", "kinvert"], True),
        (["python", "-m", "pytest", "kinvert"], False),
        (["python", "kinvert/bench.py"], False),
        (["python", "-c", "import kinvert"], False),
        (["python", "-c", "from multiprocessing.spawn import spawn_main", "--multiprocessing-fork"], False),
        (["python"], False),
    ],
)
def test_what_is_the_command(words: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", words)
    assert is_command() == expected
