"""Rules and Plans in files: every sampler comes back equal, a rule of one's own with help."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import ClassVar

import pytest

import kinvert as ki
from kinvert.forms import Form, Noise, State
from kinvert.planfile import plan_of, plan_tree, rule_of, rule_tree
from kinvert.rules import Rule, RungeKutta, StepBuilder, Tableau

SIGMAS = [9.7, 3.1, 1.0 / 3.0, 0.1]


@dataclass(frozen=True)
class Own(Rule):
    """A rule that nobody registered."""

    name: ClassVar[str] = "own"
    ode_order: ClassVar[int] = 1
    scale: float = 1.0
    top: float = math.inf

    def step(self, s: StepBuilder) -> Form:
        s.remember("D0", s.x)  # looks like an output of the denoiser
        s.remember("state y", 2.0 * s.x)
        old = [value for name in ("D0", "state y") if (value := s.recall(name)) is not None]
        x = s.x + 0.1 * s.noise(s.sigma, s.sigma_next)
        return self.scale * s.denoise(x, s.sigma) + 0.25 * sum(old[1:], old[0] if old else x)


@pytest.mark.parametrize("name", ki.SAMPLERS)
def test_every_sampler_comes_back_equal(name: str, tmp_path: Path) -> None:
    rule = ki.sampler(name)
    again = rule_of(rule_tree(rule), "f")
    assert again == rule and again.name == name and type(again) is type(rule) and repr(again) == repr(rule)
    if name == "dpm_adaptive":
        return
    plan = ki.compile_plan(rule, SIGMAS)
    plan.save(tmp_path / "plan.json")
    found = ki.load(tmp_path / "plan.json")
    assert found == plan and str(found) == str(plan)
    for old, new in zip(plan.steps, found.steps, strict=True):  # the order of the sums too
        assert [list(stage.input) for stage in old.stages] == [list(stage.input) for stage in new.stages]
        assert list(old.x) == list(new.x)


@pytest.mark.parametrize(
    "rule",
    [
        ki.sampler("euler_ancestral", eta=0.3, s_noise=1.1),
        ki.sampler("heun", s_churn=2.0, s_tmax=math.inf),
        ki.flow_sampler("dpmpp_2m_sde"),
        ki.flow_sampler("ddpm"),
        ki.rules.McCallumFoster(ki.rules.Flow(ki.sampler("dpmpp_3m_sde", eta=0.0))),
        RungeKutta(Tableau("mine", 2, ((), (Fraction(2, 3),)), (Fraction(1, 4), Fraction(3, 4)))),
        ki.rules.PhiRungeKutta(ki.rules.PhiTableau("mine", 2, "1/2: | 1: 2 p2")),
        ki.rules.DirectInversion(),
    ],
    ids=repr,
)
def test_options_and_rules_in_rules_come_back(rule: Rule) -> None:
    tree = json.loads(json.dumps(rule_tree(rule)))
    assert rule_of(tree, "f") == rule and rule_of(tree, "f").name == rule.name


def test_a_plan_in_flow_time_says_so(tmp_path: Path) -> None:
    plan = ki.compile_plan("euler", ki.levels.FlowTimes([1.0, 0.5, 0.1]))
    plan.save(tmp_path / "p.json")
    assert ki.load(tmp_path / "p.json") == plan


def test_names_of_values_are_not_taken_for_outputs(tmp_path: Path) -> None:
    plan = ki.compile_plan(Own(), SIGMAS)
    assert plan_of(plan_tree(plan), "f", Own()) == plan
    assert plan.steps[1].x[State("D0")] and plan.steps[1].stages[0].input[Noise(0)]


def test_a_rule_that_is_not_registered_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    plan = ki.compile_plan(Own(scale=0.5), SIGMAS)
    plan.save(path)
    with pytest.raises(
        ValueError, match=r"p\.json' was made with the sampler 'own', .*Own\(scale=0\.5.*ki\.load\(path, sampler=rule"
    ):
        ki.load(path)
    with pytest.raises(ValueError, match=r"sampler: .* was made with .*scale=0\.5.*got .*scale=1\.0"):
        ki.load(path, sampler=Own())
    assert ki.load(path, sampler=Own(scale=0.5)) == plan
    assert json.loads(path.read_text())["content"]["sampler"]["class"] == f"{__name__}.Own"


def test_an_unknown_option_is_an_error_not_a_guess() -> None:
    tree = rule_tree(ki.sampler("euler_ancestral"))
    tree["options"]["etta"] = 1.0
    with pytest.raises(ValueError, match=r"f: unknown option of the sampler EulerAncestral 'etta'; did you mean 'eta'"):
        rule_of(tree, "f")
