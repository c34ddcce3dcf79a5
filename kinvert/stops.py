"""Stops from outside, Ctrl-C and SIGTERM: they end a run with a sentence that says what is kept, without a traceback.

`Stopped` is raised in the main thread, like `KeyboardInterrupt`, of which it is one. While the command `kinvert` still
loads PyTorch there is nothing to clean up, and the process ends at once. Other programs that import kinvert are left
alone, and so is a signal for which a program has its own use.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["Stopped", "holding_ctrl_c", "ignore_stops", "is_command", "keeping", "raising_stops", "watch_the_start"]

TWICE = 1.0  # seconds in which a second signal is the same stop: a terminal and the program above may both send one


class Stopped(KeyboardInterrupt):
    """A run was stopped from outside.

    Attributes:
        number: the signal.
        kept: what is kept; empty if nobody has said it yet. It is the message.
    """

    def __init__(self, number: int = signal.SIGINT, kept: str = "") -> None:
        super().__init__(kept)
        self.number, self.kept = number, kept

    @property
    def status(self) -> int:
        """The exit status of a program that was stopped: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


@contextmanager
def raising_stops(*numbers: int) -> Iterator[None]:
    """Let these signals raise `Stopped` in this context, in the main thread."""
    free = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    last = -TWICE

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= TWICE:
            last = now
            raise Stopped(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in numbers}
        before = {n: handler for n, handler in before.items() if handler in (free[signal.Signals(n)], stop_at_once)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is stop_at_once else handler)


@contextmanager
def keeping(kept: Callable[[], str]) -> Iterator[None]:
    """Let a stop in this context say what is kept: what `kept` returns then, unless an inner context said it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if isinstance(stop, Stopped) and stop.kept:
            raise
        raise Stopped(getattr(stop, "number", signal.SIGINT), kept()) from None


@contextmanager
def holding_ctrl_c() -> Iterator[None]:
    """Hold Ctrl-C back while processes are started in this context: they inherit that, so that it stops only this one.

    A process of Python would otherwise print a traceback of it, even before its first line runs. Any stop of this
    process waits for the end of the context too: a process that is started by half would print a traceback as well.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # if it were started below, it would let signals through again
    with _postponing_stops():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _postponing_stops() -> Iterator[None]:
    """Let stops wait for the end of this context: a mask alone does not hold what another thread is sent."""
    held: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda number, _: held.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def ignore_stops() -> None:
    """Ignore further signals, if this is the command: it is about to say its last word."""
    if is_command() and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


# -- while the command starts ------------------------------------------------------------------------------------------
def is_command() -> bool:
    """Tell whether this process was started as `kinvert`, `python -m kinvert` or `python -m kinvert.cli`."""
    words = sys.orig_argv[1:]
    while words and words[0].startswith("-") and words[0] != "-m":
        del words[0]
    if words[:1] == ["-m"]:
        return words[1:2] in (["kinvert"], ["kinvert.cli"])
    return bool(words) and Path(words[0]).name.removesuffix(".exe") == "kinvert"


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """End the process while it starts."""
    with suppress(OSError):
        os.write(2, b"Stopped: nothing was done yet. What earlier runs left is as it was.\n")
    os._exit(128 + number)


def watch_the_start() -> None:
    """Let a stop end the command with a sentence while it starts."""
    if not is_command() or threading.current_thread() is not threading.main_thread():
        return
    for number, free in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is free:
            signal.signal(number, stop_at_once)
