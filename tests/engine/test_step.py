"""One step on tensors: linear combinations, and `advance`."""

from __future__ import annotations

import torch
from problems import mixture, noise_like
from runs import KARRAS

import kinvert as ki
from kinvert.engine import advance, combine, stage_sigmas
from kinvert.forms import Form, State


def test_advance_is_one_step_of_run() -> None:
    plan, x = ki.compile_plan("lms", KARRAS), 10 * noise_like((2, 6))
    state, seen = {"x": x}, []
    for step in plan.steps:
        sigmas = stage_sigmas([stage.sigma for stage in step.stages], x)
        state, first = advance(step, mixture(), state, lambda a, b: x, sigmas)
        seen.append(first)
    assert torch.equal(state["x"], ki.run(plan, mixture(), x))
    assert seen[0] is not None and seen[0][0] is x


def test_combine() -> None:
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    known = {State("x"): x, State("y"): y}
    assert combine(Form({State("x"): 1.0}), known, x) is x
    assert combine(Form({State("x"): 2.0, State("y"): -1.0}), known, x).tolist() == [-1.0, -1.0]
    assert combine(Form({}), known, x).tolist() == [0.0, 0.0]
    assert x.tolist() == [1.0, 2.0]


def test_half_precision_is_rounded_once() -> None:
    """1 + 2^-10 - 1: rounding after the first sum would lose the small term."""
    one, small = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 2.0**-10, dtype=torch.bfloat16)
    known = {State("a"): one, State("b"): small, State("c"): one}
    form = Form({State("a"): 1.0, State("b"): 1.0, State("c"): -1.0})
    assert combine(form, known, one).item() == 2.0**-10
