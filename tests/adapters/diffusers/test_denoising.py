"""A pipeline as a denoiser: the pipeline's own run, its levels, its coordinates, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from pipelines import CALLS, SD, build, latents_of, noise_for

import kinvert as ki
from kinvert.adapters.diffusers.denoising import denoiser
from kinvert.adapters.diffusers.host import first_noise

STEPS = 6
EULER = EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1)
KARRAS = EulerDiscreteScheduler(**SD, use_karras_sigmas=True)
V = EulerDiscreteScheduler(**SD, prediction_type="v_prediction")
ZERO_SNR = EulerDiscreteScheduler(
    **SD, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
)
SCHEDULERS: dict[str, tuple[str, Any]] = {
    "sd15": ("sd15", EULER),
    "sd15 karras": ("sd15", KARRAS),
    "sd21": ("sd15", V),
    "zero snr": ("sd15", ZERO_SNR),
    "ddim": ("sd15", DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1)),
    "edm": ("sd15", EDMEulerScheduler()),
    "sdxl": ("sdxl", None),
    "sd3": ("sd3", None),
    "flux": ("flux", None),
    "pixart": ("pixart", DPMSolverMultistepScheduler(solver_order=1)),
    "wan": ("wan", FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "stable audio": ("stable_audio", EDMEulerScheduler(sigma_min=0.3, sigma_max=500.0, sigma_data=1.0)),
}
"""Pipelines whose own method is Euler's: of a family, with a scheduler; None is that of the family."""


def pipeline_of(name: str) -> tuple[Any, str]:
    family, scheduler = SCHEDULERS[name]
    return build(family, copy.deepcopy(scheduler)), family


def first_state(pipe: Any, den: Any, noise: torch.Tensor, steps: int = STEPS) -> torch.Tensor:
    """The state with which a run of the pipeline begins, for `latents=noise`."""
    scheduler = copy.deepcopy(pipe.scheduler)
    if den.coordinates == "ve":
        scheduler.set_timesteps(steps)
    return noise * first_noise(scheduler) * den.timetable.to_x(float(den.sigmas[0]))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sampling_with_the_denoiser_is_a_run_of_the_pipeline(name: str) -> None:
    pipe, family = pipeline_of(name)
    before = dict(vars(pipe))
    den = denoiser(pipe, num_inference_steps=STEPS, **CALLS[family])
    noise = noise_for(family, 2)
    found = ki.sample(den, first_state(pipe, den, noise), den.sigmas) / den.timetable.to_x(float(den.sigmas[-1]))
    assert vars(pipe) == before
    call = {name: [value] * 2 if "prompt" in name else value for name, value in CALLS[family].items()}
    wanted = latents_of(pipe, family, STEPS, latents=noise, **call)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < (
        2e-4 if name == "zero snr" else 2e-5
    )  # sigma starts at 4096


@pytest.mark.parametrize("clip", [False, True])
def test_sampling_with_an_unconditional_network_is_a_run_of_its_scheduler(clip: bool) -> None:
    pipe = build("ddpm", DDIMScheduler(clip_sample=clip))
    den = denoiser(pipe, num_inference_steps=STEPS)
    x = y = noise_for("ddpm")
    pipe.scheduler.set_timesteps(STEPS)
    for t in pipe.scheduler.timesteps:
        y = pipe.scheduler.step(pipe.unet(y, t).sample, t, y).prev_sample
    found = ki.sample(
        den, x * den.timetable.to_x(float(den.sigmas[0])), den.sigmas, sampler="euler_cfg_pp" if clip else "euler"
    )
    assert float((found - y).abs().max() / y.abs().max()) < 1e-5
    if clip:
        assert float(y.abs().max()) <= 1


def test_an_unconditional_network_takes_its_own_arguments() -> None:
    pipe = build("ddpm", DDIMScheduler(clip_sample=False))
    torch.manual_seed(0)
    pipe.unet = UNet2DModel.from_config(pipe.unet.config, num_class_embeds=4).eval().requires_grad_(False)
    x, labels = noise_for("ddpm", 2), torch.tensor([3, 1])
    pipe.scheduler.set_timesteps(1)
    (t,) = pipe.scheduler.timesteps
    y = pipe.scheduler.step(pipe.unet(x, t, class_labels=labels).sample, t, x).prev_sample
    den = denoiser(pipe, num_inference_steps=1, class_labels=labels)
    found = ki.sample(den, x * den.timetable.to_x(float(den.sigmas[0])), den.sigmas)
    assert float((found - y).abs().max() / y.abs().max()) < 1e-5
    with pytest.raises(TypeError, match="DDPMPipeline has no argument 'class_label'; did you mean 'class_labels'"):
        denoiser(pipe, class_label=labels)


def test_the_denoiser_says_what_its_numbers_are() -> None:
    flow, ve = (denoiser(build(family), **CALLS[family]) for family in ("sd3", "sdxl"))
    assert (flow.coordinates, ve.coordinates) == ("flow", "ve")
    assert isinstance(flow.sigmas, ki.levels.FlowTimes) and not isinstance(ve.sigmas, ki.levels.FlowTimes)
    assert len(flow.sigmas) == len(ve.sigmas) == 51
    with pytest.raises(ValueError, match="sigmas are flow times, but the denoiser takes sigmas"):
        ki.sample(ve, noise_for("sdxl"), flow.sigmas)
    with pytest.raises(ValueError, match="flow times must lie in"):
        ki.sample(flow, noise_for("sd3"), ve.sigmas)


def test_every_row_may_have_its_own_level() -> None:
    den = denoiser(build("sd15"), **CALLS["sd15"] | {"prompt": ["a cat", "the dog"]})
    x, sigma = noise_for("sd15", 2), torch.tensor([3.0, 0.5])
    both = den(x, sigma)
    for row in range(2):
        alone = den.take(torch.tensor([row]))(x[[row]], sigma[[row]])
        assert torch.allclose(both[[row]], alone, atol=1e-5)


def test_the_pipelines_guidance_is_kinverts() -> None:
    """The prompts of kinvert's branches are arguments of the call."""
    pipe, size = build("sd15"), {"height": 16, "width": 16}
    own = denoiser(pipe, num_inference_steps=STEPS, **CALLS["sd15"])
    plain = denoiser(pipe, num_inference_steps=STEPS, prompt="", guidance_scale=1.0, **size)
    x = first_state(pipe, own, noise_for("sd15", 2))
    guidance = {"cfg": 3.0, "positive": {"prompt": "a cat"}, "negative": {"prompt": "a dog"}}
    found = ki.sample(plain, x, own.sigmas, **guidance)
    assert torch.allclose(found, ki.sample(own, x, own.sigmas), atol=1e-3)
    assert ki.sample(plain, x, own.sigmas, sampler="euler_cfg_pp", **guidance).isfinite().all()


def test_guidance_that_nobody_named_is_not_doubled() -> None:
    pipe, size = build("sd15"), {"height": 16, "width": 16}
    x, sigma = noise_for("sd15"), torch.tensor([1.0])
    with pytest.raises(ValueError, match=r"guides each by its default, guidance_scale=7.5; .*guidance_scale=1.0\)"):
        denoiser(pipe, prompt="", **size)(x, sigma, prompt="a cat")
    for given in ({}, {"guidance_scale": 7.5}):  # without other prompts, or named
        denoiser(pipe, prompt="", **given, **size)(x, sigma, **({"prompt": "a cat"} if given else {}))
    flux = {name: value for name, value in CALLS["flux"].items() if name != "guidance_scale"}
    denoiser(build("flux"), **flux)(noise_for("flux"), sigma / 2, prompt="the dog")  # its scale goes into the network


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_of_another_precision_is_called_in_its_own(dtype: torch.dtype) -> None:
    pipe = build("sd15", EULER)
    pipe.unet = copy.deepcopy(pipe.unet).to(dtype)
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder).to(dtype)
    den = denoiser(pipe, num_inference_steps=STEPS, **CALLS["sd15"])
    assert den.network_dtype == dtype
    wanted = denoiser(build("sd15", EULER), num_inference_steps=STEPS, **CALLS["sd15"])
    x, sigma = noise_for("sd15"), torch.tensor([3.0])
    for other in (torch.float32, torch.float64):
        found = den(x.to(other), sigma.to(other))
        assert found.dtype == other
        assert torch.allclose(found.float(), wanted(x, sigma), atol=0.2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    ("family", "x", "message"),
    [
        (
            "sd15",
            torch.zeros(1, 4, 16, 16),
            r"StableDiffusionPipeline gives .*\(batch, 4, 8, 8\), got \(1, 4, 16, 16\)",
        ),
        ("flux", torch.zeros(1, 4, 8, 8), r"FluxPipeline gives .*\(batch, 16, 16\)"),
        ("wan", torch.zeros(1, 4, 1, 4, 4), r"WanPipeline gives .*\(batch, 4, 2, 4, 4\)"),
    ],
)
def test_latents_of_another_shape_are_refused(family: str, x: torch.Tensor, message: str) -> None:
    den = denoiser(build(family), **CALLS[family])
    with pytest.raises(ValueError, match=message):
        den(x, torch.tensor([0.5]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"promt": "a cat"}, TypeError, "StableDiffusionPipeline has no argument 'promt'; did you mean 'prompt'"),
        ({"latents": noise_for("sd15")}, TypeError, "latents is not for an evaluation"),
        ({"output_type": "pil"}, TypeError, "output_type is not for an evaluation"),
        ({"prompt": "a cat", "height": 15, "width": 16}, ValueError, "divisible by 8"),
    ],
)
def test_arguments_that_cannot_work_are_refused(call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        denoiser(build("sd15"), **call)


def test_schedulers_that_are_not_known_are_named() -> None:
    from diffusers import TCDScheduler

    with pytest.raises(TypeError, match="TCDScheduler is none of those whose noise levels are known"):
        denoiser(build("sd15", TCDScheduler()), **CALLS["sd15"])


def test_random_numbers_of_the_user_are_left_alone() -> None:
    torch.manual_seed(0)
    wanted = torch.randn(3)
    torch.manual_seed(0)
    denoiser(build("sd15"), **CALLS["sd15"])
    assert torch.equal(torch.randn(3), wanted)
