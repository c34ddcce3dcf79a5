"""UniPC and SA-Solver: orders, ends, weights and options."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import noise_like, schedules
from rule_runs import MIXTURE, mean_only, run
from torch import Tensor

import kinvert as ki
from kinvert.coefficients import (
    exponential_adams,
    log_step,
    phi,
)
from kinvert.rules import (
    SASolver,
    UniPC,
)

SMOOTH = ki.denoisers.Gaussian(0.3, 1.5)


def unipc_orders(rule: ki.rules.UniPC, n: int) -> list[int]:
    return [rule._order(n, k) for k in range(1, n + 1)]


@given(order=st.integers(1, 6), n=st.integers(1, 30))
def test_unipc_orders(order: int, n: int) -> None:
    lowered, kept = (unipc_orders(ki.rules.UniPC(order=order, lower_order_final=lower), n) for lower in (True, False))
    assert kept == [min(order, k) for k in range(1, n + 1)]
    assert lowered == [min(order, k, n + 1 - k) for k in range(1, n + 1)]
    if order == 3:  # as ComfyUI has it: at most one less than the steps
        highest = min(3, n - 1)
        assert n == 1 or lowered == [k if k < highest else min(highest, n + 1 - k) for k in range(1, n + 1)]


@given(sigmas=schedules(min_steps=2, zero=False), order=st.integers(1, 5), lower=st.booleans())
@settings(max_examples=20, deadline=None)
def test_unipc_keeps_data_of_a_single_point(sigmas: list[float], order: int, lower: bool) -> None:
    """Whatever the order, the weights of predictor and corrector add up."""
    plan = ki.compile_plan(ki.sampler("uni_pc", order=order, lower_order_final=lower), sigmas)
    assert ki.analysis.row_sums(plan) == pytest.approx([1.0] * len(plan.steps), rel=1e-9)


def test_unipc_of_order_1_is_euler_and_a_trapezoid() -> None:
    """Written out for one corrected step: x' = q x + (1 - q) D - B/2 (D_next - D), with B = -h."""
    sigmas = [10.0, 4.0, 1.0]
    plan = ki.compile_plan(ki.sampler("uni_pc", order=1), sigmas)
    x = 10 * noise_like((2, 6))

    def at(x: Tensor, sigma: float) -> Tensor:
        return MIXTURE(x, torch.full((2,), sigma, dtype=torch.float64))

    d = at(x, 10.0)
    predicted = 0.4 * x + 0.6 * d
    d_next = at(predicted, 4.0)
    corrected = 0.4 * x + 0.6 * d + math.log(10 / 4) / 2 * (d_next - d)
    torch.testing.assert_close(ki.run(plan, MIXTURE, x), 0.25 * corrected + 0.75 * d_next, rtol=1e-12, atol=1e-12)


@given(sigmas=schedules(min_steps=3, max_steps=3, zero=False))
@settings(max_examples=30, deadline=None)
def test_unipc_systems_have_the_exponential_adams_weights_as_solution(sigmas: list[float]) -> None:
    """sum_m r_m^{i-1} (B rho_m) = i! z phi_{i+1}(z), with nodes r_m of older images and r_p = 1, as in the paper."""
    *_, a, b = sigmas
    h = log_step(a, b)
    r = [log_step(a, older) / h for older in sigmas[1::-1]] + [1.0]
    matrix = np.array([[node**i for node in r] for i in range(3)])
    rhs = [math.factorial(i) * -h * phi(i + 1, -h) for i in (1, 2, 3)]
    weights = -np.linalg.solve(matrix, rhs) / r
    got = exponential_adams([*sigmas[1::-1], b, a], a, b)
    np.testing.assert_allclose(got[:3], weights, rtol=1e-6, atol=1e-9)
    assert sum(got) == pytest.approx(1 - b / a, rel=1e-9)


def test_unipc_bh2_predicts_order_2_as_dpmpp_2m() -> None:
    sigmas = [10.0, 4.0, 1.0, 0.5]
    q, ratio = 1 / 4, math.log(4) / math.log(10 / 4)
    weights, _ = UniPC(variant="bh2")._predictor(sigmas, 2, [None, None])  # type: ignore[list-item]
    assert weights == pytest.approx([(1 - q) * (1 + ratio / 2), -(1 - q) * ratio / 2], rel=1e-14)


def test_unipc_ends_at_a_thousandth() -> None:
    plan = ki.compile_plan("uni_pc", [10.0, 1.0, 0.0])
    assert plan.sigmas == (10.0, 1.0, 0.001)
    assert plan.evaluations == 2
    one = run("uni_pc", [10.0, 1.0])
    torch.testing.assert_close(one, 10 * noise_like((3, 6)) * math.sqrt(2 / 101), rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match=r"before it is 0.0005; use a schedule"):
        ki.compile_plan("uni_pc", [10.0, 1.0, 0.0005, 0.0])


def test_sa_solver_discards_the_last_step_if_asked() -> None:
    """On data of a single point x - 0.5 is proportional to sigma, which shows the level of the result."""
    sigmas = [10.0, 5.0, 2.0, 1.0]
    start = 10 * noise_like((3, 6)) - 0.5
    for keep, level in ((False, 2.0), (True, 1.0)):
        got = run(SASolver(eta=0.0, keep_last=keep), sigmas, mean_only) - 0.5
        torch.testing.assert_close(got, start * level / 10.0, rtol=1e-12, atol=1e-12)
    assert SASolver().keep_last and SASolver(keep_last=False).ode_order == 1
    options = {"sde_start": 10.0, "sde_end": 0.0}
    assert [ki.compile_plan(SASolver(**options, keep_last=keep), sigmas).draws for keep in (False, True)] == [2, 3]


@pytest.mark.parametrize(
    ("predictor", "corrector", "order"), [(3, 4, 3), (1, 4, 2), (2, 2, 2), (3, 1, 1), (3, 0, 2), (1, 0, 1), (4, 0, 2)]
)
def test_sa_solver_has_the_order_of_its_weakest_part(predictor: int, corrector: int, order: int) -> None:
    """The corrector adds one to the predictor, the first step caps both; without a corrector it caps the predictor."""
    rule = SASolver(eta=0.0, predictor_order=predictor, corrector_order=corrector)
    assert rule.ode_order == order

    def error(steps: int) -> float:
        sigmas = [10.0 * 0.1 ** (i / steps) for i in range(steps + 1)]
        want = SMOOTH.ode(torch.ones(1, 2, dtype=torch.float64), 10.0, 1.0)
        got = ki.run(ki.compile_plan(rule, sigmas), SMOOTH, torch.ones(1, 2, dtype=torch.float64))
        return float((got - want).abs().max())

    assert math.log2(error(100) / error(400)) / 2 > order - 0.3


@pytest.mark.parametrize(("pece", "evaluations"), [(False, 6), (True, 11)])
def test_sa_solver_evaluations(pece: bool, evaluations: int) -> None:
    assert ki.compile_plan(SASolver(use_pece=pece), ki.schedules.karras(6, 0.1, 10)).evaluations == evaluations


def test_sa_solver_noise_has_its_interval() -> None:
    plan = ki.compile_plan("sa_solver", [10.0, 4.0, 1.0, 0.3, 0.0])
    assert [noise.sigma_to for step in plan.steps for noise in step.noises] == [4.0, 1.0]


def test_unipc_may_end_at_zero_with_the_last_denoised_image() -> None:
    """The run on the positive levels, and then what the denoiser shows there."""
    sigmas, x = [10.0, 4.0, 1.5, 0.6, 0.0], 10 * noise_like((2, 6))
    rule = ki.sampler("uni_pc_bh2", order=2, at_zero="denoised")
    seen: list[Tensor] = []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(MIXTURE(x, sigma))
        return seen[-1]

    plan = ki.compile_plan(rule, sigmas)
    assert plan.sigmas[-1] == 0 and torch.equal(ki.run(plan, denoiser, x), seen[-1])
    to_thousandth = ki.run(ki.compile_plan(ki.sampler("uni_pc_bh2", order=2), sigmas), MIXTURE, x)
    torch.testing.assert_close(seen[-1], to_thousandth, atol=0.02, rtol=0)
    assert ki.compile_plan(rule, [2.0, 0.0]).evaluations == 1


@pytest.mark.parametrize("order", [1, 2, 3])
def test_sa_solver_may_lower_its_order_at_every_end(order: int) -> None:
    """A step of the predictor alone goes from x along as many denoised images as its order."""
    for lower in (True, False):
        rule = SASolver(predictor_order=order, corrector_order=0, eta=0.0, lower_order_final=lower)
        plan = ki.compile_plan(rule, [10.0, 7.0, 5.0, 3.0, 2.0, 1.0, 0.5])
        used = [len(step.x.terms) - 1 for step in plan.steps]
        assert used == [min(order, i + 1, 6 - i if lower else 6) for i in range(6)]
