r"""What `cfg` may be: a number, one for each step, a function of sigma, or a function of the two predictions.

A denoiser is told its noise level, not the number of the step. So an evaluation takes the entry of the step whose
interval contains its level; at a level where two steps meet, that of the step that starts there. Stages inside a step
have the entry of the step. A stage at the end of a step (Heun's second one) has that of the next step. Thus the guided
denoiser is one function of x and sigma, the same for every sampler, and for `invert` as for `sample`.

A run upwards goes through the same steps in reverse order: `unsample` takes a step up with the entry of the step down
that it undoes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kinvert.checks import describe, is_number
from kinvert.denoisers.branches import Branches, Combination, Combine, Function, Model
from kinvert.denoisers.protocol import expand
from kinvert.devices import widest

__all__ = [
    "Cfg",
    "Linear",
    "PerStep",
    "StepCfg",
    "as_combination",
    "kept_cfg",
    "refuse_history",
    "settled_cfg",
    "step_cfg",
]

Cfg = float | Combination | Callable[[Tensor], Tensor] | Combine | Sequence[float | Combination | Combine]
"""A guidance scale; a function of sigma, shape (batch,), that returns one for each sample; a `kinvert.guidance`, or a
function `(cond, uncond, sigma) -> denoised`; or a sequence with a scale or a function for each step."""

# Levels have the precision of the run: a level that is relatively this close to where two steps meet counts as there.
NEAR = 1e-6


@dataclass(frozen=True, eq=False)
class StepCfg:
    """The guidance scale at a noise level: `values[k]` between the rising levels `edges[k - 1]` and `edges[k]`.

    Attributes:
        values: one for each step, from the lowest noise level up.
        edges: the levels where steps meet, rising, one fewer than values.
        from_below: whether the level of an edge belongs to the step above it, as in a run upwards.
    """

    values: tuple[float, ...]
    edges: tuple[float, ...]
    from_below: bool = False
    _buffers: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, sigma: Tensor) -> Tensor:
        """Return the scales at `sigma`, shape (batch,), without reading the device."""
        values, edges = self._on(sigma)
        return values[torch.bucketize(sigma.to(edges.dtype).contiguous(), edges, right=self.from_below)]

    def _on(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return values and edges on the device of `sigma`; they are copied once."""
        if sigma.device not in self._buffers:
            wide = widest(sigma.device)
            near = 1.0 - NEAR if self.from_below else 1.0 + NEAR
            with torch.inference_mode(False):  # what is cached must serve autograd later
                self._buffers[sigma.device] = (
                    torch.tensor(self.values, dtype=wide, device=sigma.device),
                    torch.tensor([near * edge for edge in self.edges], dtype=wide, device=sigma.device),
                )
        return self._buffers[sigma.device]


@dataclass(frozen=True)
class Linear(Combination):
    """Plain guidance, `U + w (C - U)`, the same in every kind of prediction; w a number or a function of sigma."""

    scale: float | Callable[[Tensor], Tensor]

    def combine(self, branches: Branches) -> Tensor:
        """See `Combination`."""
        if not callable(self.scale):
            return torch.lerp(branches.uncond, branches.cond, self.scale)
        scale: Any = self.scale(branches.sigma)
        if not isinstance(scale, Tensor) or scale.shape != branches.sigma.shape:
            want = tuple(branches.sigma.shape)
            raise TypeError(f"cfg(sigma) must return a scale for each sample, shape {want}, got {describe(scale)}")
        return torch.lerp(branches.uncond, branches.cond, expand(scale, branches.cond).to(branches.cond.dtype))


@dataclass(frozen=True, eq=False)
class PerStep(Combination):
    """Another combination in every step.

    Attributes:
        functions: the different ones.
        which: the place in `functions` at a noise level.
    """

    functions: tuple[Combination, ...]
    which: StepCfg

    @property
    def stateful(self) -> bool:
        """See `Combination`."""
        return any(function.stateful for function in self.functions)

    def combine(self, branches: Branches) -> Tensor:
        """Compute all of them, and take for each sample that of its level: no value of sigma is read."""
        place = expand(self.which(branches.sigma), branches.cond)
        guided = self.functions[0].combine(branches)
        for k, function in enumerate(self.functions[1:], 1):
            guided = torch.where(place == k, function.combine(branches), guided)
        return guided

    def check(self, model: Model, pair: bool) -> None:
        """See `Combination`."""
        for function in self.functions:
            function.check(model, pair)


def step_cfg(cfg: Any, sigmas: Sequence[float], run: Sequence[float] | None = None) -> Any:
    """Turn a `cfg` with one entry for each step of a schedule into a function of the noise level.

    Args:
        cfg: a sequence, a 1-D array or tensor of `len(sigmas) - 1` scales, the first for the noisiest step; a list or
            tuple may have functions `(cond, uncond, sigma) -> denoised` among them. Anything else, such as a number, is
            returned as it is. Equal entries become one.
        sigmas: the decreasing sampling schedule.
        run: the levels of the run if they differ from `sigmas`, as in `unsample`: rising, without steps at the noisy
            end.

    Raises:
        ValueError: another number of entries than steps, a scale that is not finite.
        TypeError: entries that are neither numbers nor such functions.
    """
    if not _is_for_steps(cfg):
        return cfg
    values = cfg.tolist() if hasattr(cfg, "tolist") else list(cfg)
    steps = len(sigmas) - 1
    if len(values) != steps:
        raise ValueError(
            f"cfg must be a number, or have one for each of the {steps} steps of sigmas, got {len(values)}; the first "
            "is for the noisiest step"
        )
    values = [_entry(value) for value in values]
    levels = tuple(sigmas) if run is None else tuple(run)
    values = values[steps + 1 - len(levels) :][::-1]
    edges, from_below = tuple(sorted(levels))[1:-1], levels[0] < levels[-1]
    if all(value == values[0] for value in values):
        return values[0]
    if not any(isinstance(value, Combination) for value in values):
        return StepCfg(tuple(values), edges, from_below)
    scales = StepCfg(tuple(1.0 if isinstance(v, Combination) else v for v in values), edges, from_below)
    functions: list[Combination] = []
    for value in values:
        if isinstance(value, Combination) and value not in functions:
            functions.append(value)
    which = tuple(float(functions.index(v)) if isinstance(v, Combination) else -1.0 for v in values)
    if -1.0 in which:
        functions.insert(0, Linear(scales))
        which = tuple(k + 1 for k in which)
    return PerStep(tuple(functions), StepCfg(which, edges, from_below))


def _is_for_steps(cfg: Any) -> bool:
    several = hasattr(cfg, "__len__") and not isinstance(cfg, str) and not callable(cfg)
    return several and not (isinstance(cfg, Tensor) and not cfg.ndim)


def _entry(value: Any) -> float | Combination:
    """Return the checked entry for a step."""
    if callable(value) or isinstance(value, Combination):
        found = settled_cfg(value)
        if isinstance(found, Combination):
            return found
        raise TypeError(
            f"cfg has a function of sigma alone for a step, {value!r}; give a number, or a function (cond, uncond, "
            "sigma) -> denoised"
        )
    if not is_number(value):
        raise TypeError(f"cfg must be made of Python numbers, got {value!r} for a step; pass floats, e.g. 7.5")
    if not math.isfinite(value):
        raise ValueError(f"cfg must be finite, got {value} for a step; 1 turns guidance off")
    return float(value)


def kept_cfg(cfg: Any, steps: int) -> Any:
    """Return the entries of a `cfg` for the last `steps` steps of its schedule."""
    return cfg[-steps:] if _is_for_steps(cfg) else cfg


def settled_cfg(cfg: Any) -> Any:
    """Return a function of the two predictions as a `Combination`; what else `cfg` may be is returned as it is.

    Raises:
        TypeError: a function that takes neither sigma alone nor `cond, uncond, sigma`.
    """
    if not callable(cfg) or isinstance(cfg, (Combination, StepCfg)) or _takes(cfg) == 1:
        return cfg
    return Function(cfg, stateful=bool(getattr(cfg, "stateful", False)))


def _takes(function: Callable[..., Any]) -> int:
    """Return how many arguments a function takes, 1 or 3."""
    fix = "it must be cfg(sigma) -> scales, or cfg(cond, uncond, sigma) -> denoised; wrap it in a lambda of that form"
    called = getattr(function, "forward", function)  # what a network takes stands there
    try:
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):
        raise TypeError(f"cfg is {function!r}, of which Python does not know the arguments; {fix}") from None
    given = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is p.empty for p in given)
    keywords = any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters) or keywords or needed > 3 or not given:
        raise TypeError(f"cfg is a function with the arguments {inspect.signature(called)}; {fix}")
    if needed <= 1:
        return 1
    if len(given) < 3:
        raise TypeError(f"cfg is a function with the arguments {inspect.signature(called)}; {fix}")
    return 3


def as_combination(cfg: Any) -> Combination:
    """Return a scale or a function as the combination that it stands for."""
    found = settled_cfg(cfg)
    return found if isinstance(found, Combination) else Linear(found)


def _parts(cfg: Any) -> Iterator[Any]:
    yield from cfg if isinstance(cfg, (list, tuple)) else [cfg]


def refuse_history(cfg: Any, verb: str, why: str) -> None:
    """Raise ValueError if a `cfg` says that it depends on earlier evaluations.

    Args:
        cfg: as the verb was given it.
        verb: its name.
        why: what it does that does not go with such a function.
    """
    for part in _parts(cfg):
        if getattr(part, "stateful", False):
            raise ValueError(
                f"{verb} cannot take cfg={part!r}: it depends on earlier evaluations (stateful=True), and {verb} "
                f"{why}. Use a function of (cond, uncond, sigma) alone; a noise level stands for the number of a step"
            )
