"""Ancestral samplers: DDIM with eta, and the options of LCM."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import noise_like, schedules
from rule_runs import MIXTURE, run, same_noise

import kinvert as ki


@given(sigmas=schedules(), eta=st.floats(0.0, 1.0))
@settings(max_examples=20, deadline=None)
def test_euler_ancestral_is_ddim_with_eta(sigmas: list[float], eta: float) -> None:
    """Song et al. (2020), eq. 12 and 16, as they stand: in variance-preserving coordinates, with alpha their alpha_t."""
    x = sigmas[0] * noise_like((3, 6))
    y = x / math.sqrt(1 + sigmas[0] ** 2)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        alpha, alpha_next = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
        beta, beta_next = alpha * sigma**2, alpha_next * sigma_next**2  # 1 - alpha, without cancellation
        x0 = MIXTURE(y / math.sqrt(alpha), torch.full((3,), sigma, dtype=torch.float64))
        eps = (y - math.sqrt(alpha) * x0) / math.sqrt(beta)
        std = eta * math.sqrt(beta_next / beta) * math.sqrt(1 - alpha / alpha_next)
        y = math.sqrt(alpha_next) * x0 + math.sqrt(max(beta_next - std**2, 0.0)) * eps
        y = y + std * same_noise(sigma, sigma_next)
    got = run(ki.sampler("ddim", eta=eta), sigmas)
    torch.testing.assert_close(got, y * math.sqrt(1 + sigmas[-1] ** 2), rtol=1e-10, atol=1e-10)


def test_lcm_noise_runs_from_one_scale_to_the_other() -> None:
    sigmas = [8.0, 4.0, 2.0, 1.0, 0.0]
    plan = ki.compile_plan(ki.sampler("lcm", s_noise=1.0, s_noise_end=4.0), sigmas)
    scales = [max(c for symbol, c in step.x if symbol.kind == "noise") / step.sigma_next for step in plan.steps[:-1]]
    assert scales == pytest.approx([1.0, 2.0, 3.0])
    assert plan.draws == 3
    single = ki.compile_plan(ki.sampler("lcm", s_noise=0.5, s_noise_end=4.0), [8.0, 4.0])
    assert [c for symbol, c in single.steps[0].x if symbol.kind == "noise"] == [2.0]


@pytest.mark.parametrize("rule", [ki.sampler("lcm"), ki.rules.Flow(ki.sampler("lcm"))], ids=["lcm", "flow"])
@pytest.mark.parametrize("source", [ki.noise.white(3), None, "function"], ids=["white", "default", "function"])
def test_lcm_clips_noise_of_every_source(rule: Any, source: Any) -> None:
    """After one step the state is the noise alone: the same noise, clipped at half the standard deviation of a sample."""
    clip = ki.sampler("lcm", noise_clip_std=0.5)
    clip = replace(rule, rule=clip) if isinstance(rule, ki.rules.Flow) else clip
    x = torch.zeros(2, 3, 500, dtype=torch.float64)

    def run(rule: Any) -> torch.Tensor:
        torch.manual_seed(3)  # governs the default noise
        generator = torch.Generator().manual_seed(0)
        noise = (
            (lambda a, b: torch.randn(x.shape, generator=generator, dtype=x.dtype)) if source == "function" else source
        )
        return ki.sample(lambda x, sigma: torch.zeros_like(x), x, [0.9, 0.5], sampler=rule, noise=noise)

    free = run(rule)
    limit = 0.5 * free.std(dim=(1, 2), keepdim=True)
    assert 0.5 < float((free.abs() > limit).double().mean()) < 0.7
    torch.testing.assert_close(run(clip), torch.maximum(torch.minimum(free, limit), -limit), rtol=1e-12, atol=0)


def test_replayed_noise_is_not_clipped() -> None:
    x = torch.zeros(1, 4, dtype=torch.float64)
    noise = ki.noise.replay([torch.tensor([[5.0, -4.0, 0.1, 2.0]])])
    out = ki.sample(
        lambda x, sigma: torch.zeros_like(x), x, [3.0, 1.0], sampler=ki.sampler("lcm", noise_clip_std=1.0), noise=noise
    )
    assert out.tolist() == [[5.0, -4.0, pytest.approx(0.1), 2.0]]


@pytest.mark.parametrize("options", [{"s_noise_end": "1"}, {"noise_clip_std": -1.0}, {"noise_clip_std": math.nan}])
def test_lcm_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        ki.sampler("lcm", **options)
