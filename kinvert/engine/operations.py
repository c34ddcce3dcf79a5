"""The six operations that the kernels of a run are made of; each writes one slot, `Mix` several."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Add", "Blend", "Kernel", "Lerp", "Mix", "Scale", "Sum"]


class Lerp(NamedTuple):
    """Write `a + weight (b - a)` to the slot `out`."""

    out: int
    a: int
    b: int
    weight: float


class Add(NamedTuple):
    """Write `a + weight b` to the slot `out`."""

    out: int
    a: int
    b: int
    weight: float


class Scale(NamedTuple):
    """Write `weight a` to the slot `out`."""

    out: int
    a: int
    weight: float


class Sum(NamedTuple):
    """Write the sum of (slot, coefficient) terms to the slot `out`, in float32 if the state is in half precision."""

    out: int
    terms: tuple[tuple[int, float], ...]


class Blend(NamedTuple):
    """Write `a + weight (b - a)` to `out`: as a `Lerp` if both have one dtype, else as the `Sum` of `terms`."""

    out: int
    a: int
    b: int
    weight: float
    terms: tuple[tuple[int, float], ...]


class Mix(NamedTuple):
    """Multiply the rows of `side` and the ring by matrix number `matrix`, into the slot `out` and those after it."""

    out: int
    side: int
    matrix: int


Kernel = Lerp | Add | Scale | Sum | Blend | Mix
