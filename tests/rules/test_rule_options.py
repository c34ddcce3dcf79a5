"""Options at their bounds, options that do not match, and measured orders of rules with other options."""

from __future__ import annotations

import functools
import math
from dataclasses import fields
from typing import Any, get_type_hints

import pytest
from problems import noise_like, order_slope
from rule_runs import MIXTURE, paired
from torch import Tensor

import kinvert as ki
from kinvert.rules import (
    DEIS,
    ERSDE,
    RES3S,
    CFGppUD10AB,
    DPMpp3MSDE,
    SASolver,
    Seeds3,
    UniPC,
)


@pytest.mark.parametrize(
    ("rule", "fix"),
    [
        (Seeds3(r_1=0.5, r_2=0.5), "use r_1 < r_2"),
        (RES3S(c2=2 / 3), "use c2 other than"),
        (RES3S(c2=0.5, c3=0.5), "use c2 other than"),
    ],
    ids=str,
)
def test_conflicting_options_are_refused(rule: ki.Rule, fix: str) -> None:
    with pytest.raises(ValueError, match=fix):
        ki.compile_plan(rule, [10.0, 1.0])


@pytest.mark.parametrize("name", ki.SAMPLERS)
def test_options_are_taken_up_to_their_bounds(name: str) -> None:
    """Each bound is an allowed value, and the next number beyond it is refused with both bounds."""
    entry = ki.SAMPLERS[name]
    hints = get_type_hints(entry.rule)
    for f in fields(entry.rule):
        for end, way in (("low", -math.inf), ("high", math.inf)):
            bound = f.metadata.get(end, way)
            if not math.isfinite(bound):
                continue
            kind = hints[f.name]
            assert ki.sampler(name, **{f.name: kind(bound)}).options[f.name] == bound
            beyond = bound + math.copysign(1, way) if kind is int else math.nextafter(bound, way)
            with pytest.raises(ValueError, match=rf"{f.name} must be a number from {f.metadata['low']:g} to "):
                ki.sampler(name, **{f.name: kind(beyond)})


@pytest.mark.parametrize("name", ["sa_solver", "seeds_2", "seeds_3", "dpmpp_3m_sde"])
def test_rising_noise_is_refused_with_the_fix(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} cannot step .* use eta=0"):
        ki.compile_plan(name, [0.1, 1.0, 4.0, 10.0])
    assert not ki.compile_plan(ki.sampler(name, eta=0.0), [0.1, 1.0, 4.0, 10.0]).is_stochastic


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
def test_options_at_their_bounds_give_no_negative_variance(name: str) -> None:
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
