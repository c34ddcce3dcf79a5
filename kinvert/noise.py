r"""Noise sources for stochastic samplers.

A source is called as `noise(sigma_from, sigma_to)` and returns a tensor of x's shape with unit variance, the noise of
that interval. The sources of this module are specifications: `bind(x)` gives the callable for one run on x's shape,
dtype and device, and starts the same stream every time, so that one source used twice gives the same noise twice.
Any callable of one's own serves as a source as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

NoiseFunction = Callable[[float, float], Tensor]


@runtime_checkable
class NoiseSource(Protocol):
    """A specification of noise that becomes a `NoiseFunction` once it knows the state."""

    def bind(self, x: Tensor) -> NoiseFunction:
        """The noise function of one run whose state looks like `x`, shape (batch, *event)."""
        ...


Noise = NoiseSource | NoiseFunction


@dataclass(frozen=True)
class White:
    """Independent standard normal noise at every call, whatever the interval. Build it with `white`."""

    seed: int | tuple[int, ...]

    def bind(self, x: Tensor) -> NoiseFunction:
        """A fresh stream of noise like `x`, from the seed."""
        per_sample = isinstance(self.seed, tuple)
        if isinstance(self.seed, tuple) and len(self.seed) != x.shape[0]:
            raise ValueError(
                f"white noise got {len(self.seed)} seeds for a batch of {x.shape[0]}; give one seed, or one per sample"
            )
        seeds = self.seed if isinstance(self.seed, tuple) else (self.seed,)
        generators = [torch.Generator(device=x.device).manual_seed(seed) for seed in seeds]

        def draw(sigma_from: float, sigma_to: float) -> Tensor:
            if not per_sample:
                return torch.randn(x.shape, generator=generators[0], dtype=x.dtype, device=x.device)
            rows = [torch.randn(x.shape[1:], generator=g, dtype=x.dtype, device=x.device) for g in generators]
            return torch.stack(rows)

        return draw


@dataclass(frozen=True, eq=False)
class Replay:
    """Noise tensors played back in order. Build it with `replay`."""

    tensors: tuple[Tensor, ...]

    def bind(self, x: Tensor) -> NoiseFunction:
        """The tensors from the first one on, in x's dtype and on its device."""
        rest = iter(self.tensors)

        def draw(sigma_from: float, sigma_to: float) -> Tensor:
            noise = next(rest, None)
            if noise is None:
                raise ValueError(
                    f"replay ran out of noise at the interval {sigma_from:g} -> {sigma_to:g}: it holds "
                    f"{len(self.tensors)} tensors, the run needs more (compile_plan(...).draws says how many)"
                )
            return noise.to(device=x.device, dtype=x.dtype)

        return draw


def white(seed: int | Sequence[int] | None = None) -> White:
    """Independent standard normal noise, reproducible by seed.

    Args:
        seed: one int for the whole batch, or one int per sample, which makes a sample's noise independent of its
            neighbours. None takes a seed from torch's global generator (`torch.manual_seed` governs it).

    The numbers depend on the device, as torch's generators do.
    """
    if seed is None:
        return White(int(torch.randint(2**63 - 1, ()).item()))
    seeds = (seed,) if isinstance(seed, int) else tuple(seed) if isinstance(seed, Sequence) else (seed,)
    if not seeds or any(isinstance(s, bool) or not isinstance(s, int) for s in seeds) or isinstance(seed, str):
        raise TypeError(f"seed must be an int, a sequence of ints (one per sample) or None, got {seed!r}")
    return White(seed if isinstance(seed, int) else seeds)


def replay(tensors: Sequence[Tensor]) -> Replay:
    """Play back given noise, one tensor per draw, in the order in which the Plan draws (`Step.noises`)."""
    if not isinstance(tensors, Sequence) or not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError(f"replay takes a list of tensors, one per draw, got {type(tensors).__name__}")
    return Replay(tuple(tensors))


def bind(noise: Noise | None, x: Tensor) -> NoiseFunction:
    """The noise function for a run with state `x`; None means white noise seeded by torch's global generator."""
    if noise is None:
        noise = white()
    if isinstance(noise, NoiseSource):
        return noise.bind(x)
    if callable(noise):
        return noise
    raise TypeError(
        f"noise must be a noise source such as ki.noise.white(seed), or a function (sigma_from, sigma_to) -> Tensor; "
        f"got {type(noise).__name__}"
    )
