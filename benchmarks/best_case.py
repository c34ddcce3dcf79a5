"""A lower bound for samplers made of PyTorch's operations: one loop by hand for each of ten samplers.

The loops work in place, check nothing and protect nothing: they overwrite what the denoiser returned, which a library
must not do. Coefficients are read off the Plan once, before the loop. `best_case(plan, denoiser, x, noise)` returns a
function that runs the loop; the result is that of `ki.run`, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kinvert as ki
from kinvert.forms import Denoised, Form, Noise, State

Run = Callable[[], Tensor]
X, D, D2, N = State("x"), Denoised(0), Denoised(1), Noise(0)


def levels(plan: ki.Plan, x: Tensor) -> list[list[Tensor]]:
    """Return the noise levels of each step's evaluations as the denoiser gets them."""
    return [
        [torch.full((len(x),), stage.sigma, dtype=x.dtype, device=x.device) for stage in step.stages]
        for step in plan.steps
    ]


def one_lerp(plan: ki.Plan, denoiser: Any, x: Tensor, noise: Tensor) -> Run:
    """euler."""
    steps = list(zip(levels(plan, x), [step.x[D] for step in plan.steps], strict=True))

    def run() -> Tensor:
        y = x.clone()
        for (sigma,), w in steps:
            y.lerp_(denoiser(y, sigma), w)
        return y

    return run


def two_stages(plan: ki.Plan, denoiser: Any, x: Tensor, noise: Tensor) -> Run:
    """heun, dpm_2, dpmpp_2s_ancestral."""
    steps = []
    for sigmas, step in zip(levels(plan, x), plan.steps, strict=True):
        a, b, c = step.x[X], step.x[D], step.x[D2]
        inner = step.stages[1].input[D] if len(step.stages) > 1 else 1.0
        steps.append((sigmas, inner, c / (a + c) if c else 1.0, b))

    def run() -> Tensor:
        y = x.clone()
        stage = torch.empty_like(y)
        for sigmas, inner, outer, last in steps:
            d = denoiser(y, sigmas[0])
            if len(sigmas) == 1:
                y.lerp_(d, inner)
                continue
            torch.lerp(y, d, inner, out=stage)
            y.lerp_(denoiser(stage, sigmas[1]), outer)
            if last:
                y.lerp_(d, last)
        return y

    return run


def past_slopes(plan: ki.Plan, denoiser: Any, x: Tensor, noise: Tensor) -> Run:
    """lms, deis: the history holds x - D, and 1/sigma is in the weights."""
    order = plan.memory_size + 1
    names = [State(f"d[-{age}]") for age in range(1, order)]
    steps = []
    for i, (sigmas, step) in enumerate(zip(levels(plan, x), plan.steps, strict=True)):
        weights = [step.x[name] / plan.sigmas[i - 1 - age] for age, name in enumerate(names) if step.x[name]]
        steps.append((sigmas[0], -step.x[D], weights))

    def run() -> Tensor:
        y = x.clone()
        past = [torch.empty_like(y) for _ in range(order)]
        for i, (sigma, c, weights) in enumerate(steps):
            torch.sub(y, denoiser(y, sigma), out=past[i % order])
            y.add_(past[i % order], alpha=c)
            for age, w in enumerate(weights, start=1):
                y.add_(past[(i - age) % order], alpha=w)
        return y

    return run


def past_denoised(plan: ki.Plan, denoiser: Any, x: Tensor, noise: Tensor) -> Run:
    """dpmpp_2m, dpmpp_2m_sde."""
    old = State("D[-1]")
    rows = [(step.x[D], step.x[old], step.x[N]) for step in plan.steps]
    steps = [(sigmas[0], d / (d + p), d + p, n) for sigmas, (d, p, n) in zip(levels(plan, x), rows, strict=True)]

    def run() -> Tensor:
        y, before = x.clone(), x
        for sigma, inner, outer, n in steps:
            d = denoiser(y, sigma)
            if inner == 1.0:
                y.lerp_(d, outer)
            else:
                y.lerp_(before.lerp_(d, inner), outer)
            if n:
                y.add_(noise, alpha=n)
            before = d
        return y

    return run


def extended(plan: ki.Plan, denoiser: Any, x: Tensor, noise: Tensor) -> Run:
    """er_sde: the history holds differences of denoised values."""
    steps = []
    for sigmas, step, before in zip(levels(plan, x), plan.steps, [None, *plan.steps], strict=False):
        scale = dict(before.memory).get("D1[-1]", Form({}))[D] if before is not None else 0.0
        form = step.x
        steps.append((sigmas[0], form[D] + form[State("D")], -form[State("D")], form[State("D1[-1]")] * scale, form[N]))

    def run() -> Tensor:
        y, before, older = x.clone(), None, x
        for sigma, w, c, c_old, n in steps:
            d = denoiser(y, sigma)
            y.lerp_(d, w)
            if before is not None:
                before = torch.sub(d, before, out=before)
                if c:
                    y.add_(before, alpha=c)
                if c_old:
                    y.add_(older, alpha=c_old)
                older = before
            if n:
                y.add_(noise, alpha=n)
            before = d
        return y

    return run


def corrected(plan: ki.Plan, denoiser: Any, x: Tensor, noise: Tensor) -> Run:
    """uni_pc: a chain of lerps for the corrected state, and one from there to the prediction."""
    names = [D, *(State(f"D[-{age}]") for age in range(1, plan.memory_size))]

    def chain(start: float, form: Form) -> tuple[list[tuple[int, float]], float]:
        reached, weights = start, []
        for age, c in sorted(((a, form[s]) for a, s in enumerate(names) if abs(form[s]) > 1e-9), key=lambda t: -t[1]):
            reached += c
            weights.append((age, c / reached))
        return weights, reached

    steps, unit = [], 1.0  # the corrected state is kept as the mean of x and denoised values that it is a multiple of
    for sigmas, step in zip(levels(plan, x), plan.steps, strict=True):
        base = dict(step.memory).get("base", Form({}))
        ahead = step.x
        correction: list[tuple[int, float]] = []
        if len(base):
            ahead = step.x - base
            correction, unit = chain((base[State("base")] or base[X]) * unit, base)
        start = unit if len(base) else step.x[State("base")] * unit
        steps.append((sigmas[0], correction, chain(start, ahead)[0]))

    def run() -> Tensor:
        y, base, past = x.clone(), x.clone(), list[Tensor]()
        for sigma, correction, predicted in steps:
            past = [denoiser(y, sigma), *past[: len(names) - 1]]
            for age, w in correction:
                base.lerp_(past[age], w)
            total = base
            for age, w in predicted:
                total = torch.lerp(total, past[age], w, out=y)
        return y

    return run


BEST_CASES: dict[str, Callable[[ki.Plan, Any, Tensor, Tensor], Run]] = {
    "euler": one_lerp,
    "heun": two_stages,
    "dpm_2": two_stages,
    "lms": past_slopes,
    "dpmpp_2m": past_denoised,
    "dpmpp_2s_ancestral": two_stages,
    "dpmpp_2m_sde": past_denoised,
    "deis": past_slopes,
    "uni_pc": corrected,
    "er_sde": extended,
}


def best_case(plan: ki.Plan, denoiser: Any, x: Tensor, noise: Tensor) -> Run:
    """Return the loop by hand for the Plan's sampler; `noise` is used wherever the sampler draws."""
    return BEST_CASES[plan.rule.name](plan, denoiser, x, noise)
