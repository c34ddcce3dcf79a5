"""Flow models: what the numbers of a run mean, what a sampler is in flow time, and the laws of exact denoisers."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import noise_like
from recordings import Case, RecordedNoise, array, index, recorded_denoiser, relative_error, shared
from torch import Tensor

import kinvert as ki
from kinvert.coordinates import coordinates_of
from kinvert.denoisers import Gaussian, Masked, from_eps, from_velocity, guide
from kinvert.engine.adaptive import run_adaptive
from kinvert.inversion.baselines import BASELINES
from kinvert.levels import FlowTimes
from kinvert.moments import gaussian_law, gaussian_moments
from kinvert.rules import EDICT, Flow
from kinvert.sampling import rising_schedule

LEVELS = ki.levels.flow(3.0)
TIMES = ki.schedule("simple", 20, LEVELS)
MEAN, STD = 0.3, 0.5


def gaussian_network(x: Tensor, t: Tensor) -> Tensor:
    """The velocity of data N(0.3, 0.5²), told 1000 t."""
    t = t.reshape(-1, *[1] * (x.ndim - 1)) / 1000
    variance = ((1 - t) * STD) ** 2 + t**2
    away = x - (1 - t) * MEAN
    return (away * (1 - (1 - t) * STD**2 / variance) + (1 - t) * MEAN - MEAN) / t


def mixture_denoiser(x: Tensor, t: Tensor) -> Tensor:
    """Of x0 in one dimension: 0.3 N(-0.6, 0.2²) + 0.7 N(0.5, 0.4²)."""
    means, stds, weights = (torch.tensor(v, dtype=x.dtype) for v in ((-0.6, 0.5), (0.2, 0.4), (0.3, 0.7)))
    t = t[:, None]
    variance = ((1 - t) * stds) ** 2 + t**2
    away = x - (1 - t) * means
    share = (weights.log() - variance.log() / 2 - away**2 / (2 * variance)).softmax(1)
    return (share * (means + (1 - t) * stds**2 / variance * away)).sum(1, keepdim=True)


IN_FLOW = from_velocity(gaussian_network, LEVELS)
IN_VE = from_velocity(gaussian_network, LEVELS, coordinates="ve")
X = MEAN + STD * noise_like((4, 2, 8, 8))


# -- what the numbers mean ----------------------------------------------------------------------------------------------
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
def test_what_does_not_belong_together_is_refused(verb: str) -> None:
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


def test_a_denoiser_that_does_not_say_takes_what_the_schedule_says() -> None:
    noise = noise_like(X.shape)
    for name in ("euler_ancestral", "dpmpp_2m_sde", "euler"):
        want = ki.sample(IN_FLOW, noise, TIMES.tolist(), sampler=name, noise=ki.noise.white(3))
        for start in (TIMES, FlowTimes(TIMES.tolist())):
            got = ki.sample(lambda x, t: IN_FLOW(x, t), noise, start, sampler=name, noise=ki.noise.white(3))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-3)  # where Flow starts depends on the shift
    trips = [ki.round_trip(d, X, TIMES, sampler="heun") for d in (IN_FLOW, lambda x, t: IN_FLOW(x, t))]
    assert torch.equal(trips[0].reconstruction, trips[1].reconstruction)


def test_a_schedule_from_1_that_nobody_explains_is_warned_of() -> None:
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


# -- schedules that say it ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [n for n, entry in ki.SCHEDULES.items() if entry.needs != "nothing"])
def test_schedules_of_flow_levels_are_flow_times(name: str) -> None:
    for levels in (LEVELS, ki.levels.flux()):
        for options in ({}, {"denoise": 0.5}, {"sampler": "dpm_2"}):
            assert type(ki.schedule(name, 7, levels, **options)) is FlowTimes
        if ki.SCHEDULES[name].needs == "levels":
            assert type(ki.SCHEDULES[name].function(7, levels)) is FlowTimes
    assert type(ki.schedule(name, 7, ki.levels.stable_diffusion())) is Tensor


def test_flow_times_are_tensors_that_stay_what_they_are() -> None:
    plain = torch.tensor(TIMES.tolist(), dtype=torch.float64)
    kept = [
        TIMES[2:], TIMES[::2], TIMES[plain > 0.5], TIMES.flip(0), TIMES.clone(), TIMES.detach(), TIMES.float(),
        TIMES.to(torch.float32), TIMES.cpu(), torch.cat([TIMES[:3], TIMES[3:]]), torch.cat([TIMES[:-1], plain[-1:]]),
        TIMES.clamp(max=1 - 1e-4), torch.unique_consecutive(TIMES), pickle.loads(pickle.dumps(TIMES)),
        copy.copy(TIMES), copy.deepcopy(TIMES), FlowTimes(plain), ki.levels.ve_to_flow(torch.tensor([3.0, 0.0])),
    ]  # fmt: skip
    assert {type(value) for value in kept} == {FlowTimes}
    other = [
        TIMES[0], next(iter(TIMES)), TIMES * 2, 1 - TIMES, TIMES.max(), TIMES[:, None], TIMES.diff(), TIMES.new_zeros(2),
        TIMES[0] * noise_like((3,)), TIMES * plain, ki.levels.flow_to_ve(TIMES.clamp(max=0.9)),
        ki.levels.ve_to_flow(3.0), LEVELS.sigma(plain * 1000), LEVELS.timestep(TIMES),
    ]  # fmt: skip
    assert {type(value) for value in other} == {Tensor}
    assert torch.equal(TIMES, plain)
    assert torch.equal(TIMES * 2, plain * 2)
    assert repr(TIMES[-2:]) == "FlowTimes([0.1364, 0.0000], dtype=torch.float64)"
    for weights_only in (False, True):
        file = io.BytesIO()
        torch.save({"times": TIMES}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=weights_only)["times"]
        assert type(loaded) is FlowTimes
        assert torch.equal(loaded, TIMES)


# -- what a sampler is in flow time ---------------------------------------------------------------------------------------
WRAPPED = {
    "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "er_sde", "seeds_2", "seeds_3", "sa_solver",
    "sa_solver_pece", "dpmpp_2s_ancestral_cfg_pp", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp",
    "dpmpp_3m", "exp_heun_2_x0", "exp_heun_2_x0_sde", "dpmpp_sde_gpu", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun_gpu",
    "dpmpp_3m_sde_gpu",
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


def test_flow_sampler_takes_what_a_host_knows() -> None:
    rule = ki.flow_sampler("sa_solver", Host())
    assert isinstance(rule, Flow)
    assert rule.start == 1 - 1e-8
    assert rule.rule.sde_end == pytest.approx(0.36 / 0.64)  # type: ignore[attr-defined]


def test_compile_plan_of_flow_times_is_what_the_verbs_run() -> None:
    plan = ki.compile_plan("euler_ancestral", TIMES)
    assert plan.coordinates == "flow"
    assert plan.rule == ki.sampler("euler_ancestral", flow=True)
    assert ki.compile_plan("euler_ancestral", TIMES.tolist()).rule == ki.sampler("euler_ancestral")  # as it is
    assert ki.compile_plan("euler_ancestral", TIMES) is plan


def test_a_plan_for_other_coordinates_than_the_denoiser_s_is_refused() -> None:
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
def test_by_name_as_the_host(case: Case) -> None:
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


# -- exact laws ------------------------------------------------------------------------------------------------------------
def law_errors(name: str, up: bool, steps: int) -> tuple[float, float]:
    """How far mean and standard deviation of exact Gaussian data are from their law after a run by name."""
    times = ki.schedule("simple", steps, LEVELS, sampler=name).tolist()
    levels = rising_schedule(times, highest=1.0) if up else times
    plan = ki.compile_plan(ki.flow_sampler(name, LEVELS), levels)
    start = gaussian_law(levels[0], MEAN, STD, "flow")
    found = gaussian_moments(plan, MEAN, STD, "flow", start)
    wanted = gaussian_law(plan.sigmas[-1], MEAN, STD, "flow")
    return abs(found.mean - wanted.mean) / wanted.std, abs(found.std / wanted.std - 1)


# Its steps forget x, or it goes to another law: no number of steps makes up for it.
NO_LAW = {"lcm", "dpmpp_2s_ancestral_cfg_pp", "cfgpp_ud10_ab"}
# Its weights are not those of a quadrature where the steps alternate in size, as those of this schedule do.
NO_ORDER = {"ipndm_v"}
PLANS = [name for name in ki.SAMPLERS if name != "dpm_adaptive" and not name.endswith("_gpu")]


@pytest.mark.parametrize("name", PLANS)
def test_law_down(name: str) -> None:
    """The right mean and standard deviation, and closer with twice the steps, at least at order 1."""
    coarse, fine = (law_errors(name, False, n) for n in (60, 120))
    assert fine[0] < (1e-2 if name in NO_ORDER else 2e-3)
    if name not in NO_LAW:
        assert fine[1] < 0.06
        assert name in NO_ORDER or fine[1] < 0.65 * coarse[1] or fine[1] < 5e-4


UPWARDS = [name for name in PLANS if ki.analysis.properties(name).unsamples and name != "er_sde"]
DETERMINISTIC = {name for name in ki.SAMPLERS if name == "dpm_adaptive" or not ki.compile_plan(name, [2, 1, 0.5]).draws}
# Too wide at few steps: the first step up, from 1e-4, is long in log t.
WIDE_UP = {
    "uni_pc": 0.2, "uni_pc_bh2": 6.0, "exp_heun_2_x0": 0.2, "res_4s_krogstad": 0.3, "res_5s_hochbruck-ostermann": 7.0,
}  # fmt: skip


@pytest.mark.parametrize("name", UPWARDS)
def test_law_up_to_exactly_1(name: str) -> None:
    if name == "heunpp2":
        with pytest.warns(RuntimeWarning, match="heunpp2 makes unit Gaussian data .* times too wide"):
            ki.unsample(IN_FLOW, X, TIMES, sampler=name)
        return
    mean, std = law_errors(name, True, 100)
    assert mean < 3e-3
    assert std < WIDE_UP.get(name, 0.05)


@pytest.mark.parametrize("name", sorted(ki.SAMPLERS))
def test_mixture_down(name: str) -> None:
    """Through `sample` itself: the mean 0.17 and the standard deviation 0.615 of a mixture."""

    def denoiser(x: Tensor, t: Tensor) -> Any:
        denoised = mixture_denoiser(x, t)
        return ki.Guided(denoised, denoised) if "cfg" in name else denoised

    times = ki.schedule("simple", 60, LEVELS, sampler=name)
    torch.manual_seed(1)
    x = ki.sample(denoiser, noise_like((2000, 1), seed=5), times, sampler=name)
    assert float(x.mean()) == pytest.approx(0.17, abs=0.05)
    assert float(x.std()) == pytest.approx(0.615, abs=0.25 if name in NO_LAW else 0.07)


# -- up to t = 1, and back ----------------------------------------------------------------------------------------------------
def test_offset_goes_where_it_does_no_harm() -> None:
    times = (1.0, 0.99995, 0.99992, 0.99985, 0.5, 0.0)
    rising = rising_schedule(times, highest=1.0)
    assert rising[:3] == (1e-4, 0.5001, 0.99995)  # as the node's below 1
    assert rising[-1] == 1.0
    assert all(a < b <= 1 for a, b in itertools.pairwise(rising))
    assert rising_schedule((0.99995, 0.5), highest=1.0) == (0.5001, 0.99995)  # where it ends, it ends
    assert rising_schedule((5.0, 1.0, 0.0)) == (1e-4, 1.0001, 5.0001)


def order(name: str, measure: Callable[[Tensor], float]) -> float:
    errors = [measure(FlowTimes(torch.linspace(1, 0, n + 1, dtype=torch.float64))) for n in (20, 80)]
    return float(torch.tensor(errors[0] / errors[1]).log2() / 2)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "rf_solver", "midpoint", "edict", "leapfrog"])
def test_round_trip_through_1(name: str) -> None:
    """A whole trip to t = 1 is one plain call, and comes back at the sampler's order."""

    def error(times: Tensor) -> float:
        latent = ki.unsample(IN_FLOW, X, times, sampler=name, sigma_offset=1e-6)
        assert float(latent.std()) == pytest.approx(1.0, abs=0.25)
        return float((ki.sample(IN_FLOW, latent, times, sampler=name) - X).abs().max())

    assert order(name, error) > (0.7 if name in ("euler", "edict") else 1.5)


def test_round_trip_of_rules_that_stop_just_below_1() -> None:
    for name in ("dpmpp_2m_sde", "seeds_2", "seeds_3"):
        rule = ki.sampler(name, eta=0.0)

        def error(times: Tensor, rule: ki.Rule = rule) -> float:
            latent = ki.unsample(IN_FLOW, X, times, sampler=rule, sigma_offset=1e-6)
            return float((ki.sample(IN_FLOW, latent, times, sampler=rule) - X).abs().max())

        assert order(name, error) > 1.5


def test_no_offset_bias() -> None:
    """Beyond the node's offset the image is taken to the time where the run starts; up to it, it stays as it is."""
    times = ki.schedule("normal", 200, LEVELS)
    for offset, factor in ((1e-4, 1.0), (1e-3, 1 - 1e-3), (1e-2, 1 - 1e-2)):
        latent = ki.unsample(IN_FLOW, X, times, sampler="rk4", sigma_offset=offset)
        mean, std = gaussian_law(offset, MEAN, STD, "flow")
        exact = (factor * X - mean) / std  # the ODE of Gaussian data from there
        assert float((latent - exact).abs().max()) < 2e-5


# -- what cannot be right -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["edict", "mccallum_foster"])
def test_reversible_rules_through_flow_are_refused_from_1(name: str) -> None:
    rule = Flow(ki.sampler(name))
    for times in (TIMES, TIMES.clamp(max=0.9999)):
        for verb in (ki.sample, functools.partial(ki.invert, max_evals=None)):
            with pytest.raises(
                ValueError, match=f"{name} through Flow (makes .* times too wide|moves the mean) .* without Flow"
            ):
                verb(IN_FLOW, X, times[:-1], sampler=rule)
    assert float(ki.sample(IN_FLOW, noise_like(X.shape), TIMES, sampler=name).std()) == pytest.approx(0.5, abs=0.06)


def test_flow_of_a_solver_that_discards_its_last_step() -> None:
    """The state that it returns belongs to the level before the last, and so does its scale."""
    solver = ki.sampler("sa_solver", eta=0.0, keep_last=False)
    times = TIMES[1:-1].tolist()
    got = ki.run(ki.compile_plan(Flow(solver), times), IN_FLOW, X)
    sigmas = ki.levels.flow_to_ve(torch.tensor(times, dtype=torch.float64))
    in_ve = ki.run(ki.compile_plan(solver, sigmas), IN_VE, X / (1 - times[0]))
    torch.testing.assert_close(got, in_ve * (1 - times[-2]), rtol=1e-10, atol=1e-10)


def test_messages() -> None:
    adaptive, heun = (Flow(ki.sampler(name)) for name in ("dpm_adaptive", "heun"))
    with pytest.raises(ValueError, match="pass sampler='dpm_adaptive' without Flow"):
        ki.sample(IN_FLOW, X, TIMES, sampler=adaptive)
    ki.sample(IN_FLOW, X, TIMES, sampler="dpm_adaptive")  # as it says
    times = TIMES.clone()
    times[0] = 1 + 3e-16
    ki.invert(IN_FLOW, X, times[:-1], sampler=heun)
    assert ki.compile_plan(heun, [1 + 1e-7, 0.5]).sigmas == ki.compile_plan(heun, [1.0, 0.5]).sigmas
    with pytest.raises(
        ValueError, match=r"heun: flow times must lie in \[0, 1\], got 1.0001; use sigmas.clamp\(max=1\)"
    ):
        ki.compile_plan(heun, [1.0001, 0.5])
    for rule in (heun, ki.sampler("lcm", flow=True)):
        with pytest.raises(ValueError, match="is for flow time already; use it without Flow"):
            Flow(rule)
    laplace = ki.schedule("laplace", 3, LEVELS)
    with pytest.raises(ValueError, match=r"drop the repeated ones, torch.unique_consecutive\(sigmas\)"):
        ki.sample(IN_FLOW, X, laplace)
    ki.sample(IN_FLOW, X, torch.unique_consecutive(laplace))
    abar = 1 / (1 + ki.levels.stable_diffusion(zero_snr=True).sigmas ** 2)
    abar[-1] = 2.0**-24
    with pytest.raises(ValueError, match="zero terminal SNR already.*leave zero_snr out"):
        ki.levels.from_alphas_cumprod(abar, zero_snr=True)
    ki.levels.from_alphas_cumprod(abar)


def test_advice_for_sa_solver_works() -> None:
    denoiser, sigmas = Gaussian(MEAN, STD), [5.0, 1.0, 0.5, 0.1, 0.0]
    with pytest.raises(ValueError, match=r"use ki.sampler\('sa_solver', eta=0\), which keeps it"):
        ki.unsample(denoiser, X, sigmas, sampler=ki.sampler("sa_solver", keep_last=False))
    ki.unsample(denoiser, X, sigmas, sampler=ki.sampler("sa_solver", eta=0))


# -- masks ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sampler", ["heun", "euler_ancestral", "dpmpp_2m_sde"])
def test_masks_in_flow_time(sampler: str) -> None:
    """What the network sees of the kept region is noised as flow states are, and the result shows it as it was."""
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    seen: list[tuple[float, Tensor]] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append((float(t[0]) / 1000, x))
        return gaussian_network(x, t)

    noise = noise_like(X.shape, seed=7)
    got = ki.sample(from_velocity(network, LEVELS), noise, TIMES, sampler=sampler, mask=mask, latent=X)
    torch.testing.assert_close(got[..., 4:], X[..., 4:])
    for t, x in seen:
        torch.testing.assert_close(x[..., 4:], ((1 - t) * X + t * noise)[..., 4:])
    if sampler == "heun":
        seen.clear()
        latent = ki.unsample(from_velocity(network, LEVELS), X, TIMES, sampler=sampler, mask=mask)
        for t, x in seen:
            torch.testing.assert_close(x[..., 4:], (1 - t) * X[..., 4:])
        torch.testing.assert_close(
            latent[..., 4:], torch.zeros(()).to(X).expand(latent[..., 4:].shape), rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("name", sorted(ki.SAMPLERS))
def test_unsampling_keeps_what_the_mask_keeps(name: str) -> None:
    """x in VE coordinates, (1 - t) x in flow time; or an error says why not."""
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    sigmas = ki.schedule("karras", 20, ki.levels.stable_diffusion())
    for denoiser, levels, kept in (
        (Gaussian(MEAN, STD), sigmas, 1.0),
        (IN_FLOW, ki.schedule("normal", 40, LEVELS), 0.0),
    ):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of latents that are too wide
                latent = ki.unsample(denoiser, X, levels, sampler=name, mask=mask, negative={})
        except ValueError as error:
            assert "cannot unsample with a mask" in str(error) or name not in DETERMINISTIC or "too wide" in str(error)
        else:
            assert float((latent - kept * X)[..., 4:].abs().max()) < 0.03


def test_reversible_rules_take_the_state_as_it_is() -> None:
    """In flow time the network of EDICT gets the latent as it is, with the timestep before: no factor."""
    times = (0.8, 0.5)
    x = noise_like(X.shape)
    plan = ki.compile_plan(ki.flow_sampler(EDICT()), times)
    first = plan.steps[0].stages[1]
    level = torch.full((len(x),), first.sigma, dtype=x.dtype)
    assert first.sigma == 0.8
    moved = x - 0.3 * (x - IN_FLOW(x, level)) / 0.8
    seen: list[Tensor] = []

    def denoiser(state: Tensor, t: Tensor) -> Tensor:
        seen.append(state)
        return IN_FLOW(state, t)

    ki.run(plan, denoiser, x)
    torch.testing.assert_close(seen[1], moved)
