"""Pipelines of sounds: Stable Audio, and AudioLDM 2."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
import pipelines
import transformers
from pipelines import CALLS, SD, build, latents_of, noise_for, result_of

import kinvert as ki
import kinvert.adapters.diffusers as kd

STABLE, STEPS = "stable_audio", 4
needs_torchsde = pytest.mark.skipif(not pipelines.HAS_TORCHSDE, reason="the scheduler of Stable Audio needs torchsde")


def cosine(**options: Any) -> Any:
    return diffusers.CosineDPMSolverMultistepScheduler(**options)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


@functools.cache
def audioldm2() -> Any:
    """AudioLDM 2 with random weights: latents of spectrograms, (channels, time, frequencies)."""
    text = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    spectra = {"spec_size": 8, "window_size": 4, "num_mel_bins": 8, "depths": [1, 1], "num_attention_heads": [1, 1]}
    spectra |= {"hidden_size": 16, "patch_size": 2, "patch_stride": 2, "patch_embed_input_channels": 4}
    clap = transformers.ClapConfig(
        text_config=text | {"vocab_size": 6, "pad_token_id": 1, "projection_dim": 8},
        audio_config=spectra | {"num_hidden_layers": 2, "projection_dim": 8},
        projection_dim=16,
    )
    words = {word: i for i, word in enumerate(("<s>", "<pad>", "</s>", "<unk>", "a", "<mask>"))}
    speech = {"model_in_dim": 8, "sampling_rate": 16000, "upsample_initial_channel": 16, "normalize_before": False}
    speech |= {"upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4], "resblock_kernel_sizes": [3]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = diffusers.AudioLDM2UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=(8, 16),
        )
        language = {"n_embd": 16, "n_head": 1, "n_layer": 1, "vocab_size": 9, "n_positions": 32}
        pipe = diffusers.AudioLDM2Pipeline(
            vae=pipelines.vae(in_channels=1, out_channels=1),
            text_encoder=transformers.ClapModel(clap).eval(),
            text_encoder_2=pipelines.t5().eval(),
            projection_model=diffusers.AudioLDM2ProjectionModel(16, 32, 16),
            language_model=transformers.GPT2LMHeadModel(transformers.GPT2Config(**language)).eval(),
            tokenizer=transformers.RobertaTokenizer(vocab=words, merges=[], model_max_length=8),
            tokenizer_2=pipelines.t5_tokenizer(),
            feature_extractor=transformers.ClapFeatureExtractor(feature_size=8, sampling_rate=16000, max_length_s=1),
            unet=network.eval().requires_grad_(False),
            scheduler=diffusers.DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
            vocoder=transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**speech)),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


AUDIOLDM2 = {"prompt": "a cat", "guidance_scale": 3.0, "audio_length_in_s": 0.005, "max_new_tokens": 2}


# -- Stable Audio -----------------------------------------------------------------------------------------------------
@needs_torchsde
@pytest.mark.parametrize("options", [{}, {"sigma_schedule": "karras", "sigma_data": 0.5}])
def test_the_levels_and_times_are_those_of_stable_audio(options: dict[str, Any]) -> None:
    pipe = build(STABLE, cosine(**options))
    den = kd.denoiser(pipe, num_inference_steps=STEPS, **CALLS[STABLE])
    base = cosine(**options)
    base.set_timesteps(STEPS)
    torch.testing.assert_close(den.sigmas.float(), base.sigmas)
    times = [den.timetable.timestep(level) for level in (1.0, 100.0)]
    assert times == pytest.approx([0.5, 1 - 2 / np.pi * np.arctan(1 / 100)])  # between the levels: 2 atan(sigma) / pi
    noise = noise_for(STABLE, 2)
    call = {name: [value] * 2 if "prompt" in name else value for name, value in CALLS[STABLE].items()}
    for sampler in ("euler", "heun", "dpmpp_2m"):
        pipe.scheduler = kd.KinvertScheduler.from_scheduler(base, sampler)
        wanted = latents_of(pipe, STABLE, STEPS, latents=noise, **call)
        start = (noise * base.init_noise_sigma).float()
        assert off(ki.sample(den, start, den.sigmas, sampler=sampler), wanted) < 1e-5


@needs_torchsde
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_a_run_of_stable_audio_is_inverted(sampler: str) -> None:
    pipe = build(STABLE, kd.KinvertScheduler.from_scheduler(cosine(), sampler))
    image = latents_of(pipe, STABLE, STEPS)
    pipe.scheduler = cosine()
    found = kd.invert(pipe, image, sampler=sampler, num_inference_steps=STEPS, tol=1e-4, **CALLS[STABLE])
    assert found.inversion.converged.all() and found.latents.shape == (1, 3, 16)
    pipe.scheduler = found.scheduler
    assert off(latents_of(pipe, STABLE, STEPS, latents=found.latents), image) < 3e-4


@needs_torchsde
def test_the_own_method_of_stable_audio_draws_noise_and_is_extracted() -> None:
    pipe = build(STABLE, cosine())
    image = latents_of(pipe, STABLE, STEPS, generator=torch.Generator().manual_seed(3))
    with pytest.raises(ValueError, match="it draws noise .*use extract_noise"):
        kd.invert(pipe, image, num_inference_steps=STEPS, **CALLS[STABLE])
    found = kd.extract_noise(pipe, image, sampler=None, num_inference_steps=STEPS, **CALLS[STABLE])
    pipe.scheduler = found.scheduler
    assert off(latents_of(pipe, STABLE, STEPS, latents=found.latents), image) < 1e-4


@needs_torchsde
def test_each_sample_has_the_path_of_its_own_generator() -> None:
    pipe = build(STABLE, kd.KinvertScheduler.from_scheduler(cosine()))
    call = {"prompt": ["a cat"] * 2, "negative_prompt": ["a dog"] * 2, "latents": noise_for(STABLE, 2)}
    both = latents_of(pipe, STABLE, generator=[torch.Generator().manual_seed(i) for i in (5, 6)], **call)
    alone = latents_of(
        pipe, STABLE, generator=torch.Generator().manual_seed(6), latents=call["latents"][1:]
    )  # wherever the generator stands
    assert off(both[1:], alone) < 1e-5


def test_a_sound_is_encoded_and_decoded_as_the_pipeline_does_it() -> None:
    pipe = build(STABLE)
    call = {"num_inference_steps": 2, "latents": noise_for(STABLE), **CALLS[STABLE]}
    generator = torch.Generator().manual_seed(0)
    latents = latents_of(pipe, STABLE, 2, generator=generator)
    for kind in ("pt", "np"):
        wanted = result_of(pipe(output_type=kind, generator=torch.Generator().manual_seed(0), **call))
        found = kd.decode(pipe, latents, output_type=kind)
        assert type(found) is type(wanted) and float(abs(found - wanted).max()) < 1e-6
    assert torch.equal(kd.decode(pipe, latents), kd.decode(pipe, latents, output_type="pt"))
    sound = torch.rand(2, 2, 64, generator=generator) - 0.5
    found = kd.encode(pipe, sound)
    assert torch.equal(found, pipe.vae.encode(sound).latent_dist.mean) and found.shape == (2, 3, 16)
    for other in (sound.numpy(), sound.double()):
        assert torch.allclose(kd.encode(pipe, other), found)
    assert torch.allclose(kd.encode(pipe, sound[0]), found[:1], atol=1e-6)
    silent = torch.cat([sound[..., :50], torch.zeros(2, 2, 14)], -1)
    assert torch.allclose(kd.encode(pipe, sound[..., :50]), kd.encode(pipe, silent))


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        (torch.zeros(1, 2, 65), r"1 to 64 samples, 4 s at 16 a second, got 65; cut it, and resample"),
        (torch.zeros(1, 2, 0), "1 to 64 samples"),
        (torch.zeros(1, 1, 64), r"shape \(batch, 2, samples\), got \(1, 1, 64\)"),
        (torch.zeros(64), r"shape \(batch, 2, samples\), got \(64,\)"),
        (torch.full((1, 2, 64), 30000.0), "from -1 to 1, got up to 3e"),
        (torch.full((1, 2, 64), torch.nan), "NaN"),
        (torch.zeros(1, 2, 64, dtype=torch.int16), "divide int16 by 32768"),
        ([0.0], "a tensor or an array of samples, got"),
    ],
)
def test_what_is_no_sound_is_refused_with_the_fix(sound: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        kd.encode(build(STABLE), sound)


def test_what_fits_images_alone_is_refused_for_sounds() -> None:
    pipe, latents = build(STABLE), noise_for(STABLE)
    with pytest.raises(ValueError, match="output_type='pil' is for images"):
        kd.decode(pipe, latents, output_type="pil")
    with pytest.raises(ValueError, match="height and width resize images"):
        kd.encode(pipe, torch.zeros(1, 2, 64), height=8)
    with pytest.raises(ValueError, match="encode the sound by kd.encode"):
        kd.invert(pipe, latents[..., :8], sampler="euler", **CALLS[STABLE])
    start = {"initial_audio_waveforms": torch.rand(1, 2, 64), "initial_audio_sampling_rate": 16}
    with pytest.raises(ValueError, match="leave out an image or a sound to start from"):
        kd.invert(pipe, latents, sampler="euler", num_inference_steps=2, **start, **CALLS[STABLE])


def test_masks_of_prompts_belong_to_the_rows() -> None:
    pipe = build(STABLE, diffusers.EDMEulerScheduler(sigma_min=0.3, sigma_max=500.0, sigma_data=1.0))
    embeddings, masks = torch.randn(2, 8, 32), torch.tensor([[1] * 8, [1] * 3 + [0] * 5])
    den = kd.denoiser(pipe, prompt_embeds=embeddings, attention_mask=masks, guidance_scale=1.0)
    x, sigma = noise_for(STABLE, 2), torch.ones(2)
    both = den(x, sigma)
    for row in range(2):
        assert off(den.take(torch.tensor([row]))(x[[row]], sigma[:1]), both[[row]]) < 1e-5


# -- AudioLDM 2 -------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
def test_a_run_of_audioldm2_is_inverted() -> None:
    pipe = audioldm2()
    own = pipe.scheduler
    den = kd.denoiser(pipe, num_inference_steps=STEPS, **AUDIOLDM2)
    noise = torch.randn(1, *den.event, generator=torch.Generator().manual_seed(0))
    call = {"num_inference_steps": STEPS, "output_type": "latent", **AUDIOLDM2}
    image = result_of(pipe(latents=noise, **call))
    start = noise * den.timetable.to_x(float(den.sigmas[0]))
    assert off(ki.sample(den, start, den.sigmas) / den.timetable.to_x(float(den.sigmas[-1])), image) < 2e-5
    found = kd.invert(pipe, image, num_inference_steps=STEPS, tol=1e-4, **AUDIOLDM2)
    assert found.inversion.converged.all()
    pipe.scheduler = found.scheduler
    try:
        assert off(result_of(pipe(latents=found.latents, **call)), image) < 3e-4
    finally:
        pipe.scheduler = own


def test_spectrograms_are_not_made_here() -> None:
    for job, given in ((kd.encode, torch.zeros(1, 2, 64)), (kd.decode, torch.zeros(1, 4, 20, 4))):
        with pytest.raises(ValueError, match="AudioLDM2Pipeline makes sounds of spectrograms"):
            job(audioldm2(), given)
