"""What the numbers of a run mean, and which rule a sampler is in flow time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flowmodels import IN_FLOW, IN_VE, LEVELS, MEAN, STD, TIMES, X, gaussian_network
from problems import noise_like
from recordings import Case, RecordedNoise, array, index, recorded_denoiser, relative_error, shared
from torch import Tensor

import kinvert as ki
from kinvert.coordinates import coordinates_of
from kinvert.denoisers import Gaussian, Masked, from_eps, from_velocity, guide
from kinvert.engine.adaptive import run_adaptive
from kinvert.inversion.baselines import BASELINES
from kinvert.levels import FlowTimes
from kinvert.rules import (
    Flow,
)


def test_a_denoiser_has_the_coordinates_of_its_levels() -> None:
    assert IN_FLOW.coordinates == LEVELS.coordinates == "flow"
    assert from_velocity(gaussian_network).coordinates == IN_VE.coordinates == "ve"
    levels = ki.levels.stable_diffusion()
    assert from_eps(torch.sin, levels).coordinates == levels.coordinates == Gaussian(0.0, 1.0).coordinates == "ve"
    with pytest.raises(ValueError, match="is for from_velocity, not for from_eps"):
        ki.denoisers.Preconditioned(torch.sin, levels, "eps", coordinates="flow")


def test_wrappers_pass_coordinates_on() -> None:
    guided = guide(functools.partial(IN_FLOW), 1.0)
    assert guided.coordinates == Masked(guided, torch.ones(8, 8), X).coordinates == "flow"
    assert coordinates_of(IN_FLOW.__call__) == "flow"
    assert coordinates_of(lambda x, t: x) is None
    steered = ki.inversion.baselines.steer(IN_FLOW, X, 0.0, eta=1.0)
    torch.testing.assert_close(ki.sample(steered, noise_like(X.shape), TIMES), X)  # it ends at the image in flow time

    class Own:
        coordinates: Any = "Flow"

        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match="coordinates of Own must be 've' or 'flow', got 'Flow'"):
        ki.sample(Own(), X, TIMES)
    Own.coordinates = torch.zeros(3)  # a network's own business
    assert coordinates_of(Own()) is None


VERBS: dict[str, Callable[[Any, Any], Any]] = {
    "sample": lambda d, s: ki.sample(d, X, s),
    "dpm_adaptive": lambda d, s: ki.sample(d, X, s, sampler="dpm_adaptive"),
    "run_adaptive": lambda d, s: run_adaptive(ki.rules.DPMAdaptive(), d, X, s),
    "unsample": lambda d, s: ki.unsample(d, X, s),
    "invert": lambda d, s: ki.invert(d, X, s[:-1]),
    "extract_noise": lambda d, s: ki.extract_noise(d, X, s[:-1]),
    "round_trip": lambda d, s: ki.round_trip(d, X, s),
    "run": lambda d, s: ki.run(ki.compile_plan("euler", s), d, X),
}


@pytest.mark.parametrize("verb", VERBS)
def test_mismatched_coordinates_are_refused(verb: str) -> None:
    sigmas = ki.levels.flow_to_ve(TIMES.clamp(max=1 - 1e-4))
    for times in (TIMES, TIMES.float(), TIMES[3:]):
        with pytest.raises(ValueError, match=r'coordinates="flow".*flow_to_ve'):
            VERBS[verb](IN_VE, times)
        with pytest.raises(ValueError, match="flow time"):
            VERBS[verb](Gaussian(MEAN, STD), times)
    with pytest.raises(
        ValueError, match=r"flow times must lie in \[0, 1\], got 9999; .*ve_to_flow.*coordinates=\"ve\""
    ):
        VERBS[verb](IN_FLOW, sigmas)
    for denoiser, schedule in ((IN_FLOW, TIMES), (IN_FLOW, TIMES.tolist()), (IN_VE, sigmas)):
        VERBS[verb](denoiser, schedule)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_in_ve_and_say_so(name: str) -> None:
    for denoiser in (IN_FLOW, IN_VE):
        with pytest.raises(ValueError, match=r"variance-exploding coordinates.*coordinates=\"ve\".*flow_to_ve"):
            BASELINES[name](denoiser, X, TIMES[:-1])


def test_a_rule_for_flow_time_is_refused_in_ve() -> None:
    for rule in (Flow(ki.sampler("heun")), ki.sampler("euler_ancestral", flow=True)):
        with pytest.raises(ValueError, match="is for flow time, but the denoiser takes sigmas"):
            ki.sample(IN_VE, X, [5.0, 1.0, 0.0], sampler=rule)


def test_schedule_declares_coordinates_for_a_denoiser_without() -> None:
    noise = noise_like(X.shape)
    for name in ("euler_ancestral", "dpmpp_2m_sde", "euler"):
        want = ki.sample(IN_FLOW, noise, TIMES.tolist(), sampler=name, noise=ki.noise.white(3))
        for start in (TIMES, FlowTimes(TIMES.tolist())):
            got = ki.sample(lambda x, t: IN_FLOW(x, t), noise, start, sampler=name, noise=ki.noise.white(3))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-3)  # where Flow starts depends on the shift
    trips = [ki.round_trip(d, X, TIMES, sampler="heun") for d in (IN_FLOW, lambda x, t: IN_FLOW(x, t))]
    assert torch.equal(trips[0].reconstruction, trips[1].reconstruction)


def test_undeclared_schedule_from_1_warns() -> None:
    """Only where it matters to the sampler."""

    def denoiser(x: Tensor, t: Tensor) -> Any:
        return IN_FLOW(x, t)

    with pytest.warns(RuntimeWarning, match=r"start at exactly 1.*euler_ancestral.*ki.levels.FlowTimes\(sigmas\)"):
        ki.sample(denoiser, X, TIMES.tolist(), sampler="euler_ancestral")
    ki.sample(denoiser, X, TIMES.tolist(), sampler="heun")
    ki.sample(denoiser, X, FlowTimes(TIMES.tolist()), sampler="euler_ancestral")
    ki.sample(denoiser, X, TIMES[1:].tolist(), sampler="euler_ancestral")
    denoiser.coordinates = "ve"  # type: ignore[attr-defined]
    ki.sample(denoiser, X, TIMES.tolist(), sampler="euler_ancestral")


WRAPPED = {
    "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "er_sde", "seeds_2", "seeds_3", "sa_solver",
    "sa_solver_pece", "dpmpp_2s_ancestral_cfg_pp", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp",
    "dpmpp_3m", "exp_heun_2_x0", "exp_heun_2_x0_sde", "dpmpp_sde_gpu", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun_gpu",
    "dpmpp_3m_sde_gpu", "shark", "rex_sde", "restart",
}  # fmt: skip


WITH_OPTION = {
    "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "lcm", "euler_cfg_pp", "euler_ancestral_cfg_pp", "ddim",
    "ddpm", "rf_solver", "fireflow", "cfgpp_ud10_ab", "edict", "ddim_inverse",
}  # fmt: skip


def test_flow_sampler_by_name() -> None:
    start = 3 * 0.9999 / (1 + 2 * 0.9999)
    for name in WRAPPED:
        rule = ki.flow_sampler(name, LEVELS)
        assert isinstance(rule, Flow)
        assert (rule.name, rule.start) == (name, pytest.approx(start, abs=1e-15))
    for name in WITH_OPTION:
        rule = ki.flow_sampler(name)
        assert getattr(rule, "flow", False) is True
        assert rule.name == name
    assert ki.flow_sampler("bdia") == ki.sampler("bdia", coordinates="ve")  # the state as it is
    for name in ki.SAMPLERS.keys() - WRAPPED - WITH_OPTION - {"bdia"}:
        assert ki.flow_sampler(name, LEVELS) == ki.sampler(name)
    solver = ki.flow_sampler("sa_solver", LEVELS).rule  # type: ignore[attr-defined]
    assert (solver.sde_start, solver.sde_end) == (pytest.approx(12.0), pytest.approx(0.75))


def test_flow_sampler_of_a_rule() -> None:
    """A rule with options is resolved as its name is; what is for flow time already stays, and so does its interval."""
    for rule in (Flow(ki.sampler("heun")), ki.sampler("lcm", flow=True), ki.sampler("heun")):
        assert ki.flow_sampler(rule) is rule
    assert ki.flow_sampler(ki.sampler("dpmpp_sde", eta=0.5)) == Flow(ki.sampler("dpmpp_sde", eta=0.5))
    assert isinstance(ki.flow_sampler(ki.sampler("heun", s_churn=1.0, s_tmin=30.0)), Flow)  # no matter where it churns
    solver = ki.flow_sampler(ki.sampler("sa_solver", sde_end=0.1), LEVELS).rule  # type: ignore[attr-defined]
    assert (solver.sde_start, solver.sde_end) == (ki.sampler("sa_solver").sde_start, 0.1)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="dpm_adaptive: its noise .*use eta=0"):
        ki.flow_sampler(ki.sampler("dpm_adaptive", eta=0.5))


class Host:
    """What a host's model knows of its levels."""

    def percent_to_sigma(self, p: float) -> float:
        return 1.0 - p**2


def test_flow_sampler_with_levels_of_a_host() -> None:
    rule = ki.flow_sampler("sa_solver", Host())
    assert isinstance(rule, Flow)
    assert rule.start == 1 - 1e-8
    assert rule.rule.sde_end == pytest.approx(0.36 / 0.64)  # type: ignore[attr-defined]


def test_compile_plan_of_flow_times() -> None:
    plan = ki.compile_plan("euler_ancestral", TIMES)
    assert plan.coordinates == "flow"
    assert plan.rule == ki.sampler("euler_ancestral", flow=True)
    assert ki.compile_plan("euler_ancestral", TIMES.tolist()).rule == ki.sampler("euler_ancestral")  # as it is
    assert ki.compile_plan("euler_ancestral", TIMES) is plan


def test_plan_in_other_coordinates_is_refused() -> None:
    times = TIMES[1:].tolist()
    for name in ("euler_ancestral", "dpmpp_2m_sde", "bdia"):
        with pytest.raises(ValueError, match=rf"the Plan of {name} is one for v.*flow_sampler\('{name}', levels\)"):
            ki.run(ki.compile_plan(name, times), IN_FLOW, X)
        ki.run(ki.compile_plan(ki.flow_sampler(name, LEVELS), times), IN_FLOW, X)
    for rule in (Flow(ki.sampler("heun")), ki.sampler("edict", flow=True)):
        with pytest.raises(ValueError, match="the Plan is for flow times, but the denoiser takes sigmas"):
            ki.run(ki.compile_plan(rule, TIMES[1:]), IN_VE, X)


# The host has no formulas of their own for these on a flow model, and too much spread: here they have.
BETTER = {
    "ddpm", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp", "dpmpp_2s_ancestral_cfg_pp",
    "dpmpp_sde_gpu",
}  # fmt: skip


RECORDED = [
    c for c in index()["samplers"]
    if c["process"] == "CONST" and c["direction"] == "sample" and c["finite"] and c["sampler"] in ki.SAMPLERS
]  # fmt: skip


@pytest.mark.parametrize("case", [c for c in RECORDED if c["sampler"] not in BETTER], ids=lambda c: c["id"])
def test_flow_runs_match_host_recordings(case: Case) -> None:
    """`ki.sample` by the plain name, against the recorded run of the host on a flow model of shift 3."""
    dtype = getattr(torch, case["dtype"])
    sigmas = FlowTimes(shared(f"sigmas_{case['schedule']}", torch.float64))
    x = (shared("x_init_unit", torch.float32) * sigmas[0].float()).to(dtype)
    cond, uncond = (recorded_denoiser(case, dtype, branch) for branch in (False, True))
    cfg = case.get("cfg")

    class Network:
        levels = LEVELS

        def __call__(self, x: Tensor, t: Tensor) -> Any:
            if cfg is None:
                return cond(x, t)
            u = uncond(x, t)
            return ki.Guided(u + cfg * (cond(x, t) - u), u)

    got = ki.sample(Network(), x, sigmas, sampler=case["sampler"], noise=RecordedNoise(case, sigmas.tolist(), dtype))
    assert relative_error(got, array(case, "final")) <= (1e-6 if case["sampler"] == "er_sde" else 1e-9)
