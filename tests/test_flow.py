"""Flow models through the verbs: the laws of exact denoisers, runs to t = 1 and back, masks, refusals."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flowmodels import IN_FLOW, LEVELS, MEAN, STD, TIMES, X, gaussian_network, mixture_denoiser
from problems import noise_like
from torch import Tensor

import kinvert as ki
from kinvert.denoisers import Gaussian, from_velocity
from kinvert.levels import FlowTimes
from kinvert.moments import gaussian_law, gaussian_moments
from kinvert.rules import (
    EDICT,
    Flow,
)
from kinvert.sampling import rising_schedule


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


# The steps within its restarts do not become finer with the schedule.
COARSE = {"restart"}


PLANS = [name for name in ki.SAMPLERS if name != "dpm_adaptive" and not name.endswith("_gpu")]


@pytest.mark.parametrize("name", PLANS)
def test_law_down(name: str) -> None:
    """The right mean and standard deviation, and closer with twice the steps, at least at order 1."""
    coarse, fine = (law_errors(name, False, n) for n in (60, 120))
    assert fine[0] < (1e-2 if name in NO_ORDER else 2e-3)
    if name not in NO_LAW:
        assert fine[1] < 0.06
        assert name in NO_ORDER | COARSE or fine[1] < 0.65 * coarse[1] or fine[1] < 5e-4


UPWARDS = [name for name in PLANS if ki.analysis.properties(name).unsamples and name != "er_sde"]


DETERMINISTIC = {
    name for name in ki.SAMPLERS if name == "dpm_adaptive" or not ki.compile_plan(name, [2, 1, 0.5, 0.05]).draws
}


# Too wide at few steps: the first step up, from 1e-4, is long in log t.
WIDE_UP = {
    "uni_pc": 0.2, "uni_pc_bh2": 6.0, "exp_heun_2_x0": 0.2, "res_4s_krogstad": 0.3, "res_5s_hochbruck-ostermann": 7.0,
    "etdrk3": 0.1, "etdrk4": 0.2, "strehmel_weiner": 0.3,
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


def test_sigma_offset_of_rising_flow_schedules() -> None:
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


def test_flow_messages() -> None:
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
def test_unsampling_keeps_the_masked_region(name: str) -> None:
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


def test_edict_evaluates_the_unscaled_state_in_flow_time() -> None:
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
