"""Algebraically reversible samplers: order, exact inverse, rounding floors, and what their second state is worth."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from problems import guided_mixture, mixture, noise_like, order_slope, schedules
from torch import Tensor

import kinvert as ki
from kinvert import analysis
from kinvert.engine import Memory, run_state
from kinvert.inversion.reversible import invert_reversible
from kinvert.rules import LawsonRungeKutta
from kinvert.rules.base import options_of
from kinvert.rules.reversible import BDIA, EDICT, McCallumFoster

MIXTURE = mixture()
RULES: dict[str, ki.Rule] = {
    name: ki.sampler(name) for name in ("edict", "bdia", "o_belm", "leapfrog", "reversible_heun", "mccallum_foster")
} | {
    "edict at sigma_next": EDICT(evaluate_at="sigma_next"),
    "edict alternate": EDICT(alternate=True),
    "bdia 0.5": BDIA(gamma=0.5),
    "bdia ve": BDIA(coordinates="ve"),
    "mccallum_foster euler": McCallumFoster(ki.sampler("euler")),
    "mccallum_foster rk4": McCallumFoster(ki.sampler("rk4")),
    "rex": McCallumFoster(LawsonRungeKutta(ki.sampler("midpoint").tableau), coupling="data"),
}
SIGMA_MIN, SIGMA_MAX = 0.03, 15.0


def karras(steps: int) -> Tensor:
    """So many steps, the last of which ends above 0."""
    return ki.schedules.karras(steps + 1, SIGMA_MIN, SIGMA_MAX)[:-1]


def latent(batch: int = 16) -> Tensor:
    return SIGMA_MAX * noise_like((batch, 6), seed=3)


def rough(x: Tensor, sigma: Tensor) -> Tensor:
    """No posterior mean of anything: neither symmetric nor monotone."""
    return torch.tanh(2.0 * x.roll(1, dims=1)) - 0.3 * torch.sin(3.0 * x) / (1.0 + sigma[:, None])


def split(state: Memory) -> tuple[Tensor, Memory]:
    return state["x"], {name: value for name, value in state.items() if name != "x"}


# -- the rules -------------------------------------------------------------------------------------------------------
def test_two_step_methods_by_hand() -> None:
    """x'' = x' - h d' + g (x - x' - h_prev d'): g = gamma for BDIA in VE, (h / h_prev)^2 for O-BELM."""
    sigmas, x = (4.0, 2.0, 1.5), noise_like((2, 6))
    first = ki.run(ki.compile_plan("euler", sigmas[:2]), MIXTURE, x)
    d = (first - MIXTURE(first, torch.full((2,), 2.0, dtype=torch.float64))) / 2.0
    for rule, g in (
        (BDIA(coordinates="ve"), 1.0),
        (BDIA(gamma=0.7, coordinates="ve"), 0.7),
        (ki.sampler("o_belm"), (0.5 / 2.0) ** 2),
    ):
        want = first - 0.5 * d + g * (x - first - 2.0 * d)
        torch.testing.assert_close(ki.run(ki.compile_plan(rule, sigmas), MIXTURE, x), want, rtol=1e-13, atol=1e-13)


class Preserved:
    """Latents `z = alpha x`, the noise that a network predicts of them, and DDIM steps between levels, as in papers."""

    def __init__(self, sigmas: list[float]) -> None:
        self.sigmas = sigmas
        self.alpha = [1.0 / math.sqrt(1.0 + sigma**2) for sigma in sigmas]
        self.noise = [math.sqrt(1.0 - alpha**2) for alpha in self.alpha]

    def eps(self, z: Tensor, i: int) -> Tensor:
        """Of the latent z, at whatever level it is, with the timestep i."""
        denoised = MIXTURE(z / self.alpha[i], torch.full((len(z),), self.sigmas[i], dtype=z.dtype))
        return (z - self.alpha[i] * denoised) / self.noise[i]

    def ddim(self, z: Tensor, eps: Tensor, i: int, j: int) -> Tensor:
        return self.alpha[j] / self.alpha[i] * (z - self.noise[i] * eps) + self.noise[j] * eps


def published_edict(x: Tensor, sigmas: list[float], p: float, alternate: bool) -> Tensor:
    """Wallace et al. (2022), equations 12 to 14, and the other order in every other step."""
    vp = Preserved(sigmas)
    pair = [vp.alpha[0] * x, vp.alpha[0] * x]
    for i in range(len(sigmas) - 1):
        for moved in (1, 0) if alternate and i % 2 else (0, 1):
            pair[moved] = vp.ddim(pair[moved], vp.eps(pair[1 - moved], i), i, i + 1)
        pair[0] = p * pair[0] + (1 - p) * pair[1]
        pair[1] = (1 - p) * pair[0] + p * pair[1]
    return pair[0] / vp.alpha[-1]


def published_bdia(x: Tensor, sigmas: list[float], gamma: float) -> Tensor:
    """Zhang et al. (2023): DDIM, and gamma times what DDIM upwards misses of the state before."""
    vp = Preserved(sigmas)
    z, before = vp.alpha[0] * x, None
    for i in range(len(sigmas) - 1):
        eps = vp.eps(z, i)
        after = vp.ddim(z, eps, i, i + 1)
        if before is not None:
            after = after + gamma * (before - vp.ddim(z, eps, i, i - 1))
        z, before = after, z
    return z / vp.alpha[-1]


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_edict_and_bdia_are_as_published(steps: int) -> None:
    """On the levels of Stable Diffusion."""
    sigmas = [float(s) for s in ki.schedule("normal", steps + 1, ki.levels.stable_diffusion()) if s > 0]
    x = sigmas[0] * noise_like((16, 6), seed=3)
    pairs = [
        (EDICT(), published_edict(x, sigmas, 0.93, False)),
        (EDICT(alternate=True), published_edict(x, sigmas, 0.93, True)),
        (EDICT(p=0.8), published_edict(x, sigmas, 0.8, False)),
        (BDIA(), published_bdia(x, sigmas, 1.0)),
        (BDIA(gamma=0.5), published_bdia(x, sigmas, 0.5)),
    ]
    for rule, published in pairs:
        options = {option.name: getattr(rule, option.name) for option in options_of(rule)}
        assert rule == ki.sampler(rule.name, **options)  # by name, too
        torch.testing.assert_close(ki.run(ki.compile_plan(rule, sigmas), MIXTURE, x), published, rtol=0, atol=1e-10)


def test_reversible_heun_is_a_leapfrog() -> None:
    """Its second state follows the explicit midpoint rule, X'' = X + (w + w') d(X')."""
    sigmas, x = (4.0, 2.0, 1.5), noise_like((2, 6))
    X = [x] + [
        split(run_state(ki.compile_plan("reversible_heun", sigmas[:n]), MIXTURE, {"x": x}))[1]["X"] for n in (2, 3)
    ]
    d = (X[1] - MIXTURE(X[1], torch.full((2,), 2.0, dtype=torch.float64))) / 2.0
    torch.testing.assert_close(X[2], x + (1.5 - 4.0) * d, rtol=1e-13, atol=1e-13)


def test_costs() -> None:
    """Evaluations of ten steps: down, down from a given pair, and up."""
    evaluations = {}
    for name, rule in RULES.items():
        plan = ki.compile_plan(rule, karras(10))
        evaluations[name] = (plan.evaluations, plan.closed.evaluations, analysis.explicit_inverse(plan).evaluations)
    assert evaluations == {
        "edict": (20, 20, 20),
        "edict at sigma_next": (20, 20, 20),
        "edict alternate": (20, 20, 20),
        "bdia": (10, 9, 9),
        "bdia 0.5": (10, 9, 9),
        "bdia ve": (10, 9, 9),
        "o_belm": (10, 9, 9),
        "leapfrog": (11, 10, 10),
        "reversible_heun": (11, 20, 20),
        "mccallum_foster": (40, 40, 40),
        "mccallum_foster euler": (20, 20, 20),
        "mccallum_foster rk4": (80, 80, 80),
        "rex": (40, 40, 40),
    }


# Measured on a mixture, 40 to 320 steps from sigma 15 to 0.03.
ORDERS = {
    "edict": 1.0, "edict at sigma_next": 1.0, "edict alternate": 1.0, "bdia": 2.0, "bdia 0.5": 1.0, "bdia ve": 2.0,
    "o_belm": 2.0, "leapfrog": 2.0, "reversible_heun": 2.0, "mccallum_foster": 2.0, "mccallum_foster euler": 1.0, "mccallum_foster rk4": 4.0,
    "rex": 2.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def ode_solution() -> Tensor:
    return ki.run(ki.compile_plan("dormand_prince", karras(1000)), MIXTURE, latent())


@pytest.mark.parametrize("name", RULES)
def test_order(name: str, ode_solution: Tensor) -> None:
    steps = [40, 80, 160, 320]
    runs = [ki.run(ki.compile_plan(RULES[name], karras(n)), MIXTURE, latent()) for n in steps]
    slope = order_slope([float((run - ode_solution).norm()) for run in runs], steps)
    assert slope > ORDERS[name] - 0.2
    assert RULES[name].ode_order == ORDERS[name]


def test_rex_as_published() -> None:
    """On variance-preserving latents X = alpha x, Y = X / Sigma in gamma = alpha / Sigma, with the midpoint rule."""
    sigmas, x, lam = (4.0, 2.5, 1.5), noise_like((2, 6)), 0.999

    def increment(y: Tensor, gamma: float, step: float) -> Tensor:
        def data(at: float, value: Tensor) -> Tensor:
            big = (at**2 + 1) ** -0.5  # Sigma; alpha = gamma Sigma, and x = X / alpha
            return MIXTURE(value * big / (at * big), torch.full((2,), 1 / at, dtype=torch.float64))

        return step * data(gamma + step / 2, y + step / 2 * data(gamma, y))

    big = [(s**-2 + 1) ** -0.5 for s in sigmas]
    X = Z = x * big[0] / sigmas[0]
    for i in range(2):
        gamma, step = 1 / sigmas[i], 1 / sigmas[i + 1] - 1 / sigmas[i]
        w = big[i + 1] / big[i]
        X = w * (lam * X + (1 - lam) * Z) + big[i + 1] * increment(Z / big[i], gamma, step)
        Z = w * Z - big[i + 1] * increment(X / big[i + 1], gamma + step, -step)
    state = run_state(ki.compile_plan(RULES["rex"], sigmas), MIXTURE, {"x": x})
    alpha = big[2] / sigmas[2]
    torch.testing.assert_close(state["x"], X / alpha, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state["z"], Z / alpha, rtol=1e-12, atol=1e-12)


# -- the inverse -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RULES)
@given(sigmas=schedules(zero=False))
@settings(max_examples=15, deadline=None)
def test_inverse_of_any_denoiser_on_any_schedule(name: str, sigmas: list[float]) -> None:
    """Noise -> data -> noise, and again from the pair, for a denoiser without any good property."""
    plan = ki.compile_plan(RULES[name], sigmas)
    x = sigmas[0] * noise_like((2, 6))
    image, memory = split(run_state(plan, rough, {"x": x}))
    found = invert_reversible(plan, rough, image, memory)
    # Rounding grows by the Plan and by the denoiser, which has any slope: by as much as a nudge of the image grows.
    nudged = invert_reversible(plan, rough, image * (1 + 1e-13), memory).latent
    grown = 100 * float((nudged - found.latent).abs().max())
    scale = 1e-12 * max(analysis.amplification(plan)) + 1e-9 * sigmas[0] + grown
    torch.testing.assert_close(found.latent, x, rtol=0, atol=scale)
    assert found.memory.keys() == set(plan.auxiliary)
    # The growth down the schedule is that of the denoiser, too; it is bounded loosely.
    torch.testing.assert_close(run_state(plan.closed, rough, found.state)["x"], image, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("name", [name for name in RULES if name != "bdia 0.5"])
def test_round_trips_in_float64(name: str, steps: int) -> None:
    plan = ki.compile_plan(RULES[name], karras(steps))
    image, memory = split(run_state(plan, MIXTURE, {"x": latent()}))
    found = invert_reversible(plan, MIXTURE, image, memory)
    assert float((found.latent - latent()).abs().max()) / SIGMA_MAX < 1e-12
    assert float(found.gap.max()) / SIGMA_MAX < 1e-10
    assert found.evaluations == plan.closed.evaluations + ("aim" in plan.auxiliary)

    data = 0.5 * noise_like((8, 6), seed=8)  # from no run: its second state is started at the data
    pair = invert_reversible(plan, MIXTURE, data)
    again = run_state(plan.closed, MIXTURE, pair.state)["x"]
    assert float((again - data).abs().max()) < 1e-10
    assert torch.equal(again, run_state(plan.closed.closed, MIXTURE, pair.state)["x"])


# Largest error of data -> noise -> data where the second state is dropped at the noisy end, 20 and 50 steps.
DROPPED = {
    "edict": (0.38, 0.033), "edict at sigma_next": (0.20, 0.057), "edict alternate": (0.021, 1.0e-4),
    "bdia": (2.9e-3, 4.2e-5), "bdia ve": (0.17, 0.024), "o_belm": (0.019, 3.1e-3), "leapfrog": (7.5e-5, 5.4e-8), "reversible_heun": (8.7e-5, 2.2e-6), "mccallum_foster": (0.058, 3.7e-3),
    "mccallum_foster euler": (1.1, 0.35), "mccallum_foster rk4": (2.5e-4, 2.6e-6),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPPED)
def test_what_happens_when_the_second_state_is_dropped(name: str) -> None:
    """Sampling from the latent alone returns another image: exactness belongs to the pair."""
    for steps, documented in zip((20, 50), DROPPED[name], strict=True):
        plan = ki.compile_plan(RULES[name], karras(steps))
        image = ki.run(plan, MIXTURE, latent())
        pair = invert_reversible(plan, MIXTURE, image)
        alone = float((ki.run(plan, MIXTURE, pair.latent) - image).abs().max())
        kept = float((run_state(plan.closed, MIXTURE, pair.state)["x"] - image).abs().max())
        assert alone == pytest.approx(documented, rel=0.1)
        assert kept < 1e-3 * alone
        assert float(pair.gap.min()) > 1e-8


def test_a_wrong_second_state_shows_in_the_gap() -> None:
    plan = ki.compile_plan("o_belm", karras(20))
    image, memory = split(run_state(plan, MIXTURE, {"x": latent()}))
    right, wrong = (invert_reversible(plan, MIXTURE, image, {"aim": aim}) for aim in (memory["aim"], image))
    assert float(right.gap.max()) < 1e-10
    assert float(wrong.gap.min()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("name", RULES)
def test_floors(name: str, steps: int, dtype: torch.dtype) -> None:
    """Noise -> data -> noise is off by rounding errors, of the data and of the noise, as `amplification` predicts."""
    plan = ki.compile_plan(RULES[name], karras(steps))
    x = latent().to(dtype)
    image, memory = split(run_state(plan, MIXTURE, {"x": x}))
    found = invert_reversible(plan, MIXTURE, image, memory)
    assert found.latent.dtype == dtype
    floor = float((found.latent.double() - x.double()).abs().max()) / SIGMA_MAX / torch.finfo(dtype).eps
    predicted = 1.0 + max(analysis.amplification(plan, std=0.5)) / SIGMA_MAX
    assert floor < 50 * predicted
    if predicted > 100:
        assert floor > 0.02 * predicted


# -- the prediction --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [10, 50])
def test_amplification_of_methods_with_a_closed_form(steps: int) -> None:
    """With a slope of 0: EDICT p^-2N, McCallum-Foster lam^-N; the two-step methods by what x - aim grows."""

    def whole(rule: ki.Rule) -> float:
        return analysis.amplification(ki.compile_plan(rule, sigmas))[-1]

    sigmas = karras(steps)
    first, last = float(sigmas[0] - sigmas[1]), float(sigmas[-2] - sigmas[-1])
    aimed = SIGMA_MAX / SIGMA_MIN  # x - aim is the slope times sigma
    assert whole(EDICT()) == pytest.approx(0.93 ** (-2 * steps), rel=0.1)
    assert whole(McCallumFoster(ki.sampler("heun"))) == pytest.approx(0.999**-steps, rel=0.02)
    # A displacement h d grows by (h_first / h_last)^2 and 1 / gamma^(N-1); the slope by one power of h less.
    assert whole(ki.sampler("o_belm")) == pytest.approx(aimed * first / last, rel=0.5)
    half = aimed * last / first * 2.0 ** (steps - 1)
    assert whole(BDIA(gamma=0.5, coordinates="ve")) == pytest.approx(half, rel=0.7)
    assert whole(BDIA(coordinates="ve")) < 10
    weights = math.hypot(1.0, sigmas[0]) * math.hypot(1.0, sigmas[1])  # in VP coordinates 1 / (alpha_0 alpha_1) more
    assert whole(BDIA(gamma=0.5)) == pytest.approx(weights * half, rel=0.7)
    assert whole(BDIA()) < 10 * weights


def test_amplification_is_read_level_by_level() -> None:
    plan = ki.compile_plan("edict", karras(8))
    levels = analysis.amplification(plan)
    assert len(levels) == 9 and levels[0] == 1.0
    assert list(levels) == sorted(levels)
    np.testing.assert_allclose(levels[:5], analysis.amplification(ki.compile_plan("edict", karras(8)[:5])), rtol=1e-12)
    one_point = analysis.amplification(ki.compile_plan("mccallum_foster", karras(50)), std=0.0)[-1]
    assert one_point == pytest.approx(SIGMA_MAX / SIGMA_MIN, rel=0.1)
    for std in (-1.0, math.nan):
        with pytest.raises(ValueError, match="std must be 0 or more"):
            analysis.amplification(plan, std)


# -- wrapped, guided, refused ----------------------------------------------------------------------------------------
def test_guided_pairs_are_undone_too() -> None:
    plan = ki.compile_plan(McCallumFoster(ki.sampler("euler_cfg_pp")), karras(10))
    assert plan.is_guided
    image, memory = split(run_state(plan, guided_mixture(), {"x": latent()}))
    found = invert_reversible(plan, guided_mixture(), image, memory)
    torch.testing.assert_close(found.latent, latent(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["edict", "o_belm", "mccallum_foster"])
def test_in_flow_time(name: str) -> None:
    """The change of coordinates takes the second state along."""
    sigmas = karras(12)
    times = sigmas / (1.0 + sigmas)

    def in_flow_time(x: Tensor, t: Tensor) -> Tensor:
        return MIXTURE(x / (1.0 - t)[:, None], t / (1.0 - t))

    plan = ki.compile_plan(ki.rules.Flow(ki.sampler(name)), times)
    x = noise_like((4, 6))
    image, memory = split(run_state(plan, in_flow_time, {"x": x}))
    plain = ki.run(ki.compile_plan(name, sigmas), MIXTURE, x / (1.0 - times[0]))
    torch.testing.assert_close(image, (1.0 - times[-1]) * plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(invert_reversible(plan, in_flow_time, image, memory).latent, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in RULES if name != "o_belm"])
def test_a_tiny_step_has_an_inverse(name: str) -> None:
    """At a step of 1e-7 the evaluations weigh as little, and still count.

    For O-BELM the step after it has weights of 5e6, so that rounding eats the second state: found, but off by 1e-2.
    """
    plan = ki.compile_plan(RULES[name], [3.0, 1.0, 0.9999999, 0.5, 0.4])
    x = 3.0 * noise_like((4, 6))
    image, memory = split(run_state(plan, MIXTURE, {"x": x}))
    torch.testing.assert_close(invert_reversible(plan, MIXTURE, image, memory).latent, x, rtol=0, atol=1e-12)


def test_closed_plans() -> None:
    plan = ki.compile_plan("o_belm", karras(6))
    assert plan.closed.closed is plan.closed
    assert analysis.explicit_inverse(plan).closed.sigmas == plan.sigmas[::-1]
    assert plan.closed.steps[1:] == plan.steps[1:]
    assert all(step.reads == {"x", "aim"} for step in plan.closed.steps)
    euler = ki.compile_plan("euler", karras(6))
    assert euler.closed is euler and euler.auxiliary == ()


REFUSED: dict[str, tuple[Any, list[float], str]] = {
    "to zero": ("o_belm", [4.0, 2.0, 0.0], r"o_belm cannot undo its step from sigma 2 to 0: .*sigmas\[:-1\]"),
    "no auxiliary state": ("dpmpp_2m", [4.0, 2.0, 1.0], "dpmpp_2m carries no auxiliary state"),
    "far apart": (RULES["rex"], [1e-4, 0.03], "takes its two states apart by 300; use ki.invert"),
    "noise inside": (McCallumFoster(ki.sampler("heun", s_churn=5)), [4.0, 2.0], "mccallum_foster cannot .*draws noise"),
    "memory inside": (McCallumFoster(ki.sampler("lms")), [4.0, 2.0], "mccallum_foster cannot .*remembers nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    rule, sigmas, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        invert_reversible(ki.compile_plan(rule, sigmas), MIXTURE, latent())


def test_bad_memory_is_named() -> None:
    plan, x = ki.compile_plan("edict", karras(5)), latent()
    with pytest.raises(ValueError, match="edict starts from x, y, got x, z; plan.closed"):
        invert_reversible(plan, MIXTURE, x, {"z": x})
    with pytest.raises(ValueError, match="edict starts from x, got x, y"):
        run_state(plan, MIXTURE, {"x": x, "y": x})
    with pytest.raises(ValueError, match="edict starts from x, y, got x;"):
        run_state(plan.closed, MIXTURE, {"x": x})
    with pytest.raises(ValueError, match=r"'y' must have x's shape \(16, 6\), got \(16, 5\)"):
        run_state(plan.closed, MIXTURE, {"x": x, "y": x[:, 1:]})
    with pytest.raises(TypeError, match="'y' must be a tensor of x's dtype torch.float64, got torch.float32"):
        run_state(plan.closed, MIXTURE, {"x": x, "y": x.float()})
    with pytest.raises(TypeError, match="got NoneType"):
        run_state(plan.closed, MIXTURE, {"x": x, "y": None})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="Rule"):
        replace(RULES["mccallum_foster"], rule="heun")  # type: ignore[call-arg]


def test_what_a_run_returns_is_its_own() -> None:
    """No tensor of the caller's or the denoiser's comes back."""
    plan = ki.compile_plan("o_belm", [4.0, 2.0])
    x, buffer = latent(), torch.zeros(16, 6, dtype=torch.float64)
    state = run_state(plan.closed, lambda y, sigma: buffer, {"x": x, "aim": x})
    assert state["aim"].data_ptr() != x.data_ptr()
    state = run_state(plan, lambda y, sigma: buffer, {"x": x})
    assert state["aim"].data_ptr() != buffer.data_ptr()
