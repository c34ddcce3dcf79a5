"""The compiler: what is compiled, pruned, cached and refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import kinvert as ki
from kinvert.forms import Denoised, Form, Noise, State
from kinvert.plan import Interval
from kinvert.rules import (
    StepBuilder,
)

KARRAS = ki.schedules.karras(6, 0.1, 10)


def test_heun_by_hand() -> None:
    """x' = x + (s' - s)(d + d')/2 with d' at the Euler point; from 2 to 1: x' = x - (x - D0)/4 - (x_e - D1)/2."""
    step = ki.compile_plan("heun", [2.0, 1.0, 0.0]).steps[0]
    assert [stage.sigma for stage in step.stages] == [2.0, 1.0]
    assert step.stages[1].input == Form({State("x"): 0.5, Denoised(0): 0.5})
    assert step.x == Form({State("x"): 0.5, Denoised(0): 0.0, Denoised(1): 0.5})


def test_text_of_a_plan() -> None:
    text = str(ki.compile_plan("dpmpp_2m", [4.0, 2.0, 1.0, 0.0]))
    assert text.splitlines()[0] == "DPMpp2M(): 3 steps, 3 evaluations, 0 draws of noise, 1 remembered values"
    assert "step 1: sigma 2 -> 1\n  D0 = denoiser(x, 2)\n  x' = 0.5 x + 0.75 D0 - 0.25 D[-1]" in text
    assert "n0 = noise(4, 2)" in str(ki.compile_plan("euler_ancestral", [4.0, 2.0, 0.0]))


def test_the_line_of_a_plan_says_what_its_levels_are() -> None:
    assert repr(ki.compile_plan("heun", [4.0, 2.0, 0.0])) == "Plan(Heun(), 2 steps, sigma 4 to 0, 3 evaluations)"
    times = ki.levels.FlowTimes([1.0, 0.5])
    assert repr(ki.compile_plan("euler", times)) == "Plan(Euler(), 1 step, flow time 1 to 0.5, 1 evaluation)"


def test_properties_are_read_off() -> None:
    euler, lms = ki.compile_plan("euler", KARRAS), ki.compile_plan("lms", KARRAS)
    ancestral = ki.compile_plan("euler_ancestral", KARRAS)
    assert (euler.evaluations, euler.draws, euler.memory_size) == (6, 0, 0)
    assert (lms.evaluations, lms.memory_size, lms.is_multistep) == (6, 3, True)
    assert (ancestral.draws, ancestral.is_stochastic) == (5, True)
    assert ki.compile_plan("heun", KARRAS).evaluations == 11
    assert ki.compile_plan("dpmpp_sde", KARRAS).steps[0].noises[0].sigma_from == 10
    assert ki.compile_plan("euler", KARRAS[:-1].flip(0)).is_rising


def test_unread_memory_is_dropped() -> None:
    """The last steps of a multistep method remember nothing."""
    steps = ki.compile_plan("lms", KARRAS[:-1]).steps
    assert [len(step.memory) for step in steps] == [1, 2, 3, 2 + 1, 0][: len(steps)]
    assert ki.compile_plan("dpmpp_2m", KARRAS).steps[-2].memory == ()


@dataclass(frozen=True)
class Wasteful(ki.Rule):
    """Draws two noises and uses the second."""

    name: ClassVar[str] = "wasteful"
    ode_order: ClassVar[int] = 1

    def step(self, s: StepBuilder) -> Form:
        unused, used = s.noise(s.sigma, 1.0), s.noise(1.0, s.sigma_next)
        s.remember("never read", unused)
        return 0.0 * unused + s.denoise(s.x + used, s.sigma)


def test_dead_noise_is_pruned_and_the_rest_renumbered() -> None:
    plan = ki.compile_plan(Wasteful(), [2.0, 1.5, 0.5])
    for step, sigma_next in zip(plan.steps, [1.5, 0.5], strict=True):
        assert step.noises == (Interval(1.0, sigma_next),)
        assert step.stages[0].input == Form({State("x"): 1.0, Noise(0): 1.0})
        assert step.memory == ()
        assert step.forgets_x


def test_plans_are_cached_and_hashable() -> None:
    plan = ki.compile_plan("euler", KARRAS)
    assert ki.compile_plan(ki.rules.Euler(), KARRAS.tolist()) is plan
    assert ki.compile_plan(ki.sampler("euler"), KARRAS.numpy()) is plan
    assert hash(plan) == hash(ki.compile_plan("euler", KARRAS))
    assert plan != ki.compile_plan("heun", KARRAS)


def test_calls_to_compile_a_step_do_not_depend_on_the_number_of_steps() -> None:
    def calls_per_step(n: int) -> float:
        sigmas, calls = ki.schedules.karras(n, 0.01, 10 + n), 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            ki.compile_plan("lms", sigmas)
        finally:
            sys.setprofile(None)
        return calls / n

    assert calls_per_step(2000) < 1.2 * calls_per_step(200)


BAD_SCHEDULES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "one entry": (lambda: [1.0], ValueError, "at least two"),
    "empty": (lambda: torch.empty(0), ValueError, "at least two"),
    "nan": (lambda: [2.0, float("nan"), 0.0], ValueError, r"sigmas\[1\] = nan"),
    "infinite": (lambda: [float("inf"), 1.0], ValueError, r"sigmas\[0\] = inf"),
    "negative": (lambda: [1.0, -0.5], ValueError, r"sigmas\[1\] = -0.5"),
    "repeated": (lambda: torch.tensor([2.0, 1.0, 1.0, 0.0]), ValueError, r"twice, sigmas\[1\] = sigmas\[2\]"),
    "not monotone": (lambda: [3.0, 1.0, 2.0, 0.0], ValueError, r"sigmas\[1\] = 1 -> sigmas\[2\] = 2.*sort"),
    "from zero": (lambda: [0.0, 1.0, 2.0], ValueError, "sigma_offset"),
    "2-D": (lambda: torch.ones(2, 2), TypeError, r"1-D.*shape \(2, 2\)"),
    "scalar": (lambda: torch.tensor(1.0), TypeError, "1-D"),
    "a number": (lambda: 3.0, TypeError, "1-D"),
    "text": (lambda: "karras", TypeError, "1-D"),
    "texts": (lambda: ["1.0", "0.5"], TypeError, "real numbers"),
    "complex": (lambda: np.array([1j, 0.5]), TypeError, "real numbers"),
    "none": (lambda: None, TypeError, "1-D"),
}


@pytest.mark.parametrize("name", BAD_SCHEDULES)
def test_bad_schedules_are_named(name: str) -> None:
    make, error, message = BAD_SCHEDULES[name]
    with pytest.raises(error, match=message) as caught:
        ki.compile_plan("euler", make())
    assert "sigmas" in str(caught.value)


def test_schedules_come_in_any_container() -> None:
    levels = [4.0, 2.0, 0.5]
    for sigmas in (levels, tuple(levels), np.array(levels), torch.tensor(levels), torch.tensor(levels).half()):
        assert ki.compile_plan("euler", sigmas).sigmas == (4.0, 2.0, 0.5)


def test_sde_upwards_is_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"dpmpp_2m_sde cannot step from sigma 0.1 to .*use eta=0"):
        ki.compile_plan("dpmpp_2m_sde", KARRAS[:-1].flip(0))


@dataclass(frozen=True)
class Squared(ki.Rule):
    """Not linear."""

    name: ClassVar[str] = "squared"
    ode_order: ClassVar[int] = 1

    def step(self, s: StepBuilder) -> Form:
        return s.x * s.denoise(s.x, s.sigma)


@dataclass(frozen=True)
class AtZero(ki.Rule):
    """Evaluates where there is no noise level."""

    name: ClassVar[str] = "at_zero"
    ode_order: ClassVar[int] = 1

    def step(self, s: StepBuilder) -> Form:
        return s.denoise(s.x, s.sigma_next)


@dataclass(frozen=True)
class Forgotten(ki.Rule):
    """Returns nothing."""

    name: ClassVar[str] = "forgotten"
    ode_order: ClassVar[int] = 1

    def step(self, s: StepBuilder) -> Form:
        return None  # type: ignore[return-value]


def test_invalid_rules_are_refused() -> None:
    with pytest.raises(TypeError, match="not linear"):
        ki.compile_plan(Squared(), KARRAS)
    with pytest.raises(
        ValueError, match=r"at_zero cannot step from sigma 0.1 to 0 .*evaluates the denoiser at sigma = 0"
    ):
        ki.compile_plan(AtZero(), KARRAS)
    with pytest.raises(TypeError, match=r"Forgotten.step must return a form .*got None"):
        ki.compile_plan(Forgotten(), KARRAS)


def test_stage_levels_are_the_levels_of_all_evaluations() -> None:
    assert ki.compile_plan("heun", [4.0, 2.0, 1.0, 0.0]).stage_levels == (4.0, 2.0, 2.0, 1.0, 1.0)
    plan = ki.compile_plan("leapfrog", KARRAS)
    assert len(plan.stage_levels) == plan.evaluations


def test_the_old_name_of_sampler_is_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match="compile_plan: the argument rule is now sampler"):
        plan = ki.compile_plan(rule="heun", sigmas=KARRAS)  # type: ignore[call-arg]
    assert plan is ki.compile_plan(sampler="heun", sigmas=KARRAS)
    with pytest.warns(DeprecationWarning, match="properties: the argument rule is now sampler"):
        assert ki.analysis.properties(rule="heun").name == "heun"  # type: ignore[call-arg]
