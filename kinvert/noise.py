r"""Noise sources for stochastic samplers.

A source is called as `noise(sigma_from, sigma_to)` and returns a tensor of x's shape with unit variance, the noise of
that interval. The sources of this module are specifications: `bind(x)` gives the callable for one run on x's shape,
dtype and device, and starts the same stream every time, so that one source used twice gives the same noise twice.
Any callable of one's own serves as a source as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

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
        _check_seeds(self.seed, x)
        seeds = self.seed if isinstance(self.seed, tuple) else (self.seed,)
        generators = [torch.Generator(device=x.device).manual_seed(seed) for seed in seeds]

        def draw(sigma_from: float, sigma_to: float) -> Tensor:
            if not isinstance(self.seed, tuple):
                return torch.randn(x.shape, generator=generators[0], dtype=x.dtype, device=x.device)
            rows = [torch.randn(x.shape[1:], generator=g, dtype=x.dtype, device=x.device) for g in generators]
            return torch.stack(rows)

        return draw


@dataclass(frozen=True)
class Brownian:
    r"""Increments of one Brownian path in sigma: `n(a, b) = (W(b) - W(a)) / sqrt(|b - a|)`. Build it with `brownian`.

    The path is Levy's construction on a fixed dyadic grid. `W(0) = 0`, and the increments over the octaves
    `[2^j, 2^(j+1)]` are independent. Within an octave of width w, with u in [0, 1) the place of sigma in it,
    `W = linear + sum_l sqrt(w / 2^l) / 2 (1 - |2 u_l - 1|) z_l + sqrt(w / 2^L u_L (1 - u_L)) z_L` where u_l is the
    place of sigma in its cell of level l = 0 ... L - 1, the interval that halving the octave l times gives, and z_l
    the normal variable of that cell, with a seed of its own. So W(sigma) is a function of the seed and of sigma alone,
    and its law is exact for any points of which no two share a cell of level L = `DEPTH`.
    """

    DEPTH: ClassVar[int] = 10
    LOWEST: ClassVar[int] = -14  # the octave that begins at 0

    seed: int | tuple[int, ...]

    def bind(self, x: Tensor) -> NoiseFunction:
        """The path's increments in x's shape, dtype and device; the same path every time."""
        return _BrownianPath(self.seed, x)


class _BrownianPath:
    """The path of one run. It keeps what neighbouring points share: the latest normal of every level, and anchors."""

    def __init__(self, seed: int | tuple[int, ...], x: Tensor) -> None:
        self.normal = _seeded_normal(seed, x)
        self.dtype = x.dtype
        self.anchors = {Brownian.LOWEST: torch.zeros(x.shape, dtype=_wide(x), device=x.device)}  # W at 2^j, or at 0
        self.normals: dict[int, tuple[tuple[int, int], Tensor]] = {}  # level -> (cell, its normal)
        self.values: dict[float, Tensor] = {}  # the latest few W(sigma)

    def __call__(self, sigma_from: float, sigma_to: float) -> Tensor:
        if _cell(sigma_from) == _cell(sigma_to):
            raise ValueError(
                f"brownian noise cannot resolve the interval from {sigma_from:g} to {sigma_to:g}, shorter than about "
                f"{2.0**-Brownian.DEPTH:g} of its sigma; take fewer steps or use ki.noise.white"
            )
        start = self._value(sigma_from)
        return ((self._value(sigma_to) - start) / math.sqrt(abs(sigma_to - sigma_from))).to(self.dtype)

    def _value(self, sigma: float) -> Tensor:
        if sigma not in self.values:
            while len(self.values) >= 3:  # a step asks for up to three: its ends and a stage
                del self.values[next(iter(self.values))]
            self.values[sigma] = self._evaluate(sigma)
        return self.values[sigma]

    def _evaluate(self, sigma: float) -> Tensor:
        octave, width, u = _place(sigma)
        value = torch.lerp(self._anchor(octave), self._anchor(octave + 1), u)
        for level in range(Brownian.DEPTH + 1):
            cell, place = divmod(u * 2**level, 1.0)
            last = level == Brownian.DEPTH
            hat = math.sqrt(place * (1.0 - place)) if last else (1.0 - abs(2.0 * place - 1.0)) / 2
            if hat:
                value.add_(self._normal(octave, level, int(cell)), alpha=math.sqrt(width / 2**level) * hat)
        return value

    def _anchor(self, octave: int) -> Tensor:
        if octave not in self.anchors:
            scale = math.sqrt(_edges(octave - 1)[1])
            self.anchors[octave] = self._anchor(octave - 1) + scale * self.normal(octave - 1)
        return self.anchors[octave]

    def _normal(self, octave: int, level: int, cell: int) -> Tensor:
        known = self.normals.get(level)
        if known is None or known[0] != (octave, cell):
            known = self.normals[level] = ((octave, cell), self.normal(octave, level, cell))
        return known[1]


def _edges(octave: int) -> tuple[float, float]:
    """Where an octave begins, and its width."""
    low = 0.0 if octave == Brownian.LOWEST else 2.0**octave
    return low, 2.0 ** (octave + 1) - low


def _place(sigma: float) -> tuple[int, float, float]:
    """The octave of sigma, its width, and the place of sigma in it, in [0, 1)."""
    octave = max(math.frexp(sigma)[1] - 1, Brownian.LOWEST) if sigma > 0 else Brownian.LOWEST
    low, width = _edges(octave)
    return octave, width, (sigma - low) / width


def _cell(sigma: float) -> tuple[int, int]:
    octave, _, u = _place(sigma)
    return octave, int(u * 2**Brownian.DEPTH)


def _seeded_normal(seed: int | tuple[int, ...], x: Tensor) -> Callable[..., Tensor]:
    """A standard normal tensor like x (float32 for half precision) as a function of integers."""
    _check_seeds(seed, x)
    generator = torch.Generator(device=x.device)

    def draw(shape: torch.Size, seed: int, place: tuple[int, ...]) -> Tensor:
        generator.manual_seed(_mix(seed, *place))
        return torch.randn(shape, generator=generator, dtype=_wide(x), device=x.device)

    def normal(*place: int) -> Tensor:
        if isinstance(seed, tuple):
            return torch.stack([draw(x.shape[1:], one, place) for one in seed])
        return draw(x.shape, seed, place)

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


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


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
            return noise.to(device=x.device, dtype=x.dtype)

        return draw


def white(seed: int | Sequence[int] | None = None) -> White:
    """Independent standard normal noise, reproducible by seed.

    Args:
        seed: one int for the whole batch, or one int per sample, which makes a sample's noise independent of its
            neighbours. None takes a seed from torch's global generator (`torch.manual_seed` governs it).

    The numbers depend on the device, as torch's generators do.
    """
    return White(_as_seed(seed))


def brownian(seed: int | Sequence[int] | None = None) -> Brownian:
    """Increments of a Brownian path in sigma, as the DPM++ SDE samplers use them.

    The noise of an interval is the sum of its parts (weighted by the square roots of their lengths), and one seed
    is one path: 10 steps and 1,000 steps see the same one, coarser or finer. `noise(b, a) = -noise(a, b)`.

    Args:
        seed: as for `white`.
    """
    return Brownian(_as_seed(seed))


def _as_seed(seed: Any) -> int | tuple[int, ...]:
    if seed is None:
        return int(torch.randint(2**63 - 1, ()).item())
    seeds = tuple(seed) if isinstance(seed, Sequence) and not isinstance(seed, str) else (seed,)
    if not seeds or any(isinstance(one, bool) or not isinstance(one, int) for one in seeds):
        raise TypeError(f"seed must be an int, a sequence of ints (one per sample) or None, got {seed!r}")
    return seed if isinstance(seed, int) else seeds


def replay(tensors: Sequence[Tensor]) -> Replay:
    """Play back given noise, one tensor per draw, in the order in which the Plan draws (`Step.noises`)."""
    if not isinstance(tensors, Sequence) or not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError(f"replay takes a list of tensors, one per draw, got {type(tensors).__name__}")
    return Replay(tuple(tensors))


def default_noise(kind: str) -> White | Brownian:
    """The source that a rule draws from unless told otherwise ("white" or "brownian"), seeded by torch's generator."""
    return brownian() if kind == "brownian" else white()


def bind(noise: Noise, x: Tensor) -> NoiseFunction:
    """The noise function for a run with state `x`."""
    if isinstance(noise, NoiseSource):
        return noise.bind(x)
    if callable(noise):
        return noise
    raise TypeError(
        f"noise must be a noise source such as ki.noise.white(seed), or a function (sigma_from, sigma_to) -> Tensor; "
        f"got {type(noise).__name__}"
    )
