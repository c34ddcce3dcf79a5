"""What the docstrings of the stochastic, predictor-corrector and exponential rules say, and their coefficients."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import mixture, noise_like, order_slope, schedules
from torch import Tensor

import kinvert as ki
from kinvert.coefficients import exponential_adams, left_sums, log_step, phi
from kinvert.rules import DEIS, ERSDE, RES3S, CFGppUD10AB, DPMpp3MSDE, SASolver, Seeds3, UniPC

MIXTURE = mixture()


def same_noise(sigma_from: float, sigma_to: float) -> Tensor:
    """Noise that depends on where the interval ends only."""
    return noise_like((3, 6), seed=round(1e6 * sigma_to))


def run(rule: str | ki.Rule, sigmas: Any, denoiser: Any = MIXTURE) -> Tensor:
    return ki.run(ki.compile_plan(rule, sigmas), denoiser, sigmas[0] * noise_like((3, 6)), same_noise)


def assert_same(one: Tensor, other: Tensor) -> None:
    assert float((one - other).norm() / other.norm()) < 1e-12


def paired(x: Tensor, sigma: Tensor) -> ki.Guided:
    """The mixture for CFG++, without guidance."""
    denoised = MIXTURE(x, sigma)
    return ki.Guided(denoised, denoised)


def mean_only(x: Tensor, sigma: Tensor) -> Tensor:
    """Data of a single point."""
    return torch.full_like(x, 0.5)


# -- the same sampler under two names ---------------------------------------------------------------------------------
SAME = [
    (("dpmpp_2m_sde", {"eta": 0.0}), ("dpmpp_2m", {})),
    (("dpmpp_2m_sde_heun", {"eta": 0.0}), ("res_multistep", {})),
    (("seeds_2", {"eta": 0.0}), ("dpmpp_2s_ancestral", {"eta": 0.0})),
    (("seeds_2", {"eta": 0.0, "r": 0.3}), ("dpmpp_sde", {"eta": 0.0, "r": 0.3})),
    (("seeds_3", {"eta": 0.0}), ("res_3s", {"c2": 1 / 3, "c3": 2 / 3})),
    (("er_sde", {"noise_scaler": "ode", "max_stage": 1}), ("euler", {})),
    (("er_sde", {"noise_scaler": "reverse_time_sde", "max_stage": 1}), ("euler_ancestral", {})),
    (("er_sde", {"noise_scaler": "reverse_time_sde", "reverse_eta": 0.0}), ("er_sde", {"noise_scaler": "ode"})),
    (("res_2m", {}), ("res_multistep", {})),
    (("res_2m", {}), ("dpmpp_2m_sde_heun", {"eta": 0.0})),
    (("res_2m", {"order": 1}), ("euler", {})),
    (("exp_heun_2_x0", {}), ("res_2s", {"c2": 1.0})),
    (("exp_heun_2_x0_sde", {}), ("seeds_2", {"r": 1.0, "solver_type": "phi_2"})),
    (("exp_heun_2_x0_sde", {"eta": 0.0}), ("exp_heun_2_x0", {})),
    (("seeds_2", {"eta": 0.0, "r": 0.3, "solver_type": "phi_2"}), ("res_2s", {"c2": 0.3})),
    (("dpmpp_3m_sde", {"eta": 0.0, "solver_type": "midpoint"}), ("dpmpp_3m", {})),
    (("ddim_inverse", {}), ("ddim", {})),
    (("lcm", {"s_noise": 0.7, "s_noise_end": 0.7}), ("lcm", {"s_noise": 0.7})),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=str)
@given(sigmas=schedules())
@settings(max_examples=20, deadline=None)
def test_the_same_sampler(one: Any, other: Any, sigmas: list[float]) -> None:
    assert_same(run(ki.sampler(one[0], **one[1]), sigmas), run(ki.sampler(other[0], **other[1]), sigmas))


@given(sigmas=schedules(zero=False))
@settings(max_examples=20, deadline=None)
def test_sa_solver_without_its_parts(sigmas: list[float]) -> None:
    quiet = {"eta": 0.0, "corrector_order": 0}
    assert_same(run(SASolver(**quiet), sigmas), run("res_3m", sigmas))
    assert_same(run(SASolver(predictor_order=1, **quiet), sigmas), run("euler", sigmas))


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"])
def test_gpu_names_are_the_same_rule(name: str) -> None:
    assert ki.sampler(f"{name}_gpu") == ki.sampler(name)
    assert ki.sampler(f"{name}_gpu", eta=0.5) == ki.sampler(name, eta=0.5)


# -- UniPC ------------------------------------------------------------------------------------------------------------
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


# -- SA-Solver --------------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize(("pece", "evaluations"), [(False, 6), (True, 11)])
def test_sa_solver_evaluations(pece: bool, evaluations: int) -> None:
    assert ki.compile_plan(SASolver(use_pece=pece), ki.schedules.karras(6, 0.1, 10)).evaluations == evaluations


def test_sa_solver_noise_has_its_interval() -> None:
    plan = ki.compile_plan("sa_solver", [10.0, 4.0, 1.0, 0.3, 0.0])
    assert [noise.sigma_to for step in plan.steps for noise in step.noises] == [4.0, 1.0]


@pytest.mark.parametrize("name", ["sa_solver", "seeds_2", "seeds_3", "dpmpp_3m_sde"])
def test_rising_noise_is_refused_with_the_fix(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} cannot step .* use eta=0"):
        ki.compile_plan(name, [0.1, 1.0, 4.0, 10.0])
    assert not ki.compile_plan(ki.sampler(name, eta=0.0), [0.1, 1.0, 4.0, 10.0]).is_stochastic


# -- orders that the battery does not see -----------------------------------------------------------------------------
@functools.cache
def end(rule: ki.Rule, steps: int) -> Tensor:
    plan = ki.compile_plan(rule, ki.schedules.karras(steps, 0.1, 10)[:-1])
    return ki.run(plan, paired if plan.is_guided else MIXTURE, 10 * noise_like((8, 6), seed=3))


@pytest.mark.parametrize(
    ("rule", "order"),
    [
        (SASolver(eta=0.0), 4),
        (SASolver(eta=0.0, use_pece=True), 4),
        (SASolver(eta=0.0, keep_last=False), 1),
        (UniPC(order=1), 2),
        (UniPC(order=2, lower_order_final=False), 3),
        (UniPC(order=3, lower_order_final=False), 4),
        (DPMpp3MSDE(eta=0.0, solver_type="midpoint"), 2),
        (DEIS(variable="log_sigma"), 2),
        (CFGppUD10AB(), 0),
        (CFGppUD10AB(uncond_history=0.0), 1),
        (Seeds3(eta=0.0, r_1=0.2, r_2=0.9), 2),
        (RES3S(c2=0.5, c3=0.9), 3),
        (ERSDE(noise_scaler="ode", max_stage=2), 2),
        (ERSDE(s_noise=0.0), 0),
    ],
    ids=str,
)
def test_order(rule: ki.Rule, order: int) -> None:
    steps, reference = [80, 160, 320], end(ki.sampler("res_5s_hochbruck-ostermann"), 1000)
    assert order_slope([float((end(rule, n) - reference).norm()) for n in steps], steps) == pytest.approx(
        order, abs=0.5
    )


# -- options ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rule", "fix"),
    [
        (Seeds3(r_1=0.5, r_2=0.5), "use r_1 < r_2"),
        (RES3S(c2=2 / 3), "use c2 other than"),
        (RES3S(c2=0.5, c3=0.5), "use c2 other than"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(rule: ki.Rule, fix: str) -> None:
    with pytest.raises(ValueError, match=fix):
        ki.compile_plan(rule, [10.0, 1.0])


# -- coefficients -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", range(6))
@pytest.mark.parametrize("z", [0.0, 1e-9, -1e-5, 0.1, -0.99, 1.01, -1.5, 3.0, -7.0, 12.0, -30.0])
def test_phi_is_its_series(k: int, z: float) -> None:
    term, total = Fraction(1, math.factorial(k)), Fraction(0)
    for n in range(200):
        total += term
        term *= Fraction(z) / (n + 1 + k)
    assert phi(k, z) == pytest.approx(float(total), rel=4e-15)


def test_phi_far_out() -> None:
    assert phi(2, -1e6) == pytest.approx(1e-6 - 1e-12, rel=1e-14)
    assert phi(3, -700.0) == pytest.approx((0.5 - (1 - 1 / 700) / 700) / 700, rel=1e-14)


@given(
    sigmas=schedules(min_steps=2, max_steps=5, zero=False),
    corrector=st.booleans(),
    rising=st.booleans(),
    rate=st.sampled_from([1.0, 1.25, 2.0, 5.0]),
)
@settings(max_examples=60, deadline=None)
def test_exponential_adams_is_exact_on_polynomials(
    sigmas: list[float], corrector: bool, rising: bool, rate: float
) -> None:
    """sum_j W_j u_j^m = rate int_0^h e^{rate (u - h)} u^m du = rate h^{m+1} m! phi_{m+1}(-rate h)."""
    levels = sigmas[::-1] if rising else sigmas
    *_, a, b = levels
    nodes = levels[::-1] if corrector else levels[-2::-1]
    h = log_step(a, b)
    weights = exponential_adams(nodes, a, b, rate)
    for m in range(len(nodes)):
        terms = [w * log_step(a, node) ** m for w, node in zip(weights, nodes, strict=True)]
        want = rate * h ** (m + 1) * math.factorial(m) * phi(m + 1, -rate * h)
        assert sum(terms) == pytest.approx(want, rel=1e-11, abs=1e-11 * sum(map(abs, terms)))


@pytest.mark.parametrize("h", [1e-6, 1e-3, 6.0, 25.0, -6.0, -25.0, 300.0])
def test_exponential_adams_of_short_and_long_steps(h: float) -> None:
    a, rate = 1.0, 2.0
    nodes = [a, math.exp(0.3), math.exp(0.9)]
    weights = exponential_adams(nodes, a, math.exp(-h), rate)
    assert sum(weights) == pytest.approx(-math.expm1(-rate * h), rel=1e-9)
    first = sum(w * log_step(a, node) for w, node in zip(weights, nodes, strict=True))
    assert first == pytest.approx(rate * h**2 * phi(2, -rate * h), rel=1e-8)


def test_left_sums() -> None:
    mean, moment = left_sums(lambda v: v, 1.0, 2.0)
    grid = [1 + k / 200 for k in range(200)]
    assert mean == pytest.approx(sum(1 / v for v in grid) / 200, rel=1e-14)
    assert moment == pytest.approx(sum((v - 2) / v for v in grid) / 200, rel=1e-14)
    assert mean == pytest.approx(math.log(2), abs=2e-3)


def test_seeds_noise_is_one_path() -> None:
    """On data of a single point with no noise to start from, the noise of the stages is that of the SDE itself."""
    levels = [10.0, 4.0, 1.0]
    for name in ("seeds_2", "seeds_3"):
        for step, (a, b) in zip(ki.compile_plan(name, levels).steps, pairwise(levels), strict=True):
            variance = sum(c**2 for symbol, c in step.x if symbol.kind == "noise")
            assert variance == pytest.approx(b**2 * (1 - (b / a) ** 2), rel=1e-12)
            assert sum(c for symbol, c in step.x if symbol.kind != "noise") == pytest.approx(1.0, rel=1e-12)
            assert [noise.sigma_to for noise in step.noises][-1] == b
            assert all(n.sigma_to == m.sigma_from for n, m in pairwise(step.noises))
