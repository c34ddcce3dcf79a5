"""Every "it is the same as" in the docstrings of the rules, on random schedules."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from problems import schedules
from rule_runs import assert_same, run

import kinvert as ki
from kinvert.rules import (
    SASolver,
)

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
    (("heun", {"s_churn": 5.0, "s_tmin": 1e3}), ("heun", {})),
]


STOCHASTIC = [
    (("ddpm", {}), ("euler_ancestral", {})),
    (("euler_ancestral_cfg_pp", {}), ("euler_ancestral", {})),
    (("euler_ancestral_cfg_pp", {"eta": 0.6, "s_noise": 0.9}), ("euler_ancestral", {"eta": 0.6, "s_noise": 0.9})),
    (("res_multistep_ancestral_cfg_pp", {}), ("res_multistep_ancestral", {})),
    (("lcm", {}), ("euler_ancestral", {"eta": 1e6, "noise_at_down_zero": True})),
]


DOWNWARDS = [
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


def name_of(case: Any) -> str:
    return " = ".join(f"{name}({', '.join(f'{k}={v}' for k, v in options.items())})" for name, options in case)


@pytest.mark.parametrize("case", DETERMINISTIC + STOCHASTIC + DOWNWARDS, ids=name_of)
@given(sigmas=schedules())
@settings(max_examples=20, deadline=None)
def test_same(case: Any, sigmas: list[float]) -> None:
    one, other = (ki.sampler(name, **options) for name, options in case)
    assert_same(run(one, sigmas), run(other, sigmas))


@pytest.mark.parametrize("case", DETERMINISTIC, ids=name_of)
@given(sigmas=schedules(zero=False))
@settings(max_examples=10, deadline=None)
def test_same_upwards(case: Any, sigmas: list[float]) -> None:
    one, other = (ki.sampler(name, **options) for name, options in case)
    assert_same(run(one, sigmas[::-1]), run(other, sigmas[::-1]))


@given(sigmas=schedules(zero=False))
@settings(max_examples=20, deadline=None)
def test_sa_solver_without_its_parts(sigmas: list[float]) -> None:
    quiet = {"eta": 0.0, "corrector_order": 0}
    assert_same(run(SASolver(**quiet), sigmas), run("res_3m", sigmas))
    assert_same(run(SASolver(predictor_order=1, **quiet), sigmas), run("euler", sigmas))
