r"""Facts about a sampler that follow from its Plan alone, without a model.

Two laws hold for a sampler with every denoiser, and both can be read off the rows of its Plan:

* Translation: if the data is one point `m`, then `D = m` everywhere and `x = m` stays there, so the rows sum to 1.
* Marginals: if that point is 0, then `x_i` has variance `sigma_i^2` at every noise level, like the forward process
  `x = x0 + sigma * eps`. A stochastic sampler scales its noise for this.

`D` is constant in both, and linear for data of a normal distribution, so every state is a linear combination of a few
known values, and the laws are exact arithmetic. So is the weak order, how fast the variance tends to that of the data.

`properties` reads the character of a sampler off a reference Plan: cost, memory, noise, and how it can be inverted.
`explicit_inverse` solves the rows of an algebraically reversible Plan for the states before them; the result is another
Plan. `amplification` computes how much such an inverse magnifies rounding errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from kinvert._moved import renamed
from kinvert.forms import Denoised, Form, Noise, State, Symbol, Uncond
from kinvert.plan import Interval, Plan, Stage, Step, compile_plan
from kinvert.rules import Rule
from kinvert.rules import sampler as resolve_sampler

__all__ = [
    "INVERTIBILITY",
    "REFERENCE",
    "Invertibility",
    "Properties",
    "amplification",
    "brownian_covariance",
    "explicit_inverse",
    "marginal_variances",
    "properties",
    "row_sums",
    "weak_order",
]

Invertibility = Literal["explicit", "stepwise", "two-point", "noise", "none"]

INVERTIBILITY: dict[Invertibility, str] = {
    "explicit": "each step is undone in closed form, given the auxiliary state that it carries beside x",
    "stepwise": "each step can be solved for x by itself: it remembers nothing and keeps some of x",
    "two-point": "steps remember values of noisier, still unknown states: the run must be solved as a whole",
    "noise": "the run draws noise: it can be inverted together with its noises only",
    "none": "some step forgets x: many latents give the same image, and none is the latent",
}
"""The values of `Properties.invertibility`, the strongest obstacle last."""

# Ten steps of the schedule of Karras et al. (2022) from sigma 15 to 0.03: longer than the start-up of every sampler.
REFERENCE = tuple((15.0 ** (1 / 7) + i / 10 * (0.03 ** (1 / 7) - 15.0 ** (1 / 7))) ** 7 for i in range(11))


def row_sums(plan: Plan) -> tuple[float, ...]:
    """Return `x / m` after each step if `x = m` at the start and the denoiser always returns `m`; the law is 1.

    Noise is left out, because its mean is 0. The value does not depend on `m`.
    """
    return tuple(_trajectory(plan, 1.0, lambda *_: 1.0, (0.0,) * plan.draws))


def marginal_variances(
    plan: Plan, covariance: Literal["white", "brownian"] = "white", std: float = 0.0
) -> tuple[float, ...]:
    r"""Return `Var x` after each step for data N(0, std^2), whose denoiser is exact, from the exact variance on.

    At sigma that is `std^2 + sigma^2`, `D = std^2 / (std^2 + sigma^2) x`, and every state is a known combination of the
    initial state and the noises: nothing is drawn. For one data point, `std=0`, the law is `sigma_i^2`; otherwise the
    difference is the sampler's error of the variance, which `weak_order` looks at.

    Args:
        plan: from `compile_plan`; of flow times too.
        covariance: of the unit noises of a run. "white": all are independent. "brownian": increments of one path `W`,
            `n(a, b) = (W(b) - W(a)) / sqrt|b - a|`, so that overlapping intervals I and J are correlated,
            `Cov = +-|I n J| / sqrt(|I| |J|)`, negative if they run in opposite directions.
        std: standard deviation of the data.

    Raises:
        ValueError: another covariance; a negative std.
    """
    if covariance not in ("white", "brownian"):
        raise ValueError(f"covariance must be 'white' or 'brownian', got {covariance!r}")
    if not 0 <= std < math.inf:
        raise ValueError(f"std must be finite and 0 or more, got {std}")
    unit = np.eye(1 + plan.draws)  # the initial state, then the draws in order
    cov = unit.copy()
    if covariance == "brownian":
        cov[1:, 1:] = brownian_covariance([interval for step in plan.steps for interval in step.noises])

    def denoise(x: Any, sigma: float) -> Any:
        return _kept(plan, sigma) * std**2 / _variance(plan, sigma, std) * x

    start = math.sqrt(_variance(plan, plan.sigmas[0], std)) * unit[0]
    states = _trajectory(plan, start, denoise, unit[1:])
    return tuple(float(x @ cov @ x) for x in states)


def weak_order(
    sampler: str | Rule, *, std: float = 0.5, steps: Sequence[int] = (80, 160, 320), covariance: str | None = None
) -> float:
    r"""Measure the weak order of a sampler for data N(0, std^2): how fast the error of the variance falls with steps.

    The error is `|Var x / (std^2 + sigma_N^2) - 1|` at the end of the Karras schedule from 10 to 0.1, computed
    without drawing anything, and the order is the slope of its logarithm. A weak order is that of expectations of
    the result; for a sampler without noise it is its order. It is an upper bound: it looks at one expectation.

    Args:
        sampler: a name of `ki.SAMPLERS` (with its default options), or a rule.
        std: of the data; at 0 all errors are 0.
        steps: numbers of steps, at least two.
        covariance: "white" or "brownian"; None takes the rule's own noise.

    Returns:
        The slope; infinity if every error is below 1e-11.

    Raises:
        ValueError: an unknown name; a rule without a Plan; as in `marginal_variances`.
    """
    rule = resolve_sampler(sampler)
    kind: Any = covariance or ("brownian" if rule.default_noise == "brownian" else "white")
    errors = []
    for n in steps:
        ramp = np.linspace(10.0 ** (1 / 7), 0.1 ** (1 / 7), n + 1) ** 7
        plan = compile_plan(rule, ramp.tolist())
        errors.append(abs(marginal_variances(plan, kind, std)[-1] / _variance(plan, plan.sigmas[-1], std) - 1))
    if max(errors) < 1e-11:
        return math.inf
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


def _kept(plan: Plan, sigma: float) -> float:
    """Return the factor of x0 in the state at a level."""
    return 1 - sigma if plan.coordinates == "flow" else 1.0


def _variance(plan: Plan, sigma: float, std: float) -> float:
    """Return the variance of the state at a level, for data of the standard deviation `std`."""
    return (_kept(plan, sigma) * std) ** 2 + sigma**2


def _trajectory(plan: Plan, x: Any, denoise: Callable[[Any, float], Any], noises: Any) -> Iterator[Any]:
    """Yield x after each step; an evaluation, guided or not, of x at sigma returns `denoise(x, sigma)`."""
    state, first, zero = {"x": x}, 0, 0.0 * x
    for step in plan.steps:
        drawn = noises[first : first + len(step.noises)]
        first += len(step.noises)
        values: dict[Symbol, Any] = {State(name): value for name, value in state.items()}
        values |= {Noise(r): value for r, value in enumerate(drawn)}
        for k, stage in enumerate(step.stages):
            values[Denoised(k)] = values[Uncond(k)] = denoise(stage.input.at(values) + zero, stage.sigma) + zero
        state = {name: form.at(values) + zero for name, form in (("x", step.x), *step.memory)}
        yield state["x"]


def brownian_covariance(intervals: Sequence[Interval]) -> np.ndarray:
    """Return the covariance matrix of normalized increments of one Brownian path."""
    a, b = np.array(intervals, dtype=np.float64).reshape(-1, 2).T
    low, high = np.minimum(a, b), np.maximum(a, b)
    overlap = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    scale = np.sign(b - a) * np.sqrt(high - low)
    return np.maximum(overlap, 0.0) / np.outer(scale, scale)


@dataclass(frozen=True)
class Properties:
    """The character of a sampler, as `properties` reads it off Plans on a reference schedule.

    Attributes:
        name: the sampler's public name.
        order: the order of convergence to the probability-flow ODE that the rule declares.
        evaluations_per_step: the largest number of evaluations of the denoiser in a step.
        draws: the largest number of noises that a step draws.
        memory: the largest number of values, besides x, that a step passes to the next.
        guided: whether the denoiser must return a pair `Guided(denoised, uncond)` (CFG++).
        unsamples: whether a run up a schedule depends on the image: it draws no noise, and no step forgets x.
        invertibility: what makes it hard to invert; see `INVERTIBILITY`.
    """

    name: str
    order: int
    evaluations_per_step: int
    draws: int
    memory: int
    guided: bool
    unsamples: bool
    invertibility: Invertibility

    @property
    def stochastic(self) -> bool:
        """Whether a run draws noise."""
        return self.draws > 0

    @property
    def multistep(self) -> bool:
        """Whether steps remember values of earlier steps."""
        return self.memory > 0


@renamed(rule="sampler")
def properties(sampler: str | Rule) -> Properties:
    """Read the properties of a sampler with its options off its Plan on `REFERENCE`, which stops above 0.

    Args:
        sampler: a name of `ki.SAMPLERS` (with its default options), or a rule.

    Raises:
        ValueError: an unknown name, or a rule without a Plan, because it chooses its steps during the run.
    """
    rule = resolve_sampler(sampler)
    plan = compile_plan(rule, REFERENCE)
    return Properties(
        name=rule.name,
        order=rule.ode_order,
        evaluations_per_step=max(len(step.stages) for step in plan.steps),
        draws=max(len(step.noises) for step in plan.steps),
        memory=plan.memory_size,
        guided=plan.is_guided,
        unsamples=not plan.is_stochastic and _unsamples(rule),
        invertibility=_invertibility(plan),
    )


def _unsamples(rule: Rule) -> bool:
    """Tell whether a run up `REFERENCE` depends on the image at its start."""
    try:
        up = compile_plan(rule, REFERENCE[::-1])
    except ValueError:  # on a rising schedule the variance of the noise of an SDE is negative
        return False
    return rule.keeps_last and not up.is_stochastic and not any(step.forgets_x for step in up.steps)


def _invertibility(plan: Plan) -> Invertibility:
    """Return the strongest obstacle to an inversion of a Plan."""
    if any(step.forgets_x for step in plan.steps):
        return "none"
    if plan.is_stochastic:
        return "noise"
    if plan.auxiliary and all(_inverse_step(step, plan.auxiliary) for step in plan.closed.steps):
        return "explicit"
    return "two-point" if plan.is_multistep else "stepwise"


def explicit_inverse(plan: Plan, *, known_noise: bool = False) -> Plan:
    r"""Return the Plan that undoes `plan`: from the final x and auxiliary state to the initial ones, upwards.

    After a step its new values `x', aux'` are known. They are linear combinations of `x, aux` and the evaluations
    `D_k`. If the known combinations add up to the input of some `D_k`, it can be evaluated, and `D_k` is known too.
    When they add up to x and aux, the step is undone. The inverse is exact up to rounding, with every denoiser.

    Args:
        plan: of an algebraically reversible sampler, on a schedule that stops above 0.
        known_noise: accept steps that draw noise. The inverse takes the same noises, so they must be known: it asks for
            those of the last step first, in the order that they have in the step. `invert_reversible` plays them back.

    Returns:
        A Plan for `engine.run_state`, with at most as many evaluations as `plan.closed`.

    Raises:
        ValueError: a step that cannot be undone so; the message names it.
    """
    if not plan.auxiliary:
        raise ValueError(f"{plan.rule.name} carries no auxiliary state to be undone with; use 'o_belm' or 'leapfrog'")
    steps: list[Step] = []
    for step in reversed(plan.closed.steps):
        inverse = _inverse_step(step, plan.auxiliary) if known_noise or not step.noises else None
        if inverse is None:
            unknown = "; it draws noise: use ki.invert(..., noise=...)" * bool(step.noises)
            fix = "; stop above 0, e.g. sigmas[:-1]" if step.sigma_next == 0 else unknown
            raise ValueError(
                f"{plan.rule.name} cannot undo its step from sigma {step.sigma:g} to {step.sigma_next:g}: x and "
                f"{', '.join(plan.auxiliary)} cannot be recovered from what they became{fix}"
            )
        steps.append(replace(inverse, index=len(steps)))
    return replace(plan, sigmas=plan.sigmas[::-1], steps=tuple(steps))


def _inverse_step(step: Step, auxiliary: Sequence[str]) -> Step | None:
    """Return the step back from the new state of `step`, with its noises; None if the rows do not allow it."""
    rows = {"x": step.x, **dict(step.memory)}
    if not rows.keys() >= set(auxiliary):
        return None
    names = ("x", *auxiliary)
    outputs = [[Denoised(k), Uncond(k)] if stage.guided else [Denoised(k)] for k, stage in enumerate(step.stages)]
    span = _Span([*map(State, names), *(symbol for pair in outputs for symbol in pair)])
    for name in names:
        span.add(State(name), rows[name])
    stages: list[Stage] = []
    waiting = dict(enumerate(step.stages))
    while ready := next(((k, f) for k, s in waiting.items() if (f := span.solve(s.input)) is not None), None):
        k, form = ready
        for old, new in zip(outputs[k], (Denoised(len(stages)), Uncond(len(stages))), strict=False):
            span.add(new, Form.of(old))
        stages.append(replace(waiting.pop(k), input=form))
    found = {name: row for name in names if (row := span.solve(Form.of(State(name)))) is not None}
    if len(found) < len(names):
        return None
    x = found.pop("x")
    return Step(step.index, step.sigma_next, step.sigma, tuple(stages), step.noises, x, tuple(found.items()))


class _Span:
    """The space of forms that are linear combinations of known forms, each known by its name, and of noises."""

    def __init__(self, symbols: list[Symbol]) -> None:
        self.symbols = symbols
        self.known: dict[Symbol, np.ndarray] = {}  # without their noises
        self.noises: dict[Symbol, Form] = {}

    def add(self, name: Symbol, form: Form) -> None:
        """Add a known form."""
        self.known[name], self.noises[name] = self._vector(form), _noises_of(form)

    def solve(self, form: Form) -> Form | None:
        """Return `form` as a combination of the names of known forms, and of noises; None if it is none."""
        found = self._solve(self._vector(form))
        if found is None:
            return None
        rest = _noises_of(form)
        for name, c in found:
            rest = rest.add(self.noises[name], -c)
        return found + rest

    def _solve(self, target: np.ndarray) -> Form | None:
        """Return the combination of the known forms' names that is the target up to noises."""
        for name, row in self.known.items():
            if np.array_equal(row, target):
                return Form.of(name)
        matrix = np.stack(list(self.known.values()), axis=1)
        unit = np.abs(matrix).max(axis=1) + np.abs(target)  # of each symbol: their weights differ by orders
        unit[unit == 0.0] = 1.0
        c = np.linalg.lstsq(matrix / unit[:, None], target / unit, rcond=1e-14)[0]
        largest = max(1.0, np.abs(c).max())
        rounding = 1e-13 * np.maximum(largest, np.abs(matrix) @ np.abs(c))
        if (np.abs(matrix @ c - target) > rounding).any():
            return None
        return Form({name: float(v) for name, v in zip(self.known, c, strict=True) if abs(v) > 1e-15 * largest})

    def _vector(self, form: Form) -> np.ndarray:
        return np.array([form[symbol] for symbol in self.symbols])


def _noises_of(form: Form) -> Form:
    """Return the part of a form that is noise."""
    return Form({symbol: c for symbol, c in form if symbol.kind == "noise"})


def amplification(plan: Plan, std: float = math.inf) -> tuple[float, ...]:
    r"""Compute how much the inverse of a reversible Plan magnifies an error, by the level at which the error enters.

    For Gaussian data of standard deviation `std`, with `D = x std^2 / (std^2 + sigma^2)`, a step of the inverse is a
    matrix that acts on x and the auxiliary state. The value at `sigma_i` is the 2-norm of the product of these matrices
    from `sigma_i` up to the noise: 1 at the first level, and the norm of the whole run at the last. The value is
    absolute: rounding at `sigma_i` of a state of size s becomes `eps * s * amplification[i] / sigma_0` of the noise.

    With `std=inf`, the default, the slope is 0. A one-step method then has 1 everywhere, so the value is the growth of
    the method itself, e.g. `p^-2N` for N steps of `edict`. `std=0` is data of one point, for which a run up the ODE
    itself amplifies by `sigma_0 / sigma_N`.

    Returns:
        One value for each level of `plan.sigmas`.

    Raises:
        ValueError: a Plan without an inverse in closed form, see `explicit_inverse`; a negative `std`.
    """
    if not std >= 0:
        raise ValueError(f"std must be 0 or more, got {std}")
    names = ("x", *plan.auxiliary)
    total = np.eye(len(names))
    norms = [1.0]
    for step in reversed(explicit_inverse(plan, known_noise=True).steps):
        values: dict[Symbol, np.ndarray] = {State(n): row for n, row in zip(names, np.eye(len(names)), strict=True)}
        values |= {Noise(r): np.zeros(len(names)) for r in range(len(step.noises))}  # it has no error
        for k, stage in enumerate(step.stages):
            share = 1.0 if math.isinf(std) else std**2 / (std**2 + stage.sigma**2)
            values[Denoised(k)] = values[Uncond(k)] = share * stage.input.at(values)
        rows = {"x": step.x, **dict(step.memory)}
        total = total @ np.stack([rows[name].at(values) for name in names])
        norms.append(float(np.linalg.norm(total, 2)))
    return tuple(norms)
