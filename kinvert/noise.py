r"""Noise sources for stochastic samplers.

A source is called as `noise(sigma_from, sigma_to)` and returns the noise of that interval: a tensor of x's shape with
unit variance. The sources of this module are specifications. `bind(x)` gives the callable of one run, in x's shape,
dtype and device, and starts the same stream every time: a source that is used twice gives the same noise twice.

Each kind of source makes its own stream from a seed (`derived_seed`): `white(7)` and `brownian(7)` are independent of
each other and of `torch.randn` with a generator of seed 7. Any other callable serves as a source as well. If it also
has a method `into(out, sigma_from, sigma_to)`, the engine lets it write the noise in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from kinvert.brownian import Brownian
from kinvert.checks import check_beside, check_integer, check_number, has_values, is_integer, plain
from kinvert.showing.brief import brief_repr
from kinvert.streams import NoiseFunction, Seed, check_seeds, derived_seed, empty_noise, generator_seeds
from kinvert.tensors import wide_dtype

__all__ = [
    "Brownian",
    "Clipped",
    "Noise",
    "NoiseFunction",
    "NoiseSource",
    "Replay",
    "White",
    "bind",
    "brownian",
    "clipped",
    "default_noise",
    "derived_seed",
    "replay",
    "white",
]


@runtime_checkable
class NoiseSource(Protocol):
    """A specification of noise; `bind` turns it into a `NoiseFunction` for a given state."""

    def bind(self, x: Tensor) -> NoiseFunction:
        """Return the noise function of one run with states like `x`, shape (batch, *event)."""
        ...


Noise = NoiseSource | NoiseFunction


@dataclass(frozen=True)
class White:
    """Independent standard normal noise at every call, for any interval. Build it with `white`."""

    seed: Seed

    def bind(self, x: Tensor) -> NoiseFunction:
        """Return a new stream of noise like `x`, from the seed."""
        if not has_values(x):
            return empty_noise(self.seed, x)
        return _WhiteStream(self.seed, x)


class _WhiteStream:
    """The noise of one run, from one generator or from one per sample."""

    def __init__(self, seed: Seed, x: Tensor) -> None:
        check_seeds(seed, x)
        self.x = x
        seeds = generator_seeds("white", seed)
        self.generators = [torch.Generator(device=x.device).manual_seed(one) for one in seeds]
        self.per_sample = isinstance(seed, tuple)

    def __call__(self, sigma_from: float, sigma_to: float) -> Tensor:
        out = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        self.into(out, sigma_from, sigma_to)
        return out

    def into(self, out: Tensor, sigma_from: float, sigma_to: float) -> None:
        """Write the next noise to `out`."""
        for part, generator in zip(out if self.per_sample else (out,), self.generators, strict=True):
            part.normal_(generator=generator)


@dataclass(frozen=True, eq=False)
class Replay:
    """Noise tensors that are played back in order. Build it with `replay`."""

    tensors: tuple[Tensor, ...]

    __repr__ = brief_repr

    def bind(self, x: Tensor) -> NoiseFunction:
        """Return a function that gives the tensors from the first one on, in x's dtype and on its device."""
        rest = iter(self.tensors)

        def draw(sigma_from: float, sigma_to: float) -> Tensor:
            noise = next(rest, None)
            if noise is None:
                raise ValueError(
                    f"replay ran out of noise at the interval {sigma_from:g} -> {sigma_to:g}: it holds "
                    f"{len(self.tensors)} tensors, the run needs more (compile_plan(...).draws says how many)"
                )
            check_beside("noise", noise, x)
            return plain(noise).to(device=x.device, dtype=x.dtype)

        return draw


@dataclass(frozen=True)
class Clipped:
    """Noise of another source, clamped at `std` standard deviations. Build it with `clipped`."""

    source: Noise
    std: float

    def bind(self, x: Tensor, levels: tuple[float, ...] = ()) -> NoiseFunction:
        """Return the clipped noise of one run."""
        draw = bind(self.source, x, levels)

        def clip(sigma_from: float, sigma_to: float) -> Tensor:
            noise = draw(sigma_from, sigma_to)
            wide = noise.to(wide_dtype(noise.dtype)).reshape(len(noise), -1)
            if wide.shape[1] > 1:
                limit = self.std * wide.std(1, keepdim=True)
                wide = torch.maximum(torch.minimum(wide, limit), -limit)
            else:  # a single value has no standard deviation
                wide = wide.clamp(-self.std, self.std)
            return wide.reshape(noise.shape).to(noise.dtype)

        return clip


def white(seed: int | Sequence[int] | None = None) -> White:
    """Return a source of independent standard normal noise, reproducible by seed.

    Args:
        seed: one int for the whole batch, or one int per sample, which makes a sample's noise independent of its
            neighbours. None takes a seed from torch's global generator (`torch.manual_seed` governs it).

    The same seed, shape, dtype and device give the same numbers in every run and every process. As with torch's
    generators, they depend on the device. They are independent of everything else that is seeded with the same integer,
    for example of the start `torch.randn(..., generator=torch.Generator().manual_seed(seed))` (see `derived_seed`).
    """
    return White(_as_seed(seed))


def brownian(seed: int | Sequence[int] | None = None, depth: int | None = None) -> Brownian:
    """Return a source of increments of a Brownian path in sigma, as the DPM++ SDE samplers use them.

    In a run, the noise of an interval is the sum of the noises of its parts, weighted by the square roots of their
    lengths, and `noise(b, a) = -noise(a, b)`. Runs with the same seed and different steps see nearly the same path (see
    `Brownian`), or exactly the same with `depth`, which costs about four times as much.

    Args:
        seed: as for `white`.
        depth: None, or the level of detail at which the path is fixed for every run, from 1 to 40: 10 resolves steps of
            a thousandth of sigma.

    Raises:
        TypeError, ValueError: a seed that is not made of ints, or a depth out of its range.
    """
    if depth is not None:
        depth = check_integer("depth", depth, 1, 40, fix="10 resolves steps of a thousandth of sigma")
    return Brownian(_as_seed(seed), depth)


def _as_seed(seed: Any) -> Seed:
    if seed is None:
        drawn = torch.randint(2**63 - 1, (), device="cpu")
        return int(drawn.item()) if has_values(drawn) else 0  # no value if every new tensor is fake or on meta
    many = not isinstance(seed, str) and isinstance(seed, Sequence | np.ndarray) and np.ndim(seed) == 1
    seeds = tuple(seed) if many else (seed,)
    if not seeds or not all(map(is_integer, seeds)):
        raise TypeError(f"seed must be an int, a sequence of ints (one per sample) or None, got {seed!r}")
    if not all(-(2**63) <= one < 2**64 for one in seeds):
        raise ValueError(f"seed must have 64 bits, as torch's generators take it, got {seed!r}")
    return tuple(map(int, seeds)) if many else int(seed)


def replay(tensors: Sequence[Tensor]) -> Replay:
    """Play back given noise, one tensor per draw, in the order in which the Plan draws (`Step.noises`)."""
    if not isinstance(tensors, Sequence) or not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError(f"replay takes a list of tensors, one per draw, got {type(tensors).__name__}")
    return Replay(tuple(tensors))


def clipped(source: Noise, std: float) -> Clipped:
    """Return noise of `source` with each value clamped to `std` times the standard deviation of its sample's noise.

    Clamping reduces the variance (by 3 % at std = 2.5), so the noise no longer has the law that a sampler assumes. Use
    it for models that were distilled with such noise. `ki.sampler("lcm", noise_clip_std=std)` clips by itself.

    Raises:
        TypeError, ValueError: `std` is not a positive, finite number.
    """
    return Clipped(source, check_number("std", std, above=0, fix="leave the source as it is to clip nothing"))


def default_noise(kind: str) -> White | Brownian:
    """Return the default source of a rule, "white" or "brownian", seeded by torch's global generator."""
    return brownian() if kind == "brownian" else white()


def bind(noise: Noise, x: Tensor, levels: tuple[float, ...] = (), clip: float = 0.0) -> NoiseFunction:
    """Return the noise function of a run.

    Args:
        noise: a source, or a noise function, which is returned as it is.
        x: a state of the run, shape (batch, *event).
        levels: the ends of the intervals that the run will ask for.
        clip: the rule's `noise_clip`; 0 clips nothing. Noise that is played back is never clipped.

    Raises:
        TypeError: `noise` is neither a source nor callable.
    """
    if clip and not isinstance(noise, Replay):
        noise = clipped(noise, clip)
    if isinstance(noise, (Brownian, Clipped)):
        return noise.bind(x, levels)
    if isinstance(noise, NoiseSource):
        return noise.bind(x)
    if noise is white or noise is brownian:
        raise TypeError(
            f"noise must be a noise source, got the function that makes one; call it: {noise.__name__}(seed)"
        )
    if callable(noise):
        return noise
    raise TypeError(
        f"noise must be a noise source such as ki.noise.white(seed), or a function (sigma_from, sigma_to) -> Tensor; "
        f"got {type(noise).__name__}"
    )
