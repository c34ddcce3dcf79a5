r"""What a sampler is: a `Rule`, and what it sees of the world: a `StepBuilder`.

Notation of every rule: variance-exploding coordinates `x = x0 + sigma * eps`, `D = D(x, sigma)` the denoised image,
`d = (x - D) / sigma` the slope `dx/dsigma` of the probability-flow ODE, `q = sigma_next / sigma`, and a prime for
the value at the end of the step. `interpolate(x, D, q) = q x + (1 - q) D` is at once the Euler step in sigma and the
exponential Euler step in `log sigma` (DDIM).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from kinvert.checks import is_integer, is_number, unknown
from kinvert.forms import Form


class StepBuilder(ABC):
    """One step of a schedule as a rule sees it: the noise levels, the state, and the three things it may ask for.

    Attributes:
        index: number `i` of the step, from 0.
        sigmas: all noise levels of the run; the step goes from `sigmas[i]` to `sigmas[i + 1]`.
        sigma: `sigmas[i]`.
        sigma_next: `sigmas[i + 1]`.
        steps: number of steps of the run.
        x: the state at `sigma`.

    The states are linear forms while a rule is compiled and tensors when it is run eagerly; a rule cannot tell.
    """

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
        """Evaluate the denoiser once for the pair (guided, unconditional), as CFG++ samplers need it."""

    @abstractmethod
    def noise(self, sigma_from: float, sigma_to: float) -> Form:
        """Unit-variance noise that belongs to the interval from `sigma_from` to `sigma_to`."""

    def recall(self, name: str) -> Form | None:
        """The value that the step before remembered as `name`; None if there is none."""
        return self.memory.get(name)

    def remember(self, name: str, value: Form) -> None:
        """Keep `value` for the next step. What is not remembered again is gone."""
        self.remembered[name] = value

    def history(self, name: str, value: Form, length: int) -> list[Form]:
        """Push `value` on the history `name`; returns the up to `length` newest values, newest first."""
        values = [value]
        while len(values) < length and (old := self.recall(f"{name}[-{len(values)}]")) is not None:
            values.append(old)
        for age, kept in enumerate(values[: length - 1], start=1):
            self.remember(f"{name}[-{age}]", kept)
        return values


@dataclass(frozen=True)
class Rule(ABC):
    """A sampler: how one step follows from linear combinations of states, denoised values and noise.

    Subclasses are frozen dataclasses whose fields are the options (numbers and names, checked when built); they are
    final, hashable and import no tensors. `name` is the public name, `ode_order` the order of convergence to the
    probability-flow ODE on smooth grids, whose step varies slowly from one to the next (for stochastic rules: with
    their noise switched off), `default_noise` the kind of noise that it draws unless told otherwise, `noise_clip` at
    how many standard deviations that is clipped (0: nowhere); a Plan is linear in the noise as it comes out of that.
    Everything else, evaluations, memory, noise, invertibility, is read off the Plan.
    """

    name: ClassVar[str]
    ode_order: ClassVar[int]
    default_noise: ClassVar[Literal["white", "brownian"]] = "white"
    noise_clip: ClassVar[float] = 0.0

    named: str = field(default="", kw_only=True, repr=False, compare=False)
    """What the rule was asked for as, where `name` is to be that: a field, so that copies keep it."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.__repr__ = Rule.__repr__  # type: ignore[method-assign] # else every dataclass gets one that lists it all

    def __repr__(self) -> str:
        """The rule with the options that are not at their default."""
        options = [(f.name, getattr(self, f.name), f.default) for f in options_of(self)]
        changed = [f"{name}={value!r}" for name, value, default in options if value != default]
        return f"{type(self).__name__}({', '.join(changed)})"

    @abstractmethod
    def step(self, s: StepBuilder) -> Form:
        """The state at `s.sigma_next`."""

    def auxiliary(self, s: StepBuilder) -> dict[str, Form]:
        """The auxiliary state of `s.x` where x is all that is known, by name, in the unit of x; most rules have none.

        Auxiliary state is memory that belongs to the latent: steps of algebraically reversible methods take the pair
        of x and it to the next pair. The rule finds it in `s.memory` and remembers it in every step. Whatever else it
        remembers must be a saving only, which a step can do without.
        """
        return {}

    def prepare(self, sigmas: tuple[float, ...]) -> tuple[Rule, tuple[float, ...]]:
        """The rule and the noise levels that a run on `sigmas` really has; most rules take the levels as they are."""
        return self, sigmas

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in options_of(self):
            checked = _check_option(
                f"{type(self).__name__}: {f.name}", getattr(self, f.name), hints[f.name], f.metadata
            )
            object.__setattr__(self, f.name, checked)
        self.take_name()

    def take_name(self) -> None:
        """Go by `named`, if that is another name; for a `__post_init__` that does not call this class's."""
        if self.named and self.named != self.name:
            object.__setattr__(self, "name", self.named)
        else:
            object.__setattr__(self, "named", "")  # equal rules are equal


def options_of(rule: Rule | type[Rule]) -> tuple[Field[Any], ...]:
    """The fields of a rule that are its options."""
    return tuple(f for f in fields(rule) if f.name != "named")


def option(default: Any, *, low: float = -math.inf, high: float = math.inf) -> Any:
    """A field of a rule with the bounds `low <= value <= high`."""
    return field(default=default, metadata={"low": low, "high": high})


def _check_option(label: str, value: Any, kind: Any, bounds: Any) -> Any:
    """`value` in the type that the field declares, so that equal rules are equal; an error that names the fix."""
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


def slope(x: Form, denoised: Form, sigma: float) -> Form:
    """`d = (x - D) / sigma`, the slope dx/dsigma of the probability-flow ODE."""
    return (x - denoised) / sigma


def weighted_sum(base: Form, weights: Iterable[float], values: Iterable[Form]) -> Form:
    """`base + sum_j weights_j values_j`, for as many weights as there are values."""
    for weight, value in zip(weights, values, strict=True):
        base = base.add(value, alpha=weight)
    return base


def final_order(s: StepBuilder, order: int, lower: bool) -> int:
    """The order of a multistep rule with `lower_order_final`: in runs of fewer than 15 steps it ends with ..., 3, 2, 1.

    As in diffusers' DPM-Solver and DEIS schedulers; it keeps the last steps of short runs from overshooting.
    """
    return min(order, s.steps - s.index) if lower and s.steps < 15 else order


def interpolate(x: Form, denoised: Form, q: float) -> Form:
    """`q x + (1 - q) D`: the Euler (DDIM) step to noise level `q * sigma`. At `q = 0` it is `D` exactly."""
    return q * x + (1.0 - q) * denoised
