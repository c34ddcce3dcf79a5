"""Random runs: rules with random options, random Plans, schedules, layouts, guidance and masks; and their tolerance.

A run's tolerance is its own: the reference is computed once more in float64 with each input and output of the denoiser
and each noise changed by the rounding of the run's dtype, in random directions. What that changes in the result is what
rounding may change, so a rule that magnifies rounding has a large tolerance, and there are no false alarms.
"""

from __future__ import annotations

import functools
import math
import os
import random
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from hypothesis import HealthCheck, reject, settings
from hypothesis import strategies as st
from torch import Tensor

import kinvert as ki
from kinvert.engine.eager import run_eager
from kinvert.forms import Form
from kinvert.rules import Rule, StepBuilder
from kinvert.rules.base import options_of

FUZZ = int(os.environ.get("KINVERT_FUZZ", "0"))  # examples of each test; set by tests/fuzz.py
PLANNED = [name for name in ki.SAMPLERS if name != "dpm_adaptive"]  # it has no Plan
MARGIN = 100  # times the spread of a few random directions


def few(examples: int) -> settings:
    """The settings of a random test: so many examples in the suite, and more in `make fuzz`."""
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(max_examples=FUZZ or examples, deadline=None, print_blob=bool(FUZZ), suppress_health_check=checks)


# -- rules -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RandomRule(Rule):
    """Steps of random rows: some values of the state go on unchanged, and some steps evaluate nothing."""

    name: ClassVar[str] = "random_rows"
    ode_order: ClassVar[int] = 0
    seed: int = 0

    def step(self, s: StepBuilder) -> Form:
        r = random.Random(1000 * self.seed + s.index)
        known = [s.x, *(value for name in "abc" if (value := s.recall(name)) is not None)]

        def mixed() -> Form:
            if r.random() < 0.3:
                return r.choice(known)
            values = r.sample(known, r.randint(1, min(4, len(known))))
            weights = [r.uniform(-1, 1) / len(values) for _ in values]
            return sum((w * v for w, v in zip(weights[1:], values[1:], strict=True)), start=weights[0] * values[0])

        for _ in range(r.randrange(4)):
            known.append(s.denoise(mixed(), s.sigma * r.uniform(0.3, 1.0)))
            if r.random() < 0.3:
                known.append(0.3 * s.noise(s.sigma, 0.5 * s.sigma))
        for name in "abc":
            if r.random() < 0.6:
                s.remember(name, mixed())
        return mixed()


def values_of(kind: Any, bounds: Any, default: Any) -> st.SearchStrategy[Any]:
    """Allowed values of an option."""
    if type(None) in typing.get_args(kind):
        return st.none() | values_of(typing.get_args(kind)[0], bounds, default)
    if typing.get_origin(kind) is Literal:
        return st.sampled_from(typing.get_args(kind))
    if kind is bool:
        return st.booleans()
    low, high = max(bounds.get("low", 0.0), -2.0), min(bounds.get("high", 2.0), 5.0)
    if kind is int:
        return st.integers(math.ceil(low), math.floor(high))
    return st.floats(low, high) if kind is float else st.just(default)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    """A sampler of the registry with some options, or a rule of random rows."""
    if draw(st.integers(0, 3)) == 0:
        return RandomRule(draw(st.integers(0, 10**6)))
    entry = ki.SAMPLERS[draw(st.sampled_from(PLANNED))]
    hints, options = typing.get_type_hints(entry.rule), {}
    for f in options_of(entry.rule):
        if f.name not in ("flow", "named") and draw(st.integers(0, 2)) == 0:
            options[f.name] = draw(values_of(hints[f.name], f.metadata, entry.options[f.name]))
    try:
        return ki.sampler(entry.name, **options)
    except (ValueError, TypeError):  # options that exclude each other
        return ki.sampler(entry.name)


@st.composite
def levels(draw: st.DrawFn, up: bool) -> tuple[float, ...]:
    """Noise levels with steps of random size, down and maybe to 0, or up."""
    steps = draw(st.lists(st.floats(0.02, 1.0), min_size=1, max_size=6))
    found = [draw(st.floats(0.5, 50.0))]
    for step in steps:
        found.append(found[-1] * math.exp(-step))
    if not up and draw(st.booleans()):
        found[-1] = 0.0
    return tuple(reversed(found)) if up else tuple(found)


# -- denoisers and states ----------------------------------------------------------------------------------------------
def smooth(x: Tensor, sigma: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """A smooth denoiser of single values, in x's dtype, float32 for half precision."""
    wide = torch.promote_types(x.dtype, torch.float32)
    column = sigma.to(wide).reshape(-1, *(1,) * (x.ndim - 1))
    row = shift.to(wide).reshape(-1, *(1,) * (x.ndim - 1)) if isinstance(shift, Tensor) else shift
    return torch.tanh(x.to(wide) / (1 + column**2) + 0.3 * row) + 0.1 * row


class Answering:
    """A denoiser that returns new tensors, views of larger ones, or a buffer that it uses again, or that keeps its input."""

    def __init__(self, how: str) -> None:
        self.how, self.buffers = how, dict[Any, Tensor]()
        self.kept: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        out = smooth(x, sigma, shift)
        if self.how == "view":
            return torch.stack([out + 1, out], -1)[..., 1]
        if self.how == "scratch":
            return self.buffers.setdefault((out.shape, out.dtype), torch.empty_like(out)).copy_(out)
        if self.how == "kept":
            self.kept.append(x)
        return out


@dataclass(frozen=True)
class Case:
    """One random run."""

    rule: Rule
    sigmas: tuple[float, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    answer: str
    cfg: float
    shared: bool
    masked: bool
    watched: bool
    max_batch: int | None
    seed: int

    @functools.cached_property
    def plan(self) -> ki.Plan:
        return ki.compile_plan(self.rule, self.sigmas)

    @property
    def pair(self) -> bool:
        return self.plan.is_guided

    def tensor(self, what: str, *shape: int) -> Tensor:
        """Random numbers of a name, in float64."""
        g = torch.Generator().manual_seed(hash_of(self.seed, what))
        return torch.randn(shape or self.shape, generator=g, dtype=torch.float64)

    @property
    def x(self) -> Tensor:
        x = (math.hypot(1.0, self.sigmas[0]) * self.tensor("x")).to(self.dtype)
        return laid(x, self.layout)

    @property
    def shifts(self) -> dict[str, Tensor | float]:
        """The conditioning of both branches: a number for all samples, or one for each."""
        if self.shared:
            return {"positive": 0.7, "negative": -0.4}
        return {name: self.tensor(name, self.shape[0]).to(self.wide) for name in ("positive", "negative")}

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def noise(self, rows: slice = slice(None)) -> Callable[[float, float], Tensor]:
        """Noise that depends on the interval alone."""
        return lambda a, b: self.tensor(f"{a:.12g} {b:.12g}")[rows].to(self.dtype)

    def options(self, rows: slice = slice(None)) -> dict[str, Any]:
        """Guidance and mask, for the verbs."""
        cut = {k: v[rows] if isinstance(v, Tensor) else v for k, v in self.shifts.items()}
        found: dict[str, Any] = {"cfg": self.cfg, "positive": {"shift": cut["positive"]}}
        found["negative"] = {"shift": cut["negative"]}
        return found

    @property
    def mask(self) -> Tensor:
        space = self.shape[2:] or self.shape[1:]
        return torch.linspace(0, 1, math.prod(space), dtype=torch.float64).reshape(space)

    def by_hand(self, dtype: torch.dtype, nudge: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Any]:
        """The guided and masked denoiser, from its formulas; `nudge` is applied to what goes in and comes out."""
        shifts = {
            k: v.to(torch.promote_types(dtype, torch.float32)) if isinstance(v, Tensor) else v
            for k, v in self.shifts.items()
        }

        def denoiser(x: Tensor, sigma: Tensor) -> Any:
            wide = torch.promote_types(x.dtype, torch.float32)
            x, column = nudge(x), sigma.to(wide).reshape(-1, *(1,) * (x.ndim - 1))
            if self.masked:
                m, z, eps = (v.to(wide) for v in (self.mask, self.tensor("latent"), self.tensor("kept")))
                x = (m * x + (1 - m) * (z + column * eps)).to(x.dtype)
            cond, uncond = (nudge(smooth(x, sigma, shifts[k])) for k in ("positive", "negative"))
            guided = cond if self.cfg == 1 else uncond + self.cfg * (cond - uncond)
            if self.masked:
                guided = m * guided + (1 - m) * z  # the unconditional part stays, as in ComfyUI
            return ki.Guided(nudge(guided), uncond) if self.pair else nudge(guided)

        return denoiser

    def reference(self, dtype: torch.dtype | None = None, nudge: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The rule's own formulas on tensors, without a Plan, by `run_eager`."""
        dtype, nudge = dtype or self.dtype, nudge or (lambda value: value)
        noise = lambda a, b: nudge(self.noise()(a, b).to(dtype))  # noqa: E731
        return run_eager(self.rule, self.by_hand(dtype, nudge), self.x.contiguous().to(dtype), self.sigmas, noise)

    @functools.cached_property
    def tolerance(self) -> float:
        """What rounding may change in the result."""
        want, g = self.reference(torch.float64), torch.Generator().manual_seed(self.seed)
        eps = torch.finfo(self.dtype).eps

        def nudge(value: Tensor) -> Tensor:
            signs = 2.0 * torch.rand(value.shape, generator=g, dtype=torch.float64) - 1
            return value + eps * float(value.abs().max()) * signs

        spread = max(float((self.reference(torch.float64, nudge) - want).abs().max()) for _ in range(3))
        return MARGIN * (spread + eps * float(want.abs().max()))


def hash_of(seed: int, what: str) -> int:
    """A seed for a name."""
    return random.Random(f"{seed} {what}").getrandbits(40)


def laid(x: Tensor, layout: str) -> Tensor:
    """The same values, with other strides."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "spread":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Runs that can be: a rule that refuses a schedule says so by a ValueError, and is left out."""
    rule, up = draw(rules()), draw(st.booleans())
    case = Case(
        rule,
        draw(levels(up and not isinstance(rule, RandomRule))),
        draw(st.sampled_from([(1, 3), (2, 3), (3, 2, 5), (2, 2, 3, 4), (5, 7)])),
        draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])),
        draw(st.sampled_from(["plain", "transposed", "spread", "expanded"])),
        draw(st.sampled_from(["new", "view", "scratch", "kept"])),
        draw(st.sampled_from([1.0, 0.0, 2.5, -1.0])),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([None, 1, 2])),
        draw(st.integers(0, 10**6)),
    )
    try:
        draws, start = case.plan.draws, case.x
    except ValueError:
        reject()
    assert draws >= 0 and start.shape == case.shape
    return case
