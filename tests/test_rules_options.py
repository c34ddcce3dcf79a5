"""Options that other hosts have: lower orders at the end, s_noise over the run, clipping; and stages that coincide."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace
from typing import Any, get_type_hints

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import mixture, noise_like, schedules
from torch import Tensor

import kinvert as ki
from kinvert.coefficients import ancestral_split, flow_ancestral_split, sde_noise_scale
from kinvert.forms import Denoised

MIXTURE = mixture()


# -- lower orders at the end: diffusers' rule, as it is documented ------------------------------------------------------
def orders(rule: ki.Rule, sigmas: Any) -> list[int]:
    """How many denoised images each step is made of."""
    plan = ki.compile_plan(rule, sigmas)
    seen = []
    for step in plan.steps:
        names = {symbol for symbol, _ in step.x} - {("state", "x")}
        seen.append(len({("D", 0) if symbol == Denoised(0) else symbol for symbol in names}))
    return seen


@pytest.mark.parametrize("n", [1, 2, 3, 5, 14, 15, 20])
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize(
    ("name", "highest"), [("dpmpp_2m", 2), ("dpmpp_2m_sde", 2), ("dpmpp_3m", 3), ("dpmpp_3m_sde", 3), ("deis", 3)]
)
def test_lower_order_final(name: str, highest: int, lower: bool, n: int) -> None:
    """1, 2, 3, ..., 3, 2, 1 in runs of fewer than 15 steps if asked for; the start-up is there anyway."""
    options = {"eta": 0.0} if name.endswith("_sde") else {}
    rule = ki.sampler(name, lower_order_final=lower, **options)
    want = [min(highest, k + 1, n - k if lower and n < 15 else highest) for k in range(n)]
    assert orders(rule, ki.schedules.karras(n + 1, 0.1, 10)[:-1]) == want


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


def test_dpmpp_3m_takes_its_second_step_by_the_midpoint_rule() -> None:
    sigmas = [10.0, 5.0, 2.0, 0.8]
    three, two, heun = (ki.compile_plan(name, sigmas) for name in ("dpmpp_3m", "dpmpp_2m", "res_2m"))
    assert three.steps[1].x.terms == pytest.approx(two.steps[1].x.terms, rel=1e-12)
    quiet = ki.compile_plan(ki.sampler("dpmpp_3m_sde", eta=0.0), sigmas)
    assert quiet.steps[1].x.terms == pytest.approx(heun.steps[1].x.terms, rel=1e-12)
    assert three.steps[2].x.terms == pytest.approx(quiet.steps[2].x.terms, rel=1e-12)


@given(levels=st.lists(st.floats(0.05, 1.0), min_size=3, max_size=5), slope=st.floats(-2, 2))
@settings(max_examples=30, deadline=None)
def test_deis_in_log_sigma_is_exact_for_slopes_linear_in_it(levels: list[float], slope: float) -> None:
    """int (1 + c log s) ds = s (1 + c (log s - 1))."""
    sigmas = [10 * math.exp(-h) for h in itertools.accumulate(levels)]

    def antiderivative(s: float) -> float:
        return s * (1 + slope * (math.log(s) - 1))

    weights = ki.coefficients.deis_weights(tuple(sigmas), "log_sigma")
    got = sum(w * (1 + slope * math.log(s)) for w, s in zip(weights, sigmas[-2::-1], strict=True))
    want = antiderivative(sigmas[-1]) - antiderivative(sigmas[-2])
    assert got == pytest.approx(want, rel=1e-10, abs=1e-10)


# -- cfgpp_ud10_ab ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flow", "sigmas", "want"),
    [
        (
            False,
            [14.614642, 6.0, 2.5, 1.0, 0.4, 0.0291675, 0.0],
            [0.03934933332348981, -0.07428717960501931, 0.16713877741995767, 0.019483299850203074],
        ),
        (
            True,
            [0.98, 0.75, 0.5, 0.25, 0.1, 0.0],
            [0.3472071596521206, -0.5653960587224339, 1.745889851805635, 0.16749567810030647],
        ),
    ],
)
def test_ud10_has_the_figures_of_comfyui(flow: bool, sigmas: list[float], want: list[float]) -> None:
    """Figures of ComfyUI 95539f56 (2026-09-22) for a quadratic denoiser, in its eps and flow spaces."""

    def denoiser(x: Tensor, sigma: Tensor) -> ki.Guided:
        s = sigma[:, None]
        denoised = x / (1 + s) + 0.05 * x**2 / (1 + s)
        return ki.Guided(denoised, 0.8 * x / (1.2 + s) - 0.03 * x**2 / (1 + s))

    x = torch.tensor([[0.5, -1.0, 2.0, 0.25]], dtype=torch.float64)
    got = ki.run(ki.compile_plan(ki.sampler("cfgpp_ud10_ab", flow=flow), sigmas), denoiser, x)
    torch.testing.assert_close(got, torch.tensor([want], dtype=torch.float64), rtol=1e-13, atol=0)


@given(sigmas=schedules(min_steps=2, zero=False))
@settings(max_examples=20, deadline=None)
def test_ud10_without_its_history_is_euler_cfg_pp(sigmas: list[float]) -> None:
    plain, ud10 = (
        ki.compile_plan(ki.sampler(name, **options), sigmas)
        for name, options in (("euler_cfg_pp", {}), ("cfgpp_ud10_ab", {"uncond_history": 0.0, "history": 0.0}))
    )
    for one, other in zip(plain.steps, ud10.steps, strict=True):
        assert one.x.terms == pytest.approx(other.x.terms, rel=1e-9, abs=1e-9)


# -- lcm ----------------------------------------------------------------------------------------------------------------
def test_lcm_noise_runs_from_one_scale_to_the_other() -> None:
    sigmas = [8.0, 4.0, 2.0, 1.0, 0.0]
    plan = ki.compile_plan(ki.sampler("lcm", s_noise=1.0, s_noise_end=4.0), sigmas)
    scales = [max(c for symbol, c in step.x if symbol.kind == "noise") / step.sigma_next for step in plan.steps[:-1]]
    assert scales == pytest.approx([1.0, 2.0, 3.0])
    assert plan.draws == 3
    single = ki.compile_plan(ki.sampler("lcm", s_noise=0.5, s_noise_end=4.0), [8.0, 4.0])
    assert [c for symbol, c in single.steps[0].x if symbol.kind == "noise"] == [2.0]


@pytest.mark.parametrize("rule", [ki.sampler("lcm"), ki.rules.Flow(ki.sampler("lcm"))], ids=["lcm", "flow"])
@pytest.mark.parametrize("source", [ki.noise.white(3), None, "function"], ids=["white", "default", "function"])
def test_lcm_clips_its_noise_whatever_the_source(rule: Any, source: Any) -> None:
    """After one step the state is the clipped noise alone."""
    clip = ki.sampler("lcm", noise_clip_std=0.5)
    rule = replace(rule, rule=clip) if isinstance(rule, ki.rules.Flow) else clip
    x = torch.zeros(2, 3, 500, dtype=torch.float64)
    if source == "function":
        generator = torch.Generator().manual_seed(0)
        source = lambda a, b: torch.randn(x.shape, generator=generator, dtype=x.dtype)  # noqa: E731
    out = ki.sample(lambda x, sigma: torch.zeros_like(x), x, [0.9, 0.5], sampler=rule, noise=source)
    assert 0.48 * 0.5 < float(out.abs().max()) < 0.52 * 0.5
    assert float((out.abs() > 0.47 * 0.5).double().mean()) > 0.5


def test_noise_that_is_played_back_is_not_clipped() -> None:
    x = torch.zeros(1, 4, dtype=torch.float64)
    noise = ki.noise.replay([torch.tensor([[5.0, -4.0, 0.1, 2.0]])])
    out = ki.sample(
        lambda x, sigma: torch.zeros_like(x), x, [3.0, 1.0], sampler=ki.sampler("lcm", noise_clip_std=1.0), noise=noise
    )
    assert out.tolist() == [[5.0, -4.0, pytest.approx(0.1), 2.0]]


@pytest.mark.parametrize("options", [{"s_noise_end": "1"}, {"noise_clip_std": -1.0}, {"noise_clip_std": math.nan}])
def test_lcm_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        ki.sampler("lcm", **options)


# -- DDIM inversion -----------------------------------------------------------------------------------------------------
def test_ddim_inversion_by_name() -> None:
    """Up: as diffusers' inverse scheduler, in VP coordinates, the slope at the noisier level. Down: DDIM."""
    sigmas = ki.schedules.karras(6, 0.1, 10)
    x = noise_like((3, 6))
    got = ki.unsample(MIXTURE, x, sigmas[:-1], sampler="ddim_inverse", sigma_offset=0.0)
    y = x / math.sqrt(1 + 0.1**2)
    for a, b in itertools.pairwise(sigmas[:-1].flip(0).tolist()):
        seen = y * math.sqrt(1 + b**2)  # the latent as it is, at the next level
        eps = (seen - MIXTURE(seen, torch.full((3,), b, dtype=torch.float64))) / b
        clean = (y - eps * a / math.sqrt(1 + a**2)) * math.sqrt(1 + a**2)
        y = (clean + b * eps) / math.sqrt(1 + b**2)
    torch.testing.assert_close(got, y * math.sqrt(1 + 10.0**2), rtol=1e-10, atol=1e-10)
    down = ki.sample(MIXTURE, got, sigmas, sampler="ddim_inverse")
    assert torch.equal(down, ki.sample(MIXTURE, got, sigmas, sampler="euler"))


# -- variances ----------------------------------------------------------------------------------------------------------
@given(a=st.floats(1e-3, 1e3), r=st.floats(1e-12, 1.0), eta=st.floats(0.0, 3.0))
def test_the_ancestral_split_keeps_its_digits(a: float, r: float, eta: float) -> None:
    b = a * r
    assume(0 < b <= a)
    down, up = ancestral_split(a, b, eta)
    assert math.hypot(down, up) == pytest.approx(b, rel=1e-14)
    assert 0 <= down <= b and 0 <= up <= b
    if eta == 1:
        assert down == pytest.approx(b * b / a, rel=1e-14)


@given(t=st.floats(1e-6, 1.0), r=st.floats(0.0, 1.0), eta=st.floats(0.0, 1.0))
def test_the_flow_split_of_a_falling_step_never_fails(t: float, r: float, eta: float) -> None:
    t_next = t * r
    assume(t_next < 1)
    down, scale, up = flow_ancestral_split(t, t_next, eta)
    assert math.hypot(down * scale, up) == pytest.approx(t_next, rel=1e-9, abs=1e-300)
    assert up >= 0


def test_levels_that_differ_by_rounding_are_one_level() -> None:
    for h in (-4e-16, -1e-13, 0.0, 1e-16, 1e-13):
        assert sde_noise_scale(h, 1.0) == 0.0
    with pytest.raises(ValueError, match="rising step"):
        sde_noise_scale(-1e-9, 1.0)
    assert sde_noise_scale(1e-9, 1.0) == pytest.approx(math.sqrt(2e-9), rel=1e-6)


def extremes(entry: ki.rules.SamplerEntry) -> list[dict[str, Any]]:
    """The bounds of each number among a sampler's options, one at a time, with and without noise."""
    hints = get_type_hints(entry.rule)
    found: list[dict[str, Any]] = [{}]
    for f in fields(entry.rule):
        low, high = (f.metadata.get(end, math.inf) for end in ("low", "high"))
        ends = [end for end in (low, high) if math.isfinite(end) and end > 1e-6 and hints[f.name] in (int, float)]
        found += [{f.name: hints[f.name](end)} for end in ends]
        if f.name in ("r", "r_1", "r_2", "eta", "reverse_eta"):
            found += [{f.name: value} for value in (0.4, 0.9, 1.0 - 1e-9, 1.0 - 1e-16)]
    return found


@pytest.mark.parametrize("name", [name for name in ki.SAMPLERS if name != "dpm_adaptive"])
def test_no_option_makes_a_falling_schedule_rise(name: str) -> None:
    """Stages may coincide with each other or with an end of the step: rounding alone makes no negative variance."""
    entry = ki.SAMPLERS[name]
    grids = [ki.schedule("karras", n, ki.levels.edm(0.02, 80.0)) for n in (3, 20)]
    grids.append(ki.schedule("simple", 9, ki.levels.stable_diffusion()))
    for options in extremes(entry):
        rule = ki.sampler(name, **options)
        for sigmas in grids:
            try:
                plan = ki.compile_plan(rule, sigmas)
            except ValueError as error:
                assert "variance" not in str(error) and "rising" not in str(error), (options, error)
                continue
            for step in plan.steps:
                assert all(a != b for a, b in step.noises)
