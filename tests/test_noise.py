"""Noise sources: reproducible, per sample, of unit variance."""

from __future__ import annotations

import pytest
import torch

import kinvert as ki
from kinvert.noise import bind

X = torch.zeros(4, 3, 5, dtype=torch.float32)


def test_white_is_standard_normal_and_independent() -> None:
    draw = ki.noise.white(0).bind(torch.zeros(200, 1000))
    a, b = draw(2.0, 1.0), draw(2.0, 1.0)
    n = a.numel()
    assert abs(float(a.mean())) < 5 / n**0.5
    assert abs(float(a.var()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float((a * b).mean())) < 5 / n**0.5


def test_white_starts_again_for_every_run() -> None:
    source = ki.noise.white(3)
    first, second = source.bind(X), source.bind(X)
    assert torch.equal(first(2.0, 1.0), second(5.0, 4.0))
    assert torch.equal(first(1.0, 0.5), second(4.0, 3.0))
    assert source == ki.noise.white(3) and hash(source) == hash(ki.noise.white(3))


def test_a_seed_per_sample_is_independent_of_the_batch() -> None:
    whole, alone = ki.noise.white([5, 6, 7, 8]).bind(X), ki.noise.white([7]).bind(X[:1])
    assert torch.equal(whole(1, 0)[2:3], alone(1, 0))
    assert torch.equal(whole(1, 0)[2:3], alone(1, 0))


def test_none_follows_the_global_generator() -> None:
    torch.manual_seed(1)
    a = bind(None, X)(1, 0)
    torch.manual_seed(1)
    assert torch.equal(a, bind(None, X)(1, 0))
    assert not torch.equal(a, bind(None, X)(1, 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_noise_has_the_dtype_of_x(dtype: torch.dtype) -> None:
    assert ki.noise.white(0).bind(X.to(dtype))(1, 0).dtype == dtype
    assert ki.noise.replay([torch.ones(4, 3, 5).double()]).bind(X.to(dtype))(1, 0).dtype == dtype


def test_replay_runs_out_with_a_count() -> None:
    draw = ki.noise.replay([X, X + 1]).bind(X)
    assert torch.equal(draw(3, 2), X)
    assert torch.equal(draw(2, 1), X + 1)
    with pytest.raises(ValueError, match=r"ran out of noise at the interval 1 -> 0.5: it holds 2 tensors"):
        draw(1, 0.5)


@pytest.mark.parametrize("seed", ["7", 1.5, True, [], [1, "2"], [True]])
def test_seeds_are_ints(seed: object) -> None:
    with pytest.raises(TypeError, match="seed must be an int"):
        ki.noise.white(seed)  # type: ignore[arg-type]
