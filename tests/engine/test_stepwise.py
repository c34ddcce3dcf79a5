"""Runs one evaluation at a time: the same as `ki.run`, saved and loaded, interleaved, edited, and refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import noise_like
from runs import KARRAS, MIXTURE, PLANS, denoise, finish, plainly, saved, start
from torch import Tensor

import kinvert as ki
from kinvert.engine import plain_loop, run_state
from kinvert.forms import Form, Noise, State

REVERSIBLE = [name for name, plan in PLANS.items() if plan.auxiliary]


# -- the same run ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ends_at_zero", [True, False])
@pytest.mark.parametrize("name", PLANS)
def test_equals_run(name: str, ends_at_zero: bool) -> None:
    """To the bit, with the noise of the sampler's own kind."""
    plan = PLANS[name] if ends_at_zero else ki.compile_plan(name, KARRAS[:-1])
    torch.manual_seed(0)
    want = plainly(plan, start())
    torch.manual_seed(0)
    run = ki.stepwise(plan, start())
    assert torch.equal(finish(run), want)
    assert run.evaluations == plan.evaluations and run.step == len(plan.steps)
    with torch.enable_grad():
        torch.manual_seed(0)
        assert torch.equal(ki.run(plan, lambda y, sigma: denoise(plan, y, sigma), start()), want)


@pytest.mark.parametrize("name", ["dpm_2", "dpmpp_2m_sde", "euler_cfg_pp"])
def test_step_and_stage_say_what_is_evaluated(name: str) -> None:
    plan, seen = PLANS[name], list[tuple[int, int, float]]()
    run = ki.stepwise(plan, start(), ki.noise.white(0))
    while not run.done:
        assert run.x.shape == (2, 6) and run.sigma.shape == (2,) and run.sigma.dtype == torch.float64
        seen.append((run.step, run.stage, float(run.sigma[0])))
        run.send(denoise(plan, run.x, run.sigma))
    assert seen == [(i, k, stage.sigma) for i, step in enumerate(plan.steps) for k, stage in enumerate(step.stages)]


@pytest.mark.parametrize("name", REVERSIBLE)
def test_closed_plans_start_from_auxiliary_state_and_give_it_back(name: str) -> None:
    plan = ki.compile_plan(name, KARRAS[:-1]).closed
    values = {key: start() + 0.1 * noise_like((2, 6), 7) for key in plan.steps[0].reads} | {"x": start()}
    run = ki.stepwise(plan, values, ki.noise.white(0))
    finish(run)
    with plain_loop():
        want = run_state(plan, lambda y, sigma: denoise(plan, y, sigma), values, ki.noise.white(0))
    assert run.values.keys() == want.keys() > {"x"}
    assert all(torch.equal(run.values[key], want[key]) for key in want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["heun", "lms", "dpmpp_2m_sde"])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """Also with outputs in float32 for states in half precision."""
    plan, x = PLANS[name], start().to(dtype)
    for wide in (torch.float32, dtype):
        run = ki.stepwise(plan, x, ki.noise.white(0))
        while not run.done:
            assert run.sigma.dtype == torch.float32
            run.send((run.x.float() / (1 + run.sigma[:, None] ** 2)).to(wide))
        with plain_loop():
            want = ki.run(plan, lambda y, s: (y.float() / (1 + s[:, None] ** 2)).to(wide), x, ki.noise.white(0))  # noqa: B023
        assert run.result.dtype == dtype and torch.equal(run.result, want)


def test_steps_without_evaluations_are_walked_through() -> None:
    """At the beginning, between others and at the end; their noise is drawn in its turn."""
    plan, half = PLANS["euler_ancestral"], Form.of(State("x")) * 0.5
    steps = tuple(
        step if i % 2 else replace(step, stages=(), x=half + Form.of(Noise(0)) if step.noises else half)
        for i, step in enumerate(plan.steps)
    )
    for cut in (steps, steps[:-1], steps[:1], steps[1:]):
        shorter = ki.Plan(plan.rule, plan.sigmas, cut)
        run, x = ki.stepwise(shorter, start(), ki.noise.white(1)), start()
        assert run.done == (shorter.evaluations == 0)
        assert torch.equal(finish(run), plainly(shorter, x, ki.noise.white(1)))
        assert run.result.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "lms"])
def test_gradients_flow_through_a_run(name: str) -> None:
    plan, gradients = ki.compile_plan(name, KARRAS[:-1]), []
    for run_it in (finish, None):
        x = start().requires_grad_()
        result = plainly(plan, x) if run_it is None else run_it(ki.stepwise(plan, x))
        gradients += torch.autograd.grad(result.square().sum(), x)
    assert torch.equal(*gradients)


def test_vmap_and_compile() -> None:
    plan = PLANS["dpmpp_2m"]

    def linear(x: Tensor) -> Tensor:
        run = ki.stepwise(plan, x)
        while not run.done:
            run.send(run.x / (1 + run.sigma[:, None] ** 2))
        return run.result

    x = torch.stack([start(0), start(1)])
    torch.testing.assert_close(torch.func.vmap(linear)(x), torch.stack([linear(x[0]), linear(x[1])]))
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x[0]), linear(x[0]))


# -- interleaved -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "lms", "dpmpp_2m_sde", "uni_pc"])
def test_two_runs_share_a_denoiser_call(name: str) -> None:
    """Of different lengths, through one buffer that the network uses again."""
    plans = [PLANS[name], ki.compile_plan(name, ki.schedules.karras(9, 0.1, 10.0))]
    runs = [ki.stepwise(plan, start(i), ki.noise.white(i)) for i, plan in enumerate(plans)]
    buffer = torch.empty(4, 6, dtype=torch.float64)
    while not all(run.done for run in runs):
        waiting = [run for run in runs if not run.done]
        x, sigma = torch.cat([run.x for run in waiting]), torch.cat([run.sigma for run in waiting])
        out = buffer[: len(x)].copy_(MIXTURE(x, sigma))
        for run, part in zip(waiting, out.split(2), strict=True):
            run.send(part)
    for i, (run, plan) in enumerate(zip(runs, plans, strict=True)):
        torch.testing.assert_close(run.result, plainly(plan, start(i), ki.noise.white(i)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PLANS)
def test_what_was_sent_may_be_written_over(name: str) -> None:
    plan = PLANS[name]
    run = ki.stepwise(plan, start(), ki.noise.white(0))
    while not run.done:
        sent = denoise(plan, run.x, run.sigma)
        run.send(sent)
        for part in sent if plan.is_guided else [sent]:
            part.fill_(torch.nan)
    assert torch.equal(run.result, plainly(plan, start(), ki.noise.white(0)))


# -- edited ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "euler_ancestral", "lcm"])
def test_replace_is_a_run_from_there(name: str) -> None:
    """A new x at the beginning of step 2, beside what the sampler remembers."""
    plan = PLANS[name]
    run = ki.stepwise(plan, start(), ki.noise.white(0))
    while run.step < 2:
        run.send(denoise(plan, run.x, run.sigma))
    run.replace(start(5))
    assert torch.equal(run.values["x"], start(5))
    values = run.values
    rest = ki.Plan(plan.rule, plan.sigmas, plan.steps[2:])
    skipped = plan.draws - rest.draws
    source = ki.noise.white(0).bind(start())
    noises = [source(1.0, 0.5) for _ in range(plan.draws)][skipped:]
    with plain_loop():
        want = run_state(rest, lambda y, s: denoise(plan, y, s), values, ki.noise.replay(noises))["x"]
    assert torch.equal(finish(run), want)


def test_replace_keeps_the_noise_of_the_step() -> None:
    """With churn the denoiser sees the new state with the noise that was drawn, once."""
    plan = ki.compile_plan(ki.sampler("euler", s_churn=3.0), KARRAS)
    run = ki.stepwise(plan, start(), ki.noise.white(0))
    before = run.x - run.values["x"]
    run.replace(start(5))
    torch.testing.assert_close(run.x - start(5), before, rtol=1e-9, atol=1e-9)
    assert float(before.norm()) > 0


@pytest.mark.parametrize("name", ["uni_pc", "sa_solver"])
def test_replace_of_what_the_sampler_goes_on_from(name: str) -> None:
    plan = PLANS[name]
    run = ki.stepwise(plan, start(), ki.noise.white(0))
    run.replace(start(1))  # nothing is remembered yet
    run.send(denoise(plan, run.x, run.sigma))
    with pytest.raises(ValueError, match=r"goes on from base instead.*run\.replace\(x, base=\.\.\.\)"):
        run.replace(start(2))
    run.replace(start(2), base=start(2))
    assert torch.equal(run.values["base"], start(2)) and torch.equal(run.x, start(2))
    finish(run)


def test_replace_before_the_last_evaluation_of_a_cfg_pp_sampler() -> None:
    """Its last step reads no state but through the denoiser: a new x alone is enough."""
    plan = PLANS["cfgpp_ud10_ab"]
    run = ki.stepwise(plan, start())
    while run.step < len(plan.steps) - 1:
        run.send(denoise(plan, run.x, run.sigma))
    run.replace(start(1))
    finish(run)


def test_replace_within_a_step_is_refused() -> None:
    run = ki.stepwise(PLANS["heun"], start())
    run.send(denoise(run.plan, run.x, run.sigma))
    with pytest.raises(RuntimeError, match=r"stage 1 of step 0.*replace it when run\.stage is 0"):
        run.replace(start())


BAD_EDITS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "a list": ([1.0], {}, TypeError, "the new x must be a tensor, got list"),
    "shape": (torch.ones(3, 6).double(), {}, ValueError, r"the new x must have shape \(2, 6\)"),
    "dtype": (torch.ones(2, 6), {}, TypeError, "torch.float64.* got .*torch.float32"),
    "unknown": (start(), {"y": start()}, ValueError, r"does not read 'y'.*it reads D\[-1\], x"),
}


@pytest.mark.parametrize("case", BAD_EDITS)
def test_replace_refuses(case: str) -> None:
    x, values, error, message = BAD_EDITS[case]
    run = ki.stepwise(PLANS["dpmpp_2m"], start())
    run.send(denoise(run.plan, run.x, run.sigma))
    with pytest.raises(error, match=message):
        run.replace(x, **values)
    assert torch.equal(finish(run), plainly(run.plan, start()))


# -- refused -----------------------------------------------------------------------------------------------------------
BAD_SENDS: dict[str, tuple[str, Any, type[Exception], str]] = {
    "shape": (
        "euler",
        torch.ones(2, 5).double(),
        ValueError,
        r"must return x's shape \(2, 6\), got \(2, 5\) in step 0",
    ),
    "dtype": ("heun", torch.ones(2, 6), TypeError, "must return x's dtype torch.float64, got torch.float32 in step 0"),
    "a tuple": ("euler", (1, 2), TypeError, "must return a tensor"),
    "no pair": ("euler_cfg_pp", torch.ones(2, 6).double(), TypeError, r"needs a pair Guided\(denoised, uncond\)"),
}


@pytest.mark.parametrize("case", BAD_SENDS)
def test_send_refuses_and_the_run_stays(case: str) -> None:
    name, sent, error, message = BAD_SENDS[case]
    run = ki.stepwise(PLANS[name], start())
    with pytest.raises(error, match=message):
        run.send(sent)
    assert run.evaluations == 0
    assert torch.equal(finish(run), plainly(run.plan, start()))


def test_after_the_end_and_before_it() -> None:
    run = ki.stepwise(PLANS["euler"], start())
    with pytest.raises(RuntimeError, match=r"not done: 0 of 6 evaluations were sent; send\(denoiser"):
        _ = run.result
    result = finish(run)
    for use in (lambda: run.x, lambda: run.sigma, lambda: run.send(result), lambda: run.replace(result)):
        with pytest.raises(RuntimeError, match=r"the run is done.*all 6 evaluations were sent; read run\.result"):
            use()
    assert run.stage == 0 and run.step == 6
    again = ki.stepwise(run.plan, state=saved(run.state))
    assert again.done and torch.equal(again.result, result)


BAD_STARTS: dict[str, tuple[Any, type[Exception], str]] = {
    "a name": (lambda: ki.stepwise("euler", start()), TypeError, "plan must be a Plan, got str"),  # type: ignore[arg-type]
    "nothing": (lambda: ki.stepwise(PLANS["euler"]), TypeError, "takes either x"),
    "both": (
        lambda: ki.stepwise(PLANS["euler"], start(), state=ki.stepwise(PLANS["euler"], start()).state),
        TypeError,
        "takes either x",
    ),
    "integers": (lambda: ki.stepwise(PLANS["euler"], torch.ones(2, 6).int()), TypeError, "floating point"),
    "another sampler": (
        lambda: ki.stepwise(PLANS["heun"], state=ki.stepwise(PLANS["euler"], start()).state),
        ValueError,
        r"the state belongs to Euler\(.*the Plan is of Heun\(",
    ),
    "another schedule": (
        lambda: ki.stepwise(ki.compile_plan("euler", KARRAS[:-1]), state=ki.stepwise(PLANS["euler"], start()).state),
        ValueError,
        "on 7 noise levels, .* on 6; compile the Plan for the same",
    ),
    "a shorter Plan": (
        lambda: ki.stepwise(
            replace(PLANS["euler"], steps=PLANS["euler"].steps[:1]),
            state={**ki.stepwise(PLANS["euler"], start()).state, "step": 3},
        ),
        ValueError,
        "stage 0 of step 3, which the Plan of 1 steps lacks",
    ),
    "no state": (lambda: ki.stepwise(PLANS["euler"], state={"x": start()}), TypeError, r"state of a run, run\.state"),  # type: ignore[typeddict-item]
}


@pytest.mark.parametrize("case", BAD_STARTS)
def test_stepwise_refuses(case: str) -> None:
    call, error, message = BAD_STARTS[case]
    with pytest.raises(error, match=message):
        call()


def test_a_value_that_the_state_lacks_is_named() -> None:
    run = ki.stepwise(PLANS["dpmpp_2m"], start())
    run.send(denoise(run.plan, run.x, run.sigma))
    state = run.state
    del state["values"]["D[-1]"]
    with pytest.raises(ValueError, match=r"the state lacks D\[-1\]"):
        ki.stepwise(run.plan, state=state)


def test_a_drowned_run_upwards_is_warned_of_as_by_run() -> None:
    plan, x = ki.compile_plan("euler", [1e-4, 1.0]), torch.ones(2, 6, dtype=torch.bfloat16)
    with pytest.warns(RuntimeWarning, match="the first slope of the way up") as caught:
        ki.stepwise(plan, x)
    assert caught[0].filename == __file__


def test_x_is_left_alone_and_the_result_is_the_callers() -> None:
    """Also if the Plan hands out the state as it came, or a buffer of the denoiser."""
    x, buffer = start(), torch.zeros(2, 6, dtype=torch.float64)
    plan = PLANS["euler"]
    idle = replace(plan, steps=(replace(plan.steps[0], stages=(), x=Form.of(State("x"))),))
    result = ki.stepwise(idle, x).result
    assert torch.equal(result, x) and result.data_ptr() != x.data_ptr()
    run = ki.stepwise(plan, x)
    while not run.done:
        run.send(buffer.copy_(denoise(plan, run.x, run.sigma)))
    result = run.result.clone()
    buffer.zero_()
    assert torch.equal(run.result, result) and torch.equal(x, start())
