"""The state of a run one evaluation at a time: copied, saved and loaded, it goes on to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from problems import noise_like
from runs import PLANS, denoise, finish, plainly, saved, start
from torch import Tensor

import kinvert as ki

STOCHASTIC = [name for name, plan in PLANS.items() if plan.is_stochastic]


@pytest.mark.parametrize("how", [copy.deepcopy, saved], ids=["copied", "saved"])
@pytest.mark.parametrize("name", PLANS)
def test_goes_on_from_its_state_at_every_evaluation(name: str, how: Any) -> None:
    """To the bit, with the seed of the state, though others draw from torch's generator; and what is left is left alone."""
    plan = PLANS[name]
    run = ki.stepwise(plan, start())
    state = run.state
    want = finish(ki.stepwise(plan, state=state))
    while not run.done:
        run.send(denoise(plan, run.x, run.sigma))
        torch.rand(())
        state = how(run.state)
        other = ki.stepwise(plan, state=state)
        assert (other.step, other.stage, other.evaluations, other.done) == (
            run.step,
            run.stage,
            run.evaluations,
            run.done,
        )
        if run.evaluations % 3 == 1 or plan.evaluations < 9:
            assert torch.equal(finish(other), want)
    assert torch.equal(run.result, want)


SOURCES: dict[str, Any] = {
    "white": ki.noise.white(3),
    "white, a seed for each": ki.noise.white([3, 4]),
    "brownian": ki.noise.brownian(3),
    "brownian with a depth": ki.noise.brownian([3, 4], depth=8),
    "clipped": ki.noise.clipped(ki.noise.white(3), 1.0),
    "replayed": ki.noise.replay([noise_like((2, 6), seed=i) for i in range(30)]),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_goes_on(name: str, source: str) -> None:
    """Seeds are in the state; another source is given again."""
    plan, noise = PLANS[name], SOURCES[source]
    want = plainly(plan, start(), noise)
    for sent in range(0, plan.evaluations, 3):
        run = ki.stepwise(plan, start(), noise)
        for _ in range(sent):
            run.send(denoise(plan, run.x, run.sigma))
        state = saved(run.state)
        known = source.startswith(("white", "brownian"))
        assert torch.equal(finish(ki.stepwise(plan, noise=None if known else noise, state=state)), want)


def test_noise_that_the_state_does_not_hold_has_to_be_given() -> None:
    plan = PLANS["euler_ancestral"]
    run = ki.stepwise(plan, start(), SOURCES["replayed"])
    state = run.state
    with pytest.raises(ValueError, match=r"source that its state does not hold.*stepwise\(plan, state=state, noise="):
        ki.stepwise(plan, state=state)
    while run.step < len(plan.steps) - 1:
        run.send(denoise(plan, run.x, run.sigma))
    finish(ki.stepwise(plan, state=run.state))  # nothing is drawn any more


def test_a_noise_function_keeps_its_own_place() -> None:
    plan, calls = PLANS["euler_ancestral"], list[float]()

    def noise(a: float, b: float) -> Tensor:
        calls.append(a)
        return a * noise_like((2, 6), seed=len(calls))

    run = ki.stepwise(plan, start(), noise)
    run.send(denoise(plan, run.x, run.sigma))
    state = run.state
    assert len(calls) == 2  # of the first step and the one under way
    finish(ki.stepwise(plan, state=state, noise=noise))
    assert calls == [interval.sigma_from for step in plan.steps for interval in step.noises]


def test_state_is_a_copy() -> None:
    plan = PLANS["dpmpp_2m"]
    run, want = ki.stepwise(plan, start()), plainly(plan, start())
    run.send(denoise(plan, run.x, run.sigma))
    state = run.state
    for value in state["values"].values():
        value.zero_()
    assert torch.equal(finish(run), want)


def test_state_of_a_run_with_gradients_can_be_saved() -> None:
    plan = PLANS["heun"]
    run = ki.stepwise(plan, start().requires_grad_())
    run.send(denoise(plan, run.x, run.sigma))
    state = saved(copy.deepcopy(run.state))
    assert not any(value.requires_grad for value in state["values"].values())
    torch.testing.assert_close(finish(ki.stepwise(plan, state=state)), finish(run).detach())
