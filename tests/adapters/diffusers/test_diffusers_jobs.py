"""Jobs on pipelines: what they return goes into the unmodified pipeline and gives the image again."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from pipelines import CALLS, SD, build, latents_of, noise_for

import kinvert as ki
import kinvert.adapters.diffusers as kd
from kinvert.adapters.diffusers.jobs import MADE

STEPS = 4
DDIM = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
V = EulerDiscreteScheduler(**SD, prediction_type="v_prediction")
ZERO_SNR = EulerDiscreteScheduler(
    **SD, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
)
FAMILIES: dict[str, tuple[str, Any]] = {
    "sd15": ("sd15", DDIM),
    "sd21": ("sd15", V),
    "zero snr": ("sd15", ZERO_SNR),
    "edm": ("sd15", EDMEulerScheduler()),
    "sdxl": ("sdxl", None),
    "sd3": ("sd3", None),
    "flux": ("flux", None),
    "pixart": ("pixart", DPMSolverMultistepScheduler()),
    "wan": ("wan", FlowMatchEulerDiscreteScheduler(shift=3.0)),
}


def pipeline_of(name: str) -> tuple[Any, str]:
    family, scheduler = FAMILIES[name]
    return build(family, copy.deepcopy(scheduler)), family


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


SLOW = ("sd21", "edm", "sdxl")  # their evaluations and their levels are compared with the pipeline's in quick tests


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FAMILIES]
)
def test_the_latents_of_an_inversion_give_the_image_in_the_pipeline(name: str) -> None:
    pipe, family = pipeline_of(name)
    before = pipe.scheduler
    image = latents_of(pipe, family, STEPS)
    found = kd.invert(pipe, image, num_inference_steps=STEPS, tol=1e-4, **CALLS[family])
    assert found.inversion.converged.all()
    assert pipe.scheduler is before
    pipe.scheduler = found.scheduler
    assert off(latents_of(pipe, family, STEPS, latents=found.latents), image) < 3e-4


def test_an_unconditional_model_is_inverted_too() -> None:
    pipe = build("ddpm", DDIMScheduler(clip_sample=False, set_alpha_to_one=False))
    scheduler = kd.KinvertScheduler.from_scheduler(pipe.scheduler, "euler")
    scheduler.set_timesteps(STEPS)

    def run(scheduler: Any, y: torch.Tensor) -> torch.Tensor:
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            y = scheduler.step(pipe.unet(y, t).sample, t, y).prev_sample
        return y

    image = run(copy.deepcopy(pipe.scheduler), noise_for("ddpm"))
    found = kd.invert(pipe, image, num_inference_steps=STEPS, tol=1e-4)
    assert found.inversion.converged.all()
    assert off(run(found.scheduler, found.latents), image) < 3e-4
    assert off(found.latents, noise_for("ddpm")) < 1e-3


@pytest.mark.parametrize(
    ("family", "sampler"), [("sdxl", "heun"), ("flux", "dpmpp_2m"), ("pixart", ki.sampler("deis", max_order=2))]
)
def test_samplers_of_every_kind_are_inverted_in_a_batch_of_prompts(family: str, sampler: Any) -> None:
    pipe, call = build(family), CALLS[family] | {"prompt": ["a cat", "the dog"]}
    if "negative_prompt" in call:
        call["negative_prompt"] = ["", "a"]
    own = pipe.scheduler
    pipe.scheduler = kd.KinvertScheduler.from_scheduler(own, sampler)
    image = latents_of(pipe, family, STEPS, latents=noise_for(family, 2), **call)
    pipe.scheduler = own
    found = kd.invert(pipe, image, sampler=sampler, num_inference_steps=STEPS, tol=1e-3, **call)
    assert found.inversion.converged.all()
    pipe.scheduler = found.scheduler
    assert off(latents_of(pipe, family, STEPS, latents=found.latents, **call), image) < 3e-3


@pytest.mark.parametrize(("family", "sampler"), [("sdxl", "bdia"), ("sd3", "edict"), ("wan", "leapfrog")])
def test_reversible_samplers_bring_their_state_along(family: str, sampler: str) -> None:
    pipe = build(family)
    image = latents_of(pipe, family, STEPS)
    found = kd.invert(pipe, image, sampler=sampler, num_inference_steps=STEPS, tol=1e-4, **CALLS[family])
    assert found.inversion.memory and found.inversion.converged.all()
    pipe.scheduler = found.scheduler
    for _ in range(2):  # the state stays
        assert off(latents_of(pipe, family, STEPS, latents=found.latents), image) < 1e-5


def test_the_scheduler_of_an_inversion_can_be_inverted_again() -> None:
    pipe, call = build("sd3"), CALLS["sd3"]
    image = latents_of(pipe, "sd3", STEPS)
    first = kd.invert(pipe, image, num_inference_steps=STEPS, tol=1e-4, **call)
    pipe.scheduler = first.scheduler
    again = kd.invert(pipe, image, num_inference_steps=STEPS, tol=1e-4, **call)
    assert torch.equal(first.latents, again.latents)


def test_another_prompt_makes_an_edit() -> None:
    pipe, call = build("sd3"), CALLS["sd3"]
    image = latents_of(pipe, "sd3", STEPS)
    found = kd.invert(pipe, image, num_inference_steps=STEPS, tol=1e-4, **call)
    pipe.scheduler = found.scheduler
    edit = latents_of(pipe, "sd3", STEPS, latents=found.latents, prompt="the photo")
    assert edit.isfinite().all() and off(edit, image) > 0.01
    wanted = found.inversion.sample(kd.denoiser(pipe, **call), positive={"prompt": "the photo"})
    assert off(edit, wanted) < 1e-4


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_extracted_noises_are_in_the_scheduler(family: str) -> None:
    pipe = build(family)
    image = latents_of(pipe, family, STEPS)
    generator = torch.Generator().manual_seed(0)
    found = kd.extract_noise(pipe, image, num_inference_steps=STEPS, path="chain", generator=generator, **CALLS[family])
    assert found.inversion.converged.all() and found.inversion.noises
    pipe.scheduler = found.scheduler
    for _ in range(2):  # the noises stay
        assert off(latents_of(pipe, family, STEPS, latents=found.latents), image) < 1e-3


@pytest.mark.parametrize(("family", "sampler"), [("sd15", "euler"), ("sdxl", "heun"), ("sd3", "heun"), ("flux", None)])
def test_unsampling_is_a_run_of_the_pipeline_upwards(family: str, sampler: str | None) -> None:
    pipe = build(family)
    image = latents_of(pipe, family, STEPS)
    found = kd.unsample(pipe, image, sampler=sampler, num_inference_steps=STEPS, **CALLS[family])
    base = pipe.scheduler
    pipe.scheduler = kd.KinvertScheduler.from_scheduler(base, sampler, inverse=True)
    up = latents_of(pipe, family, STEPS, latents=image)
    assert off(found.latents, up) < 1e-3  # the slope at the first level, 1e-4, magnifies rounding
    pipe.scheduler = found.scheduler
    assert off(latents_of(pipe, family, STEPS, latents=found.latents), image) < 1.0
    pipe.scheduler = base


def test_an_exact_inversion_beats_ddim_inverse() -> None:
    """On the same pipeline, with the same levels, timesteps and guidance."""
    pipe, call = build("sd15", copy.deepcopy(DDIM)), CALLS["sd15"]
    image = latents_of(pipe, "sd15", STEPS)
    found = kd.invert(pipe, image, num_inference_steps=STEPS, tol=1e-4, **call)
    pipe.scheduler = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    inverted = latents_of(pipe, "sd15", STEPS, latents=image)
    pipe.scheduler = copy.deepcopy(DDIM)
    published = off(latents_of(pipe, "sd15", STEPS, latents=inverted), image)
    pipe.scheduler = found.scheduler
    assert off(latents_of(pipe, "sd15", STEPS, latents=found.latents), image) < 1e-3 * published


def test_a_round_trip_measures_both_directions() -> None:
    pipe, call = build("sd15", copy.deepcopy(DDIM)), CALLS["sd15"]
    image = latents_of(pipe, "sd15", STEPS)
    exact, plain = (
        kd.round_trip(pipe, image, num_inference_steps=STEPS, method=method, **call)
        for method in ("invert", "unsample")
    )
    assert float(exact.mse) < 1e-3 * float(plain.mse)
    assert torch.equal(plain.latent.isfinite(), torch.ones_like(image, dtype=torch.bool))


@pytest.mark.parametrize("given", [None, torch.float32])
@pytest.mark.filterwarnings("ignore:the network computes in torch.bfloat16")
def test_a_network_in_half_precision_is_inverted_to_its_rounding(given: torch.dtype | None) -> None:
    pipe = build("sdxl")
    for name in ("unet", "text_encoder", "text_encoder_2", "vae"):
        setattr(pipe, name, copy.deepcopy(getattr(pipe, name)).to(torch.bfloat16))
    call = CALLS["sdxl"]
    image = latents_of(pipe, "sdxl", STEPS, latents=noise_for("sdxl").bfloat16())
    found = kd.invert(pipe, image, num_inference_steps=STEPS, dtype=given, **call)
    assert found.inversion.latent.dtype == (given or torch.bfloat16)
    assert found.latents.dtype == torch.bfloat16
    pipe.scheduler = found.scheduler
    again = latents_of(pipe, "sdxl", STEPS, latents=found.latents)
    assert again.dtype == torch.bfloat16 and off(again.float(), image.float()) < 0.1


def test_arguments_go_to_kinvert_and_to_the_pipeline() -> None:
    pipe, seen = build("sd3"), []
    image = latents_of(pipe, "sd3", STEPS)
    mask = torch.zeros(8, 8)
    mask[:4] = 1
    found = kd.invert(
        pipe,
        image,
        num_inference_steps=STEPS,
        method="newton",
        mask=mask,
        callback=seen.append,
        tol=1e-3,
        **CALLS["sd3"],
    )
    assert found.inversion.back is not None and found.inversion.back.mask is not None
    assert seen and found.inversion.converged.all()


@pytest.mark.parametrize("job", [kd.invert, kd.extract_noise, kd.unsample, kd.round_trip], ids=lambda job: job.__name__)
def test_jobs_refuse_what_cannot_work(job: Any) -> None:
    pipe, call, image = build("sd15"), CALLS["sd15"], noise_for("sd15")
    with pytest.raises(ValueError, match=r"latents must have the shape that StableDiffusionPipeline gives them"):
        job(pipe, image[..., :4], **call)
    with pytest.raises(TypeError, match="latents must be a floating point tensor, got .*encode an image by kd.encode"):
        job(pipe, [image], **call)
    with pytest.raises(TypeError, match="has no argument 'promt'; did you mean 'prompt'"):
        job(pipe, image, promt="a cat")
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
        job(pipe, image, num_inference_steps=0, **call)
    with pytest.raises(TypeError, match="dtype must be what the network is called in"):
        job(pipe, image, dtype=torch.int32, **call)
    pipe.scheduler = DDIMInverseScheduler.from_config(DDIM.config)
    with pytest.raises(ValueError, match="pipe.scheduler runs upwards"):
        job(pipe, image, sampler="euler", **call)


def test_samplers_that_cannot_go_up_are_refused_with_the_fix() -> None:
    pipe, call, image = build("sd15"), CALLS["sd15"], noise_for("sd15")
    with pytest.raises(ValueError, match="cannot invert euler_ancestral: it draws noise .*use extract_noise"):
        kd.invert(pipe, image, sampler="euler_ancestral", **call)
    with pytest.raises(ValueError, match="euler draws no noise on this schedule"):
        kd.extract_noise(pipe, image, sampler="euler", **call)
    with pytest.raises(ValueError, match="euler_cfg_pp needs the guided and the unconditional"):
        kd.invert(pipe, image, sampler="euler_cfg_pp", **call)
    with pytest.raises(TypeError, match="end_at_step makes latents that no run of the pipeline begins with"):
        kd.unsample(pipe, image, end_at_step=1, **call)
    with pytest.raises(ValueError, match="unknown method 'reverse'"):
        kd.round_trip(pipe, image, method="reverse", **call)


@pytest.mark.parametrize("job", [kd.invert, kd.extract_noise, kd.unsample, kd.round_trip], ids=lambda job: job.__name__)
def test_no_argument_of_a_pipeline_is_hidden_by_one_of_kinvert(job: Any) -> None:
    """What both take goes to kinvert; that is right for these names alone."""
    own = set(inspect.signature(getattr(ki, job.__name__)).parameters) - {*MADE}
    for family in CALLS:
        shared = own & set(inspect.signature(type(build(family)).__call__).parameters)
        assert shared <= {"generator", "callback"}
