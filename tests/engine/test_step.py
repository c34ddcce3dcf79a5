"""One step on tensors: linear combinations, and `advance`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from problems import mixture, noise_like
from runs import KARRAS
from torch import Tensor

import kinvert as ki
from kinvert.engine import advance, combine, stage_sigmas
from kinvert.engine.eager import run_eager
from kinvert.forms import Form, State
from kinvert.rules import Rule, StepBuilder


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


@dataclass(frozen=True)
class Forgetful(Rule):
    """Evaluates at 0, remembers 0 and, in the step `at`, sets x to 0: rows of its Plan without terms."""

    at: int = 0

    name: ClassVar[str] = "forgetful"
    ode_order: ClassVar[int] = 0

    def step(self, s: StepBuilder) -> Form:
        denoised = s.denoise(0.0 * s.x, s.sigma)
        old = s.recall("nothing")
        s.remember("nothing", 0.0 * denoised)
        if s.index == self.at:
            return 0.0 * s.x
        return 0.5 * s.x + denoised if old is None else 0.5 * s.x + denoised + 3.0 * old


@pytest.mark.parametrize("way", ["plain", "fused", "eager"])
@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_rows_without_terms_are_zero(at: int, way: str, dtype: torch.dtype) -> None:
    """Exactly: the run of `x' = x / 2 + sigma`, from 0 after the step `at`."""
    sigmas, x = [8.0, 4.0, 2.0, 1.0, 0.5], torch.tensor([[3.0, -5.0]], dtype=dtype)

    def denoiser(y: Tensor, sigma: Tensor) -> Tensor:
        assert y.count_nonzero() == 0
        return y + sigma[:, None].to(y.dtype)

    want = x.clone()
    for step, sigma in enumerate(sigmas[:-1]):
        want = 0 * want if step == at else want / 2 + sigma
    plan = ki.compile_plan(Forgetful(at), sigmas)
    assert len(plan.steps[at].x) == 0
    if way == "eager":
        got = run_eager(Forgetful(at), denoiser, x, sigmas)
    else:
        with torch.set_grad_enabled(way == "plain"):
            got = ki.run(plan, denoiser, x)
    assert torch.equal(got, want) and got.dtype is dtype
