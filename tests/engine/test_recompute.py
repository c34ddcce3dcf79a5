"""Gradients through reversible samplers whose states are not kept: those of plain backpropagation, in little memory."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from livetensors import Live, peak_of
from problems import noise_like
from torch import Tensor

import kinvert as ki
from kinvert.rules import BDIA, EDICT, Euler, McCallumFoster

RULES = [
    *[
        name
        for name in ki.SAMPLERS
        if name != "dpm_adaptive" and ki.analysis.properties(name).invertibility == "explicit"
    ],
    EDICT(p=0.9, alternate=True),
    BDIA(gamma=0.7),
    BDIA(coordinates="ve"),
    McCallumFoster(Euler(), lam=0.95),
]
DOWN = ki.schedules.karras(8, 0.1, 8.0)  # ends in 0
SCHEDULES = {"to zero": DOWN, "above zero": DOWN[:-1], "up": DOWN[:-1].flip(0), "one step": DOWN[:2]}


class Network(torch.nn.Module):
    """A smooth denoiser with parameters and conditioning, float64."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(noise_like((dim, dim), seed=7) / dim**0.5)
        self.bias = torch.nn.Parameter(noise_like((dim,), seed=8))

    def forward(self, x: Tensor, sigma: Tensor, c: Tensor | float = 0.0) -> Tensor:
        s = sigma[:, None]
        size = (1 + s**2).sqrt()
        return x / size**2 + 0.4 * s / size * torch.tanh(x / size @ self.weight + self.bias + c)


def gradients(plan: ki.Plan, recompute: bool) -> list[Tensor]:
    """Return the result, and the gradients of a loss with respect to all that it depends on."""
    network = Network()
    x = (plan.sigmas[0] * noise_like((2, 6), seed=1)).requires_grad_()
    leaf, kept = noise_like((2, 6), seed=2).requires_grad_(), noise_like((2, 6), seed=3).requires_grad_()
    embedded = torch.sin(leaf)  # conditioning that was computed itself
    given: dict[str, Any] = {"positive": {"c": embedded}, "negative": {"c": 0.3 * embedded}, "latent": kept}
    if plan.is_rising:  # some of these samplers lose the kept region on the way up, and are refused
        given["latent"] = None
    else:
        given["mask"] = torch.tensor([1.0, 1, 0, 1, 1, 0.5])
    result = ki.run(plan, network, x, cfg=2.0, recompute=recompute, **given)
    result.sin().sum().backward()
    leaves = (x, leaf, network.weight, network.bias, *([] if plan.is_rising else [kept]))
    return [result.detach(), *(value.grad for value in leaves)]


@pytest.mark.parametrize("levels", SCHEDULES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_gradients_are_those_of_plain_backpropagation(rule: Any, levels: str) -> None:
    plan = ki.compile_plan(rule, SCHEDULES[levels])
    for got, want in zip(gradients(plan, True), gradients(plan, False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def smooth(x: Tensor, sigma: Tensor) -> Tensor:
    s = sigma[:, None]
    return x / (1 + s**2) + 0.3 * torch.tanh(x / (1 + s))


def memory(rule: Any, steps: int, recompute: bool = True) -> tuple[float, float]:
    """Return the states that live after the forward pass, and at most in both, without those inside the denoiser."""
    plan = ki.compile_plan(rule, ki.schedules.karras(steps + 1, 0.1, 8.0)[:-1])
    x = noise_like((1, 4096)).requires_grad_()
    with Live(least=1024) as live:
        result = ki.run(plan, smooth, x, recompute=recompute)
        gc.collect()
        after = live.now / (4096 * 8)
    del result
    return after, peak_of(lambda wrap: ki.run(plan, wrap(smooth), x, recompute=recompute).square().sum().backward(), x)


@pytest.mark.parametrize("rule", ["edict", "bdia", "mccallum_foster"])
def test_memory_is_that_of_a_few_states_for_any_number_of_steps(rule: str) -> None:
    """Three states beside x and the result: two at the end, and the auxiliary one at the start, if it is not x."""
    few, many = memory(rule, 4), memory(rule, 12)
    assert many == pytest.approx(few, abs=0.1)
    assert many[0] <= 5
    assert memory(rule, 12, recompute=False)[0] > 12


def test_the_state_at_the_start_is_checked() -> None:
    plan, x = ki.compile_plan("bdia", DOWN[:-1]), 8 * noise_like((2, 6))
    generator = torch.Generator().manual_seed(0)

    def random(x: Tensor, sigma: Tensor) -> Tensor:
        return smooth(x, sigma) + 1e-4 * torch.randn(x.shape, generator=generator, dtype=x.dtype)

    result = ki.run(plan, random, x.requires_grad_(), recompute=True)
    with pytest.raises(RuntimeError, match=r"bdia were not recovered.*answer the same twice.*checkpoint"):
        result.sum().backward()


def test_rounding_that_was_magnified_is_an_error() -> None:
    plan = ki.compile_plan(EDICT(p=0.5), ki.schedules.karras(40, 0.1, 8.0)[:-1])
    result = ki.run(plan, smooth, (8 * noise_like((2, 6))).requires_grad_(), recompute=True)
    with pytest.raises(RuntimeError, match=r"edict were not recovered.*rms error in '[xy]' of .* allowed"):
        result.sum().backward()


def dropped_out(sampler: str, recompute: bool) -> Tensor:
    """Return the gradient of a run in float32 with a denoiser that draws random numbers."""
    layer = torch.nn.Dropout(0.1)
    x = (8 * noise_like((2, 64))).float().requires_grad_()
    torch.manual_seed(0)
    plan = ki.compile_plan(sampler, DOWN)
    result = ki.run(plan, lambda x, sigma: layer(smooth(x, sigma)), x, recompute=recompute)
    torch.manual_seed(1)
    result.sin().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("sampler", ["o_belm", "bdia", "leapfrog"])
def test_dropout_is_the_same_again_in_steps_of_one_evaluation(sampler: str) -> None:
    torch.testing.assert_close(dropped_out(sampler, True), dropped_out(sampler, False), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", ["edict", "mccallum_foster", "reversible_heun"])
def test_dropout_in_steps_of_several_evaluations_is_an_error(sampler: str) -> None:
    with pytest.raises(RuntimeError, match="were not recovered"):
        dropped_out(sampler, True)


def test_the_backward_pass_can_be_made_twice_but_not_differentiated() -> None:
    x = (8 * noise_like((2, 6))).requires_grad_()
    result = ki.run(ki.compile_plan("o_belm", DOWN), smooth, x, recompute=True)
    first = torch.autograd.grad(result.sum(), x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(result.sum(), x, retain_graph=True)[0], first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(result.sum(), x, create_graph=True)


def test_the_result_may_be_written_to() -> None:
    x = (8 * noise_like((2, 6))).requires_grad_()
    plan, found = ki.compile_plan("edict", DOWN[:-1]), []
    for recompute in (True, False):
        result = ki.run(plan, smooth, x, recompute=recompute)
        result.mul_(2.0)
        found += torch.autograd.grad(result.sum(), x)
    torch.testing.assert_close(*found)


def test_x_may_be_written_to_before_the_backward_pass_of_a_step_to_zero() -> None:
    x = (8 * noise_like((2, 6))).requires_grad_()
    plan = ki.compile_plan("edict", DOWN[-2:])
    want = torch.autograd.grad(ki.run(plan, smooth, x).sum(), x)[0]
    result = ki.run(plan, smooth, x, recompute=True)
    with torch.no_grad():
        x.zero_()
    torch.testing.assert_close(torch.autograd.grad(result.sum(), x)[0], want)


@pytest.mark.parametrize("sampler", ["edict", "o_belm"])
def test_the_callback_is_told_what_it_is_told_otherwise(sampler: str) -> None:
    plan, x, told = ki.compile_plan(sampler, DOWN), 8 * noise_like((2, 6)), ([], [])
    for recompute, steps in zip((True, False), told, strict=True):
        result = ki.run(plan, smooth, x.clone().requires_grad_(), callback=steps.append, recompute=recompute)
        result.sum().backward()
    assert len(told[0]) >= len(told[1]) - 1
    for got, want in zip(told[0][::-1], told[1][::-1], strict=False):
        assert got.sigma == want.sigma
        torch.testing.assert_close((got.x, got.denoised), (want.x, want.denoised))


def test_the_auxiliary_state_is_differentiated_too() -> None:
    plan = ki.compile_plan("edict", DOWN[:-1]).closed
    found = []
    for recompute in (True, False):
        state = {name: (8 * noise_like((2, 6), seed)).requires_grad_() for name, seed in (("x", 0), ("y", 0))}
        end = ki.engine.run_state(plan, smooth, state, recompute=recompute)
        found.append(torch.autograd.grad(end["x"].sum() + end["y"].square().sum(), [*state.values()]))
    torch.testing.assert_close(*found)


def test_without_gradients_it_is_a_plain_run() -> None:
    plan, x = ki.compile_plan("bdia", DOWN), 8 * noise_like((2, 6))
    with torch.no_grad():
        assert torch.equal(ki.run(plan, smooth, x, recompute=True), ki.run(plan, smooth, x))


def test_samplers_and_dtypes_that_cannot_be_undone_are_refused() -> None:
    x = 8 * noise_like((2, 6))
    for sampler in ("heun", "dpmpp_2m", "euler_ancestral"):
        with pytest.raises(ValueError, match=f"{sampler} is none; .*torch.utils.checkpoint"):
            ki.run(ki.compile_plan(sampler, DOWN), smooth, x, recompute=True)
    with pytest.raises(ValueError, match="float16 does not allow"):
        ki.run(ki.compile_plan("edict", DOWN), smooth, x.half(), recompute=True)
    noisy = McCallumFoster(ki.sampler("euler", s_churn=2.0))
    with pytest.raises(ValueError, match="draws noise"):
        ki.run(ki.compile_plan(noisy, DOWN[:-1]), smooth, x, recompute=True)


def test_a_cfg_with_a_memory_is_refused() -> None:
    def remembers(cond: Tensor, uncond: Tensor, sigma: Tensor) -> Tensor:
        return cond

    remembers.stateful = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="recompute=True"):
        ki.run(
            ki.compile_plan("edict", DOWN), smooth, 8 * noise_like((2, 6)), cfg=remembers, negative={}, recompute=True
        )
