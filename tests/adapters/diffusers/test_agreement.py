"""The scheduler without a sampler makes what diffusers' own scheduler makes."""

from __future__ import annotations

import copy
import importlib
import types
import warnings
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import agreement
import diffusers
import drives
import pipelines
import torch

from kinvert.adapters.diffusers import KinvertScheduler


@pytest.mark.usefixtures("one_thread")  # as in the table of the documentation
@pytest.mark.parametrize("case", agreement.CASES, ids=lambda case: f"{case.scheduler}-{case.title}-{case.steps}")
def test_a_pipeline_makes_the_same_with_both_schedulers(case: agreement.Case) -> None:
    off, scheduler = agreement.difference(case)
    assert off <= case.bound
    assert bool(case.reason) == (case.bound > agreement.EXACT)
    assert scheduler.step_index == len(scheduler.timesteps)


@pytest.mark.parametrize("case", agreement.REFUSED, ids=lambda case: f"{case.scheduler}-{case.options}")
def test_a_method_that_no_sampler_equals_is_refused_with_the_reason(case: agreement.Refused) -> None:
    scheduler = getattr(diffusers, case.scheduler)(**case.options)
    with pytest.raises(ValueError, match=case.scheduler) as refused:
        KinvertScheduler.from_scheduler(scheduler)
    assert case.reason in str(refused.value)
    if case.scheduler != "FlowMatchEulerDiscreteScheduler":
        KinvertScheduler.from_scheduler(scheduler, "dpmpp_2m")


@pytest.mark.parametrize(("name", "theirs", "ours"), agreement.equal_levels())
def test_schedules_have_other_names_here(name: str, theirs: torch.Tensor, ours: torch.Tensor) -> None:
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6 * float(ours.max()))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", ["DDPMPipeline", "DDIMPipeline"])
def test_pipelines_without_text_make_the_same(kind: str, clip: bool) -> None:
    base = getattr(diffusers, kind.replace("Pipeline", "Scheduler"))(clip_sample=clip)
    pipe = getattr(diffusers, kind)(pipelines.build("ddpm").unet, base)
    pipe.set_progress_bar_config(disable=True)
    found = []
    for scheduler in (base, KinvertScheduler.from_scheduler(base)):
        pipe.scheduler = scheduler
        generator = torch.Generator().manual_seed(0)
        found.append(torch.as_tensor(pipe(generator=generator, num_inference_steps=6, output_type="np").images))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [6, 20])
def test_where_diffusers_rounds_its_coefficients_float64_agrees(steps: int) -> None:
    base = diffusers.DEISMultistepScheduler(**agreement.FLOW)
    base.set_timesteps(steps)
    base.sigmas = base.sigmas.double()
    x = drives.noise(dtype=torch.float64)
    theirs = drives.drive(base, x, steps, set_timesteps=False)
    torch.testing.assert_close(
        drives.drive(KinvertScheduler.from_scheduler(base), x, steps), theirs, rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("options", [{"prediction_type": "sample"}, agreement.V | agreement.ZERO])
def test_euler_differs_by_rounding_alone(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """`EulerDiscreteScheduler.step` casts its state to float32, here to float64."""
    base = diffusers.EulerDiscreteScheduler(**pipelines.SD, **options)
    pipe, made = pipelines.build("sd15"), dict[tuple[str, bool], torch.Tensor]()
    for wide in (False, True):
        if wide:
            there = importlib.import_module(type(base).__module__)
            monkeypatch.setattr(there, "torch", types.SimpleNamespace(**vars(torch) | {"float32": torch.float64}))
            for name in ("unet", "text_encoder"):
                setattr(pipe, name, copy.deepcopy(getattr(pipe, name)).double())
        x = pipelines.noise_for("sd15").to(torch.float64 if wide else torch.float32)
        for name, scheduler in (("theirs", copy.deepcopy(base)), ("ours", KinvertScheduler.from_scheduler(base))):
            pipe.scheduler = scheduler
            made[name, wide] = pipelines.latents_of(pipe, "sd15", latents=x).double()
    off = {key: float((value - made["theirs", True]).abs().max() / value.abs().max()) for key, value in made.items()}
    assert off["ours", True] < 1e-10
    assert off["theirs", False] > 1e-6 and off["ours", False] < 2 * off["theirs", False]


def test_unipc_bh1_to_zero_is_nan_in_diffusers_and_finite_here() -> None:
    base = diffusers.UniPCMultistepScheduler(**pipelines.SD, solver_type="bh1")
    pipe = pipelines.build("sd15", base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = pipelines.latents_of(pipe, "sd15")
    pipe.scheduler = KinvertScheduler.from_scheduler(base)
    assert theirs.isnan().all() and pipelines.latents_of(pipe, "sd15").isfinite().all()
