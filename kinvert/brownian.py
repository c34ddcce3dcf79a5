"""Brownian noise: increments of one path in sigma, each a function of the seed and of where it is asked for."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kinvert.checks import has_values
from kinvert.streams import NoiseFunction, Seed, check_seeds, empty_noise, generator_seeds, mixed
from kinvert.tensors import wide_dtype

__all__ = ["Brownian"]


@dataclass(frozen=True)
class Brownian:
    r"""Increments of one Brownian path in sigma: `n(a, b) = (W(b) - W(a)) / sqrt(|b - a|)`. Build it with `brownian`.

    The path is Levy's construction on a fixed dyadic grid. The increments over the octaves `[2^j, 2^(j+1)]` are
    independent, and so is the increment from 0 to the lowest octave. In an octave of width w, let u in [0, 1) be the
    place of sigma. Then

        W = linear + sum_l sqrt(w / 2^l) / 2 (1 - |2 u_l - 1|) z_l + sqrt(w / 2^L u_L (1 - u_L)) z_L

    The cells of level l = 0 ... L - 1 come from halving the octave l times; u_l is the place of sigma in its cell, and
    z_l the normal variable of that cell, with its own seed. The bridge ends at level L. The law is exact for any points
    of which no two share a cell of level L.

    With `depth`, L is that number. W(sigma) is then a function of the seed and sigma alone, and two runs see the same
    path whatever their steps; each point costs up to L + 1 normal variables.

    Without `depth`, the bridge of each level of a run ends as soon as no other level of the run shares the cell, at
    level `COARSEST` at the earliest: two normal variables a level. The law of the run is still exact for any levels.
    But runs with different levels do not see exactly the same path. They agree at the corners of cells that both divide
    further (at least 4 in an octave); inside a cell that one of them does not divide, its bridge ends with the normal
    variable from which the other one continues. Outside a run (`bind` without levels) L is `DEPTH`.
    """

    DEPTH: ClassVar[int] = 10
    COARSEST: ClassVar[int] = 2
    LOWEST: ClassVar[int] = -14  # the octave that begins at 0

    seed: Seed
    depth: int | None = None

    def bind(self, x: Tensor, levels: tuple[float, ...] = ()) -> NoiseFunction:
        """Return the path's increments in x's shape, dtype and device; the same every time for the same `levels`."""
        if not has_values(x):
            return empty_noise(self.seed, x)
        return _BrownianPath(self, x, levels if self.depth is None else ())


class _BrownianPath:
    """The path of one run. It keeps what neighbouring points share: anchors, and the latest normal of each level."""

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
        """Return W(sigma), valid until two other levels were asked for; the least recently used memory is reused."""
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
        """Return W at the start of an octave, up to a constant: it is 0 at the first octave that is asked for."""
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
    """Map each sigma to the first level of cells, from `COARSEST` on, at which no other sigma is in its cell."""
    depths = dict.fromkeys(sorted(levels), Brownian.COARSEST)
    for a, b in itertools.pairwise(depths):  # neighbours share a cell longest
        depth = next(depth for depth in itertools.count(Brownian.COARSEST) if _cell(a, depth) != _cell(b, depth))
        depths[a], depths[b] = max(depths[a], depth), depth
    return depths


def _edges(octave: int) -> tuple[float, float]:
    """Return the lower edge of an octave, and its width."""
    low = 0.0 if octave == Brownian.LOWEST else 2.0**octave
    return low, 2.0 ** (octave + 1) - low


def _place(sigma: float) -> tuple[int, float, float]:
    """Return the octave of sigma, its width, and the place of sigma in it, in [0, 1)."""
    octave = max(math.frexp(sigma)[1] - 1, Brownian.LOWEST) if sigma > 0 else Brownian.LOWEST
    low, width = _edges(octave)
    return octave, width, (sigma - low) / width


def _cell(sigma: float, depth: int) -> tuple[int, int]:
    octave, _, u = _place(sigma)
    return octave, int(u * 2**depth)


def _seeded_normal(seed: Seed, x: Tensor) -> Callable[..., Tensor]:
    """Return a function of integers that gives standard normal tensors like x (float32 for half precision)."""
    check_seeds(seed, x)
    generator = torch.Generator(device=x.device)
    seeds = generator_seeds("brownian", seed)

    def normal(*place: int, out: Tensor | None = None) -> Tensor:
        out = torch.empty(x.shape, dtype=wide_dtype(x.dtype), device=x.device) if out is None else out
        for part, one in zip(out if isinstance(seed, tuple) else (out,), seeds, strict=True):
            part.normal_(generator=generator.manual_seed(mixed(one, *place)))
        return out

    return normal
