"""A sampler on the levels of a scheduler: the Plan, and what the pipeline has to know of it beforehand.

A pipeline calls its network once for each timestep, so that a step of several stages has several timesteps. It shows
the network the latents that `step` returned; only the scale of a state in VE coordinates can be changed before the
network sees it. So the first evaluation has to be at the latents that the pipeline starts from.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kinvert.adapters.diffusers.timetable import Timetable
from kinvert.analysis import explicit_inverse
from kinvert.inversion import Inversion
from kinvert.levels import FlowTimes
from kinvert.moments import check_flow_spread
from kinvert.plan import Plan, compile_auxiliary, compile_plan
from kinvert.ready import Ready, uses_evaluations
from kinvert.rules import (
    DEIS,
    SAMPLERS,
    DDIMInverse,
    DPMAdaptive,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp3MSDE,
    Flow,
    Rule,
    sampler,
)
from kinvert.rules.base import switched_off

__all__ = ["Course", "check_sampler", "course_for", "saved_options"]

# The first level of a run upwards, in place of 0: as `unsample` has it, or a tenth of the next level.
OFFSET = 1e-4
# The same for a rule that never evaluates at its lower end.
UNSEEN = 1e-9
SHORTENED = (DEIS, DPMpp2M, DPMpp2MSDE, DPMpp3MSDE)
"""Rules whose `lower_order_final` depends on the number of steps."""


@dataclass(frozen=True)
class Course:
    """A run of a sampler on the levels of a scheduler.

    Attributes:
        table: the levels and timesteps of the scheduler.
        plan: the run.
        down: for a run upwards of a reversible sampler, the run that it undoes.
        schedule: the levels that were compiled, in the direction of the run.
    """

    table: Timetable
    plan: Plan
    down: Plan | None
    schedule: Tensor

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """The level of each evaluation."""
        return self.plan.stage_levels

    @cached_property
    def timesteps(self) -> list[float]:
        """The network's time in each evaluation."""
        return [self.table.timestep(level) for level in self.levels]

    @cached_property
    def starts(self) -> dict[int, int]:
        """The number of each evaluation that begins a step, and the number of the step."""
        starts: dict[int, int] = {}
        count = 0
        for i, step in enumerate(self.plan.steps):
            starts.setdefault(count, i)  # a step without evaluations goes before the next
            count += len(step.stages)
        return {k: i for k, i in starts.items() if k < count}

    @cached_property
    def order(self) -> int:
        """Evaluations of most steps."""
        return statistics.mode(len(step.stages) for step in self.plan.steps if step.stages)

    @cached_property
    def first_scale(self) -> float:
        """The factor from the first state to the input of the first evaluation.

        Raises:
            ValueError: they differ by more than a factor.
        """
        known = {name: 1.0 if name == "x" else 0.0 for name in {"x"} | set(self.plan.steps[0].reads)}
        for step in self.plan.steps:
            form = step.stages[0].input if step.stages else None
            rows = dict([("x", step.x), *step.memory]) if form is None else {"x": form}
            if any(symbol.kind != "state" for row in rows.values() for symbol, _ in row):
                raise ValueError(
                    f"sampler: {self.plan.rule.name} adds noise before its first evaluation, and the network of a "
                    f"pipeline sees the latents as they are; switch it off ({switched_off(self.plan.rule)}), or take "
                    "another sampler"
                )
            known = {name: sum(c * known[str(symbol.key)] for symbol, c in row) for name, row in rows.items()}
            if form is not None:
                break
        return known["x"]

    def begin_at(self, timestep: float) -> int:
        """Return the number of the evaluation that begins a step at a timestep.

        Raises:
            ValueError: there is none.
        """
        for k in self.starts:
            if math.isclose(self.timesteps[k], timestep, rel_tol=1e-6, abs_tol=1e-6):
                return k
        raise ValueError(f"timestep: no step begins at {timestep:g}; those of this run are in scheduler.timesteps")

    def check_begin(self, k: int) -> None:
        """Raise ValueError if a run cannot begin at evaluation k."""
        if k not in self.starts:
            raise ValueError(
                f"begin_index: no step of {self.plan.rule.name} begins at evaluation {k}, but at "
                f"{', '.join(map(str, self.starts))}"
            )

    def fits(self, found: Inversion) -> bool:
        """Tell whether an inversion on these levels leaves out a last step to 0.

        Raises:
            ValueError: it is on other levels, or has embeddings, which a pipeline cannot take up.
        """
        levels = self.table.levels
        above = levels[-1] == 0 and found.sigmas[-1] > 0 and len(found.sigmas) == len(levels) - 1
        same = len(found.sigmas) == len(levels) - above
        if not same or not math.isclose(found.sigmas[0], self.plan.sigmas[0], rel_tol=1e-6):
            raise ValueError(
                f"found: its latent is at level {found.sigmas[0]:g} of {len(found.sigmas)} levels, this scheduler has "
                f"{len(levels)} from {levels[0]:g}; invert on scheduler.schedule, after set_timesteps"
            )
        if found.embeddings:
            raise ValueError("found: it has embeddings for each step, which no pipeline takes; use found.sample(...)")
        return above

    def tail(self, step: int) -> Plan:
        """Return the Plan of the run from one of its steps on.

        Raises:
            ValueError: it makes other evaluations than the whole run makes there.
        """
        if step == 0:
            return self.plan
        rule = self.plan.rule
        inner = rule.rule if isinstance(rule, Flow) else rule
        if isinstance(inner, SHORTENED) and inner.lower_order_final and len(self.plan.steps) >= 15:
            inner = replace(inner, lower_order_final=False)
            rule = replace(rule, rule=inner) if isinstance(rule, Flow) else inner
        rest = compile_plan(rule, _marked(self.plan.sigmas[step:], self.table))
        first = sum(len(done.stages) for done in self.plan.steps[:step])
        if self.down is not None or rest.stage_levels != self.levels[first:]:
            raise ValueError(
                f"sampler: {self.plan.rule.name} begins a run with other evaluations than it makes in the middle, so "
                f"it cannot begin at step {step}; use a sampler of one evaluation a step, such as 'dpmpp_2m'"
            )
        return rest


def check_sampler(rule: Rule, pair: bool) -> None:
    """Refuse samplers that no scheduler can run, whatever the levels.

    Raises:
        ValueError: steps chosen on the way; a sampler of CFG++ that gets no pair.
    """
    if isinstance(rule, DPMAdaptive):
        raise ValueError(f"sampler: {rule.name} chooses its steps on the way, a pipeline beforehand; use 'dpmpp_2m'")
    if compile_plan(rule, (0.9, 0.5, 0.2)).is_guided and not pair:
        raise ValueError(
            f"sampler: {rule.name} needs the guided and the unconditional prediction, and a pipeline combines the two "
            "before it calls the scheduler; use it with ki.sample and a denoiser that returns ki.Guided, or take "
            "another sampler here"
        )


def saved_options(rule: Rule) -> dict[str, Any] | None:
    """Return the plain options that make a rule by its name, or None if they do not."""
    if rule.name not in SAMPLERS:
        return None
    defaults = SAMPLERS[rule.name].options
    options = {name: value for name, value in rule.options.items() if value != defaults[name]}
    is_plain = all(isinstance(value, (bool, int, float, str)) for value in options.values())
    return options if is_plain and sampler(rule.name, **options) == rule else None


def course_for(rule: Rule, table: Timetable, *, up: bool, above_zero: bool, started: bool, own: bool) -> Course:
    """Compile a sampler for the levels of a scheduler.

    Args:
        rule: the sampler.
        table: the levels.
        up: run from the image to the noise.
        above_zero: leave out a last step to 0, as a reversible sampler always does upwards.
        started: the auxiliary state is given; the run takes it up.
        own: the sampler is the scheduler's own method, which the user has chosen already.

    Raises:
        ValueError: a sampler that cannot make this run.
    """
    levels = table.levels
    down = compile_plan(rule, _marked(levels, table))
    if levels[-1] == 0 and (above_zero or (up and down.auxiliary)):
        levels = levels[:-1]
        down = compile_plan(rule, _marked(levels, table))
    plan, undone = down.closed if started else down, None
    if up and down.auxiliary:
        undone = down
        inverse = explicit_inverse(down)
        steps = compile_auxiliary(down.rule, inverse.sigmas[0]), *inverse.steps
        plan = replace(inverse, steps=tuple(replace(step, index=i) for i, step in enumerate(steps)))
        levels = levels[::-1]
    elif up:
        levels = _rising(levels, rule)
        plan = _upwards(rule, levels, down, table)
    elif not uses_evaluations(plan):
        Ready(plan.rule, plan.sigmas, plan).refuse_idle(plan)
    if table.space == "flow" and undone is None and not started and not own:
        check_flow_spread(plan, "flow")
    course = Course(table, plan, undone, _marked(levels, table))
    _check_first(course, started)
    return course


def _upwards(rule: Rule, levels: tuple[float, ...], down: Plan, table: Timetable) -> Plan:
    """Return the Plan of a run upwards, refused for the reasons for which `unsample` refuses it."""
    if not rule.keeps_last:
        raise ValueError(f"sampler: {rule.name} discards its last step, so it cannot run upwards; use 'dpmpp_2m'")
    plan = compile_plan(rule, _marked(levels, table))
    Ready(plan.rule, plan.sigmas, plan).check_unsampling(None, Ready(down.rule, down.sigmas, down))
    return plan


def _rising(levels: tuple[float, ...], rule: Rule) -> tuple[float, ...]:
    """Return the levels upwards, from a small one in place of 0."""
    rising = levels[::-1]
    if rising[0] > 0:
        return rising
    return (UNSEEN if isinstance(rule, DDIMInverse) else min(OFFSET, 0.1 * rising[1]), *rising[1:])


def _marked(levels: tuple[float, ...], table: Timetable) -> Any:
    """Return levels as a tensor that says whether they are flow times."""
    values = torch.tensor(levels, dtype=torch.float64, device="cpu")
    return FlowTimes(values) if table.space == "flow" else values


def _check_first(course: Course, started: bool) -> None:
    """Raise ValueError if the pipeline would show the network something else than the first evaluation wants."""
    if started:  # the latents are the input of the first evaluation
        return
    table, first = course.table, course.plan.sigmas[0]
    scale = course.first_scale * table.to_x(first) / table.to_x(course.levels[0])
    if table.space != "ve" and abs(scale - 1) > 1e-6:
        raise ValueError(
            f"sampler: the first evaluation of {course.plan.rule.name} is at {scale:g} times the latents, and the "
            f"pipelines of this scheduler do not scale them; use a sampler such as 'dpmpp_2m'"
        )
