"""The registry of samplers: names, options, and rules of your own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

import kinvert as ki
from kinvert.forms import Form
from kinvert.rules import (
    StepBuilder,
)


def test_bad_samplers() -> None:
    with pytest.raises(ValueError, match="did you mean 'dpmpp_2m'"):
        ki.sampler("dpmp_2m")
    with pytest.raises(ValueError, match="unknown sampler.*did you mean 'heun'"):
        ki.compile_plan("hein", KARRAS)
    with pytest.raises(TypeError, match="no option 'etta'.*did you mean 'eta'"):
        ki.sampler("euler_ancestral", etta=0.5)
    with pytest.raises(TypeError, match="dpmpp_2m has no option 'eta'"):
        ki.sampler("dpmpp_2m", eta=0.5)
    with pytest.raises(
        ValueError, match="unknown solver_type 'huen'; did you mean 'heun'. It must be one of midpoint, heun"
    ):
        ki.sampler("dpmpp_2m_sde", solver_type="huen")
    with pytest.raises(TypeError, match="eta must be a float, got '1'"):
        ki.sampler("euler_ancestral", eta="1")
    with pytest.raises(ValueError, match=r"eta must be a number from .*got nan"):
        ki.sampler("euler_ancestral", eta=float("nan"))
    with pytest.raises(TypeError, match="order must be an int, got 2.5"):
        ki.sampler("lms", order=2.5)
    with pytest.raises(ValueError, match="order must be a number from 1 to inf, got 0"):
        ki.sampler("lms", order=0)
    with pytest.raises(TypeError, match="sampler must be a name or a Rule, got 3"):
        ki.compile_plan(3, KARRAS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="options eta were given with a finished rule"):
        ki.sampler(ki.rules.EulerAncestral(), eta=0.5)


def test_options_of_equal_value_are_equal_rules() -> None:
    assert ki.sampler("euler_ancestral", eta=1) == ki.sampler("euler_ancestral", eta=1.0)
    assert repr(ki.sampler("euler_ancestral", eta=1)) == repr(ki.sampler("euler_ancestral"))


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"])
def test_gpu_names_are_the_same_rule(name: str) -> None:
    assert ki.sampler(f"{name}_gpu") == ki.sampler(name)
    assert ki.sampler(f"{name}_gpu", eta=0.5) == ki.sampler(name, eta=0.5)


KARRAS = ki.schedules.karras(6, 0.1, 10)


@dataclass(frozen=True)
class Halved(ki.Rule):
    """Returns half of the denoised image."""

    name: ClassVar[str] = "halved"
    ode_order: ClassVar[int] = 1

    def step(self, s: StepBuilder) -> Form:
        return 0.5 * s.denoise(s.x, s.sigma)


def test_register_a_rule() -> None:
    try:
        ki.rules.register(Halved)
        assert ki.sampler("halved") == Halved()
        with pytest.raises(ValueError, match="'euler' is taken by Euler"):
            ki.rules.register(Halved, "euler")
    finally:
        del ki.SAMPLERS["halved"]
