"""The battery: laws that every registered sampler obeys. A new rule is tested by being registered.

The laws of translation and of marginals are in test_analysis.py; agreement with recorded outputs in
test_recorded_samplers.py.
"""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import guided_mixture, mixture, noise_like, order_slope, schedules
from torch import Tensor

import kinvert as ki
from kinvert.engine.eager import run_eager

# The sampler that chooses its own steps has no Plan; test_adaptive.py has its tests.
RULES = {name: ki.sampler(name) for name in ki.SAMPLERS if name != "dpm_adaptive"}
MIXTURE, GUIDED = mixture(), guided_mixture()


def interval_noise(sigma_from: float, sigma_to: float) -> Tensor:
    """Noise that depends on the interval only, so that who skips a draw sees the same noise afterwards."""
    return noise_like((2, 6), seed=hash((round(sigma_from, 9), round(sigma_to, 9))) % 2**31)


def denoiser_for(plan: ki.Plan) -> ki.Denoiser:
    return GUIDED if plan.is_guided else MIXTURE


@pytest.mark.parametrize("name", RULES)
@given(sigmas=schedules())
@settings(max_examples=15, deadline=None)
def test_plan_equals_eager(name: str, sigmas: list[float]) -> None:
    plan = ki.compile_plan(name, sigmas)
    x = sigmas[0] * noise_like((2, 6))
    compiled = ki.run(plan, denoiser_for(plan), x, interval_noise)
    eager = run_eager(RULES[name], denoiser_for(plan), x, sigmas, interval_noise)
    torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", RULES)
@given(sigmas=schedules(zero=False))
@settings(max_examples=10, deadline=None)
def test_plan_equals_eager_upwards(name: str, sigmas: list[float]) -> None:
    """On a rising schedule both agree, or the compiler has refused it by name."""
    rising = sigmas[::-1]
    try:
        plan = ki.compile_plan(name, rising)
    except ValueError as error:
        assert RULES[name].name in str(error)
        return
    x = noise_like((2, 6))
    compiled = ki.run(plan, denoiser_for(plan), x, interval_noise)
    eager = run_eager(RULES[name], denoiser_for(plan), x, rising, interval_noise)
    scale = float(compiled.abs().max())
    torch.testing.assert_close(compiled / scale, eager / scale, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", RULES)
@given(scale=st.floats(0.1, 10.0), sigmas=schedules(min_steps=2, zero=False))  # uni_pc of one step has a scale
@settings(max_examples=10, deadline=None)
def test_rules_have_no_unit(name: str, scale: float, sigmas: list[float]) -> None:
    """Measured in another unit of x and sigma, a run without noise is the same run; or the rule says it has a scale."""
    rule = RULES[name].quiet()
    if rule.name in HAS_A_SCALE:
        return
    x = sigmas[0] * noise_like((2, 6))
    plan = ki.compile_plan(rule, sigmas)
    scaled = ki.compile_plan(rule, [scale * sigma for sigma in sigmas])
    denoise = denoiser_for(plan)

    def in_unit(y: Tensor, sigma: Tensor) -> Tensor | ki.Guided:
        out = denoise(y / scale, sigma / scale)
        return ki.Guided(scale * out.denoised, scale * out.uncond) if isinstance(out, ki.Guided) else scale * out

    torch.testing.assert_close(
        ki.run(scaled, in_unit, scale * x) / scale, ki.run(plan, denoise, x), rtol=1e-8, atol=1e-8
    )


# Constants of the rule are noise levels: a VP time map fitted to levels, an interval of noise, a noise scaler; or the
# level 1 of variance-preserving coordinates, in which the rule was published.
HAS_A_SCALE = {"deis", "sa_solver", "sa_solver_pece", "er_sde", "rf_solver", "fireflow", "edict", "bdia"}
# With their noise off these do not follow the probability-flow ODE (which is all that an order can be measured on):
# they have no switch for the noise, or integrate the drift of an SDE; CFG++ follows another field.
NO_ORDER = {"lcm", "er_sde"}
# Its weights are not those of a quadrature on a non-uniform grid; order 2 is what is left for many steps.
ORDER_STEPS = {"ipndm_v": [320, 640, 1280, 2560]}


@functools.cache
def ode_solution() -> tuple[Tensor, Tensor]:
    """Starts at sigma 10 and where the probability-flow ODE of the mixture takes them at 0.1, to about 1e-14."""
    x = 10 * noise_like((16, 6), seed=3)
    return x, ki.run(ki.compile_plan("dormand_prince", ki.schedules.karras(1000, 0.1, 10)[:-1]), MIXTURE, x)


def order_errors(rule: ki.Rule, steps: list[int]) -> list[float]:
    """Distance to the ODE solution on non-uniform (Karras) grids."""
    x, reference = ode_solution()

    def pair(y: Tensor, sigma: Tensor) -> ki.Guided:
        denoised = MIXTURE(y, sigma)
        return ki.Guided(denoised, denoised)

    errors = []
    for n in steps:
        plan = ki.compile_plan(rule, ki.schedules.karras(n, 0.1, 10)[:-1])
        error = ki.run(plan, pair if plan.is_guided else MIXTURE, x) - reference
        errors.append(float(error.norm() / reference.norm()))
    return errors


@pytest.mark.parametrize("name", [name for name in RULES if name not in NO_ORDER])
def test_order(name: str) -> None:
    """The error falls at least as fast as the declared order says; start-up caps are in the declared order."""
    steps = ORDER_STEPS.get(name, [20, 40, 80, 160])
    slope = order_slope(order_errors(RULES[name].quiet(), steps), steps)
    assert slope > RULES[name].quiet().ode_order - 0.3, slope


@pytest.mark.parametrize("name", RULES)
def test_dead_noise_is_never_drawn(name: str) -> None:
    """With eta or s_noise at 0 the coefficient of the noise is 0, and a run makes no draw."""
    rule = RULES[name].quiet()
    if rule == RULES[name]:
        return
    plan = ki.compile_plan(rule, ki.schedules.karras(8, 0.1, 10))
    assert plan.draws == 0

    def forbidden(sigma_from: float, sigma_to: float) -> Tensor:
        raise AssertionError("drawn")

    ki.run(plan, denoiser_for(plan), noise_like((2, 6)), forbidden)


@pytest.mark.parametrize("name", RULES)
def test_runs_keep_inputs_and_samples_are_independent(name: str) -> None:
    """x is not modified, a sample does not depend on its neighbours, and the same noise gives the same result."""
    plan = ki.compile_plan(name, ki.schedules.karras(6, 0.1, 10))
    x = 10 * noise_like((3, 6))
    kept = x.clone()
    noise = ki.noise.white([1, 2, 3])
    result = ki.run(plan, denoiser_for(plan), x, noise)
    assert torch.equal(x, kept)
    assert torch.equal(result, ki.run(plan, denoiser_for(plan), x, noise))
    alone = ki.run(plan, denoiser_for(plan), x[1:2], ki.noise.white([2]))
    torch.testing.assert_close(result[1:2], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """Every floating dtype goes in and comes out, close to the float64 run: half precision rounds once a state."""
    plan = ki.compile_plan(RULES[name].quiet(), ki.schedules.karras(6, 0.1, 10))
    x = (10 * noise_like((3, 6))).to(dtype)
    got = ki.run(plan, denoiser_for(plan), x)
    assert got.dtype == dtype
    want = ki.run(plan, denoiser_for(plan), x.double())
    tolerance = 200 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize(
    "rule",
    [ki.sampler("edict", evaluate_at="sigma_next"), ki.sampler("bdia", coordinates="ve")],
    ids=lambda rule: rule.name,
)
def test_reversible_rules_have_no_unit_outside_vp_coordinates(rule: ki.Rule) -> None:
    """What breaks the law above is the published choice of coordinates, and nothing else."""
    sigmas = ki.schedules.karras(6, 0.1, 10)[:-1]
    x = 10 * noise_like((2, 6))
    scaled = ki.run(ki.compile_plan(rule, 7 * sigmas), lambda y, sigma: 7 * MIXTURE(y / 7, sigma / 7), 7 * x) / 7
    torch.testing.assert_close(scaled, ki.run(ki.compile_plan(rule, sigmas), MIXTURE, x), rtol=1e-10, atol=1e-10)
