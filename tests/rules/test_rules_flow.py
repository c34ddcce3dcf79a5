"""`Flow`: a rule in variance-exploding coordinates on a schedule of flow times."""

from __future__ import annotations

import pytest
import torch
from flowmodels import IN_FLOW, IN_VE, TIMES, X
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import guided_mixture, mixture, noise_like, schedules
from rule_runs import MIXTURE, run

import kinvert as ki
from kinvert.rules import (
    Flow,
)


@given(times=schedules(), eta=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("name", ["euler_ancestral_cfg_pp", "lcm"])
def test_own_flow_branch_is_the_change_of_coordinates(name: str, times: list[float], eta: float) -> None:
    times = [0.9 * t / times[0] for t in times]
    options = {"eta": eta} if "cfg_pp" in name else {}
    denoiser = guided_mixture() if "cfg_pp" in name else MIXTURE
    a = run(ki.sampler(name, flow=True, **options), times, denoiser)
    b = run(Flow(ki.sampler(name, **options)), times, denoiser)
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@given(sigmas=schedules(zero=False), start=st.floats(0.6, 0.99))
@settings(max_examples=20, deadline=None)
def test_euler_is_the_same_in_flow_time(sigmas: list[float], start: float) -> None:
    """Euler on flow times is Euler in VE coordinates; Heun is not."""
    times = [start * sigma / sigmas[0] for sigma in sigmas]
    denoise = mixture()

    def in_flow_time(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return denoise(x / (1 - t)[:, None], t / (1 - t))

    x = noise_like((2, 6))
    plain, changed = (
        ki.run(ki.compile_plan(rule, times), in_flow_time, x) for rule in ("euler", ki.rules.Flow(ki.sampler("euler")))
    )
    torch.testing.assert_close(plain, changed, rtol=1e-10, atol=1e-10)


def test_flow_starts_below_one_and_refuses_more() -> None:
    rule = ki.rules.Flow(ki.sampler("dpmpp_2m"), start=0.999)
    assert ki.compile_plan(rule, [1.0, 0.5, 0.0]).sigmas == pytest.approx((0.999, 0.5, 0.0))
    with pytest.raises(ValueError, match=r"dpmpp_2m: flow times must lie in \[0, 1\], got 1.0001"):
        ki.compile_plan(rule, [1e-4, 0.5, 1.0001])
    with pytest.raises(TypeError, match="rule must be a Rule"):
        ki.rules.Flow("euler")  # type: ignore[arg-type]


def test_a_flow_schedule_close_to_1_keeps_its_times() -> None:
    """Only 1 itself is moved, and not past the next time."""
    model = ki.levels.flux()
    times = ki.schedule("beta", 200, model)
    assert float(times[0]) == 1.0 and float(times[1]) > 0.9999
    plan = ki.compile_plan(ki.rules.Flow(ki.sampler("dpmpp_2m")), times)
    assert plan.sigmas[0] == pytest.approx((1 + float(times[1])) / 2, abs=1e-12)
    assert plan.sigmas[1:] == pytest.approx(times[1:].tolist(), abs=1e-12)
    near = ki.compile_plan(ki.rules.Flow(ki.sampler("euler")), [0.99999, 0.5, 0.1])
    assert near.sigmas[0] == pytest.approx(0.99999, abs=1e-12)


def test_flow_of_a_solver_that_discards_its_last_step() -> None:
    """The state that it returns belongs to the level before the last, and so does its scale."""
    solver = ki.sampler("sa_solver", eta=0.0, keep_last=False)
    times = TIMES[1:-1].tolist()
    got = ki.run(ki.compile_plan(Flow(solver), times), IN_FLOW, X)
    sigmas = ki.levels.flow_to_ve(torch.tensor(times, dtype=torch.float64))
    in_ve = ki.run(ki.compile_plan(solver, sigmas), IN_VE, X / (1 - times[0]))
    torch.testing.assert_close(got, in_ve * (1 - times[-2]), rtol=1e-10, atol=1e-10)
