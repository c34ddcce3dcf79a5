"""Streams of random numbers: independent of each other and of what a user draws with the same integer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kinvert as ki

X = torch.zeros(4, 3, 5, dtype=torch.float32)
INTERVALS = [(14.6, 10.0), (10.0, 4.0), (4.0, 0.03), (0.03, 0.0)]


def draws_of(source: Any, seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    draw = source(seed).bind(torch.zeros(shape, dtype=dtype))
    return [draw(a, b).flatten() for a, b in INTERVALS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("source", [ki.noise.white, ki.noise.brownian, lambda seed: ki.noise.white([seed])])
def test_noise_is_independent_of_what_the_user_draws_with_the_same_integer(source: Any, dtype: torch.dtype) -> None:
    """No draw is correlated with torch.randn of the same seed or of a neighbour, from the start of the stream or on."""
    n = 1000
    users = {
        seed: torch.randn(4 * n, generator=torch.Generator().manual_seed(seed), dtype=dtype) for seed in range(-1, 61)
    }
    for seed in range(60):
        drawn = torch.stack(draws_of(source, seed, (1, n), dtype))
        for other in (seed - 1, seed, seed + 1):
            correlations = drawn @ users[other].reshape(4, n).T / n
            assert float(correlations.abs().max()) < 6 / math.sqrt(n), (seed, other)


def test_the_sources_are_independent_of_each_other() -> None:
    n = 4000
    for seed in range(20):
        white, brownian = (
            torch.stack(draws_of(s, seed, (1, n), torch.float32)) for s in (ki.noise.white, ki.noise.brownian)
        )
        assert float((white @ brownian.T / n).abs().max()) < 6 / math.sqrt(n)


@given(seeds=st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=50, unique=True), purpose=st.text())
@settings(max_examples=50, deadline=None)
def test_different_seeds_have_different_streams(seeds: list[int], purpose: str) -> None:
    """Of the low 32 bits too, which are all that torch's generator on a CPU looks at."""
    derived = [ki.noise.derived_seed(purpose, seed) for seed in seeds]
    assert len({one % 2**32 for one in derived}) == len(seeds)
    assert all(0 <= one < 2**63 for one in derived)


def test_seeds_that_differ_in_their_high_bits_differ() -> None:
    """torch's generator on a CPU takes them for the same."""
    draw = ki.noise.white([1, 1 + 2**32, 2**63, -1]).bind(X)(2.0, 1.0)
    assert len({tuple(one.flatten().tolist()) for one in draw}) == 4


def test_streams_are_reproducible() -> None:
    """The same in every process and on every machine: this pins the derivation."""
    assert ki.noise.derived_seed("white", 7) == 4359467319645926355
    assert ki.noise.derived_seed("brownian", 7) == 5467540385878524184


def test_seeds_are_taken_modulo_two_to_the_64_as_torch_takes_them() -> None:
    assert ki.noise.derived_seed("white", -1) == ki.noise.derived_seed("white", 2**64 - 1)
    assert ki.noise.derived_seed("white", -(2**63)) == ki.noise.derived_seed("white", 2**63)
