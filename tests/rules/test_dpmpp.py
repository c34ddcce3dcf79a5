"""DPM-Solver++ and DEIS: lower orders at the end of short runs, the second step of 3M."""

from __future__ import annotations

from typing import Any

import pytest

import kinvert as ki
from kinvert.forms import Denoised


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


def test_dpmpp_3m_takes_its_second_step_by_the_midpoint_rule() -> None:
    sigmas = [10.0, 5.0, 2.0, 0.8]
    three, two, heun = (ki.compile_plan(name, sigmas) for name in ("dpmpp_3m", "dpmpp_2m", "res_2m"))
    assert three.steps[1].x.terms == pytest.approx(two.steps[1].x.terms, rel=1e-12)
    quiet = ki.compile_plan(ki.sampler("dpmpp_3m_sde", eta=0.0), sigmas)
    assert quiet.steps[1].x.terms == pytest.approx(heun.steps[1].x.terms, rel=1e-12)
    assert three.steps[2].x.terms == pytest.approx(quiet.steps[2].x.terms, rel=1e-12)
