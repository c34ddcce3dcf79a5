r"""Noise sources for stochastic samplers.

A source is called as `noise(sigma_from, sigma_to)` and returns a tensor of x's shape with unit variance, the noise of
that interval. The sources of this module are specifications: `bind(x)` gives the callable for one run on x's shape,
dtype and device, and starts the same stream every time, so that one source used twice gives the same noise twice.
A seed names a stream of its own for each kind of source (`derived_seed`): `white(7)` and `brownian(7)` have nothing in
common with each other, nor with what `torch.randn` draws from a generator that was seeded with 7. Any callable of
one's own serves as a source as it is; where it has a method `into(out, sigma_from, sigma_to)` too, the engine lets it
write the noise where it belongs.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from kinvert.checks import check_beside, check_integer, check_number, has_values, is_integer, plain
from kinvert.tensors import wide_dtype

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
        if not has_values(x):
            return _shapes(self.seed, x)
        return _WhiteStream(self.seed, x)


class _WhiteStream:
    """The noise of one run, from one generator or from one for each sample."""

    def __init__(self, seed: int | tuple[int, ...], x: Tensor) -> None:
        _check_seeds(seed, x)
        self.x = x
        seeds = seed if isinstance(seed, tuple) else (seed,)
        self.generators = [torch.Generator(device=x.device).manual_seed(_derive(_WHITE, one)) for one in seeds]
        self.per_sample = isinstance(seed, tuple)

    def __call__(self, sigma_from: float, sigma_to: float) -> Tensor:
        out = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        self.into(out, sigma_from, sigma_to)
        return out

    def into(self, out: Tensor, sigma_from: float, sigma_to: float) -> None:
        """Write the next noise to `out`."""
        for part, generator in zip(out if self.per_sample else (out,), self.generators, strict=True):
            part.normal_(generator=generator)


@dataclass(frozen=True)
class Brownian:
    r"""Increments of one Brownian path in sigma: `n(a, b) = (W(b) - W(a)) / sqrt(|b - a|)`. Build it with `brownian`.

    The path is Levy's construction on a fixed dyadic grid. The increments over the octaves `[2^j, 2^(j+1)]` are
    independent, as is the one from 0 to the lowest of them. Within an octave of width w, with u in [0, 1) the place of
    sigma in it, `W = linear + sum_l sqrt(w / 2^l) / 2 (1 - |2 u_l - 1|) z_l + sqrt(w / 2^L u_L (1 - u_L)) z_L` where
    u_l is the place of sigma in its cell of level l = 0 ... L - 1, the interval that halving the octave l times gives,
    and z_l the normal variable of that cell, with a seed of its own. L is the level at which the bridge ends; the law
    is exact for any points of which no two share a cell of level L.

    With `depth` L is that number, so W(sigma) is a function of the seed and of sigma alone, and two runs see the same
    path whatever their steps, at the cost of most of L + 1 normal variables for each point. Without it, a run ends the
    bridge of each of its levels as soon as no other of its levels shares the cell, at level `COARSEST` at the earliest:
    two normal variables a level. The law of the run is exact for any levels. What is given up is that runs with
    different levels see exactly the same path. They agree at the corners of cells that both divide further, of which
    there are at least 4 in an octave; inside a cell that one of them does not divide, its bridge ends with the normal
    variable that the other one goes on from. Outside of a run (`bind` without levels) L is `DEPTH`.
    """

    DEPTH: ClassVar[int] = 10
    COARSEST: ClassVar[int] = 2
    LOWEST: ClassVar[int] = -14  # the octave that begins at 0

    seed: int | tuple[int, ...]
    depth: int | None = None

    def bind(self, x: Tensor, levels: tuple[float, ...] = ()) -> NoiseFunction:
        """The path's increments in x's shape, dtype and device; for the same `levels` of a run, the same every time."""
        if not has_values(x):
            return _shapes(self.seed, x)
        return _BrownianPath(self, x, levels if self.depth is None else ())


class _BrownianPath:
    """The path of one run. It keeps what neighbouring points share: the latest normal of every level, and anchors."""

    def __init__(self, source: Brownian, x: Tensor, levels: tuple[float, ...]) -> None:
        self.normal = _seeded_normal(source.seed, x)
        self.depth = Brownian.DEPTH if source.depth is None else source.depth
        self.depths = _depths(levels)
        self.dtype = x.dtype
        self.zero = torch.zeros(x.shape, dtype=wide_dtype(x.dtype), device=x.device)
        self.anchors: dict[int, Tensor] = {}  # W at 2^j, or at 0
        self.normals: dict[int, tuple[tuple[int, int], Tensor]] = {}  # level -> (cell, its normal)
        self.values: dict[float, Tensor] = {}  # the latest few W(sigma)

    def __call__(self, sigma_from: float, sigma_to: float) -> Tensor:
        out = torch.empty_like(self.zero, dtype=self.dtype)
        self.into(out, sigma_from, sigma_to)
        return out

    def into(self, out: Tensor, sigma_from: float, sigma_to: float) -> None:
        """Write the increment, scaled to unit variance, to `out`."""
        if sigma_from == sigma_to or not all(0 <= sigma < math.inf for sigma in (sigma_from, sigma_to)):
            raise ValueError(
                f"brownian noise belongs to an interval between two finite noise levels, got {sigma_from:g} to "
                f"{sigma_to:g}; give two different ones, or use ki.noise.white"
            )
        known = sigma_from in self.depths and sigma_to in self.depths
        if not known and _cell(sigma_from, self.depth) == _cell(sigma_to, self.depth):
            raise ValueError(
                f"brownian noise cannot resolve the interval from {sigma_from:g} to {sigma_to:g}, shorter than about "
                f"{2.0**-self.depth:g} of its sigma; take fewer steps or use ki.noise.white"
            )
        start, end = self._value(sigma_from), self._value(sigma_to)
        scale = 1.0 / math.sqrt(abs(sigma_to - sigma_from))
        if out.dtype == start.dtype:
            torch.sub(end, start, out=out).mul_(scale)
        else:
            out.copy_((end - start).mul_(scale))

    def _value(self, sigma: float) -> Tensor:
        """W(sigma), good until two other levels have been asked for: the memory of the one unused longest is reused."""
        value = self.values.pop(sigma, None)
        if value is None:
            # A step asks for up to three levels: its ends and a stage.
            spare = self.values.pop(next(iter(self.values))) if len(self.values) >= 3 else torch.empty_like(self.zero)
            value = self._evaluate(sigma, spare)
        self.values[sigma] = value  # last, as the one used latest
        return value

    def _evaluate(self, sigma: float, out: Tensor) -> Tensor:
        octave, width, u = _place(sigma)
        depth = self.depths.get(sigma, self.depth)
        torch.lerp(self._anchor(octave), self._anchor(octave + 1), u, out=out)
        for level in range(depth + 1):
            cell, place = divmod(u * 2**level, 1.0)
            hat = math.sqrt(place * (1.0 - place)) if level == depth else (1.0 - abs(2.0 * place - 1.0)) / 2
            if hat:
                out.add_(self._normal(octave, level, int(cell)), alpha=math.sqrt(width / 2**level) * hat)
        return out

    def _anchor(self, octave: int) -> Tensor:
        """W at the beginning of an octave, up to a constant: 0 at the first one that is asked for."""
        anchors = self.anchors
        if not anchors:
            anchors[octave] = self.zero
        elif octave not in anchors and octave > max(anchors):
            before = self._anchor(octave - 1)
            anchors[octave] = self.normal(octave - 1).mul_(math.sqrt(_edges(octave - 1)[1])).add_(before)
        elif octave not in anchors:
            after = self._anchor(octave + 1)
            anchors[octave] = self.normal(octave).mul_(-math.sqrt(_edges(octave)[1])).add_(after)
        return anchors[octave]

    def _normal(self, octave: int, level: int, cell: int) -> Tensor:
        known = self.normals.get(level)
        if known is None or known[0] != (octave, cell):
            normal = self.normal(octave, level, cell, out=None if known is None else known[1])
            known = self.normals[level] = ((octave, cell), normal)
        return known[1]


@functools.lru_cache(maxsize=64)
def _depths(levels: tuple[float, ...]) -> dict[float, int]:
    """For each of some sigmas the first level of cells, from `COARSEST` on, at which it has its cell for itself."""
    depths = dict.fromkeys(sorted(levels), Brownian.COARSEST)
    for a, b in itertools.pairwise(depths):  # who shares a cell longest is a neighbour
        depth = next(depth for depth in itertools.count(Brownian.COARSEST) if _cell(a, depth) != _cell(b, depth))
        depths[a], depths[b] = max(depths[a], depth), depth
    return depths


def _edges(octave: int) -> tuple[float, float]:
    """Where an octave begins, and its width."""
    low = 0.0 if octave == Brownian.LOWEST else 2.0**octave
    return low, 2.0 ** (octave + 1) - low


def _place(sigma: float) -> tuple[int, float, float]:
    """The octave of sigma, its width, and the place of sigma in it, in [0, 1)."""
    octave = max(math.frexp(sigma)[1] - 1, Brownian.LOWEST) if sigma > 0 else Brownian.LOWEST
    low, width = _edges(octave)
    return octave, width, (sigma - low) / width


def _cell(sigma: float, depth: int) -> tuple[int, int]:
    octave, _, u = _place(sigma)
    return octave, int(u * 2**depth)


def _seeded_normal(seed: int | tuple[int, ...], x: Tensor) -> Callable[..., Tensor]:
    """A standard normal tensor like x (float32 for half precision) as a function of integers."""
    _check_seeds(seed, x)
    generator = torch.Generator(device=x.device)
    seeds = [_derive(_BROWNIAN, one) for one in (seed if isinstance(seed, tuple) else (seed,))]

    def normal(*place: int, out: Tensor | None = None) -> Tensor:
        out = torch.empty(x.shape, dtype=wide_dtype(x.dtype), device=x.device) if out is None else out
        for part, one in zip(out if isinstance(seed, tuple) else (out,), seeds, strict=True):
            part.normal_(generator=generator.manual_seed(_mix(one, *place)))
        return out

    return normal


def _mix(*values: int) -> int:
    """A 63-bit hash of integers, each absorbed by the finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def derived_seed(purpose: str, seed: int) -> int:
    r"""A seed for `torch.Generator` that belongs to `purpose`, from a user's integer.

    Numbers drawn with it are independent of those that the user draws with a generator seeded by the same integer, or
    by its neighbours, and of those for another purpose. It depends on nothing but its arguments. torch's generator on a
    CPU looks at the lowest 32 bits of a seed only; they are different for different seeds from 0 to 2^32 - 1, so no two
    streams of one purpose coincide.

    Args:
        purpose: any text.
        seed: 64 bits, as torch's generators take it.

    Returns:
        A number of 63 bits.
    """
    return _derive(_key(purpose), seed)


def _derive(key: int, seed: int) -> int:
    seed %= 2**64  # torch reads -1 as 2^64 - 1
    upper = _mix(key, seed)
    low = (seed ^ _mix(key, seed >> 32)) % 2**32  # from here on a permutation of 32 bits
    for factor in (0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F):
        low = (low ^ low >> 16) * factor % 2**32
    return upper >> 32 << 32 | low ^ low >> 15


def _key(purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"kinvert.noise {purpose}".encode(), digest_size=8).digest(), "big")


_WHITE, _BROWNIAN = _key("white"), _key("brownian")


def _shapes(seed: int | tuple[int, ...], x: Tensor) -> NoiseFunction:
    """Noise for a state without values: tensors like it."""
    _check_seeds(seed, x)
    return lambda sigma_from, sigma_to: torch.empty_like(x)


def _check_seeds(seed: int | tuple[int, ...], x: Tensor) -> None:
    if isinstance(seed, tuple) and len(seed) != x.shape[0]:
        raise ValueError(f"noise got {len(seed)} seeds for a batch of {x.shape[0]}; give one seed, or one per sample")


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
            check_beside("noise", noise, x)
            return plain(noise).to(device=x.device, dtype=x.dtype)

        return draw


@dataclass(frozen=True)
class Clipped:
    """Another source's noise, cut off at `std` standard deviations. Build it with `clipped`."""

    source: Noise
    std: float

    def bind(self, x: Tensor, levels: tuple[float, ...] = ()) -> NoiseFunction:
        """The clipped noise of one run."""
        draw = bind(self.source, x, levels)

        def clip(sigma_from: float, sigma_to: float) -> Tensor:
            noise = draw(sigma_from, sigma_to)
            wide = noise.to(wide_dtype(noise.dtype)).reshape(len(noise), -1)
            if wide.shape[1] > 1:
                limit = self.std * wide.std(1, keepdim=True)
                wide = torch.maximum(torch.minimum(wide, limit), -limit)
            else:  # a single value has no standard deviation of its own
                wide = wide.clamp(-self.std, self.std)
            return wide.reshape(noise.shape).to(noise.dtype)

        return clip


def white(seed: int | Sequence[int] | None = None) -> White:
    """Independent standard normal noise, reproducible by seed.

    Args:
        seed: one int for the whole batch, or one int per sample, which makes a sample's noise independent of its
            neighbours. None takes a seed from torch's global generator (`torch.manual_seed` governs it).

    The same seed, shape, dtype and device give the same numbers, in every run and every process; they depend on the
    device, as torch's generators do. They are independent of everything else that is seeded with the same integer, the
    start `torch.randn(..., generator=torch.Generator().manual_seed(seed))` for one (see `derived_seed`).
    """
    return White(_as_seed(seed))


def brownian(seed: int | Sequence[int] | None = None, depth: int | None = None) -> Brownian:
    """Increments of a Brownian path in sigma, as the DPM++ SDE samplers use them.

    In a run, the noise of an interval is the sum of its parts (weighted by the square roots of their lengths), and
    `noise(b, a) = -noise(a, b)`. Runs with the same seed and different steps see the same path: nearly (see
    `Brownian`), or exactly with `depth`, which costs about four times as much.

    Args:
        seed: as for `white`.
        depth: None, or the level of detail at which the path is fixed for every run: 10 resolves steps of a thousandth
            of sigma. From 1 to 40.

    Raises:
        TypeError, ValueError: a seed that is not made of ints, or a depth out of its range.
    """
    if depth is not None:
        depth = check_integer("depth", depth, 1, 40, fix="10 resolves steps of a thousandth of sigma")
    return Brownian(_as_seed(seed), depth)


def _as_seed(seed: Any) -> int | tuple[int, ...]:
    if seed is None:
        drawn = torch.randint(2**63 - 1, ())
        return int(drawn.item()) if has_values(drawn) else 0  # none where every new tensor is fake or on meta
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
    """Noise of `source`, every value of a sample clamped to `std` times the standard deviation of the sample's noise.

    The variance falls below 1 by it (by 3 % at std = 2.5), so a sampler's noise no longer has the law that it asks for:
    it is for models that were distilled with such noise. `ki.sampler("lcm", noise_clip_std=std)` takes it by itself.

    Raises:
        TypeError, ValueError: `std` is not a positive, finite number.
    """
    return Clipped(source, check_number("std", std, above=0, fix="leave the source as it is to clip nothing"))


def default_noise(kind: str) -> White | Brownian:
    """The source that a rule draws from unless told otherwise ("white" or "brownian"), seeded by torch's generator."""
    return brownian() if kind == "brownian" else white()


def bind(noise: Noise, x: Tensor, levels: tuple[float, ...] = (), clip: float = 0.0) -> NoiseFunction:
    """The noise function for a run with state `x`; `levels` are the ends of the intervals that it will ask for.

    `clip` is the rule's `noise_clip`; 0 clips nothing. Noise that is played back stays as it was recorded.
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
