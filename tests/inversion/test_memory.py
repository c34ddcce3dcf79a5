"""How many tensors of x's size an inversion holds at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inverting import task_of
from livetensors import peak_of
from torch import Tensor

import kinvert as ki
from kinvert.inversion import Sweeps

SIDE = 128
LEAN = Sweeps(memory=0)


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """A smooth function that takes sweeps as many as a trained network does."""
    s = sigma[:, None, None]
    near = torch.roll(x, 1, 1) + torch.roll(x, 1, 2)
    return x / (1 + s**2) + 0.3 * torch.tanh(2 * x / (0.5 + s) + 0.5 * near / (1 + s)) / (1 + 0.1 * s)


def image(count: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return 0.5 * torch.randn(count, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(dtype)


def inverted(sampler: str, steps: int, x: Tensor, **options: Any) -> tuple[float, ki.Inversion]:
    """Return the peak per evaluation of the run, and the inversion."""
    sigmas, found = ki.schedules.karras(steps + 1, 0.05, 20.0)[:-1], list[ki.Inversion]()
    peak = peak_of(lambda wrap: found.append(ki.invert(wrap(denoiser), x, sigmas, sampler=sampler, **options)), x)
    return peak / ki.compile_plan(sampler, sigmas).evaluations, found[0]


@pytest.mark.parametrize("options", [{}, {"max_evals": 300}])
def test_whole_runs_take_at_most_eight_tensors_per_evaluation(options: dict[str, Any]) -> None:
    peak, found = inverted("dpmpp_2m", 20, image(), method=LEAN, tol=1e-2, **options)
    assert found.converged.all() and peak <= 8


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "uni_pc", "lms", "deis"])
def test_few_differences_take_at_most_twice_the_evaluations(sampler: str) -> None:
    x = image()
    peak, found = inverted(sampler, 20, x, method=LEAN)
    assert found.converged.all() and peak <= 8
    more, full = inverted(sampler, 20, x, method=Sweeps(memory=2**40))
    assert full.converged.all() and int(found.evaluations) <= 2 * int(full.evaluations) and more > 8


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_single_steps_take_at_most_eight_tensors_per_evaluation(sampler: str) -> None:
    peak, found = inverted(sampler, 20, image(), tol=1e-3)
    assert found.converged.all() and peak <= 8


@pytest.mark.slow
def test_memory_is_per_sample() -> None:
    alone, both = (inverted("dpmpp_2m", 20, image(count), method=LEAN, tol=1e-2)[0] for count in (1, 3))
    assert both <= 1.1 * alone


def test_large_images_are_inverted_with_few_differences_by_default() -> None:
    plan = ki.compile_plan("dpmpp_2m", ki.schedules.karras(21, 0.05, 20.0)[:-1])

    def room(values: int) -> int:
        return Sweeps().room(task_of(plan, torch.zeros(1, values), 1e-5, denoiser).problem)

    assert room(64) == room(2**15) == 40 and room(4 * 128 * 128) == 6
