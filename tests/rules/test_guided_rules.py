"""CFG++ samplers: where they differ from the plain samplers, and the published figures of UD10."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from problems import schedules
from rule_runs import run
from torch import Tensor

import kinvert as ki


def test_2s_cfg_pp_is_not_2s() -> None:
    """Its last shift mixes two evaluations, so it differs even where U = D."""
    sigmas = ki.schedules.karras(8, 0.1, 10)
    gap = run(ki.sampler("dpmpp_2s_ancestral_cfg_pp"), sigmas) - run(ki.sampler("dpmpp_2s_ancestral"), sigmas)
    assert float(gap.abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("flow", "sigmas", "want"),
    [
        (
            False,
            [14.614642, 6.0, 2.5, 1.0, 0.4, 0.0291675, 0.0],
            [0.03934933332348981, -0.07428717960501931, 0.16713877741995767, 0.019483299850203074],
        ),
        (
            True,
            [0.98, 0.75, 0.5, 0.25, 0.1, 0.0],
            [0.3472071596521206, -0.5653960587224339, 1.745889851805635, 0.16749567810030647],
        ),
    ],
)
def test_ud10_has_the_figures_of_comfyui(flow: bool, sigmas: list[float], want: list[float]) -> None:
    """Figures of ComfyUI 95539f56 (2026-09-22) for a quadratic denoiser, in its eps and flow spaces."""

    def denoiser(x: Tensor, sigma: Tensor) -> ki.Guided:
        s = sigma[:, None]
        denoised = x / (1 + s) + 0.05 * x**2 / (1 + s)
        return ki.Guided(denoised, 0.8 * x / (1.2 + s) - 0.03 * x**2 / (1 + s))

    x = torch.tensor([[0.5, -1.0, 2.0, 0.25]], dtype=torch.float64)
    got = ki.run(ki.compile_plan(ki.sampler("cfgpp_ud10_ab", flow=flow), sigmas), denoiser, x)
    torch.testing.assert_close(got, torch.tensor([want], dtype=torch.float64), rtol=1e-13, atol=0)


@given(sigmas=schedules(min_steps=2, zero=False))
@settings(max_examples=20, deadline=None)
def test_ud10_without_its_history_is_euler_cfg_pp(sigmas: list[float]) -> None:
    plain, ud10 = (
        ki.compile_plan(ki.sampler(name, **options), sigmas)
        for name, options in (("euler_cfg_pp", {}), ("cfgpp_ud10_ab", {"uncond_history": 0.0, "history": 0.0}))
    )
    for one, other in zip(plain.steps, ud10.steps, strict=True):
        assert one.x.terms == pytest.approx(other.x.terms, rel=1e-9, abs=1e-9)
