"""Runs in few passes over memory: the results of the plain loop, and nobody's memory overwritten."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from problems import noise_like
from runs import IN_FEW_PASSES, KARRAS, PLANS, denoiser_for, gaussian, given_noise, plain_run
from torch import Tensor

import kinvert as ki
from kinvert.engine import run_state


@pytest.mark.parametrize("ends_at_zero", [True, False])
@pytest.mark.parametrize("name", PLANS)
def test_fused_loop_equals_plain_loop(name: str, ends_at_zero: bool) -> None:
    """Started from x alone and from the auxiliary state, in float64; the results are tensors of their own."""
    plan = PLANS[name] if ends_at_zero else ki.compile_plan(name, KARRAS[:-1])
    for p in {plan, plan.closed}:
        x = 10 * noise_like((2, 6))
        state = {key: x + 0.1 * noise_like((2, 6), seed=7) for key in p.steps[0].reads} | {"x": x}
        before = {key: value.clone() for key, value in state.items()}
        want = plain_run(p, denoiser_for(p), state, noise=given_noise(x))
        with torch.no_grad():
            got = run_state(p, denoiser_for(p), state, noise=given_noise(x))
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert float((got[key] - value).norm()) <= 1e-12 * float(value.norm())
            assert got[key].untyped_storage().nbytes() == value.nbytes
        assert all(torch.equal(value, before[key]) for key, value in state.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["euler", "dpm_2", "dpmpp_2m", "uni_pc", "euler_ancestral"])
def test_fused_loop_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """One rounding an update, as in the plain loop: a network in float32 or in half gives the same bits, or one off."""
    for wide in (False, True):

        def denoise(x: Tensor, sigma: Tensor, wide: bool = wide) -> Tensor:
            out = x.float() / (1 + sigma[:, None] ** 2)
            return out if wide else out.to(dtype)

        x = (10 * noise_like((2, 6))).to(dtype)
        want = plain_run(PLANS[name], denoise, {"x": x}, noise=given_noise(x))["x"]
        got = ki.sample(denoise, x, KARRAS, sampler=name, noise=given_noise(x))
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_kept_inputs_are_not_overwritten() -> None:
    """Whether it keeps the tensor or a part of it, and whether x lies in a row of its own or among others."""
    for name, view in itertools.product(("heun", "lms"), (False, True)):
        kept: list[tuple[Tensor, Tensor]] = []

        def keep(x: Tensor, sigma: Tensor, view: bool = view, kept: list[Any] = kept) -> Tensor:
            kept.append((x[:, 1:] if view else x, x.clone()))
            return gaussian(x, sigma)

        x = 10 * noise_like((2, 6))
        got = ki.sample(keep, x, KARRAS, sampler=name)
        assert torch.equal(got, ki.sample(gaussian, x, KARRAS, sampler=name))
        for value, at_the_time in kept:
            assert torch.equal(value, at_the_time[:, 1:] if view else at_the_time)


@pytest.mark.parametrize("name", ["dpmpp_2m", "lms", "heun", "uni_pc", "euler_cfg_pp", "edict"])
def test_denoiser_may_return_its_input(name: str) -> None:
    def same(x: Tensor, sigma: Tensor) -> Any:
        return ki.Guided(x, x.view_as(x)) if PLANS[name].is_guided else x.view_as(x)

    x = 10 * noise_like((2, 6))
    torch.testing.assert_close(ki.sample(same, x, KARRAS, sampler=name), x, rtol=1e-12, atol=1e-12)


def test_outputs_and_progress_are_not_overwritten() -> None:
    for name in IN_FEW_PASSES:
        kept: list[tuple[Tensor, Tensor]] = []

        def denoise(x: Tensor, sigma: Tensor, kept: list[Any] = kept) -> Tensor:
            out = gaussian(x, sigma)
            kept.append((out, out.clone()))
            return out

        def callback(step: ki.Progress, kept: list[Any] = kept) -> None:
            kept.append((step.x, step.x.clone()))

        steps: list[Any] = []
        x = 10 * noise_like((2, 6))
        noise = given_noise(x)
        ki.sample(denoise, x, KARRAS, sampler=name, noise=noise, callback=callback)
        assert all(torch.equal(value, at_the_time) for value, at_the_time in kept)
        plain_run(PLANS[name], gaussian, {"x": x}, noise=noise, callback=steps.append)
        torch.testing.assert_close(steps[-1].x, kept[-1][0], rtol=1e-9, atol=1e-12)


def test_sigma_written_by_denoiser_does_not_reach_next_run() -> None:
    def careless(x: Tensor, sigma: Tensor) -> Tensor:
        out = gaussian(x, sigma)
        sigma.fill_(float("nan"))
        return out

    x = 10 * noise_like((2, 6))
    want = ki.sample(gaussian, x, KARRAS)
    assert torch.equal(ki.sample(careless, x, KARRAS), want)
    assert torch.equal(ki.sample(careless, x, KARRAS), want)
    assert torch.equal(ki.sample(gaussian, x, KARRAS), want)


def test_strides_are_kept() -> None:
    x = (10 * noise_like((2, 3, 4, 4))).to(memory_format=torch.channels_last)
    for name in ("euler", "lms", "dpmpp_2m_sde"):
        seen: list[bool] = []

        def denoise(y: Tensor, sigma: Tensor, seen: list[bool] = seen) -> Tensor:
            seen.append(y.is_contiguous(memory_format=torch.channels_last))
            return gaussian(y, sigma)

        result = ki.sample(denoise, x, KARRAS, sampler=name, noise=ki.noise.white(0))
        assert all(seen) and result.is_contiguous(memory_format=torch.channels_last)
        flat = ki.sample(gaussian, x.contiguous(), KARRAS, sampler=name, noise=ki.noise.white(0))
        torch.testing.assert_close(result, flat)


def test_sigma_written_by_denoiser_does_not_reach_another_run_meanwhile() -> None:
    """A run of the same Plan inside of the denoiser, as threads make them, has noise levels of its own."""
    plan, x, inner = ki.compile_plan("euler", KARRAS), 10 * noise_like((2, 6)), list[Tensor]()

    def careless(y: Tensor, sigma: Tensor) -> Tensor:
        out = gaussian(y, sigma)
        sigma.fill_(float("nan"))
        return out

    def outer(y: Tensor, sigma: Tensor) -> Tensor:
        inner.append(ki.run(plan, careless, x))
        return gaussian(y, sigma)

    with torch.no_grad():
        results = [ki.run(plan, denoiser, x) for denoiser in (gaussian, outer, gaussian)]
    assert len(inner) == plan.evaluations and all(torch.equal(result, results[0]) for result in (*results, *inner))
