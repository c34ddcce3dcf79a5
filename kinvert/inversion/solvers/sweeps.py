r"""Sweeps: solve for all evaluations of a Plan at once, from the cleanest to the noisiest, one evaluation each.

The Plan may be a whole run, which multistep samplers need, or a single step. `Secants` holds the evaluations and the
model of the denoiser that they teach; here is the loop that drives it, and when a sample is done.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kinvert import linalg
from kinvert.checks import check_count_field
from kinvert.inversion.noise_floor import LONGEST, is_confirmed, is_noise
from kinvert.inversion.problem import Guess, Judge, Problem, Reason, Root, Search
from kinvert.inversion.solvers.base import Solver
from kinvert.inversion.solvers.secants import SLOPE, Secants
from kinvert.tensors import per_sample, rms, wide_dtype

__all__ = ["StepSweeps", "Sweeps"]

STALLED = 6  # sweeps without a halved residual after which the noise of the denoiser is measured


class _Course:
    """The books of one call of a sweeping solver."""

    def __init__(
        self, settings: _Sweeping, problem: Problem, guess: Guess, wide: torch.dtype, slope: float = 0.0
    ) -> None:
        if problem.denoiser is None:
            raise ValueError(f"{type(settings).__name__} needs a problem that tells its Plan and its denoiser")
        self.settings, self.problem, self.search = settings, problem, Search(problem, guess.u)
        self.run = Secants(problem.couplings, problem.denoiser, problem.value, settings.room(problem), wide, slope)
        self.started = self.run.start(guess)
        self.search.evaluations += self.started

    @abstractmethod
    def look(self, sweep: int) -> list[list[bool]]:
        """Return which evaluations the next sweep makes, for every row of the run; none for a row that ends here."""

    def spend(self, counts: list[int]) -> None:
        """Book the evaluations of a sweep, one number for each row of the run."""
        self.search.evaluations[self.run.index] += torch.tensor(counts, device=self.run.index.device)

    @abstractmethod
    def root(self) -> Root:
        """Return what was found."""


@dataclass(frozen=True)
class _Sweeping(Solver):
    window: int
    max_sweeps: int
    focus: float
    patience: int

    def __post_init__(self) -> None:
        check_count_field(self, "window")
        check_count_field(self, "max_sweeps")

    def room(self, problem: Problem) -> int:
        """Return how many differences are kept of each evaluation."""
        return self.window

    @abstractmethod
    def course(self, problem: Problem, guess: Guess) -> _Course:
        """Return the books to start with."""

    def solve(self, problem: Problem, guess: Guess) -> Root:
        """See `Solver`."""
        course = self.course(problem, guess)
        run = course.run
        for sweep in range(1, self.max_sweeps + 1):
            todo = course.look(sweep)
            places = [place for place, levels in enumerate(todo) if any(levels)]
            if not places or sweep == self.max_sweeps:
                break
            if len(places) < len(todo):
                run.keep(places)
                todo = [todo[place] for place in places]
            course.spend([sum(levels) for levels in todo])
            run.sweep(run.residual(), todo)
        return course.root()


@dataclass(frozen=True)
class Sweeps(_Sweeping):
    """The method for whole runs, of any deterministic sampler without auxiliary state.

    A latent is verified by running the sampler on it: where the residual of the worst evaluation is at most 0.3 of the
    tolerance in units of max(size, sigma), and at a tenth of that for samplers that magnify it. A search that starts
    from a recorded run verifies after so many evaluations, too, and no others in the end, so that a larger budget goes
    on where a smaller one ended. The residual of a `Root` is the rms error of the verified run.

    Attributes:
        window: differences kept of each evaluation, or as many as there were sweeps, in tens; each takes half a tensor
            of x's size.
        bounded: as many are kept if those of a sample could take more than `memory` otherwise.
        memory: bytes.
        max_sweeps: of one evaluation a level each, or fewer.
        focus: a sweep evaluates where the residual is above this share of the sample's largest. At high noise it mostly
            is not, for many sweeps.
        patience: sweeps in which the residual must halve; a sample that does not manage is given up.
    """

    scope: ClassVar[str] = "run"

    window: int = 40
    max_sweeps: int = 100
    focus: float = 0.01
    patience: int = 12
    bounded: int = 6
    memory: int = 2**26

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count_field(self, "bounded")
        check_count_field(self, "memory", 0)

    def room(self, problem: Problem) -> int:
        """Return how many differences are kept of each evaluation."""
        value = problem.value[0]
        most = self.window * len(problem.couplings.B) * value.numel() * value.element_size() // 2
        return self.window if most <= self.memory else min(self.window, self.bounded)

    def course(self, problem: Problem, guess: Guess) -> _Course:
        """See `_Sweeping`."""
        return _VerifiedCourse(self, problem, guess)


@dataclass(frozen=True)
class StepSweeps(_Sweeping):
    """The same for the evaluations of one step; `Sweeps` describes the attributes.

    The residual of a `Root` is the rms of the worst evaluation's, times the sum of |B|: to first order what the step
    misses y by at most, if D does not stretch.
    """

    window: int = 12
    max_sweeps: int = 40
    focus: float = 0.5
    patience: int = 6

    def course(self, problem: Problem, guess: Guess) -> _Course:
        """See `_Sweeping`."""
        return _StepCourse(self, problem, guess)


class _StepCourse(_Course):
    """A step is solved if its residual is small: nothing is verified, and the host reads once a sweep."""

    def __init__(self, settings: StepSweeps, problem: Problem, guess: Guess) -> None:
        super().__init__(settings, problem, guess, wide_dtype(problem.value.dtype))
        self.run.unit.fill_(1.0 / float(abs(problem.couplings.B).sum()))
        self.denoised = problem.denoised(guess.u)  # if the denoiser fails, nothing better is known
        self.mark, self.since = self.search.residual.clone(), torch.zeros_like(self.search.evaluations)

    def look(self, sweep: int) -> list[list[bool]]:
        """See `_Course`."""
        run, search, index, settings = self.run, self.search, self.run.index, self.settings
        dtype = self.problem.value.dtype
        sizes = run.sizes(run.residual()).to(dtype)
        worst = sizes.amax(1)
        better = search.keep(index, run.latent, worst)
        denoised = run.D[:, 0].reshape(-1, *run.shape).to(dtype)
        if self.denoised is not None:
            self.denoised[index] = torch.where(per_sample(better, denoised), denoised, self.denoised[index])
        halved = worst < self.mark[index] / 2
        self.mark[index] = torch.where(halved, worst, self.mark[index])
        self.since[index] = torch.where(halved, sweep, self.since[index])
        going = search.is_open(index, worst) & (sweep - self.since[index] < settings.patience)
        near = search.is_near_floor(index, worst)
        if near is not None:  # noise ends there, and what still halves is no noise
            going &= ~(near & (sweep > self.since[index]))
        enough = self.problem.tolerance[index]
        enough = enough if search.floor is None else enough.maximum(search.floor[index])
        wanted = (sizes > enough[:, None].maximum(settings.focus * worst[:, None])) & going[:, None]
        return self._told(wanted, worst)

    def _told(self, wanted: Tensor, worst: Tensor) -> list[list[bool]]:
        """Return what is wanted, shape (n, k), on the host; the residuals come along if somebody is told them."""
        if not self.problem.watch.is_watched:
            plain: list[list[bool]] = wanted.tolist()
            return plain
        rows = torch.cat([wanted.to(worst.dtype), worst[:, None]], 1).tolist()
        todo = [[bool(level) for level in levels] for *levels, _ in rows]
        sizes = [row[-1] for row, levels in zip(rows, todo, strict=True) if any(levels)]
        self.problem.watch.note_round(len(sizes), sizes)
        return todo

    def root(self) -> Root:
        """See `_Course`."""
        return self.search.root(self.denoised)


class _VerifiedCourse(_Course):
    """The best verified latent of every sample, and the latent with the least residual, which may be better.

    Attributes:
        trial, residuals: that latent, and its residual in units of max(size, sigma).
        waiting: whether the trial has not been verified yet.
        errors: rms error of the best verified latent.
        asked: residual at which the trial is verified.
        pause, gap: evaluations at which a search from a recorded run verifies its trial, and until it does so again.
    """

    def __init__(self, settings: Sweeps, problem: Problem, guess: Guess) -> None:
        # What x_N and D leave of the latent is magnified by sigma / sigma_min: no work for single precision.
        wide = linalg.widest(problem.value.device)
        super().__init__(settings, problem, guess, wide, SLOPE)
        x, n, cost = problem.value, len(problem.value), problem.cost
        self.judge = problem.judge or Judge(rms(x), torch.ones_like(problem.tolerance), problem.tolerance)
        unit, size = self.run.unit, self.judge.size.to(wide)[:, None]
        self.run.unit = unit.maximum(size) * self.judge.share.to(wide)[:, None]
        goal = (problem.tolerance / self.judge.size).nan_to_num(0.0, 0.0)
        known = torch.stack([goal.to(wide), self.judge.enough.to(wide), problem.budget.to(wide)])
        self.goal, self.enough, self.budget = known.tolist()
        self.spent = [self.started] * n
        self.trial, self.reached = x.clone(), guess.u.clone() if guess.reached is None else guess.reached.clone()
        self.residuals, self.errors, self.waiting = [math.inf] * n, [math.inf] * n, [True] * n
        self.asked, self.mark, self.since = [0.3 * goal for goal in self.goal], [math.inf] * n, [0] * n
        self.recorded = guess.reached is not None
        if guess.reached is not None:
            self.search.residual = self.judge.error(x - guess.reached, self.search.everyone)
            self.errors = self.search.residual.tolist()
        self.noisy = [False] * n
        self.pause, self.gap = [self.started + cost] * n, [cost] * n

    def look(self, sweep: int) -> list[list[bool]]:
        """See `_Course`."""
        samples = self.run.samples
        if self.problem.watch.stopped:
            self.budget = [0.0] * len(self.budget)
        sizes = self.run.sizes(self.run.residual()).tolist()
        worst = [max(levels) for levels in sizes]
        self._improve(samples, worst)
        for i, size in zip(samples, worst, strict=True):
            if size < self.mark[i] / 2:
                self.mark[i], self.since[i] = size, sweep
        ready = [i for i, size in zip(samples, worst, strict=True) if size <= self.asked[i]]
        paused = [i for i in samples if self.recorded and self.spent[i] >= self.pause[i]]
        self._verify(sorted({*ready, *paused}))
        for i, size in zip(samples, worst, strict=True):
            while 0 < size <= self.asked[i]:
                self.asked[i] /= 10
        for i in paused:
            self.gap[i] *= 2
            self.pause[i] = self.spent[i] + self.gap[i]
        self._probe(samples, sizes, [self._stalls(i, sweep) for i in samples])
        todo = []
        for place, i in enumerate(samples):
            going = not self._is_done(i) and not self.noisy[i] and sweep - self.since[i] < self.settings.patience
            going &= self.spent[i] + 2 * self.problem.cost <= self.budget[i]
            enough = max(self.asked[i], self.settings.focus * worst[place])
            todo.append([going and size > enough for size in sizes[place]])
        left = [worst[place] for place, levels in enumerate(todo) if any(levels)]
        self.problem.watch.note_round(len(left), left)
        return todo

    def _stalls(self, i: int, sweep: int) -> bool:
        """Tell whether sample i no longer comes closer, so that its noise should be measured."""
        affordable = self.spent[i] + 6 + 2 * self.problem.cost <= self.budget[i]
        waited = sweep - self.since[i]
        return not self._is_done(i) and waited > 0 and waited % STALLED == 0 and affordable

    def _probe(self, samples: list[int], sizes: list[list[float]], stalls: list[bool]) -> None:
        """Find out which of the samples that stall are lost in the noise of the denoiser."""
        groups: dict[int, list[int]] = {}
        for place, (stalled, levels) in enumerate(zip(stalls, sizes, strict=True)):
            if stalled and math.isfinite(max(levels)):
                groups.setdefault(levels.index(max(levels)), []).append(place)
        for k, places in groups.items():
            rows = torch.tensor(places, device=self.trial.device)
            unit = self.run.unit[self.run.index[rows], k]
            residual = torch.tensor([sizes[place][k] for place in places], device=unit.device, dtype=unit.dtype) * unit
            gain = self.run.C[rows, k].square().sum(1).sqrt().clamp(min=1.0)
            length = (residual / gain).minimum(LONGEST * unit)
            second = self._probed(k, rows, length)
            suspects = is_noise(second, length, residual, gain).nonzero()[:, 0]
            if len(suspects):
                longer = self._probed(k, rows[suspects], 4 * length[suspects])
                confirmed = is_confirmed(second[suspects], longer).tolist()
                for place, found in zip(rows[suspects].tolist(), confirmed, strict=True):
                    self.noisy[samples[place]] = found

    def _probed(self, k: int, rows: Tensor, length: Tensor) -> Tensor:
        """Return the second differences of some rows at evaluation k, and book the three evaluations of each."""
        for place in rows.tolist():
            self.spent[self.run.samples[place]] += 3
        self.search.evaluations[self.run.index[rows]] += 3
        return self.run.probe(k, rows, length)

    def _is_done(self, i: int) -> bool:
        """Tell whether the verified latent of sample i is good enough."""
        return self.errors[i] <= self.enough[i] and (math.isfinite(self.enough[i]) or self.residuals[i] <= self.goal[i])

    def _improve(self, samples: list[int], worst: list[float]) -> None:
        """Take over the latents with a smaller residual."""
        better = [place for place, size in enumerate(worst) if size < self.residuals[samples[place]]]
        if not better:
            return
        places = torch.tensor(better, device=self.trial.device)
        self.trial[self.run.index[places]] = self.run.latent[places]
        for place in better:
            i = samples[place]
            self.residuals[i], self.waiting[i] = worst[place], True

    def spend(self, counts: list[int]) -> None:
        """See `_Course`; a search of runs reads its own books on the host."""
        super().spend(counts)
        for i, count in zip(self.run.samples, counts, strict=True):
            self.spent[i] += count

    def _verify(self, samples: list[int]) -> None:
        """Run the sampler on the trials of some samples, and keep those that are better."""
        samples = [i for i in samples if self.waiting[i]]
        if not samples:
            return
        index = torch.tensor(samples, device=self.trial.device)
        latent = self.trial[index]
        reached = self.search.call(latent, index)
        error = self.judge.error(self.problem.value[index] - reached, index)
        better = (error < self.search.residual[index]) | self.search.residual[index].isinf()
        self.reached[index] = torch.where(per_sample(better, reached), reached, self.reached[index])
        least = error.minimum(self.search.residual[index])
        self.search.put(index, torch.where(per_sample(better, latent), latent, self.search.u[index]), least)
        for i, value in zip(samples, least.tolist(), strict=True):
            self.errors[i], self.waiting[i] = value, False
            self.spent[i] += self.problem.cost

    def root(self) -> Root:
        """See `_Course`."""
        everyone, stopped = range(len(self.errors)), self.problem.watch.stopped
        known = [self.recorded and math.isfinite(error) for error in self.errors]
        # A search from a recorded run that its budget ended says no more than at its last verification.
        ended = [spent + 2 * self.problem.cost <= most for spent, most in zip(self.spent, self.budget, strict=True)]
        self._verify([i for i in everyone if stopped or ended[i] or not known[i]])
        root = self.search.root(reached=self.reached)
        done = torch.tensor([self._is_done(i) for i in everyone], device=root.reason.device)
        reason = torch.where((root.reason == Reason.CONVERGED) & ~done, int(Reason.STALLED), root.reason)
        noisy = torch.tensor(self.noisy, device=root.reason.device)
        reason = torch.where(noisy & (reason == Reason.STALLED), int(Reason.PRECISION), reason)
        return replace(root, reason=reason)
