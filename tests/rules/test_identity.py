"""A rule that is edited is compiled anew, whatever was edited; the samplers of kinvert are compiled once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest

import kinvert as ki
from kinvert.rules import Euler, McCallumFoster, dpmpp, interpolate
from kinvert.rules.identity import code_of

SIGMAS = (10.0, 3.0, 1.0, 0.5)
CONSTANT = 1.0


def helper(s: Any) -> Any:
    return CONSTANT * s.denoise(s.x, s.sigma)


def rule_that_aims_at(aim: Callable[[Any], Any]) -> ki.Rule:
    """Return a rule whose step depends on a closure."""

    @dataclasses.dataclass(frozen=True)
    class Mine(ki.Rule):
        name = "mine"
        ode_order = 1

        def step(self, s: Any) -> Any:
            return interpolate(s.x, aim(s), s.sigma_next / s.sigma)

    return Mine()


@pytest.mark.parametrize("wrap", [lambda rule: rule, McCallumFoster], ids=["alone", "wrapped"])
def test_what_a_rule_calls_may_change(wrap: Callable[[ki.Rule], ki.Rule], monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant of the notebook, a function of it, and what a closure holds."""
    weight = [1.0]
    for rule, edit in (
        (rule_that_aims_at(lambda s: helper(s)), lambda: monkeypatch.setitem(globals(), "CONSTANT", 0.5)),
        (rule_that_aims_at(lambda s: helper(s)), lambda: monkeypatch.setitem(globals(), "helper", lambda s: s.x)),
        (rule_that_aims_at(lambda s: weight[0] * s.denoise(s.x, s.sigma)), lambda: weight.append(weight.pop() / 2)),
    ):
        before = ki.compile_plan(wrap(rule), SIGMAS)
        assert ki.compile_plan(wrap(rule), SIGMAS) == before
        edit()
        assert ki.compile_plan(wrap(rule), SIGMAS).steps != before.steps


def test_a_class_of_the_same_name_is_another_rule() -> None:
    one, other = (rule_that_aims_at(lambda s, c=c: c * s.denoise(s.x, s.sigma)) for c in (1.0, 0.5))
    assert repr(one) == repr(other)
    assert ki.compile_plan(one, SIGMAS).steps != ki.compile_plan(other, SIGMAS).steps


def half(self: Any, s: Any) -> Any:
    return 0.5 * s.denoise(s.x, s.sigma)


@pytest.mark.parametrize("method", [half, functools.partialmethod(half), functools.partialmethod(half).func])
def test_a_sampler_of_kinvert_with_another_method(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ki.compile_plan("euler", SIGMAS)
    assert ki.compile_plan("euler", SIGMAS) is before
    monkeypatch.setattr(Euler, "step", method)
    assert ki.compile_plan("euler", SIGMAS).steps != before.steps and code_of(Euler()) is None
    monkeypatch.undo()
    assert ki.compile_plan("euler", SIGMAS) is before


def test_a_module_of_kinvert_that_is_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An editor replaces a function beside the rule by another one of the same module."""
    rule = dpmpp.DPMpp2M()
    before = code_of(rule)

    def beside() -> int:
        return 1

    beside.__module__ = dpmpp.__name__
    monkeypatch.setattr(dpmpp, "beside", beside, raising=False)
    assert code_of(rule) is None  # written here
    namespace = {"__name__": dpmpp.__name__}
    exec("def beside(): return 2", namespace)
    monkeypatch.setattr(dpmpp, "beside", namespace["beside"])
    assert code_of(rule) not in (None, before)


def test_what_dataclass_gives_to_a_class_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.13 gives it `__replace__`, and none of its code is the rule's."""
    monkeypatch.setattr(Euler, "__replace__", dataclasses.replace, raising=False)
    assert code_of(Euler()) is not None and ki.compile_plan("euler", SIGMAS) is ki.compile_plan("euler", SIGMAS)


def test_every_sampler_of_kinvert_is_compiled_once() -> None:
    for name in ki.SAMPLERS:
        if name != "dpm_adaptive":
            assert code_of(ki.sampler(name)) is not None
            assert ki.compile_plan(name, SIGMAS) is ki.compile_plan(name, SIGMAS), name
