r"""The two classes of every sampler: `Rule`, and `StepBuilder`, which is one step of a schedule as a rule sees it.

Notation of every rule: variance-exploding coordinates `x = x0 + sigma * eps`, `D = D(x, sigma)` the denoised image,
`d = (x - D) / sigma` the slope `dx/dsigma` of the probability-flow ODE, `q = sigma_next / sigma`, and a prime for
the value at the end of the step. `interpolate(x, D, q) = q x + (1 - q) D` is both the Euler step in sigma and the
exponential Euler step in `log sigma` (DDIM).
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Literal, NoReturn, Self, get_args, get_origin, get_type_hints

from kinvert.checks import is_integer, is_number, unknown
from kinvert.forms import Denoised, Form, Noise, State, Uncond

__all__ = [
    "TRIAL",
    "OneStep",
    "Rule",
    "StepBuilder",
    "final_order",
    "interpolate",
    "option",
    "options_of",
    "quiet_rule",
    "slope",
    "switched_off",
    "weighted_sum",
]

TRIAL = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Falling noise levels, valid as flow times too, on which a rule shows whether it draws noise."""


class StepBuilder(ABC):
    """One step of a schedule as a rule sees it: the noise levels, the state, and what the rule may ask for.

    Attributes:
        index: number `i` of the step, from 0.
        sigmas: all noise levels of the run; the step goes from `sigmas[i]` to `sigmas[i + 1]`.
        sigma: `sigmas[i]`.
        sigma_next: `sigmas[i + 1]`.
        steps: number of steps of the run.
        x: the state at `sigma`.
        memory: the values that the step before remembered, and x, by name.
        remembered: the values that this step remembers, by name.
        retraces: whether the step goes back along noise that is known, as in a coupling of a step down and a step up.
            Then a rising step of an SDE has the noise of the falling one, and is no error.

    The states are linear forms while a rule is compiled, and tensors when it is run eagerly. A rule cannot tell which.
    """

    retraces: bool = False

    def __init__(self, sigmas: Sequence[float], index: int, memory: dict[str, Form]) -> None:
        self.sigmas = sigmas
        self.index = index
        self.sigma = sigmas[index]
        self.sigma_next = sigmas[index + 1]
        self.steps = len(sigmas) - 1
        self.x = memory["x"]
        self.memory = memory
        self.remembered: dict[str, Form] = {}

    @abstractmethod
    def denoise(self, x: Form, sigma: float) -> Form:
        """Evaluate the denoiser at the state `x` with noise level `sigma` > 0."""

    @abstractmethod
    def denoise_guided(self, x: Form, sigma: float) -> tuple[Form, Form]:
        """Evaluate the denoiser once for the pair (guided, unconditional) that CFG++ samplers need."""

    @abstractmethod
    def noise(self, sigma_from: float, sigma_to: float) -> Form:
        """Draw the unit-variance noise that belongs to the interval from `sigma_from` to `sigma_to`."""

    def recall(self, name: str) -> Form | None:
        """Return the value that the step before remembered as `name`, or None."""
        return self.memory.get(name)

    def remember(self, name: str, value: Form) -> None:
        """Keep `value` for the next step. A value that the next step does not remember again is lost after it."""
        self.remembered[name] = value

    def history(self, name: str, value: Form, length: int) -> list[Form]:
        """Add `value` to the history `name`, and return its newest values, at most `length`, newest first."""
        values = [value]
        while len(values) < length and (old := self.recall(f"{name}[-{len(values)}]")) is not None:
            values.append(old)
        for age, kept in enumerate(values[: length - 1], start=1):
            self.remember(f"{name}[-{age}]", kept)
        return values


class OneStep(StepBuilder):
    """A step of its own between two noise levels, made by a rule that another rule wraps.

    Args:
        outer: the step of the other rule, which evaluates and draws.
        x: the state at `sigma`.
        sigma, sigma_next: the noise levels.
        path: for a step that goes back, the `noises` of the step there. Backwards the noise n of an interval is -n.

    Attributes:
        noises: what was drawn, by interval.
    """

    def __init__(
        self,
        outer: StepBuilder,
        x: Form,
        sigma: float,
        sigma_next: float,
        path: Mapping[tuple[float, float], Form] | None = None,
    ) -> None:
        super().__init__((sigma, sigma_next), 0, {"x": x})
        self._outer = outer
        self._path = path or {}
        self.retraces = path is not None
        self.noises: dict[tuple[float, float], Form] = {}

    def denoise(self, x: Form, sigma: float) -> Form:
        return self._outer.denoise(x, sigma)

    def denoise_guided(self, x: Form, sigma: float) -> tuple[Form, Form]:
        return self._outer.denoise_guided(x, sigma)

    def noise(self, sigma_from: float, sigma_to: float) -> Form:
        if (known := self._path.get((sigma_to, sigma_from))) is not None:
            return -1.0 * known
        self.noises[sigma_from, sigma_to] = noise = self._outer.noise(sigma_from, sigma_to)
        return noise

    def remember(self, name: str, value: Form) -> NoReturn:
        raise ValueError("it needs a rule that remembers nothing, such as 'euler' or 'heun'")


class _OwnName:
    """The attribute `name` of a rule: on a class its own name, on an instance the name that it was asked for by."""

    def __init__(self, own: str) -> None:
        self.own = own

    def __get__(self, rule: Rule | None, owner: type[Rule]) -> str:
        return self.own if rule is None else rule.named or self.own


@dataclass(frozen=True)
class Rule(ABC):
    """A sampler: how one step follows from linear combinations of states, denoised values and noise.

    A subclass is a frozen dataclass. Its fields are the options: numbers and names, checked when the rule is built. It
    is final and hashable, and it imports no tensors. It declares `name` and `ode_order`, and it may declare
    `default_noise` and `noise_clip`. Evaluations, memory, noise and invertibility are read off its Plan.

    Options of these names mean the same in every rule: `eta`, `s_churn` and `s_noise` scale the noise and switch it off
    at 0, `flow` says that the noise levels are flow times.
    """

    named: str = field(default="", kw_only=True, repr=False, compare=False)
    """The public name that the rule was asked for by, if it is another than the rule's own. Copies keep it."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.__repr__ = Rule.__repr__  # type: ignore[method-assign] # else each dataclass gets one with all fields
        if isinstance(own := vars(cls).get("name"), str):
            setattr(cls, "name", _OwnName(own))  # noqa: B010 - `name` is declared as a property

    @property
    @abstractmethod
    def name(self) -> str:
        """The public name, such as "dpmpp_2m"."""

    @property
    @abstractmethod
    def ode_order(self) -> int:
        """The order of convergence to the probability-flow ODE, with the noise switched off.

        It is the order on smooth grids, whose steps vary slowly in size.
        """

    @property
    def default_noise(self) -> Literal["white", "brownian"]:
        """The kind of noise that a run draws if none is given."""
        return "white"

    @property
    def noise_clip(self) -> float:
        """The number of standard deviations at which noise is clipped, 0 for no clipping.

        A Plan is linear in the noise after clipping.
        """
        return 0.0

    @property
    def options(self) -> dict[str, Any]:
        """The options by name. Those of a rule in `Flow` are the options of the wrapped rule."""
        return {f.name: getattr(self, f.name) for f in options_of(self)}

    @property
    def noise_options(self) -> dict[str, Any]:
        """The options that make noise now, with the values that switch it off, e.g. `{"eta": 0.0}`.

        If a rule has `eta` or `s_churn`, that option is enough: at 0 there is no noise for `s_noise` to scale.
        """
        options = self.options
        switch = next((name for name in ("eta", "s_churn", "s_noise") if name in options), None)
        return {switch: 0.0} if switch and options[switch] else {}

    @property
    def keeps_last(self) -> bool:
        """Whether the result is at the last noise level of the schedule, and not at the level before it."""
        return True

    @property
    def is_in_flow(self) -> bool:
        """Whether the rule takes the noise levels of a schedule as flow times."""
        return self.options.get("flow") is True

    def quiet(self) -> Self:
        """Return this rule with its noise switched off, by `noise_options`; a deterministic rule returns itself.

        Raises:
            ValueError: no option switches the noise off.
        """
        rule = replace(self, **options) if (options := self.noise_options) else self
        if _draws_noise(rule):
            raise ValueError(
                f"{self.name} draws noise, and it has no option that switches it off; take a deterministic sampler "
                "such as 'euler' or 'heun'"
            )
        return rule

    def __repr__(self) -> str:
        """Return the rule with the options that are not at their default."""
        options = [(f.name, getattr(self, f.name), f.default) for f in options_of(self)]
        changed = [f"{name}={value!r}" for name, value, default in options if value != default]
        return f"{type(self).__name__}({', '.join(changed)})"

    @abstractmethod
    def step(self, s: StepBuilder) -> Form:
        """Return the state at `s.sigma_next`."""

    def auxiliary(self, s: StepBuilder) -> dict[str, Form]:
        """Return the auxiliary state that belongs to `s.x` if x is all that is known; most rules have none.

        Auxiliary state is memory that belongs to the latent: a step of an algebraically reversible method takes the
        pair of x and auxiliary state to the next pair. The rule finds it in `s.memory` and remembers it in every step.
        Everything else that such a rule remembers may only save evaluations: a step must be able to do without it.

        Returns:
            The auxiliary values by name, each in the unit of x.
        """
        return {}

    def prepare(self, sigmas: tuple[float, ...]) -> tuple[Rule, tuple[float, ...]]:
        """Return the rule and the noise levels that a run on `sigmas` really has; most rules change neither."""
        return self, sigmas

    def __post_init__(self) -> None:
        hints = _types_of(type(self))
        for f in options_of(self):
            label = f"{type(self).__name__}: {f.name}"
            checked = _check_option(label, getattr(self, f.name), hints[f.name], f.metadata)
            object.__setattr__(self, f.name, checked)  # in the type of the field, so that equal rules are equal


@functools.lru_cache(maxsize=256)
def _types_of(rule: type[Rule]) -> dict[str, Any]:
    """Return the declared types of a rule's fields; evaluating the annotations takes most of the time to build it."""
    return get_type_hints(rule)


def options_of(rule: Rule | type[Rule]) -> tuple[Field[Any], ...]:
    """Return the fields of a rule that are its options."""
    return tuple(f for f in fields(rule) if f.name != "named")


def option(default: Any, *, low: float = -math.inf, high: float = math.inf) -> Any:
    """Declare an option of a rule with the bounds `low <= value <= high`."""
    return field(default=default, metadata={"low": low, "high": high})


def _check_option(label: str, value: Any, kind: Any, bounds: Mapping[str, float]) -> Any:
    """Return `value` in the type `kind` that its field declares.

    Raises:
        TypeError: a value of another type.
        ValueError: a number outside of the bounds, or an unknown name.
    """
    if type(None) in get_args(kind):
        if value is None:
            return None
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            rule, _, name = label.partition(": ")
            raise ValueError(f"{rule}: {unknown(name, value, get_args(kind))}")
        return value
    if kind is Rule:
        if not isinstance(value, Rule):
            raise TypeError(f"{label} must be a Rule, e.g. ki.sampler('dpmpp_2m'), got {value!r}")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError(f"{label} must be True or False, got {value!r}")
        return value
    if not (is_integer(value) if kind is int else is_number(value)):
        raise TypeError(f"{label} must be {'an int' if kind is int else 'a float'}, got {value!r}")
    low, high = bounds.get("low", -math.inf), bounds.get("high", math.inf)
    if not low <= value <= high:  # also refuses nan
        raise ValueError(f"{label} must be a number from {low:g} to {high:g}, got {value!r}")
    return kind(value)


class _TrialStep(StepBuilder):
    """A step on symbols that keeps every form that its rule made."""

    def __init__(self, sigmas: Sequence[float], index: int, memory: dict[str, Form]) -> None:
        super().__init__(sigmas, index, memory)
        self.inputs: list[Form] = []
        self.draws = 0

    def denoise(self, x: Form, sigma: float) -> Form:
        self.inputs.append(x)
        return Form.of(Denoised(len(self.inputs)))

    def denoise_guided(self, x: Form, sigma: float) -> tuple[Form, Form]:
        return self.denoise(x, sigma), Form.of(Uncond(len(self.inputs)))

    def noise(self, sigma_from: float, sigma_to: float) -> Form:
        self.draws += 1
        return Form.of(Noise(self.draws))


def _draws_noise(rule: Rule) -> bool:
    """Tell whether noise enters a run of the rule on `TRIAL`; False if it cannot run there."""
    memory = {"x": Form.of(State("x"))}
    for index in range(len(TRIAL) - 1):
        step = _TrialStep(TRIAL, index, memory)
        try:
            if index == 0:
                step.memory = {**memory, **rule.auxiliary(step)}
            x = rule.step(step)
        except (ArithmeticError, ValueError):  # compiling the rule says what is wrong
            return False
        memory = {**step.remembered, "x": x}
        if any(symbol.kind == "noise" for form in (*step.inputs, *memory.values()) for symbol, _ in form):
            return True
    return False


def quiet_rule(rule: Rule) -> dict[str, Any]:
    """Return `{"rule": ...}`, a wrapped rule with its noise switched off; {} if it draws none, or has no switch."""
    try:
        quiet = rule.quiet()
    except ValueError:  # `quiet` of the rule around it says so
        return {}
    return {} if quiet is rule else {"rule": quiet}


def switched_off(rule: Rule) -> str:
    """Return how the options are written that switch a rule's noise off, e.g. "eta=0"; "" if there are none."""
    options = rule.noise_options.items()
    return ", ".join(f"{name}={value:g}" if is_number(value) else f"{name}={value!r}" for name, value in options)


def slope(x: Form, denoised: Form, sigma: float) -> Form:
    """Return `d = (x - D) / sigma`, the slope dx/dsigma of the probability-flow ODE."""
    return (x - denoised) / sigma


def weighted_sum(base: Form, weights: Iterable[float], values: Iterable[Form]) -> Form:
    """Return `base + sum_j weights_j values_j`, for as many weights as there are values."""
    for weight, value in zip(weights, values, strict=True):
        base = base.add(value, alpha=weight)
    return base


def final_order(s: StepBuilder, order: int, lower: bool) -> int:
    """Return the order of a multistep rule in this step, given its option `lower_order_final`.

    If `lower` is true, runs of fewer than 15 steps end with the orders ..., 3, 2, 1, as in diffusers' DPM-Solver and
    DEIS schedulers. This keeps the last steps of short runs from overshooting.
    """
    return min(order, s.steps - s.index) if lower and s.steps < 15 else order


def interpolate(x: Form, denoised: Form, q: float) -> Form:
    """Return `q x + (1 - q) D`, the Euler (DDIM) step to noise level `q * sigma`; exactly `D` at `q = 0`."""
    return q * x + (1.0 - q) * denoised
