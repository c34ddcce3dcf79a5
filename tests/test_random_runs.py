"""Random runs in all ways to run them agree with the rule's own formulas, to what rounding may change in that run.

`make fuzz` runs these tests for as long as you like, with other seeds.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from randomruns import Answering, Case, cases, few
from torch import Tensor

import kinvert as ki
from kinvert.denoisers import Masked, guide
from kinvert.engine import plain_loop

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of a first level that rounding drowns


def ways(case: Case) -> dict[str, Tensor]:
    """The result of a run by every way to run it."""
    found, told = dict[str, Tensor](), []

    def scribble(progress: Any) -> None:
        told.append(progress.index)
        for tensor in (progress.x, progress.denoised):
            tensor.mul_(0.0)

    def bound(rows: slice = slice(None)) -> Any:
        x = case.x[rows]
        made = guide(Answering(case.answer), **case.options(rows), pair=case.pair, batch=len(x))
        if not case.masked:
            return made
        latent, kept = (case.tensor(name)[rows].to(x.dtype) for name in ("latent", "kept"))
        return Masked(made, case.mask, latent, noise=kept)

    watch = {"callback": scribble} if case.watched else {}
    with torch.no_grad():
        found["fused"] = ki.run(case.plan, bound(), case.x, case.noise(), **watch)
    assert not case.watched or told == [step.index for step in case.plan.steps if step.stages]
    with plain_loop():
        found["plain"] = ki.run(case.plan, bound(), case.x, case.noise(), **watch)
    one, denoiser = ki.stepwise(case.plan, case.x, case.noise()), bound()
    while not one.done:
        one.send(denoiser(one.x.clone(), one.sigma))
    found["stepwise"] = one.result
    parts = [slice(i, i + 1) for i in range(len(case.x))]
    with torch.no_grad():
        found["by rows"] = torch.cat([ki.run(case.plan, bound(p), case.x[p], case.noise(p)) for p in parts])
    if case.sigmas[0] > case.sigmas[-1]:
        more: dict[str, Any] = {"max_batch": case.max_batch, "noise": case.noise(), **case.options(), **watch}
        if case.masked:
            latent, kept = (case.tensor(name).to(case.dtype) for name in ("latent", "kept"))
            more |= {"mask": case.mask, "latent": latent, "mask_noise": kept}
        try:
            found["sample"] = ki.sample(Answering(case.answer), case.x, case.sigmas, sampler=case.rule, **more)
        except ValueError as error:  # of random rows; a run without the verb is not refused
            assert "no evaluation of the denoiser enters its result" in str(error)
    return found


@few(25)
@given(cases())
def test_all_ways_to_run_agree(case: Case) -> None:
    want = case.reference()
    assume(bool(want.isfinite().all()) and case.tolerance < 0.1 * (1 + float(want.abs().max())))
    x = case.x.clone()
    for way, got in ways(case).items():
        assert got.shape == case.shape and got.dtype == case.dtype, way
        error = float((got.double() - want.double()).abs().max())
        assert error <= case.tolerance, f"{way}: {error:.3g} above {case.tolerance:.3g}"
    assert torch.equal(case.x, x)


@few(10)
@given(cases())
def test_unsampling_is_a_run_up(case: Case) -> None:
    """`unsample` of a deterministic rule is its Plan on the reversed schedule with the offset."""
    rule = case.rule
    falling = tuple(sorted(case.sigmas, reverse=True))
    more = case.options()
    try:
        got = ki.unsample(
            Answering(case.answer), case.x, falling, sampler=rule, max_batch=case.max_batch, sigma_offset=0.01, **more
        )
    except ValueError as error:  # a stochastic rule, or one that loses the image
        assert str(error)
        return
    rising = tuple(sigma + 0.01 for sigma in reversed(falling))
    again = Case(**{**vars_of(case), "sigmas": rising, "masked": False})
    start = case.x
    with plain_loop():
        plan = ki.compile_plan(rule, rising)
        want = ki.run(plan, again.by_hand(case.dtype, lambda value: value), start, case.noise())
    spread = again.tolerance
    assume(math.isfinite(spread) and spread < 0.1 * (1 + float(want.abs().max())))
    assert float((got.double() - want.double()).abs().max()) <= spread


def vars_of(case: Case) -> dict[str, Any]:
    return {name: getattr(case, name) for name in case.__dataclass_fields__}
