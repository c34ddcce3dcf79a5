"""A rule keeps its public name in copies; it says which options make noise; it can be made quiet."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

import kinvert as ki
from kinvert.forms import Form
from kinvert.rules import DirectInversion, Flow, McCallumFoster, Restart, RungeKutta, StepBuilder, register
from kinvert.rules.base import interpolate, options_of
from kinvert.rules.tables import TABLEAUS

SIGMAS = (10.0, 3.0, 1.0, 0.1)


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
def test_public_name_survives_copies(way: str, renamed: str) -> None:
    for name in ki.SAMPLERS:
        rule = ki.sampler(name)
        found = COPIES[way](rule)
        assert found.name == rule.name == name
        assert type(found) is type(rule) and found == dataclasses.replace(rule, **vars_of(found))
        if way != "replace an option":
            assert found == rule and hash(found) == hash(rule)


def test_public_name_survives_replace() -> None:
    assert dataclasses.replace(ki.sampler("ddim"), s_noise=1.0).name == "ddim"
    assert (
        dataclasses.replace(ki.sampler("rk4"), tableau=TABLEAUS[0]).name == "midpoint"
    )  # its own name changes with it
    assert dataclasses.replace(Flow(ki.sampler("ddim")), start=0.9).name == "ddim"


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
        assert ki.compile_plan(rule, SIGMAS) == before
        aim, Mine.aim = Mine.aim, lambda self, s: 0.5 * s.denoise(s.x, s.sigma)
        assert ki.compile_plan(rule, SIGMAS).steps != before.steps
        Mine.aim = aim
        assert ki.compile_plan(rule, SIGMAS) == before


def test_repr_shows_changed_options() -> None:
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


# -- quiet rules and typed properties -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ki.SAMPLERS)
def test_quiet_switches_the_noise_off(name: str) -> None:
    rule = ki.sampler(name)
    quiet = rule.quiet()
    assert quiet.name == name and type(quiet) is type(rule)
    assert not quiet.noise_options and quiet.quiet() is quiet
    assert quiet == dataclasses.replace(rule, **rule.noise_options)
    if name == "dpm_adaptive":
        return
    noisy = ki.compile_plan(rule, SIGMAS).is_stochastic
    assert (quiet is not rule) == noisy == bool(rule.noise_options)
    assert not ki.compile_plan(quiet, SIGMAS).is_stochastic


NOISY: dict[str, tuple[ki.Rule, dict[str, Any]]] = {
    "churn": (ki.sampler("heun", s_churn=5.0), {"s_churn": 0.0}),
    "churn at other levels": (ki.sampler("heun", s_churn=5.0, s_tmin=1e3), {"s_churn": 0.0}),
    "eta": (ki.sampler("dpm_adaptive", eta=0.5), {"eta": 0.0}),
    "an interval of noise": (ki.sampler("sa_solver", sde_start=0.05, sde_end=0.01), {"eta": 0.0}),
    "eta before s_noise": (ki.sampler("seeds_2", s_noise=0.5), {"eta": 0.0}),
    "s_noise alone": (ki.sampler("er_sde"), {"s_noise": 0.0}),
    "an ode": (ki.sampler("er_sde", noise_scaler="ode"), {}),
    "a reverse SDE with eta 0": (ki.sampler("er_sde", noise_scaler="reverse_time_sde", reverse_eta=0.0), {}),
    "both ends": (ki.sampler("lcm", s_noise=0.0, s_noise_end=1.0), {"s_noise": 0.0, "s_noise_end": None}),
    "through Flow": (Flow(ki.sampler("dpmpp_2m_sde")), {"eta": 0.0}),
    "a quiet rule through Flow": (Flow(ki.sampler("heun")), {}),
}


@pytest.mark.parametrize("case", NOISY)
def test_noise_options(case: str) -> None:
    rule, options = NOISY[case]
    assert rule.noise_options == options
    assert (rule.quiet() is rule) == (not options)
    assert not rule.quiet().noise_options


def test_quiet_reaches_the_rule_inside() -> None:
    assert Flow(ki.sampler("ddpm")).quiet() == Flow(ki.sampler("ddim"))
    churned = McCallumFoster(ki.sampler("heun", s_churn=5.0))
    assert churned.noise_options == {"rule": ki.sampler("heun")} and churned.quiet() == McCallumFoster(
        ki.sampler("heun")
    )
    restarted = Restart(ki.sampler("heun", s_churn=5.0))
    assert restarted.quiet() == Restart(ki.sampler("heun"), restarts=0)


@dataclasses.dataclass(frozen=True)
class Unswitched(ki.Rule):
    """Denoises and adds noise again in its second step and later."""

    name: ClassVar[str] = "unswitched"
    ode_order: ClassVar[int] = 0

    def step(self, s: StepBuilder) -> Form:
        noise = s.noise(s.sigma, s.sigma_next)
        return s.denoise(s.x, s.sigma) + (s.sigma_next if s.index else 0.0) * noise


@pytest.mark.parametrize("rule", [DirectInversion(), Flow(DirectInversion()), Unswitched()], ids=repr)
def test_noise_without_a_switch_is_an_error(rule: ki.Rule) -> None:
    with pytest.raises(ValueError, match=f"{rule.name} draws noise, and it has no option that switches it off"):
        rule.quiet()


def test_properties_work_through_flow() -> None:
    solver = ki.sampler("sa_solver", keep_last=False)
    assert [rule.keeps_last for rule in (solver, Flow(solver), ki.sampler("sa_solver"))] == [False, False, True]
    assert Flow(solver).options == solver.options
    flags = [ki.sampler("lcm"), ki.sampler("lcm", flow=True), Flow(ki.sampler("lcm")), ki.sampler("heun")]
    assert [rule.is_in_flow for rule in flags] == [False, True, True, False]
    lcm = Flow(ki.sampler("lcm", noise_clip_std=2.0))
    assert (lcm.noise_clip, lcm.default_noise, lcm.ode_order) == (2.0, "white", 0)


def test_a_rule_without_a_name_cannot_be_built() -> None:
    @dataclasses.dataclass(frozen=True)
    class Nameless(ki.Rule):
        ode_order: ClassVar[int] = 1

        def step(self, s: StepBuilder) -> Form:
            return s.x

    with pytest.raises(TypeError, match="abstract.*name"):
        Nameless()  # type: ignore[abstract]
    with pytest.raises(TypeError, match=r"RungeKutta has no name of its own; give one, e.g. register\(RungeKutta"):
        register(RungeKutta)
