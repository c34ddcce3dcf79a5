"""A rule keeps the name that it was asked for by, in whatever way it is copied, and through the cache of Plans."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kinvert as ki
from kinvert.rules import Flow, McCallumFoster, RungeKutta, register
from kinvert.rules.base import interpolate, options_of
from kinvert.rules.tableau import TABLEAUS

SIGMAS = (10.0, 3.0, 1.0, 0.5)
COPIES: dict[str, Callable[[ki.Rule], ki.Rule]] = {
    "replace": dataclasses.replace,
    "replace an option": lambda rule: dataclasses.replace(rule, **an_option(rule)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda rule: pickle.loads(pickle.dumps(rule)),
    "twice": lambda rule: dataclasses.replace(pickle.loads(pickle.dumps(dataclasses.replace(rule)))),
}


def an_option(rule: ki.Rule) -> dict[str, Any]:
    """Some option of a rule with another value, if it has a number that may be 0.5."""
    for f in options_of(rule):
        low, high = (f.metadata.get(end, 0.5) for end in ("low", "high"))
        if isinstance(getattr(rule, f.name), float) and low <= 0.5 <= high:
            return {f.name: 0.5}
    return {}


@pytest.fixture
def renamed() -> Iterator[str]:
    """A rule whose own name is computed, registered under another."""
    register(RungeKutta, "my_method", tableau=TABLEAUS[0])
    yield "my_method"
    del ki.SAMPLERS["my_method"]


@pytest.mark.parametrize("way", COPIES)
def test_the_name_survives(way: str, renamed: str) -> None:
    for name in ki.SAMPLERS:
        rule = ki.sampler(name)
        found = COPIES[way](rule)
        assert found.name == rule.name == name
        assert type(found) is type(rule) and found == dataclasses.replace(rule, **vars_of(found))
        if way != "replace an option":
            assert found == rule and hash(found) == hash(rule)


def vars_of(rule: ki.Rule) -> dict[str, Any]:
    return {f.name: getattr(rule, f.name) for f in options_of(rule)}


def test_a_name_is_no_option() -> None:
    assert all("named" not in entry.options for entry in ki.SAMPLERS.values())
    with pytest.raises(TypeError, match="ddim has no option 'named'"):
        ki.sampler("ddim", named="euler")
    assert "named" not in repr(ki.sampler("ddim"))


def test_a_rule_by_its_own_name_is_the_plain_rule() -> None:
    for name, entry in ki.SAMPLERS.items():
        if name == entry.rule.name:
            assert ki.sampler(name) == entry.rule(**entry.defaults)
    assert ki.sampler("ddim") == ki.sampler("euler_ancestral", eta=0.0)  # the same rule, by another name


def test_an_edited_rule_is_compiled_anew() -> None:
    """A notebook cell that is run again, or autoreload, puts another method in place of the old one."""

    @dataclasses.dataclass(frozen=True)
    class Mine(ki.Rule):
        name = "mine"
        ode_order = 1

        def step(self, s: Any) -> Any:
            return interpolate(s.x, self.aim(s), s.sigma_next / s.sigma)

        def aim(self, s: Any) -> Any:
            return s.denoise(s.x, s.sigma)

    for rule in (Mine(), McCallumFoster(Mine())):
        before = ki.compile_plan(rule, SIGMAS)
        assert ki.compile_plan(rule, SIGMAS) is before
        aim, Mine.aim = Mine.aim, lambda self, s: 0.5 * s.denoise(s.x, s.sigma)
        assert ki.compile_plan(rule, SIGMAS).steps != before.steps
        Mine.aim = aim
        assert ki.compile_plan(rule, SIGMAS) is before


def test_a_rule_prints_what_was_changed() -> None:
    assert repr(ki.sampler("heun")) == "Heun()"
    assert repr(ki.sampler("heun", s_churn=3)) == "Heun(s_churn=3.0)"
    assert repr(Flow(ki.sampler("dpmpp_2m"))) == "Flow(rule=DPMpp2M())"


def test_plans_are_of_the_rule_that_was_asked_for() -> None:
    plain, ddim = ki.sampler("euler_ancestral", eta=0.0), ki.sampler("ddim")
    for rule in (plain, ddim, plain):
        assert ki.compile_plan(rule, SIGMAS).rule.name == rule.name
        inner: Any = ki.compile_plan(McCallumFoster(rule), SIGMAS).rule
        assert inner.rule.name == rule.name
    flow = ki.compile_plan(Flow(ddim), (0.9, 0.5, 0.1)).rule
    assert flow.name == "ddim" and ki.compile_plan(Flow(plain), (0.9, 0.5, 0.1)).rule.name == "euler_ancestral"
