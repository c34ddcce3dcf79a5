"""Every "it is the same as" of a rule's docstring, on random schedules; and the data that rules are made of."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import guided_mixture, mixture, noise_like, schedules
from torch import Tensor

import kinvert as ki
from kinvert.coefficients import UNIFORM_ADAMS, adams, deis_time, deis_weights, ipndm_v_weights
from kinvert.rules import Flow, RungeKutta, Tableau
from kinvert.rules.tableau import trees

MIXTURE = mixture()


def same_noise(sigma_from: float, sigma_to: float) -> Tensor:
    """Noise that depends on where the interval ends only."""
    return noise_like((3, 6), seed=round(1e6 * sigma_to))


def pair(x: Tensor, sigma: Tensor) -> ki.Guided:
    """A pair with U = D, as at cfg = 1."""
    denoised = MIXTURE(x, sigma)
    return ki.Guided(denoised, denoised)


def run(rule: ki.Rule, sigmas: Any, denoiser: Any = None) -> Tensor:
    plan = ki.compile_plan(rule, sigmas)
    x = sigmas[0] * noise_like((3, 6))
    return ki.run(plan, denoiser or (pair if plan.is_guided else MIXTURE), x, same_noise)


def assert_same(one: ki.Rule, other: ki.Rule, sigmas: Any) -> None:
    a, b = run(one, sigmas), run(other, sigmas)
    assert float((a - b).norm() / b.norm()) < 1e-12


DETERMINISTIC = [
    (("ddim", {}), ("euler", {})),
    (("euler_ancestral", {"eta": 0.0}), ("euler", {})),
    (("euler_cfg_pp", {}), ("euler", {})),
    (("lms", {"order": 1}), ("euler", {})),
    (("ipndm", {"max_order": 1}), ("euler", {})),
    (("ipndm_v", {"max_order": 1}), ("euler", {})),
    (("deis", {"max_order": 1}), ("euler", {})),
    (("gradient_estimation", {"ge_gamma": 1.0}), ("euler", {})),
    (("gradient_estimation", {"ge_gamma": 1.5}), ("ipndm", {"max_order": 2})),
    (("gradient_estimation_cfg_pp", {}), ("gradient_estimation", {})),
    (("gradient_estimation_cfg_pp", {"ge_gamma": 1.5}), ("ipndm", {"max_order": 2})),
    (("ipndm_v", {"max_order": 2}), ("lms", {"order": 2})),
    (("dpm_2_ancestral", {"eta": 0.0}), ("dpm_2", {})),
    (("dpmpp_2s_ancestral", {"eta": 0.0}), ("dpmpp_sde", {"eta": 0.0})),
    (("dpmpp_2m_sde", {"eta": 0.0}), ("dpmpp_2m", {})),
    (("dpmpp_2m_cfg_pp", {}), ("dpmpp_2m", {})),
    (("res_multistep", {}), ("dpmpp_2m_sde", {"eta": 0.0, "solver_type": "heun"})),
    (("res_multistep_cfg_pp", {}), ("res_multistep", {})),
    (("res_multistep_ancestral", {"eta": 0.0}), ("res_multistep", {})),
]
STOCHASTIC = [
    (("ddpm", {}), ("euler_ancestral", {})),
    (("euler_ancestral_cfg_pp", {}), ("euler_ancestral", {})),
    (("euler_ancestral_cfg_pp", {"eta": 0.6, "s_noise": 0.9}), ("euler_ancestral", {"eta": 0.6, "s_noise": 0.9})),
    (("res_multistep_ancestral_cfg_pp", {}), ("res_multistep_ancestral", {})),
    (("lcm", {}), ("euler_ancestral", {"eta": 1e6, "noise_at_down_zero": True})),
]


def name_of(case: Any) -> str:
    return " = ".join(f"{name}({', '.join(f'{k}={v}' for k, v in options.items())})" for name, options in case)


@pytest.mark.parametrize("case", DETERMINISTIC + STOCHASTIC, ids=name_of)
@given(sigmas=schedules())
@settings(max_examples=20, deadline=None)
def test_same(case: Any, sigmas: list[float]) -> None:
    one, other = (ki.sampler(name, **options) for name, options in case)
    assert_same(one, other, sigmas)


@pytest.mark.parametrize("case", DETERMINISTIC, ids=name_of)
@given(sigmas=schedules(zero=False))
@settings(max_examples=10, deadline=None)
def test_same_upwards(case: Any, sigmas: list[float]) -> None:
    one, other = (ki.sampler(name, **options) for name, options in case)
    assert_same(one, other, sigmas[::-1])


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


@given(times=schedules(), eta=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("name", ["euler_ancestral_cfg_pp", "lcm"])
def test_own_flow_branch_is_the_change_of_coordinates(name: str, times: list[float], eta: float) -> None:
    times = [0.9 * t / times[0] for t in times]
    options = {"eta": eta} if "cfg_pp" in name else {}
    denoiser = guided_mixture() if "cfg_pp" in name else MIXTURE
    a = run(ki.sampler(name, flow=True, **options), times, denoiser)
    b = run(Flow(ki.sampler(name, **options)), times, denoiser)
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@given(sigmas=schedules(min_steps=2, max_steps=2, zero=False))
@settings(max_examples=20, deadline=None)
def test_dpm_fast_of_one_and_two_evaluations(sigmas: list[float]) -> None:
    ends = [sigmas[0], sigmas[-1]]
    assert_same(ki.sampler("dpm_fast"), ki.sampler("euler"), ends)
    torch.testing.assert_close(
        run(ki.sampler("dpm_fast"), sigmas), run(ki.sampler("dpm_2"), ends), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("n", range(1, 14))
def test_dpm_fast_makes_as_many_evaluations_as_steps(n: int) -> None:
    plan = ki.compile_plan("dpm_fast", ki.schedules.karras(n, 0.1, 10))
    assert plan.evaluations == n
    assert plan.sigmas[-1] == pytest.approx(10 if n == 1 else 0.1)


@given(sigmas=schedules())
@settings(max_examples=10, deadline=None)
def test_heun_is_a_tableau(sigmas: list[float]) -> None:
    assert_same(RungeKutta(Tableau.parse("heun", 2, "1", "1/2 1/2")), ki.sampler("heun"), sigmas)


def test_2s_cfg_pp_is_not_2s() -> None:
    """Its last shift mixes two evaluations, so it differs even where U = D."""
    sigmas = ki.schedules.karras(8, 0.1, 10)
    gap = run(ki.sampler("dpmpp_2s_ancestral_cfg_pp"), sigmas) - run(ki.sampler("dpmpp_2s_ancestral"), sigmas)
    assert float(gap.abs().max()) > 1e-2


# -- the data that the rules are made of --------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_uniform_adams_weights(k: int) -> None:
    np.testing.assert_allclose(adams([0.0, -1.0, -2.0, -3.0][:k], 0.0, 1.0), UNIFORM_ADAMS[k - 1], rtol=1e-13)


levels = st.lists(st.floats(0.05, 1.0), min_size=2, max_size=5).map(
    lambda steps: tuple(10 * math.exp(-h) for h in np.cumsum(steps))
)


@given(levels=levels)
def test_ipndm_v_weights(levels: tuple[float, ...]) -> None:
    """Exact for up to two slopes; the weights of up to three add up to the step."""
    got = ipndm_v_weights(levels)
    nodes = levels[-2::-1]
    if len(nodes) <= 2:
        np.testing.assert_allclose(got, adams(nodes, *levels[-2:]), rtol=1e-10)
    if len(nodes) <= 3:
        assert sum(got) == pytest.approx(levels[-1] - levels[-2], rel=1e-9)


def test_ipndm_v_weights_on_a_uniform_grid() -> None:
    np.testing.assert_allclose(ipndm_v_weights([3.0, 2.0, 1.0, 0.0]), [-w for w in UNIFORM_ADAMS[2]], rtol=1e-13)
    np.testing.assert_allclose(ipndm_v_weights([4.0, 3.0, 2.0, 1.0, 0.0]), [-57 / 24, 65 / 24, -43 / 24, 11 / 24])


@given(levels=levels)
def test_deis_weights(levels: tuple[float, ...]) -> None:
    """The exact weights integrate 1 exactly; the 10,000-point sum is near them, as near as its two ends allow."""
    exact, upstream = (np.array(deis_weights(levels, how)) for how in ("exact", "upstream"))
    assert sum(exact) == pytest.approx(levels[-1] - levels[-2], rel=1e-12)
    assert np.abs(upstream - exact).max() <= 1e-3 * np.abs(exact).max()


@pytest.mark.parametrize("sigma", [1e-4, 1e-2, 5.0])
def test_exact_deis_weights_on_a_large_step(sigma: float) -> None:
    """One quadrature over a whole range against the sum over its parts."""
    before, end = (0.5 * sigma, sigma), 14.6
    whole = deis_weights((*before, end), "exact")
    # int l_j over a part, with the polynomials of the whole: l_1 = (t - t_i) / (t_{i-1} - t_i) is linear in t, so the
    # part's own weight of l_1 and the width, shifted to the part, add up to it.
    t_older, t_i = deis_time(np.array(before))
    points = np.geomspace(sigma, end, 41)
    total = 0.0
    for a, b in itertools.pairwise(points):
        slope_part = deis_weights((0.5 * a, a, b), "exact")[1]  # int (t - t_a) / (t_{a/2} - t_a)
        t_half, t_a = deis_time(np.array([0.5 * a, a]))
        total += slope_part * (t_half - t_a) + (t_a - t_i) * (b - a)
    assert whole[1] == pytest.approx(total / (t_older - t_i), rel=1e-10)


def test_rooted_trees() -> None:
    assert [len(trees(n)) for n in range(1, 7)] == [1, 1, 2, 4, 9, 20]


@pytest.mark.parametrize("name", ["midpoint", "ralston", "rk3", "bogacki_shampine", "rk4", "dormand_prince"])
def test_tableau_order_is_not_higher(name: str) -> None:
    tableau = ki.SAMPLERS[name].defaults["tableau"]
    assert tableau.name == name
    with pytest.raises(ValueError, match="does not have order"):
        Tableau(name, tableau.order + 1, tableau.a, tableau.b)
    rule = ki.sampler(name)
    assert (rule.name, rule.ode_order) == (name, tableau.order)
    plan = ki.compile_plan(rule, [3.0, 1.0, 0.0])
    assert [len(step.stages) for step in plan.steps] == [len(tableau.b), 1]


def test_bad_tableaus() -> None:
    with pytest.raises(ValueError, match="sum_i b_i Phi_i is 2/3 and must be 1"):
        Tableau.parse("wrong", 1, "1/2", "1/3 1/3")
    with pytest.raises(ValueError, match="lengths 0 to 1"):
        Tableau.parse("wrong", 1, "1/2 | 1 1", "1/2 1/2")
    with pytest.raises(TypeError, match="must be a Tableau"):
        ki.sampler("rk4", tableau="rk4")
