"""The laws that need no model, over every registered sampler, and the facts that `properties` reads off Plans."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import kinvert as ki
from kinvert import analysis
from kinvert.flowtimes import FlowTimes
from kinvert.forms import Form
from kinvert.rules.base import Rule, StepBuilder

# Where a sampler as it is known breaks a law by design: the option that switches this off, and the reason.
QUIRKS: dict[str, tuple[dict[str, Any], str]] = {
    "ipndm_v": ({"max_order": 3}, "its four weights add up to the step on a geometric schedule only"),
    "deis": ({"quadrature": "exact"}, "its integrals are sums that count both ends, off by 1e-4 of the step"),
    "edict": ({"evaluate_at": "sigma_next"}, "the network gets the latent of sigma_next with the timestep of sigma"),
}
# A single step of UniPC evaluates nothing.
MIN_STEPS = {"uni_pc": 2, "uni_pc_bh2": 2}

# These choose their steps on the way.
NO_PLAN = {"dpm_adaptive"}
PLANNED = [name for name in ki.SAMPLERS if name not in NO_PLAN]

ratios = st.lists(st.floats(1.05, 3.0), min_size=1, max_size=12)
law = settings(max_examples=20, deadline=None)


@st.composite
def schedules(draw: Any) -> tuple[float, ...]:
    """Decreasing, 1 to 13 steps, with or without a last step to 0; the lowest other level is 0.002 or more."""
    start = draw(st.floats(0.5, 100.0))
    levels = tuple(start / r for r in itertools.accumulate([1.0, *draw(ratios)], lambda a, b: a * b))
    levels = tuple(sigma for sigma in levels if sigma >= 0.002)
    return (*levels, 0.0) if draw(st.booleans()) else levels


def lawful(name: str, sigmas: tuple[float, ...], **options: Any) -> ki.Plan:
    """The Plan of a sampler with its quirk switched off; skips a schedule that is too short for it."""
    assume(len(sigmas) > MIN_STEPS.get(name, 1))
    return ki.compile_plan(ki.sampler(name, **QUIRKS.get(name, ({}, ""))[0], **options), sigmas)


def having(option: str) -> list[str]:
    return [name for name in PLANNED if option in ki.SAMPLERS[name].options]


def assert_marginals(plan: ki.Plan, covariance: Any) -> None:
    relative = np.sqrt(analysis.marginal_variances(plan, covariance)) / plan.sigmas[0]
    np.testing.assert_allclose(relative, np.array(plan.sigmas[1:]) / plan.sigmas[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", PLANNED)
@law
@given(sigmas=schedules())
def test_rows_sum_to_one(name: str, sigmas: tuple[float, ...]) -> None:
    plan = lawful(name, sigmas)
    growth = sigmas[0] / min(sigma for sigma in sigmas if sigma)  # of a rounding, in what two coupled states differ by
    rounding = max(1e-12, 1e-15 * growth) if plan.auxiliary else 1e-12
    np.testing.assert_allclose(analysis.row_sums(plan), 1.0, rtol=0, atol=rounding)


@pytest.mark.parametrize("name", PLANNED)
@law
@given(sigmas=schedules())
def test_variance_is_sigma_squared(name: str, sigmas: tuple[float, ...]) -> None:
    plan = lawful(name, sigmas)
    assert_marginals(plan, "white")
    assert_marginals(plan, "brownian")


@pytest.mark.parametrize("name", having("s_churn"))
@law
@given(sigmas=schedules(), churn=st.floats(0.1, 40.0))
def test_variance_is_sigma_squared_with_churn(name: str, sigmas: tuple[float, ...], churn: float) -> None:
    plan = lawful(name, sigmas, s_churn=churn)
    assert plan.is_stochastic
    assert_marginals(plan, "white")


@pytest.mark.parametrize("name", having("eta"))
@law
@given(sigmas=schedules(), eta=st.floats(0.0, 1.0))
def test_variance_is_sigma_squared_at_every_eta(name: str, sigmas: tuple[float, ...], eta: float) -> None:
    assert_marginals(lawful(name, sigmas, eta=eta), "white")


@pytest.mark.parametrize("name", QUIRKS)
def test_quirks_are_needed(name: str) -> None:
    """Each breaks the law as it is, so that no exception outlives its reason."""
    plan = ki.compile_plan(name, (20.0, 11.0, 7.0, 3.0, 2.0, 1.5, 1.0))
    with pytest.raises(AssertionError):
        assert_marginals(plan, "white")


@pytest.mark.parametrize("name", NO_PLAN & ki.SAMPLERS.keys())
def test_no_plan_no_properties(name: str) -> None:
    with pytest.raises(ValueError, match="has no Plan"):
        analysis.properties(name)


@pytest.mark.parametrize("name", PLANNED)
def test_analysis_is_what_the_engine_computes(name: str) -> None:
    """Noises that are unit vectors make the engine itself print the linear combination."""
    sigmas = (9.0, 5.0, 2.0, 0.7, 0.2, 0.0)
    plan = ki.compile_plan(name, sigmas)
    unit = torch.eye(1 + plan.draws, dtype=torch.float64)[:, None]
    guided = plan.is_guided

    def constant(value: float) -> Any:
        def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> Any:
            d = torch.full_like(x, value)
            return ki.Guided(d, d) if guided else d

        return denoiser

    states: list[torch.Tensor] = []
    noise = ki.noise.replay(list(unit[1:]))
    start = plan.sigmas[0] * unit[0]
    final = ki.run(plan, constant(0.0), start, noise, lambda step: states.append(step.x))
    assert float(final.square().sum()) == pytest.approx(analysis.marginal_variances(plan)[-1], abs=1e-12)
    still = ki.run(plan, constant(3.0), torch.full((1, 1), 3.0, dtype=torch.float64), _no_noise)
    assert float(still) / 3.0 == pytest.approx(analysis.row_sums(plan)[-1], abs=1e-12)
    assert len(analysis.row_sums(plan)) == len(analysis.marginal_variances(plan)) == len(plan.steps)


def _no_noise(sigma_from: float, sigma_to: float) -> torch.Tensor:
    return torch.zeros(1, 1, dtype=torch.float64)


@dataclass(frozen=True)
class Detour(Rule):
    """Noise by way of a midpoint minus the direct noise: 0 on one Brownian path, not for independent draws."""

    name: ClassVar[str] = "detour"
    ode_order: ClassVar[int] = 0

    def step(self, s: StepBuilder) -> Form:
        a, b = s.sigma, s.sigma_next
        m = (a + b) / 2
        there = math.sqrt(abs(a - m)) * s.noise(a, m) + math.sqrt(abs(m - b)) * s.noise(m, b)
        return s.x + there + math.sqrt(abs(a - b)) * s.noise(b, a)


def test_brownian_covariance_of_overlapping_and_opposite_intervals() -> None:
    plan = ki.compile_plan(Detour(), (4.0, 2.0, 1.0))
    assert analysis.marginal_variances(plan, "brownian") == pytest.approx((16.0, 16.0))
    assert analysis.marginal_variances(plan, "white") == pytest.approx((20.0, 22.0))
    with pytest.raises(ValueError, match="covariance must be 'white' or 'brownian', got 'pink'"):
        analysis.marginal_variances(plan, "pink")  # type: ignore[arg-type]


def test_broken_marginal_law_is_measured() -> None:
    """s_noise = 2 draws four times the variance that eta asks for."""
    plan = ki.compile_plan(ki.sampler("euler_ancestral", s_noise=2.0), (4.0, 2.0))
    down, up = 1.0, math.sqrt(3.0)  # up^2 = 4 (16 - 4) / 16
    assert analysis.marginal_variances(plan) == pytest.approx((down**2 + 4 * up**2,))


FACTS: dict[str, dict[str, Any]] = {
    "euler": dict(order=1, evaluations_per_step=1, draws=0, memory=0, unsamples=True, invertibility="stepwise"),
    "heun": dict(order=2, evaluations_per_step=2, draws=0, memory=0, unsamples=True, invertibility="stepwise"),
    "dpm_2": dict(order=2, evaluations_per_step=2, draws=0, memory=0, unsamples=True, invertibility="stepwise"),
    "lms": dict(order=2, evaluations_per_step=1, draws=0, memory=3, unsamples=True, invertibility="two-point"),
    "dpmpp_2m": dict(order=2, evaluations_per_step=1, draws=0, memory=1, unsamples=True, invertibility="two-point"),
    "dpmpp_sde": dict(order=2, evaluations_per_step=2, draws=2, memory=0, unsamples=False, invertibility="noise"),
    "dpmpp_2m_sde": dict(order=2, evaluations_per_step=1, draws=1, memory=1, unsamples=False, invertibility="noise"),
    "euler_ancestral": dict(order=1, evaluations_per_step=1, draws=1, memory=0, unsamples=False, invertibility="noise"),
    "edict": dict(order=1, evaluations_per_step=2, draws=0, memory=1, unsamples=True, invertibility="explicit"),
    "bdia": dict(order=2, evaluations_per_step=1, draws=0, memory=1, unsamples=True, invertibility="explicit"),
    "o_belm": dict(order=2, evaluations_per_step=1, draws=0, memory=1, unsamples=True, invertibility="explicit"),
    "leapfrog": dict(order=2, evaluations_per_step=2, draws=0, memory=1, unsamples=True, invertibility="explicit"),
    "reversible_heun": dict(
        order=2, evaluations_per_step=2, draws=0, memory=2, unsamples=True, invertibility="explicit"
    ),
    "mccallum_foster": dict(
        order=2, evaluations_per_step=4, draws=0, memory=1, unsamples=True, invertibility="explicit"
    ),
}


@pytest.mark.parametrize("name", FACTS)
def test_known_properties(name: str) -> None:
    assert analysis.properties(name) == analysis.Properties(name=name, guided=False, **FACTS[name])


def test_properties_follow_the_options() -> None:
    still = analysis.properties(ki.sampler("dpmpp_2m_sde", eta=0))
    assert (still.name, still.stochastic, still.multistep) == ("dpmpp_2m_sde", False, True)
    assert still.unsamples and still.invertibility == "two-point"
    churned = analysis.properties(ki.sampler("heun", s_churn=10))
    assert churned.stochastic and not churned.unsamples and churned.invertibility == "noise"


@dataclass(frozen=True)
class Consistency(Rule):
    """Denoise, then noise again: `x' = D + sigma_next n`."""

    name: ClassVar[str] = "consistency"
    ode_order: ClassVar[int] = 0

    def step(self, s: StepBuilder) -> Form:
        return s.denoise(s.x, s.sigma) + s.sigma_next * s.noise(s.sigma, s.sigma_next)


def test_a_step_that_forgets_x_cannot_be_inverted() -> None:
    found = analysis.properties(Consistency())
    assert found.invertibility == "none" and not found.unsamples and found.stochastic


@pytest.mark.parametrize("name", PLANNED)
def test_every_sampler_has_properties(name: str) -> None:
    found = analysis.properties(name)
    assert found.name == name
    assert found.evaluations_per_step >= 1
    assert found.invertibility in analysis.INVERTIBILITY


@pytest.mark.parametrize("name", PLANNED)
def test_unsamples_means_that_unsample_accepts_it(name: str) -> None:
    x = torch.zeros(1, 2, dtype=torch.float64)
    still = {"cfg": 1.0, "positive": {}, "negative": {}}
    try:
        ki.unsample(lambda x, sigma: 0.9 * x, x, analysis.REFERENCE, sampler=name, **still)
    except ValueError:
        accepted = False
    else:
        accepted = True
    assert accepted == analysis.properties(name).unsamples


# -- data of a normal distribution -------------------------------------------------------------------------------------
@pytest.mark.parametrize("covariance", ["white", "brownian"])
@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_sde", "dpmpp_3m_sde", "dpmpp_2m", "sa_solver", "lcm"])
def test_variances_of_normal_data_are_those_of_runs(name: str, covariance: str) -> None:
    """Of 60,000 runs on one value each; the standard error of a variance v is v sqrt(2 / n)."""
    plan, n, std = ki.compile_plan(name, (6.0, 3.0, 1.0, 0.4)), 60_000, 0.7
    generator = torch.Generator().manual_seed(0)
    x = math.sqrt(std**2 + 36) * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    source = ki.noise.white(1) if covariance == "white" else ki.noise.brownian(1)
    seen: list[float] = []
    end = ki.run(plan, ki.denoisers.Gaussian(0.0, std), x, source, lambda p: seen.append(float(p.x.var())))
    seen = [*seen[1:], float(end.var())]  # a callback sees the state before its step
    want = analysis.marginal_variances(plan, covariance, std)  # type: ignore[arg-type]
    for found, true in zip(seen, want, strict=True):
        assert abs(found / true - 1) < 4 * math.sqrt(2 / n)


def test_variances_in_flow_time_are_those_of_the_ode() -> None:
    plan = ki.compile_plan("rk4", FlowTimes((1.0, 0.7, 0.4, 0.2)))
    found = analysis.marginal_variances(plan, std=0.5)
    assert found == pytest.approx([((1 - t) * 0.5) ** 2 + t**2 for t in (0.7, 0.4, 0.2)], rel=2e-3)


WEAK = [
    ("euler", 1),
    ("heun", 2),
    ("rk4", 4),
    ("euler_ancestral", 1),
    ("dpmpp_2m_sde", 2),
    ("ddpm", 1),
    ("leapfrog", 4),
]


@pytest.mark.parametrize(("name", "order"), WEAK)
def test_weak_order(name: str, order: int) -> None:
    assert analysis.weak_order(name) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("name", [name for name in PLANNED if not analysis.properties(name).stochastic])
def test_without_noise_the_weak_order_is_at_least_the_order(name: str) -> None:
    steps = (20, 40, 80) if ki.sampler(name).ode_order > 4 else (80, 160, 320)
    assert analysis.weak_order(name, steps=steps) > ki.sampler(name).ode_order - 0.5


def test_weak_order_of_what_is_exact_is_infinite() -> None:
    assert analysis.weak_order("euler_ancestral", std=0.0) == math.inf
    with pytest.raises(ValueError, match="std must be finite and 0 or more, got -1"):
        analysis.weak_order("euler", std=-1.0)


def test_the_reference_is_a_schedule_of_karras() -> None:
    torch.testing.assert_close(
        torch.tensor(analysis.REFERENCE, dtype=torch.float64), ki.schedules.karras(11, 0.03, 15.0)[:-1]
    )
