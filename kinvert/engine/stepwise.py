"""A run one evaluation at a time, by a caller who owns the denoiser call.

The plain loop of `kinvert.engine.loop` is

    run = Stepwise(...)
    while not run.done:
        run.send(denoiser(run.x, run.sigma))

and everything else is here: where a run stands, and what follows from the next evaluation.
"""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from kinvert.checks import plain
from kinvert.denoisers import Guided
from kinvert.engine.contract import (
    check_edit,
    check_memory,
    check_plan,
    check_resumed,
    check_state,
    warn_if_rising_drowns,
)
from kinvert.engine.draws import Recipe, from_recipe, noise_after, noise_for, recipe_of, source_for
from kinvert.engine.kernels import outlives
from kinvert.engine.step import Callback, Memory, OpenStep, Progress, draw_noises, stage_sigmas
from kinvert.forms import Denoised, Noise, Uncond
from kinvert.noise import Noise as NoiseLike
from kinvert.noise import NoiseFunction
from kinvert.plan import Plan

__all__ = ["Stepwise", "StepwiseState", "stepwise"]


class StepwiseState(TypedDict):
    """Where a run stands, as plain data: copies of its tensors, numbers and names.

    Attributes:
        sampler, sigmas: of the Plan that it belongs to.
        step, stage: the next evaluation; `step` is the number of steps after the last one.
        values: "x" and what the sampler remembers, at the beginning of the step.
        noises: what was drawn for the step.
        denoised, uncond: what earlier evaluations of the step returned and later ones need, by number of the stage.
        x: the input of the next evaluation within a step; None at the beginning of a step.
        noise: the source of noise, if a seed says all about it.
    """

    sampler: str
    sigmas: list[float]
    step: int
    stage: int
    values: dict[str, Tensor]
    noises: list[Tensor]
    denoised: dict[int, Tensor]
    uncond: dict[int, Tensor]
    x: Tensor | None
    noise: Recipe | None


def stepwise(
    plan: Plan, x: Tensor | Memory | None = None, noise: NoiseLike | None = None, *, state: StepwiseState | None = None
) -> Stepwise:
    """Run a Plan one evaluation at a time; the denoiser is called by you.

        run = ki.stepwise(plan, x)
        while not run.done:
            run.send(denoiser(run.x, run.sigma))
        run.result

    The result is that of `ki.run` with gradients, to the bit, and differentiable like it.

    Args:
        plan: from `compile_plan`.
        x: the state at `plan.sigmas[0]`, shape (batch, *event), floating point; it is not modified. For a Plan that
            starts from auxiliary state (`plan.closed`), a mapping of "x" and the auxiliary values by their names.
        noise: a noise source for stochastic Plans, as in `run`.
        state: the `state` of an earlier run of the same Plan, in place of x: the run goes on from there, to the bit on
            the same device. Its noise goes on too: `ki.noise.white` and `brownian` are known by their seeds; any other
            source has to be given again, in `noise`. A noise function of your own keeps its own place.

    Returns:
        The run, before its next evaluation.

    Raises:
        TypeError, ValueError: as `run`, for plan and x; a state of another Plan; noise that is missing.

    Warns:
        RuntimeWarning: as `run`.
    """
    check_plan(plan)
    if state is not None and x is None:
        return _resume(plan, state, noise)
    if state is not None or x is None:
        raise TypeError("stepwise takes either x, to start a run, or state=, to go on with one")
    values = x if isinstance(x, dict) else {"x": x}
    check_memory(plan, values)
    warn_if_rising_drowns(plan, values["x"])
    values = {name: plain(value) for name, value in values.items()}
    source = source_for(plan, noise)
    return Stepwise(plan, values, noise_for(plan, source, values["x"]), recipe=recipe_of(source))


class Stepwise:
    """A run under way, made by `stepwise`.

    Attributes:
        plan: the Plan.
        evaluations: how many results have been sent.
    """

    def __init__(
        self,
        plan: Plan,
        values: Memory,
        draw: NoiseFunction,
        callback: Callback | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        self.plan = plan
        self.evaluations = 0
        levels = plan.stage_levels
        self._levels, self._total = stage_sigmas(levels, values["x"]), len(levels)
        self._values, self._draw, self._callback, self._recipe = values, draw, callback, recipe
        self._index = 0  # of the step under way or, if there is none, of the next one
        self._open: OpenStep | None = None

    @property
    def done(self) -> bool:
        """Whether all evaluations have been made."""
        return self.evaluations == self._total

    @property
    def x(self) -> Tensor:
        """The tensor to evaluate, shape (batch, *event); do not write into it."""
        return self._next("evaluate").x

    @property
    def sigma(self) -> Tensor:
        """Its noise level as denoisers get it, shape (batch,), in x's dtype, float32 for half precision; a copy."""
        self._next("evaluate")
        return self._levels[self.evaluations].clone()

    @property
    def step(self) -> int:
        """The number of the step under way, from 0; the number of steps after the last one."""
        self._begin()
        return self._index

    @property
    def stage(self) -> int:
        """The number of the next evaluation within its step, from 0."""
        current = self._begin()
        return 0 if current is None else current.stage

    @property
    def values(self) -> Memory:
        """The state at the beginning of the step under way, or at the end: "x" and what the sampler remembers."""
        self._begin()
        return dict(self._values)

    @property
    def result(self) -> Tensor:
        """The final x; `values` has the auxiliary state too."""
        if not self.done:
            raise RuntimeError(
                f"the run is not done: {self.evaluations} of {self._total} evaluations were sent; "
                "send(denoiser(run.x, run.sigma)) until run.done"
            )
        return self.values["x"]

    def send(self, denoised: Tensor | Guided) -> None:
        """Send what the denoiser returned for `x`, and go on to the next evaluation.

        Your tensor may be used again after the call: what is needed later is copied if you hold it.

        Args:
            denoised: of x's shape and dtype, float32 for half precision; a pair `Guided` for Plans with `is_guided`.

        Raises:
            TypeError, ValueError: it is something else; the run stays where it is.
            RuntimeError: the run is done.
        """
        current = self._next("send")
        outputs = [denoised]
        del denoised  # the list has to hold the only reference
        current.take(outputs)
        self.evaluations += 1
        if current.stage == len(current.step.stages):
            self._end(current)

    def replace(self, x: Tensor, **values: Tensor) -> None:
        """Replace the state at the beginning of the step under way, before its first evaluation (`stage` 0).

        Noise that was drawn for the step stays, and the next `x` to evaluate is computed anew: from the new state, so
        that it is the new state itself unless the step adds noise first. What the sampler remembers of earlier steps
        stays as well, unless it is given too.

        Args:
            x: the new state, of the same shape, dtype and device as `values["x"]`.
            values: new values of what the sampler remembers, by their names in `values`.

        Raises:
            TypeError, ValueError: tensors that do not fit; names that the step does not read; a sampler whose next
                state does not follow from x but from values that were not given.
            RuntimeError: in the middle of a step, whose earlier evaluations belong to the old state, or after the end.
        """
        current = self._next("replace")
        if current.stage:
            raise RuntimeError(
                f"x cannot be replaced at stage {current.stage} of step {self._index}: the evaluations of this step so "
                "far belong to the state that it started from; replace it when run.stage is 0, or evaluate the "
                "denoiser at an edited run.x"
            )
        check_edit(self.plan, self._index, self._values, {"x": x, **values})
        self._values = self._values | {name: plain(value) for name, value in {"x": x, **values}.items()}
        noises = [current.known[Noise(r)] for r in range(len(current.step.noises))]
        self._open = OpenStep(current.step, self._values, noises, current.watched)

    @property
    def state(self) -> StepwiseState:
        """Where the run stands, as plain data to copy, to save and to go on from with `stepwise(plan, state=...)`.

        The tensors are copies without a graph of gradients.
        """
        current = self._begin()
        known = {} if current is None else current.known
        done = 0 if current is None else current.stage
        needed = [k for k in range(done) if current is not None and outlives(current.step, k)]
        copy = {name: value.detach().clone() for name, value in self._values.items()}
        return {
            "sampler": repr(self.plan.rule),
            "sigmas": list(self.plan.sigmas),
            "step": self._index,
            "stage": done,
            "values": copy,
            "noises": [value.detach().clone() for symbol, value in known.items() if symbol.kind == "noise"],
            "denoised": {k: known[Denoised(k)].detach().clone() for k in needed},
            "uncond": {k: known[Uncond(k)].detach().clone() for k in needed if Uncond(k) in known},
            "x": current.x.detach().clone() if current is not None and done else None,
            "noise": self._recipe,
        }

    def _next(self, wanted: str) -> OpenStep:
        """Return the step under way, or raise RuntimeError if the run is done."""
        current = None if self.done else self._begin()
        if current is None:
            raise RuntimeError(
                f"the run is done, so there is nothing to {wanted}: all {self._total} evaluations were sent; read "
                "run.result"
            )
        return current

    def _begin(self) -> OpenStep | None:
        """Return the step under way, after steps without evaluations; None at the end.

        A step begins when it is asked for, not when the one before ends: a callback comes first, then the noise.
        """
        while self._open is None and self._index < len(self.plan.steps):
            step = self.plan.steps[self._index]
            noises = draw_noises(step, self._draw, self._values["x"])
            self._open = OpenStep(step, self._values, noises, self._callback is not None)
            if not step.stages:
                self._end(self._open)
        return self._open

    def _end(self, current: OpenStep) -> None:
        """Take over the state after a step."""
        step, values = current.step, current.end()
        self._index += 1
        self._open = None
        if self._index == len(self.plan.steps):
            # A row "x' = D" is the denoiser's own tensor, and "x' = x" the caller's.
            rows = {"x": step.x, **dict(step.memory)}
            values = {name: value.clone() if rows[name].alias() else value for name, value in values.items()}
        self._values = values
        if self._callback is not None and current.seen is not None:
            progress = Progress(step.index, step.sigma, step.sigma_next, *current.seen, evaluations=self.evaluations)
            self._callback(progress)

    def _restore(self, state: StepwiseState) -> None:
        """Go to where `state` was taken."""
        steps = self.plan.steps
        self._index = state["step"]
        self.evaluations = sum(len(step.stages) for step in steps[: self._index]) + state["stage"]
        if self._index < len(steps):
            current = self._open = OpenStep(steps[self._index], self._values, state["noises"])
            current.known |= {Denoised(k): value for k, value in state["denoised"].items()}
            current.known |= {Uncond(k): value for k, value in state["uncond"].items()}
            current.stage = state["stage"]
            if state["x"] is not None:
                current.wait_at(state["x"])


def _resume(plan: Plan, state: StepwiseState, noise: NoiseLike | None) -> Stepwise:
    """Return a run that goes on where `state` was taken."""
    check_resumed(plan, state)
    values = dict(state["values"])
    x = check_state(values["x"])
    recipe = state["noise"] if noise is None else recipe_of(noise)
    source = from_recipe(recipe) if noise is None and recipe is not None else noise
    draws = sum(len(step.noises) for step in plan.steps[: state["step"] + 1])
    if source is None and draws < plan.draws:
        raise ValueError(
            "the run drew its noise from a source that its state does not hold; give the same source again: "
            "ki.stepwise(plan, state=state, noise=...)"
        )
    draw = noise_after(plan, source, x, draws)
    run = Stepwise(plan, values, draw, recipe=recipe)
    run._restore(state)
    return run
