r"""The compiler: it turns a rule and a schedule into a Plan, which contains only numbers.

A Plan is a general linear method with coefficients that depend on the schedule. One step takes the state
`y = (x, memory...)` to

    stages   Y_k = sum_j U_kj y_j + sum_{l<k} A_kl D_l + sum_r N_kr n_r        D_k = denoiser(Y_k, sigma_k)
    update   y'  = V y + B D + C n                                             n_r = noise on an interval of sigma

The compiler runs the rule on linear forms and keeps the forms that come out. So nothing is derived by hand, and
linearity holds by construction. Unused noise and memory are dropped, so they are never drawn or stored. Only a rule's
auxiliary state (`Rule.auxiliary`) is kept to the end, because it belongs to the result as x does.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kinvert._moved import renamed
from kinvert.caches import sized_cache
from kinvert.checks import MOST_STEPS, check_length, describe
from kinvert.forms import Denoised, Form, Noise, State, Symbol, Uncond
from kinvert.plancard import plan_card, plan_line
from kinvert.rules import sampler as resolve_sampler
from kinvert.rules.base import Rule, StepBuilder
from kinvert.rules.identity import code_of
from kinvert.showing.brief import never_fails
from kinvert.showing.html import html_never_fails

__all__ = [
    "Interval",
    "Plan",
    "Stage",
    "Step",
    "as_schedule",
    "compile_auxiliary",
    "compile_plan",
    "compile_step",
]


KEPT = 2**24
"""Bytes of Plans that are cached."""


class Interval(NamedTuple):
    """The piece of the noise path that one draw belongs to, from `sigma_from` to `sigma_to`."""

    sigma_from: float
    sigma_to: float


@dataclass(frozen=True)
class Stage:
    """One evaluation of the denoiser.

    Attributes:
        sigma: the noise level.
        input: the state, as a form.
        guided: whether the evaluation returns a pair (D, U).
    """

    sigma: float
    input: Form
    guided: bool = False


@dataclass(frozen=True)
class Step:
    """One step of a Plan.

    Attributes:
        index: number of the step, from 0.
        sigma: the noise level at its start.
        sigma_next: the noise level at its end.
        stages: its evaluations of the denoiser, in order.
        noises: the intervals of its noises, in the order in which they are drawn.
        x: the row of the update for the new x.
        memory: the names and rows of the values that it remembers.
    """

    index: int
    sigma: float
    sigma_next: float
    stages: tuple[Stage, ...]
    noises: tuple[Interval, ...]
    x: Form
    memory: tuple[tuple[str, Form], ...] = ()

    @property
    def rows(self) -> list[Form]:
        """All rows: the inputs of the evaluations, the new x, and the remembered values."""
        return [*(stage.input for stage in self.stages), self.x, *(form for _, form in self.memory)]

    @functools.cached_property
    def reads(self) -> frozenset[str]:
        """The names of the values of the old state, including x, that the step depends on."""
        return frozenset(str(symbol.key) for row in self.rows for symbol, _ in row if symbol.kind == "state")

    @property
    def forgets_x(self) -> bool:
        """Whether the new x depends on the old state through the denoiser only."""
        return not any(symbol.kind == "state" for symbol, _ in self.x)

    @never_fails
    def __repr__(self) -> str:
        sizes = f"{len(self.stages)} evaluations, {len(self.noises)} noises"
        return f"Step({self.index}: sigma {self.sigma:.4g} to {self.sigma_next:.4g}, {sizes})"

    def __str__(self) -> str:
        lines = [f"step {self.index}: sigma {self.sigma:.6g} -> {self.sigma_next:.6g}"]
        for r, (a, b) in enumerate(self.noises):
            lines.append(f"  n{r} = noise({a:.6g}, {b:.6g})")
        for k, stage in enumerate(self.stages):
            names = f"D{k}, U{k}" if stage.guided else f"D{k}"
            lines.append(f"  {names} = denoiser({stage.input}, {stage.sigma:.6g})")
        lines += [f"  {name}' = {form}" for name, form in (("x", self.x), *self.memory)]
        return "\n".join(lines)


@dataclass(frozen=True)
class Plan:
    """A sampler on a schedule, as coefficients. `print(plan)` shows every row; all of them are plain numbers.

    Attributes:
        rule: the rule that was compiled.
        sigmas: the noise levels, or flow times, of the run.
        steps: its steps.
        auxiliary: the names of the remembered values that belong to the state (`Rule.auxiliary`); mostly empty.
        coordinates: "flow" if the levels are known to be flow times, None if their coordinates are not known.
    """

    rule: Rule
    sigmas: tuple[float, ...]
    steps: tuple[Step, ...]
    auxiliary: tuple[str, ...] = ()
    coordinates: Literal["flow"] | None = None

    @functools.cached_property
    def evaluations(self) -> int:
        """The number of denoiser evaluations of one run."""
        return sum(len(step.stages) for step in self.steps)

    def save(self, path: Path | str) -> None:
        """Write the Plan as JSON that can be read, with exact numbers; `ki.load` returns an equal Plan.

        Raises:
            ValueError: it cannot be written.
        """
        from kinvert.planfile import plan_tree  # which imports this module
        from kinvert.records import write_json

        write_json(path, "plan", plan_tree(self))

    @property
    def stage_levels(self) -> tuple[float, ...]:
        """The noise level of each evaluation of one run, in order."""
        return tuple([stage.sigma for step in self.steps for stage in step.stages])  # a list: torch.compile traces it

    @functools.cached_property
    def draws(self) -> int:
        """The number of noise draws of one run."""
        return sum(len(step.noises) for step in self.steps)

    @functools.cached_property
    def noise_levels(self) -> tuple[float, ...]:
        """The ends of all intervals of noise, sorted."""
        return tuple(sorted({sigma for step in self.steps for interval in step.noises for sigma in interval}))

    @property
    def is_stochastic(self) -> bool:
        """Whether a run draws noise."""
        return self.draws > 0

    @functools.cached_property
    def memory_size(self) -> int:
        """The most values, besides x, that are carried from one step to the next."""
        return max(len(step.memory) for step in self.steps)

    @property
    def is_multistep(self) -> bool:
        """Whether steps remember values of earlier steps."""
        return self.memory_size > 0

    @functools.cached_property
    def is_guided(self) -> bool:
        """Whether the denoiser must return a pair `Guided(denoised, uncond)` (CFG++)."""
        return any(stage.guided for step in self.steps for stage in step.stages)

    @property
    def is_rising(self) -> bool:
        """Whether the noise level rises, as it does when unsampling."""
        return self.sigmas[-1] > self.sigmas[0]

    @functools.cached_property
    def closed(self) -> Plan:
        """The same run for a state whose auxiliary part is given: steps from (x, auxiliary) to (x, auxiliary).

        Each step stands alone, so a run can start at any step, and can be undone step by step. A Plan without auxiliary
        state, or one that is closed already, is returned unchanged.
        """
        if not self.auxiliary or self.steps[0].reads & set(self.auxiliary):
            return self
        known = {name: Form.of(State(name)) for name in ("x", *self.auxiliary)}
        steps = [compile_step(self.rule, self.sigmas, i, known) for i in range(len(self.steps))]
        return replace(self, steps=tuple(kept for step in steps for kept in _prune([step], self.auxiliary)))

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.rule, self.sigmas))  # the steps follow from these two

    @never_fails
    def __repr__(self) -> str:
        """Return the rule and the size of a run in one line."""
        return plan_line(self)

    @html_never_fails
    def _repr_html_(self) -> str:
        return plan_card(self)

    def __str__(self) -> str:
        head = f"{self.rule!r}: {len(self.steps)} steps, {self.evaluations} evaluations, {self.draws} draws of noise"
        return "\n".join([f"{head}, {self.memory_size} remembered values", *map(str, self.steps)])


@renamed(rule="sampler")
def compile_plan(sampler: str | Rule, sigmas: Any) -> Plan:
    """Compile a sampler for a schedule.

    Args:
        sampler: a name of `ki.SAMPLERS`, or a `Rule`. It is compiled unchanged, unless sigmas are flow times
            (`levels.FlowTimes`): then `flow_sampler` gives the rule.
        sigmas: strictly monotone noise levels, decreasing (sampling) or increasing (unsampling); a 1-D tensor, array
            or sequence on any device. The first must be positive, the last may be 0.

    Returns:
        The Plan. For samplers of kinvert equal arguments give the same, cached object. A rule of your own is compiled
        at every call, because its code may have changed, or what its code depends on.

    Raises:
        ValueError: a schedule that is not strictly monotone, not finite or too short; a step that the rule cannot make.
        TypeError: sigmas that are not numbers, or a rule that is not linear.
    """
    rule = resolve_sampler(sampler)
    coordinates: Literal["flow"] | None = None
    if getattr(sigmas, "coordinates", None) == "flow":
        from kinvert.coordinates import flow_sampler  # here, because it tries rules by compiling them

        rule, coordinates = flow_sampler(rule), "flow"
    schedule, code = as_schedule(sigmas), code_of(rule)
    return _compile(rule, schedule, coordinates) if code is None else _compiled(rule, schedule, coordinates, code)


def plan_size(plan: Plan) -> int:
    """Estimate the memory of a Plan, in bytes, from measurements of ten samplers."""
    rows = [row for step in plan.steps for row in step.rows]
    return 128 * (sum(map(len, rows)) + 2 * len(rows) + 2 * len(plan.steps))


@sized_cache(KEPT, lambda plan, *_: plan_size(plan))
def _compiled(
    rule: Rule, sigmas: tuple[float, ...], coordinates: Literal["flow"] | None, code: tuple[object, ...]
) -> Plan:
    """Compile a rule; `code` is part of the cache key only."""
    return _compile(rule, sigmas, coordinates)


def _compile(rule: Rule, sigmas: tuple[float, ...], coordinates: Literal["flow"] | None) -> Plan:
    """Compile a rule."""
    rule, sigmas = rule.prepare(sigmas)
    auxiliary = tuple(name for name, _ in compile_auxiliary(rule, sigmas[0]).memory)
    steps = []
    memory = {"x": Form.of(State("x"))}
    for index in range(len(sigmas) - 1):
        step = compile_step(rule, sigmas, index, memory)
        steps.append(step)
        memory = {name: Form.of(State(name)) for name in ("x", *(name for name, _ in step.memory))}
    plan = Plan(rule, sigmas, _prune(steps, auxiliary), auxiliary, coordinates)
    _ = plan.steps[0].reads, plan.noise_levels, plan.draws  # torch.compile cannot trace their first use
    return plan


def compile_step(rule: Rule, sigmas: Sequence[float], index: int, memory: dict[str, Form]) -> Step:
    """Run the rule on forms for one step; `memory` has the form of x and of each remembered value, by name."""
    tracer = _Tracer(sigmas, index, memory)
    try:
        if index == 0 and len(memory) == 1:
            tracer.memory = {**memory, **rule.auxiliary(tracer)}
        x = rule.step(tracer)
    except (ArithmeticError, ValueError) as error:
        raise ValueError(
            f"{rule.name} cannot step from sigma {tracer.sigma:g} to {tracer.sigma_next:g} (step {index}): {error}"
        ) from error
    if not isinstance(x, Form):
        raise TypeError(f"{type(rule).__name__}.step must return a form (the new x), got {x!r}")
    remembered = tuple(tracer.remembered.items())
    return Step(index, tracer.sigma, tracer.sigma_next, tuple(tracer.stages), tuple(tracer.noises), x, remembered)


def compile_auxiliary(rule: Rule, sigma: float) -> Step:
    """Return the start of the auxiliary state of x at `sigma`, as a step from `sigma` to `sigma` that keeps x."""
    x = Form.of(State("x"))
    tracer = _Tracer((sigma, sigma), 0, {"x": x})
    auxiliary = tuple(rule.auxiliary(tracer).items())
    return Step(0, sigma, sigma, tuple(tracer.stages), tuple(tracer.noises), x, auxiliary)


class _Tracer(StepBuilder):
    """A step that records the requests of a rule and answers with symbols."""

    def __init__(self, sigmas: Sequence[float], index: int, memory: dict[str, Form]) -> None:
        super().__init__(sigmas, index, memory)
        self.stages: list[Stage] = []
        self.noises: list[Interval] = []

    def denoise(self, x: Form, sigma: float) -> Form:
        self._evaluate(x, sigma, guided=False)
        return Form.of(Denoised(len(self.stages) - 1))

    def denoise_guided(self, x: Form, sigma: float) -> tuple[Form, Form]:
        self._evaluate(x, sigma, guided=True)
        k = len(self.stages) - 1
        return Form.of(Denoised(k)), Form.of(Uncond(k))

    def _evaluate(self, x: Form, sigma: float, guided: bool) -> None:
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"it evaluates the denoiser at sigma = {sigma:g}, which must be positive and finite")
        self.stages.append(Stage(float(sigma), x, guided))

    def noise(self, sigma_from: float, sigma_to: float) -> Form:
        self.noises.append(Interval(float(sigma_from), float(sigma_to)))
        return Form.of(Noise(len(self.noises) - 1))


def _prune(steps: list[Step], keep: Iterable[str]) -> tuple[Step, ...]:
    """Drop remembered values and noises that nothing later depends on; keep the values `keep` after the last step."""
    needed = set(keep)  # the remembered values that the following step uses
    pruned = []
    for step in reversed(steps):
        memory = tuple((name, form) for name, form in step.memory if name in needed)
        used = {symbol for stage in step.stages for symbol in stage.input.terms} | step.x.terms.keys()
        used.update(*(form.terms for _, form in memory))
        kept = [r for r in range(len(step.noises)) if Noise(r) in used]
        if len(kept) < len(step.noises):
            names = {Noise(old): Noise(new) for new, old in enumerate(kept)}
            step = replace(  # noqa: PLW2901
                step,
                noises=tuple(step.noises[r] for r in kept),
                stages=tuple(replace(stage, input=_rename(stage.input, names)) for stage in step.stages),
                x=_rename(step.x, names),
            )
            memory = tuple((name, _rename(form, names)) for name, form in memory)
        pruned.append(step if memory == step.memory else replace(step, memory=memory))
        needed = {str(symbol.key) for symbol in used if symbol.kind == "state"}
    return tuple(reversed(pruned))


def _rename(form: Form, names: dict[Symbol, Symbol]) -> Form:
    """Return the form with its symbols replaced by `names`."""
    if all(old == new for old, new in names.items()):
        return form
    return Form({names.get(symbol, symbol): c for symbol, c in form})


def as_schedule(sigmas: Any) -> tuple[float, ...]:
    """Check a schedule and return it as floats on the host; see `compile_plan`."""
    check_length("sigmas", sigmas)
    try:
        values = sigmas.tolist() if hasattr(sigmas, "tolist") else sigmas
    except (RuntimeError, NotImplementedError, AttributeError):  # the last is torch 2.4 for a fake tensor
        raise TypeError(
            f"sigmas must have values that can be read, got {describe(sigmas)}; give a dense tensor on a real device "
            "(not on meta, not fake), or a list of floats"
        ) from None
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"sigmas must be a 1-D sequence of noise levels, got {describe(sigmas)}")
    values = list(itertools.islice(values, MOST_STEPS + 2))  # a generator may never end
    check_length("sigmas", values)
    try:
        levels = tuple(_number(v) for v in values)
    except (TypeError, ValueError, RuntimeError):
        hint = f"; pass it as it is, not in a {type(sigmas).__name__}" if len(values) == 1 else ""
        raise TypeError(f"sigmas must be a 1-D sequence of real numbers, got {describe(sigmas)}{hint}") from None
    if len(levels) < 2:
        raise ValueError(f"sigmas must have at least two noise levels (one step), got {levels}")
    for i, sigma in enumerate(levels):
        if not (math.isfinite(sigma) and sigma >= 0):
            raise ValueError(f"sigmas must be finite and not negative, got sigmas[{i}] = {sigma}; drop that entry")
    _check_monotone(levels)
    if levels[0] == 0:
        raise ValueError(
            "sigmas start at 0, where the slope (x - D)/sigma is undefined; start a rising schedule above it, e.g. at "
            "1e-4 (unsample does this by sigma_offset)"
        )
    return levels


def _number(value: Any) -> float:
    """Convert one noise level to a float; TypeError for text and bools."""
    if isinstance(value, (str, bytes, bool)):
        raise TypeError
    return float(value)


def _check_monotone(levels: tuple[float, ...]) -> None:
    """Raise ValueError if noise levels are not strictly monotone."""
    rising = levels[-1] > levels[0]
    for i, (a, b) in enumerate(itertools.pairwise(levels)):
        if a == b:
            raise ValueError(
                f"sigmas must be strictly monotone, got the same value twice, sigmas[{i}] = sigmas[{i + 1}] = {a:g}; "
                "drop the repeated ones, torch.unique_consecutive(sigmas)"
            )
        if (b > a) != rising:
            raise ValueError(
                f"sigmas must be strictly monotone, got sigmas[{i}] = {a:g} -> sigmas[{i + 1}] = {b:g} in a "
                f"{'rising' if rising else 'falling'} schedule; sort them, e.g. sigmas.sort(descending=True).values"
            )
