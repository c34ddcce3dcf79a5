"""What the denoiser may return; the other checks are in test_inputs.py."""

from __future__ import annotations

import pytest
import torch
from problems import mixture, noise_like
from runs import KARRAS

import kinvert as ki


def test_float32_output_for_half_states_is_accepted() -> None:
    x = torch.ones(2, 6, dtype=torch.float16)
    result = ki.run(ki.compile_plan("heun", KARRAS), lambda y, sigma: y.float() / (1 + sigma[:, None] ** 2), x)
    assert result.dtype == torch.float16
    with pytest.raises(TypeError, match=r"dtype torch.float32, got torch.float16 in step 0 \(sigma 10\)"):
        ki.run(ki.compile_plan("heun", KARRAS), lambda y, sigma: y.half(), torch.ones(2, 6))


def test_a_guided_plan_needs_a_pair() -> None:
    guided = [name for name in ki.SAMPLERS if name.endswith("cfg_pp")]
    for name in guided:
        plan = ki.compile_plan(name, KARRAS)
        with pytest.raises(TypeError, match=r"needs a pair Guided\(denoised, uncond\).*negative="):
            ki.run(plan, mixture(), 10 * noise_like((2, 6)))


def test_a_plain_plan_takes_the_denoised_of_a_pair() -> None:
    x, denoise, plan = 10 * noise_like((2, 6)), mixture(), ki.compile_plan("heun", KARRAS)
    paired = ki.run(plan, lambda y, sigma: ki.Guided(denoise(y, sigma), torch.zeros_like(y)), x)
    assert torch.equal(paired, ki.run(plan, denoise, x))
