"""A run under way in a pipeline: between two calls of the scheduler's `step`.

The state stays here, in float32 or wider and in the coordinates of kinvert; the pipeline holds a copy in its own dtype
and space. What the pipeline did to its copy, in a callback for example, is the difference from what it was handed. It
is added to the state at the beginning of a step. Between two evaluations of one step it moves the next evaluation
alone, as in diffusers' own schedulers of two stages.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kinvert as ki
from kinvert.adapters.diffusers.course import Course
from kinvert.adapters.diffusers.host import BaseOutput, randn_tensor
from kinvert.adapters.diffusers.predictions import Prediction
from kinvert.forms import State
from kinvert.noise import Noise, NoiseFunction, bind
from kinvert.plan import Interval, Plan

__all__ = ["GeneratorNoise", "PathMaker", "PipelineRun", "SchedulerOutput", "is_entry", "noise_source", "number_of"]

Generators = torch.Generator | Sequence[torch.Generator] | None
PathMaker = Callable[[Tensor, Generators], NoiseFunction]
"""Makes the noise of a run of the state and the pipeline's generator."""
# A difference from the latents that belong to a state, in parts of their size, that is rounding and not another image.
ROUNDING = 0.02


@dataclass
class SchedulerOutput(BaseOutput):
    """What `KinvertScheduler.step` returns.

    Attributes:
        prev_sample: the latents of the next evaluation, or the result.
        pred_original_sample: the denoised image.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class GeneratorNoise:
    """Noise from the `generator` that a pipeline hands to `step`, in the order in which diffusers draws it.

    Samplers whose steps draw for overlapping intervals get the increments of a Brownian path, with a seed drawn from
    the generator; `path` makes another. With `every_step` a noise is drawn and left in each step that needs none.
    """

    def __init__(self, plan: Plan, like: Tensor, every_step: bool = False, path: PathMaker | None = None) -> None:
        self.plan, self.like = plan, like
        self._left = {step.noises[0]: _idle_before(plan, step.index) for step in plan.steps if step.noises}
        self._every_step = every_step
        self.generator: Generators = None
        self._path: NoiseFunction | None = None
        overlap = _overlap([interval for step in plan.steps for interval in step.noises])
        self._make = path or (self._brownian if overlap else None)

    def __call__(self, sigma_from: float, sigma_to: float) -> Tensor:
        """Return the noise of an interval."""
        if self._make is None:
            for _ in range(self._left.get(Interval(sigma_from, sigma_to), 0) if self._every_step else 0):
                self._draw()
            return self._draw()
        if self._path is None:
            self._path = self._make(self.like, self.generator)
        return self._path(sigma_from, sigma_to)

    def _brownian(self, like: Tensor, generator: Generators) -> NoiseFunction:
        """Return the increments of a path with a seed from the generator."""
        seeds = [_seed(one) for one in generator] if isinstance(generator, Sequence) else _seed(generator)
        return bind(ki.noise.brownian(seeds), like, self.plan.noise_levels)

    def _draw(self) -> Tensor:
        """Draw unit noise."""
        generator = list(self.generator) if isinstance(self.generator, Sequence) else self.generator
        like = self.like
        drawn: Tensor = randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        return drawn


def noise_source(
    plan: Plan, like: Tensor, noises: Sequence[Tensor], every_step: bool, path: PathMaker | None
) -> Noise | None:
    """Return the noise of a run: given tensors, or those of the pipeline's generator; None if it draws none.

    Raises:
        ValueError: another number of tensors than the run draws.
    """
    if not noises:
        return GeneratorNoise(plan, like, every_step, path) if plan.is_stochastic else None
    if len(noises) != plan.draws:
        raise ValueError(f"noises: {plan.rule.name} draws {plan.draws} on this schedule, got {len(noises)}")
    return ki.noise.replay(noises)


class PipelineRun:
    """One run of a scheduler, made at its first call of `step`.

    Args:
        course: the whole run.
        prediction: what the network predicts.
        pair: hand the sampler the clipped image and the unclipped one.
        step: the step that the run begins at.
        sample: the pipeline's latents.
        state: the state that the run begins with, by name; None takes `sample`.
        noises: the noises to draw; none for those of the generator.
        generator: the pipeline's.
        every_step: draw in each step, as the scheduler itself does.
        path: makes the noise, if the scheduler itself does not draw it step by step.
        unit: what the pipeline will multiply the result of a run upwards by.
    """

    def __init__(
        self,
        course: Course,
        prediction: Prediction,
        *,
        pair: bool,
        step: int,
        sample: Tensor,
        state: Mapping[str, Tensor] | None,
        noises: Sequence[Tensor],
        generator: Generators,
        unit: float,
        every_step: bool,
        path: PathMaker | None,
    ) -> None:
        if state is not None:
            if step > min(course.starts.values()):  # the steps before that evaluate nothing
                raise ValueError(
                    f"begin_index: the state belongs to the first level, so a run cannot begin at step {step}"
                )
            step = 0
        self.course, self.prediction, self.pair, self.unit = course, prediction, pair, unit
        plan = course.tail(step)
        wide = torch.promote_types(sample.dtype, torch.float32)
        x = sample.to(wide) * course.table.to_x(plan.sigmas[0])
        begin = x if state is None else {name: value.to(x) for name, value in state.items()}
        self.noise = noise_source(plan, x, noises, every_step, path)
        self._listen(generator)
        self.run = ki.stepwise(plan, begin, self.noise)
        self._handed = sample.clone() if state is None else self._latents(sample)
        if state is not None:
            self._check_latents(sample)

    @property
    def values(self) -> dict[str, Tensor]:
        """The state at the beginning of the step under way, or at the end."""
        return dict(self.run.values)

    def receive(self, output: Tensor, sample: Tensor, generator: Generators) -> tuple[Tensor, Tensor]:
        """Take what the network returned; return the next latents and the denoised image, in the sample's dtype."""
        if sample.shape != self._handed.shape:
            raise ValueError(
                f"sample must have the shape of the run, {tuple(self._handed.shape)}, got {tuple(sample.shape)}"
            )
        self._listen(generator)
        run, table = self.run, self.course.table
        level = run.plan.stage_levels[run.evaluations]
        wide = run.x.dtype
        moved = (sample.to(wide) - self._handed.to(wide)) * table.to_x(level)
        seen = run.x + moved
        self._edit(moved)
        denoised = self.prediction.denoised(output, seen, level)
        clip = self.prediction.clip
        clipped = denoised if clip is None else clip(denoised)
        run.send(ki.Guided(clipped, denoised) if self.pair else clipped)
        latents = self._latents(sample)
        self._handed = latents.clone()
        return latents, clipped.to(sample.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineRun:
        other = copy.copy(self)
        other.noise = copy.copy(self.noise)
        other.run = ki.stepwise(self.run.plan, state=self.run.state, noise=other.noise)
        other._handed = self._handed.clone()
        return other

    def _latents(self, like: Tensor) -> Tensor:
        """Return what the pipeline holds next: the input of the next evaluation, or the result, in its space."""
        run, table = self.run, self.course.table
        if run.done:
            x, level = run.result, run.plan.sigmas[-1]
            if self.course.down is not None:  # the way back begins with an evaluation at this state
                down = self.course.down.closed
                x, level = ki.stepwise(down, run.values).x, down.stage_levels[0]
            return (x / table.to_x(level) / self.unit).to(like.dtype)
        return (run.x / table.to_x(run.plan.stage_levels[run.evaluations])).to(like.dtype)

    def _edit(self, moved: Tensor) -> None:
        """Move the state at the beginning of a step as the pipeline moved its latents."""
        run = self.run
        if run.stage:
            return
        step = run.plan.steps[run.step]
        x = run.values["x"]
        scale = step.stages[0].input.terms.get(State("x"), 0.0)
        try:
            if scale == 0:
                raise ValueError(f"step {step.index} of {run.plan.rule.name} does not show x to the network")
            moved = moved / scale
            bases = {} if State("x") in step.x.terms else _bases(run.plan, step.index)
            run.replace(x + moved, **{name: run.values[name] + moved / c for name, c in bases.items()})
        except ValueError as error:
            if bool(moved.any()):
                raise ValueError(
                    f"the latents were changed between two steps, and {run.plan.rule.name} cannot take that up: "
                    f"{error}; leave them as they are, or use a sampler such as 'euler' or 'dpmpp_2m'"
                ) from error

    def _listen(self, generator: Generators) -> None:
        """Take up the generator that the pipeline gave."""
        if isinstance(self.noise, GeneratorNoise):
            self.noise.generator = generator

    def _check_latents(self, sample: Tensor) -> None:
        """Refuse latents that do not belong to the state that the run begins with, and take out their rounding."""
        if sample.shape != self._handed.shape:
            raise ValueError(
                f"latents must have the shape of the state, {tuple(self._handed.shape)}, got {tuple(sample.shape)}"
            )
        off = (sample - self._handed).float().square().mean().sqrt()
        size = self._handed.float().square().mean().sqrt()
        if not bool(off <= ROUNDING * size):
            raise ValueError(
                f"latents are not those that belong to the scheduler's state: they differ by {float(off / size):.2g} "
                "of their size; pass what the inverse run returned, as it is, or take a scheduler without a state"
            )
        self._handed = sample.clone()


def number_of(timestep: Any) -> float:
    """Return a timestep as a float; of a tensor with one for each sample, the first."""
    return float(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else float(timestep)


def is_entry(timestep: Any, timesteps: Tensor, k: int) -> bool:
    """Tell whether a timestep is entry k of the tensor itself; this reads nothing from a device."""
    return isinstance(timestep, Tensor) and timestep.data_ptr() == timesteps[k].data_ptr()


def _seed(generator: torch.Generator | None) -> int:
    """Draw a seed."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def _bases(plan: Plan, index: int) -> dict[str, float]:
    """Return what a sampler with a corrector goes on from, in place of x, before a step: x is a factor times it and
    denoised images.
    """
    before = plan.steps[index - 1]
    rows = {name: row for name, row in before.memory if name == "base"} if index else {}
    found = {}
    for name, row in rows.items():
        symbol = next(symbol for symbol, _ in row if symbol.kind == "state")
        found[name] = before.x.terms[symbol] / row.terms[symbol]
    return found


def _idle_before(plan: Plan, index: int) -> int:
    """Return how many steps right before a step draw nothing."""
    idle = 0
    while index > idle and not plan.steps[index - idle - 1].noises:
        idle += 1
    return idle


def _overlap(intervals: list[Interval]) -> bool:
    """Tell whether two intervals share more than an end."""
    ordered = sorted((min(pair), max(pair)) for pair in intervals)
    return any(b[0] < a[1] for a, b in itertools.pairwise(ordered))
