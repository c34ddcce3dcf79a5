"""Dataclasses and named tuples in one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kinvert.showing.brief import brief_repr


@dataclass(eq=False)
class Found:
    count: int
    noises: tuple[int, ...] = ()
    latent: torch.Tensor | None = None
    exact: bool = False
    steps: int = 20

    __repr__ = brief_repr


class Pair(NamedTuple):
    a: Any
    b: Any

    __repr__ = brief_repr


def test_fields_are_shown_unless_they_are_nothing_by_default() -> None:
    assert repr(Found(1)) == "Found(count=1, exact=False, steps=20)"
    full = Found(2, (3, 4), torch.zeros(2, 3), True, 5)
    assert repr(full) == "Found(count=2, noises=(3, 4), latent=float32 (2, 3), exact=True, steps=5)"
    assert repr(Pair(1, None)) == "Pair(a=1, b=None)" and repr(Pair([], 2)) == "Pair(b=2)"


def test_what_is_half_filled_is_shown_as_far_as_it_goes() -> None:
    half = object.__new__(Found)
    half.count = 7
    assert repr(half) == "Found(count=7, exact=False, steps=20)"
    del half.count
    assert repr(half) == "Found(exact=False, steps=20)"


def test_long_lines_are_cut() -> None:
    text = repr(Pair("x" * 1000, "y" * 1000))
    assert text.endswith("...)") and len(text) < 300
