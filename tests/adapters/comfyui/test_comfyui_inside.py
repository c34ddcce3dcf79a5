"""A run of kinvert inside the host's sampling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from standin import NEGATIVE, POSITIVE, Host, Model, back, error, latent, model, run
from torch import Tensor

import kinvert as ki
from kinvert.adapters.comfyui.inside import Call, HostDenoiser, run_inside
from kinvert.denoisers import Guided

FOUR = torch.tensor([0.0, 0.5, 1.0, 2.0])


def call_of(patcher: Model, batch: int = 4, cfg: float = 1.0, work: Any = lambda call: call) -> Any:
    shifts = FOUR[:batch]
    return run_inside(
        patcher, work, torch.tensor([0.5, 2.0]), latent(batch), cfg=cfg, positive=shifts, negative=-shifts
    )


def wanted(patcher: Model, x: Tensor, level: float, rows: list[int]) -> Tensor:
    return patcher.model.denoised(x, torch.full((len(x),), level), FOUR[rows])


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("rows, calls", [([0, 1, 2, 3], 1), ([2], 1), ([3, 1], 1), ([1, 1, 0], 2)])
def test_rows_are_evaluated_in_their_places(rows: list[int], calls: int) -> None:
    patcher = model()
    denoiser: HostDenoiser = call_of(patcher).denoiser
    x = torch.randn(len(rows), 4, 6, 8, generator=torch.Generator().manual_seed(1))
    result = denoiser.take(torch.tensor(rows))(x, torch.full((len(rows),), 1.5))
    assert isinstance(result, Tensor)
    torch.testing.assert_close(result, wanted(patcher, x, 1.5, rows))
    assert patcher.model.calls == [4] * calls


@pytest.mark.usefixtures("comfy")
def test_copies_of_a_row_cost_no_second_call() -> None:
    patcher = model()
    x = torch.randn(2, 4, 6, 8)
    rows, copies = torch.tensor([2, 0, 2, 2]), torch.stack([x[0], x[1], x[0], x[0]])
    result = call_of(patcher).denoiser.take(rows)(copies, torch.full((4,), 1.5))
    torch.testing.assert_close(result, wanted(patcher, copies, 1.5, rows.tolist()))
    assert patcher.model.calls == [4]


@pytest.mark.usefixtures("comfy")
def test_each_noise_level_has_its_own_call() -> None:
    patcher = model()
    x, levels = torch.randn(4, 4, 6, 8), torch.tensor([1.0, 2.0, 1.0, 2.0])
    result = call_of(patcher).denoiser(x, levels)
    torch.testing.assert_close(result, patcher.model.denoised(x, levels, FOUR))
    assert patcher.model.calls == [4, 4]


@pytest.mark.usefixtures("comfy")
def test_the_pair_has_the_unconditional_prediction() -> None:
    patcher = model()
    denoiser = call_of(patcher, cfg=3.0).denoiser.paired().take(torch.tensor([3, 1]))
    x = torch.randn(2, 4, 6, 8)
    result = denoiser(x, torch.full((2,), 1.5))
    uncond, cond = (patcher.model.denoised(x, torch.full((2,), 1.5), s * FOUR[[3, 1]]) for s in (-1, 1))
    assert isinstance(result, Guided)
    torch.testing.assert_close(result.uncond, uncond)
    torch.testing.assert_close(result.denoised, uncond + 3 * (cond - uncond))


@pytest.mark.usefixtures("comfy")
def test_guidance_that_hides_the_unconditional_prediction_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(
        sys.modules["comfy.model_patcher"], "set_model_options_post_cfg_function", lambda options, *_, **__: options
    )
    denoiser = call_of(model()).denoiser.paired()
    with pytest.raises(RuntimeError, match="no unconditional prediction"):
        denoiser(torch.zeros(4, 4, 6, 8), torch.ones(4))


@pytest.mark.usefixtures("comfy")
def test_what_float32_loses_of_x_does_not_enter_the_slope() -> None:
    """D moves with x, so that x - D, which is divided by a small sigma, keeps its digits."""
    patcher = model()
    denoiser = call_of(patcher, batch=1).denoiser
    x = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    lost = x - x.float().double()
    assert bool(lost.any())
    sigma = torch.full((1,), 1e-4)
    low = wanted(patcher, x.float(), 1e-4, [0]).double()
    assert torch.equal(denoiser(x, sigma), low + lost)
    exact = replace(denoiser, narrow=False)(x, sigma)
    torch.testing.assert_close(
        exact, patcher.model.denoised(x, sigma.double(), FOUR[:1].double()), rtol=1e-7, atol=1e-9
    )


@pytest.mark.usefixtures("comfy")
def test_a_patch_that_samples_twice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    once = sys.modules["comfy.sample"].sample_custom

    def twice(*args: Any, **more: Any) -> Any:
        once(*args, **more)
        return once(*args, **more)

    monkeypatch.setattr(sys.modules["comfy.sample"], "sample_custom", twice)
    with pytest.raises(RuntimeError, match="sampled 2 times"):
        call_of(model())


def test_the_bar_of_a_search_rises_and_leaves_its_end_free(comfy: Host) -> None:
    def work(call: Call) -> None:
        call.show_search(3)
        for _ in range(20):
            call.denoiser(call.x, torch.full((4,), 0.5))

    run_inside(model(), work, torch.linspace(0.5, 2.0, 11), latent(4), cfg=1.0, positive=FOUR, negative=FOUR)
    steps = [step for step, _ in comfy.shown]
    assert steps == sorted(steps) and steps[0] >= 1 and steps[-1] < 10 and len(steps) == 20


@pytest.mark.usefixtures("comfy")
def test_a_run_in_a_host_without_a_patcher_takes_the_dtype_of_x() -> None:
    """Another pack may hand over a guider of its own."""
    patcher = model()
    sampler = run("KinvertSampler", sampler_name="euler")[0]
    sigmas = torch.tensor([2.0, 1.0, 0.0])
    z = latent()["samples"]
    result = back(patcher, sampler, sigmas, z)
    plain = ki.sample(
        lambda x, sigma: patcher.model.denoised(x, sigma, POSITIVE), patcher.model.process_latent_in(z), sigmas
    )
    assert error(result, patcher.model.process_latent_out(plain)) < 1e-6
    assert NEGATIVE is not None
