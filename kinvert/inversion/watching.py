"""Where an inversion stands while it solves: what `watch` and the progress bar are told, and how it is stopped.

Solvers say what they know where they read the device anyway, and every call of the denoiser is told on. So whoever
looks on makes the device wait for nothing. A search that is to stop finds that it affords no further evaluation.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kinvert.engine import Callback, Progress
from kinvert.plan import Plan
from kinvert.telling import warn_user

__all__ = ["UNLIMITED", "Bars", "Solving", "Stop", "Watch", "Watcher", "looking_on"]

UNLIMITED = 2**62
"""A limit on evaluations that is none."""


class Stop(Exception):  # noqa: N818 - a request, no error
    """Raise it in `watch` to end an inversion: `invert` then returns the best that was found so far."""


@dataclass(frozen=True)
class Solving:
    """What `watch` is told after each evaluation of the denoiser: plain numbers, known without asking the device.

    Attributes:
        part, parts: part of the batch that is being inverted, from 0, and how many there are (`max_batch`).
        solved, steps: steps that are solved, and steps of the run. The last step of the schedule is solved first. For
            a run that is solved as a whole, those of an Euler run that it is solved through, if it comes to that.
        rounds: sweeps or iterations since the step, or the run, was begun.
        samples: samples of this part.
        open: those that the step, or the run, is still being solved for. The others are solved or given up.
        evaluations: calls of the denoiser for this part, which is at least what its dearest sample has cost.
        limit: evaluations that one sample may cost; None: no limit.
        residual: largest rms residual of the open samples, NaN before one is known; for a run that is solved as a whole
            in units of the image's size or sigma, whichever is larger.
        stopping: whether the inversion was asked to stop and is about to end.
    """

    part: int = 0
    parts: int = 1
    solved: int = 0
    steps: int = 0
    rounds: int = 0
    samples: int = 0
    open: int = 0
    evaluations: int = 0
    limit: int | None = None
    residual: float = math.nan
    stopping: bool = False


Watcher = Callable[[Solving], None]


class Watch:
    """The state of an inversion on the host, those who are told, and whether to stop.

    Attributes:
        now: what is told.
        stopped: whether somebody asked to stop.
    """

    def __init__(self, watchers: Sequence[Watcher] = (), steps: int = 0, limit: int = UNLIMITED) -> None:
        self.watchers = tuple(watchers)
        self.now = Solving(steps=steps, limit=None if limit == UNLIMITED else limit)
        self.stopped, self._unsaid = False, False

    @property
    def is_watched(self) -> bool:
        """Tell whether anybody is told."""
        return bool(self.watchers)

    def note(self, **changes: Any) -> None:
        """Change what is told with the next evaluation."""
        self.now = replace(self.now, **changes)

    def begin(self, part: int, parts: int, samples: int) -> None:
        """Begin with a part of the batch."""
        self.note(part=part, parts=parts, samples=samples, open=samples, evaluations=0, solved=0, rounds=0)

    def rows(self, mask: Tensor, residual: Tensor) -> Tensor:
        """Return the places where a mask is true, shape (n,), and note their residuals, in one read of the device."""
        if not self.is_watched:
            return mask.nonzero()[:, 0]
        flags, sizes = torch.stack([mask.to(residual.dtype), residual]).tolist()
        places = [place for place, flag in enumerate(flags) if flag]
        self.note_round(len(places), [sizes[place] for place in places])
        return torch.tensor(places, dtype=torch.int64, device=mask.device)

    def note_round(self, count: int, residuals: Sequence[float]) -> None:
        """Note the open samples after a sweep or an iteration, and their residuals."""
        if self.is_watched:
            largest = max(residuals, default=self.now.residual)
            self.note(open=count, rounds=self.now.rounds + 1, residual=largest)

    def count(self) -> None:
        """Count a call of the denoiser, and tell."""
        self._say_interrupted()
        self.note(evaluations=self.now.evaluations + 1, stopping=self.stopped)
        try:
            for watcher in self.watchers:
                watcher(self.now)
        except Stop:
            self.stopped = True

    @contextmanager
    def until_interrupted(self) -> Iterator[None]:
        """Let the first Ctrl-C in this context ask to stop; the second raises KeyboardInterrupt.

        Only where Ctrl-C would raise that: not in another thread, nor for a program that has its own use for it.
        """
        default = signal.default_int_handler
        if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not default:
            yield
            return

        def ask(number: int, frame: Any) -> None:
            signal.signal(signal.SIGINT, default)
            self.stopped = self._unsaid = True

        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, default)
        self._say_interrupted()

    def _say_interrupted(self) -> None:
        """Warn of Ctrl-C, once, and where a warning may be raised as an error."""
        if self._unsaid:
            self._unsaid = False
            warn_user("Ctrl-C: the inversion stops and returns the best that it has found; press it again to abort")


@contextmanager
def looking_on(
    plan: Plan, scope: str, limit: int, callback: Callback | None, watch: Watcher | None, progress: bool
) -> Iterator[tuple[Watch, Callback | None]]:
    """Return who is told of an inversion, and the callback of the run that checks; with their bars for `progress`.

    Ctrl-C asks to stop in this context, see `Watch.until_interrupted`.

    Args:
        plan: the run that is inverted.
        scope: of the route. A run that is solved as a whole is checked while it is solved and needs no second bar.
        limit: evaluations that one sample may cost.
        callback, watch, progress: of `invert`.
    """
    bars = Bars(plan.rule.name, len(plan.steps), scope == "step") if progress else None
    if bars is not None and scope != "run":
        callback = bars.checking(callback)
    watchers = [*([] if bars is None else [bars.show]), *([] if watch is None else [watch])]
    eye = Watch(watchers, len(plan.steps), limit)
    try:
        with eye.until_interrupted():
            yield eye, callback
    finally:
        if bars is not None:
            bars.show(eye.now)
            bars.close()


class Bars:
    """A bar that shows the solving, and under it one for the run that checks the latent, once that has begun."""

    def __init__(self, name: str, steps: int, by_steps: bool) -> None:
        self.name, self.steps, self.by_steps = name, steps, by_steps
        self.bars: dict[str, Any] = {}

    def show(self, now: Solving) -> None:
        """Show where the solving stands: the steps that are solved, or the sweeps of a whole run."""
        bar = self._bar("invert", self.steps * now.parts if self.by_steps else None)
        bar.n = self.steps * now.part + now.solved if self.by_steps else now.rounds
        most = "" if now.limit is None else f" of {now.limit}"
        left = "stopping" if now.stopping else f"{now.open} of {now.samples} samples open"
        bar.set_postfix_str(f"{left}, {now.evaluations}{most} evaluations, residual {now.residual:.2g}", refresh=False)
        bar.update(0)

    def checking(self, callback: Callback | None) -> Callback:
        """Return the callback of the run that checks, with its bar."""

        def update(step: Progress) -> None:
            bar = self._bar("check", self.steps)
            if step.index == 0:
                bar.reset()
            bar.update()
            if callback is not None:
                callback(step)

        return update

    def close(self) -> None:
        """Close the bars."""
        for bar in reversed(self.bars.values()):
            bar.refresh()
            bar.close()

    def _bar(self, verb: str, total: int | None) -> Any:
        from tqdm.auto import tqdm

        if verb not in self.bars:
            unit = "step" if total else "sweep"
            self.bars[verb] = tqdm(total=total, desc=f"{verb} {self.name}", unit=unit, miniters=0)
        return self.bars[verb]
