"""A guidance scale for each step: which one an evaluation gets, in every verb."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import mixture, noise_like, schedules
from torch import Tensor

import kinvert as ki
from kinvert.denoisers import guide, step_cfg

MIXTURES = mixture(seed=0), mixture(seed=1)
SIGMAS = ki.schedules.karras(6, 0.1, 10)
CFGS = [1.0, 3.0, 5.0, 2.0, 1.0, 4.0]
GUIDANCE: dict[str, Any] = {"positive": {"label": 0}, "negative": {"label": 1}}


def denoiser(x: Tensor, sigma: Tensor, label: int) -> Tensor:
    return MIXTURES[label](x, sigma)


def at(scale: float, x: Tensor, sigma: float) -> Tensor:
    levels = torch.full((len(x),), sigma, dtype=x.dtype)
    cond, uncond = (MIXTURES[label](x, levels) for label in (0, 1))
    return uncond + scale * (cond - uncond)


def euler(x: Tensor, levels: list[float], scales: list[float]) -> Tensor:
    for (a, b), scale in zip(itertools.pairwise(levels), scales, strict=True):
        x = x + (b - a) * (x - at(scale, x, a)) / a
    return x


@pytest.mark.parametrize("as_tensor", [False, True])
def test_sample_takes_the_scale_of_each_step(as_tensor: bool) -> None:
    x = 10 * noise_like((2, 6))
    got = ki.sample(denoiser, x, SIGMAS, cfg=torch.tensor(CFGS) if as_tensor else CFGS, **GUIDANCE)
    torch.testing.assert_close(got, euler(x, SIGMAS.tolist(), CFGS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e-4])
@pytest.mark.parametrize("end_at_step", [0, 2])
def test_unsample_takes_the_scale_of_the_step_that_it_undoes(offset: float, end_at_step: int) -> None:
    x = noise_like((2, 6))
    sigmas = SIGMAS if offset else SIGMAS[:-1]
    cfgs = CFGS[: len(sigmas) - 1]
    got = ki.unsample(denoiser, x, sigmas, cfg=cfgs, sigma_offset=offset, end_at_step=end_at_step, **GUIDANCE)
    rising = [sigma + offset for sigma in sigmas.flip(0).tolist()][: len(sigmas) - end_at_step]
    want = euler(x, rising, cfgs[::-1][: len(rising) - 1])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@given(sigmas=schedules(min_steps=2), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@settings(max_examples=60, deadline=None)
def test_an_evaluation_has_the_scale_of_its_step(sigmas: list[float], dtype: torch.dtype) -> None:
    """Whatever the dtype in which the level comes back, in both directions, at the start of a step and inside of it."""
    n = len(sigmas) - 1
    values = [float(k) for k in range(n)]
    down = step_cfg(values, sigmas)
    levels = [s + 1e-4 for s in sigmas[::-1]]
    up = step_cfg(values, sigmas, levels)
    wide = torch.promote_types(dtype, torch.float32)
    for i, (a, b) in enumerate(itertools.pairwise(sigmas)):
        inside = [a, (a + b) / 2]
        assert down(torch.tensor(inside, dtype=wide)).tolist() == [i, i]
    for k, (a, b) in enumerate(itertools.pairwise(levels)):
        assert up(torch.tensor([a, (a + b) / 2], dtype=wide)).tolist() == [n - 1 - k] * 2


def test_beyond_the_ends_and_at_the_end_of_the_last_step() -> None:
    down = step_cfg([1.0, 2.0, 3.0], [8.0, 4.0, 2.0, 1.0])
    assert down(torch.tensor([100.0, 8.0, 4.0, 2.0, 1.0, 1e-3])).tolist() == [1.0, 1.0, 2.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "res_3s", "euler_cfg_pp", "dpm_fast", "uni_pc", "lms"])
def test_equal_scales_are_one_scale(sampler: str) -> None:
    """A function that is constant, too: both branches are called then, and combined in the same way."""
    x = 10 * noise_like((2, 6))
    one, same, function = (
        ki.sample(denoiser, x, SIGMAS, sampler=sampler, cfg=cfg, **GUIDANCE)
        for cfg in (3.0, [3.0] * 6, lambda sigma: torch.full_like(sigma, 3.0))
    )
    assert torch.equal(one, same)
    torch.testing.assert_close(one, function, rtol=1e-12, atol=1e-12)


def test_entries_of_1_are_the_positive_prediction() -> None:
    x = 10 * noise_like((2, 6))
    guided = guide(denoiser, step_cfg([1.0, 7.0], [10.0, 5.0, 1.0]), **GUIDANCE)
    levels = torch.tensor([10.0, 10.0], dtype=torch.float64)
    assert torch.equal(guided(x, levels), MIXTURES[0](x, levels))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_invert_is_exact_with_a_scale_for_each_step(sampler: str) -> None:
    x = noise_like((2, 6)) / 2
    sigmas, cfgs = ki.schedules.karras(12, 0.1, 10)[:-1], [1.0, 2.0, 2.0, 1.5, 1.0, 1.0, 1.2, 1.0, 2.0, 1.0, 1.0]
    found = ki.invert(denoiser, x, sigmas, sampler=sampler, cfg=cfgs, **GUIDANCE)
    assert found.converged.all()
    back = ki.sample(denoiser, found.latent, sigmas, sampler=sampler, cfg=cfgs, **GUIDANCE)
    assert float((back - x).abs().max()) < 1e-7


@pytest.mark.parametrize("method", ["unsample", "invert"])
@pytest.mark.parametrize("end_at_step", [0, 3])
def test_round_trip_uses_the_same_scales_both_ways(method: Any, end_at_step: int) -> None:
    if method == "invert" and end_at_step:
        return
    x = noise_like((2, 6)) / 2
    sigmas = ki.schedules.karras(13, 0.1, 10)[:-1]
    cfgs = [1.0] * 6 + [1.5] * 4 + [1.0] * 2
    result = ki.round_trip(denoiser, x, sigmas, method=method, end_at_step=end_at_step, cfg=cfgs, **GUIDANCE)
    if method == "invert":
        assert float(result.max_error.max()) < 1e-7
        return
    latent = ki.unsample(denoiser, x, sigmas, end_at_step=end_at_step, cfg=cfgs, **GUIDANCE)
    assert torch.equal(result.latent, latent)
    back = ki.sample(denoiser, latent, sigmas[end_at_step:], cfg=cfgs[end_at_step:], **GUIDANCE)
    assert torch.equal(result.reconstruction, back)


def test_extract_noise_has_the_scales_of_the_run() -> None:
    sigmas, x = SIGMAS[:-1], noise_like((2, 6))
    found = ki.extract_noise(denoiser, x, sigmas, cfg=CFGS[:-1], **GUIDANCE)
    back = ki.sample(
        denoiser, found.latent, sigmas, sampler="ddpm", cfg=CFGS[:-1], noise=ki.noise.replay(found.noises), **GUIDANCE
    )
    assert float((back - x).abs().max()) < 1e-10


def test_samples_in_parts_and_alone_have_the_same_scales() -> None:
    x = 10 * noise_like((3, 6))
    whole = ki.sample(denoiser, x, SIGMAS, cfg=CFGS, **GUIDANCE)
    parts = ki.sample(denoiser, x, SIGMAS, cfg=CFGS, max_batch=1, **GUIDANCE)
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_round_the_scale(dtype: torch.dtype) -> None:
    cond, uncond = torch.ones(2, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype)
    guided = guide(
        lambda x, sigma, pick: pick, lambda sigma: torch.full_like(sigma, 7.3), {"pick": cond}, {"pick": uncond}
    )
    assert torch.equal(guided(cond, torch.ones(2)), torch.full_like(cond, 7.3))


@pytest.mark.parametrize(
    ("cfg", "error", "message"),
    [
        ([1.0, 2.0], ValueError, r"one for each of the 6 steps of sigmas, got 2"),
        ([1.0] * 5 + [float("nan")], ValueError, "cfg must be finite, got nan for a step"),
        ([1.0] * 5 + ["7"], TypeError, "cfg must be made of Python numbers, got '7'"),
        ([1.0] * 5 + [True], TypeError, "cfg must be made of Python numbers, got True"),
        ("7", TypeError, "cfg must be a Python number, got str"),
    ],
)
@pytest.mark.parametrize("verb", [ki.sample, ki.unsample, ki.invert, ki.round_trip])
def test_errors(verb: Any, cfg: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        verb(denoiser, noise_like((2, 6)), ki.schedules.karras(7, 0.1, 10)[:-1], cfg=cfg, **GUIDANCE)


def test_the_other_functions_say_how() -> None:
    with pytest.raises(TypeError, match=r"denoisers.step_cfg\(cfg, sigmas\)"):
        guide(denoiser, CFGS, **GUIDANCE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a cfg for each step needs the unconditional prediction"):
        ki.sample(denoiser, noise_like((2, 6)), SIGMAS, cfg=CFGS, positive={"label": 0})
