r"""A guidance scale for each step of a schedule, as a function of the noise level.

A denoiser is told its noise level, not the number of the step. So an evaluation takes the scale of the step whose
interval contains its level; at a level where two steps meet, the scale of the step that starts there. Stages inside a
step have the scale of the step. A stage at the end of a step (Heun's second one) has the scale of the next step. Thus
the guided denoiser is one function of x and sigma, the same for every sampler, and for `invert` as for `sample`.

A run upwards goes through the same steps in reverse order: `unsample` takes a step up with the scale of the step down
that it undoes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kinvert.checks import is_number
from kinvert.devices import widest

__all__ = ["Cfg", "StepCfg", "kept_cfg", "step_cfg"]

Cfg = float | Sequence[float] | Callable[[Tensor], Tensor]
"""A guidance scale; one for each step; or a function of sigma, shape (batch,), that returns one for each sample."""

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


def step_cfg(cfg: Any, sigmas: Sequence[float], run: Sequence[float] | None = None) -> Any:
    """Turn a `cfg` with one entry for each step of a schedule into a function of the noise level.

    Args:
        cfg: a sequence, a 1-D array or tensor of `len(sigmas) - 1` scales, the first for the noisiest step. Anything
            else, such as a number, is returned as it is. Equal scales become one number.
        sigmas: the decreasing sampling schedule.
        run: the levels of the run if they differ from `sigmas`, as in `unsample`: rising, without steps at the noisy
            end.

    Raises:
        ValueError: another number of scales than steps, a scale that is not finite.
        TypeError: scales that are not numbers.
    """
    if isinstance(cfg, str) or not hasattr(cfg, "__len__") or (isinstance(cfg, Tensor) and not cfg.ndim):
        return cfg
    values = cfg.tolist() if hasattr(cfg, "tolist") else list(cfg)
    steps = len(sigmas) - 1
    if len(values) != steps:
        raise ValueError(
            f"cfg must be a number, or have one for each of the {steps} steps of sigmas, got {len(values)}; the first "
            "is for the noisiest step"
        )
    for value in values:
        if not is_number(value):
            raise TypeError(f"cfg must be made of Python numbers, got {value!r} for a step; pass floats, e.g. 7.5")
        if not math.isfinite(value):
            raise ValueError(f"cfg must be finite, got {value} for a step; 1 turns guidance off")
    levels = tuple(sigmas) if run is None else tuple(run)
    values = [float(value) for value in values[steps + 1 - len(levels) :]]
    if len(set(values)) == 1:
        return values[0]
    return StepCfg(tuple(values[::-1]), tuple(sorted(levels))[1:-1], from_below=levels[0] < levels[-1])


def kept_cfg(cfg: Any, steps: int) -> Any:
    """Return the entries of a `cfg` for the last `steps` steps of its schedule."""
    return cfg[-steps:] if hasattr(cfg, "__len__") and not isinstance(cfg, str) else cfg
