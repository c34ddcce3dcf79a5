"""The couplings of a Plan hold on every run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from inverting import MIXTURE, schedule
from problems import guided_mixture, noise_like
from torch import Tensor

import kinvert as ki
from kinvert.inversion.couplings import couplings


def deterministic() -> list[str]:
    """Every sampler whose run at the default options is a linear map of x and what the denoiser returns."""
    names = []
    for name in ki.rules.SAMPLERS:
        if name == "dpm_adaptive":
            continue
        plan = ki.compile_plan(name, schedule(7))
        if not plan.is_stochastic and not any(step.forgets_x for step in plan.steps):
            names.append(name)
    return names


@pytest.mark.parametrize("name", deterministic())
def test_the_equations_hold_on_every_run(name: str) -> None:
    """`Y = a x_N + C D` and `x_0 = (x_N - B D) / alpha` for the evaluations of a run; the reduced ones for `D - c Y`."""
    plan = ki.compile_plan(name, schedule(7))
    denoiser = guided_mixture() if plan.is_guided else MIXTURE
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def recording(x: Tensor, sigma: Tensor) -> Tensor:
        result = denoiser(x, sigma)
        inputs.append(x.clone())
        outputs.extend(part.clone() for part in (result if isinstance(result, tuple) else (result,)))
        return result

    x = 10 * noise_like((2, 6))
    end = ki.run(plan, recording, x)
    system = couplings(plan)
    a, C, B = (torch.from_numpy(part) for part in (system.a, system.C, system.B))
    Y, D = torch.stack(inputs), torch.stack(outputs)
    torch.testing.assert_close(a[:, None, None] * end + torch.tensordot(C, D, 1), Y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((end - torch.tensordot(B, D, 1)) / system.alpha, x, rtol=1e-9, atol=1e-9)
    assert system.levels == tuple(stage.sigma for step in plan.steps for stage in step.stages)
    c = np.linspace(0.1, 0.6, len(a))
    reduced = system.reduced(c)
    a, C, B, c = (torch.from_numpy(part) for part in (reduced.a, reduced.C, reduced.B, c))
    E = D - (c[:, None, None] * Y).repeat_interleave(len(D) // len(Y), 0)
    torch.testing.assert_close(a[:, None, None] * end + torch.tensordot(C, E, 1), Y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((end - torch.tensordot(B, E, 1)) / reduced.alpha, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in deterministic() if not ki.analysis.properties(n).memory])
def test_a_step_is_a_mean(name: str) -> None:
    """A step without memory from sigma to r sigma is `r x + (1 - r) mean(D)`."""
    plan = ki.compile_plan(name, schedule(7))
    for step in plan.steps:
        system = couplings(replace(plan, steps=(step,), sigmas=(step.sigma, step.sigma_next)))
        r = step.sigma_next / step.sigma
        assert system.alpha == pytest.approx(r, rel=1e-12)
        assert system.B.sum() == pytest.approx(1 - r, rel=1e-12)
        assert system.weights.sum() == pytest.approx(1, rel=1e-12)
