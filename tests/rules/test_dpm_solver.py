"""DPM-Solver-fast: its sub-steps and its evaluations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from problems import schedules
from rule_runs import assert_same, run

import kinvert as ki


@given(sigmas=schedules(min_steps=2, max_steps=2, zero=False))
@settings(max_examples=20, deadline=None)
def test_dpm_fast_of_one_and_two_evaluations(sigmas: list[float]) -> None:
    ends = [sigmas[0], sigmas[-1]]
    assert_same(run("dpm_fast", ends), run("euler", ends))
    torch.testing.assert_close(
        run(ki.sampler("dpm_fast"), sigmas), run(ki.sampler("dpm_2"), ends), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("n", range(1, 14))
def test_dpm_fast_makes_as_many_evaluations_as_steps(n: int) -> None:
    plan = ki.compile_plan("dpm_fast", ki.schedules.karras(n, 0.1, 10))
    assert plan.evaluations == n
    assert plan.sigmas[-1] == pytest.approx(10 if n == 1 else 0.1)
