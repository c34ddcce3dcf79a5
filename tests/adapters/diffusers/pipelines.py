"""Small pipelines of diffusers with random weights, one of each family, built without a download.

Import this module after `pytest.importorskip("diffusers")`. `build("sdxl")` gives a new pipeline whose networks are
shared by all pipelines of the family: change the scheduler, never the weights. A call needs only `CALLS[family]`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    AutoencoderOobleck,
    CosineDPMSolverMultistepScheduler,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

HAS_TORCHSDE = importlib.util.find_spec("torchsde") is not None
"""Whether the schedulers of diffusers can run that draw noise from torchsde."""

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""The noise levels of Stable Diffusion, as its schedulers are configured."""

GUIDED = {"prompt": "a cat", "negative_prompt": "a dog", "guidance_scale": 3.0, "height": 16, "width": 16}
CALLS: dict[str, dict[str, Any]] = {
    "sd15": GUIDED,
    "sdxl": GUIDED,
    "sd3": GUIDED | {"max_sequence_length": 8},
    "flux": {"prompt": "a cat", "guidance_scale": 3.5, "height": 16, "width": 16, "max_sequence_length": 8},
    "pixart": GUIDED | {"max_sequence_length": 8, "use_resolution_binning": False, "clean_caption": False},
    "wan": GUIDED | {"num_frames": 5, "height": 32, "width": 32, "max_sequence_length": 8},
    "stable_audio": {"prompt": "a cat", "negative_prompt": "a dog", "guidance_scale": 3.0},
    "ddpm": {},
}
"""What a call of each family needs beside the number of steps, for the smallest image."""

EVENTS = {
    "sd15": (4, 8, 8),
    "sdxl": (4, 8, 8),
    "sd3": (4, 8, 8),
    "flux": (16, 16),
    "pixart": (4, 8, 8),
    "wan": (4, 2, 4, 4),
    "stable_audio": (3, 16),
    "ddpm": (3, 8, 8),
}
"""The shape of one latent of each family, as `pipe(latents=...)` takes it for `CALLS`."""


def build(family: str, scheduler: Any = None) -> Any:
    """A new pipeline of the family, with its own scheduler or the given one; nothing is drawn on the terminal."""
    pipe = _FAMILIES[family]()
    if scheduler is not None:
        pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise_for(family: str, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Unit noise of the shape that `pipe(latents=...)` takes."""
    return torch.randn(batch, *EVENTS[family], generator=torch.Generator().manual_seed(seed))


def latents_of(pipe: Any, family: str, steps: int = 6, **call: Any) -> torch.Tensor:
    """Run a pipeline from `noise_for(family)`, or from `latents`, to the latents of its image."""
    call = {"latents": noise_for(family), "num_inference_steps": steps, "output_type": "latent"} | CALLS[family] | call
    return result_of(pipe(**call))


def result_of(out: Any) -> Any:
    """What a call of a pipeline returned: images, videos or sounds."""
    return next(getattr(out, name) for name in ("images", "frames", "audios") if hasattr(out, name))


def clip_words() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of a few words, their letters, and the merges that make words of letters."""
    vocabulary, merges = {"<|startoftext|>": 0, "<|endoftext|>": 1}, []
    for word in ("a", "cat", "dog", "the", "photo"):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for part in parts:
            vocabulary.setdefault(part, len(vocabulary))
        while len(parts) > 1:  # from the end, so that no merge is another word's
            merges.append((parts[-2], parts[-1]))
            parts = [*parts[:-2], parts[-2] + parts[-1]]
            vocabulary.setdefault(parts[-1], len(vocabulary))
    return vocabulary, merges


def clip_tokenizer() -> CLIPTokenizer:
    """A tokenizer that tells a few words apart."""
    vocabulary, merges = clip_words()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=8, unk_token="<|endoftext|>")


def t5_tokenizer() -> T5Tokenizer:
    """A tokenizer of a few pieces."""
    pieces = ["<pad>", "</s>", "<unk>", "▁a", "▁cat", "▁dog", "▁the", "▁photo", "▁"]
    return T5Tokenizer(vocab=[(piece, -1.0 - i) for i, piece in enumerate(pieces)], extra_ids=0, model_max_length=8)


def clip(projected: bool = False, width: int = 32) -> Any:
    """A text encoder."""
    config = CLIPTextConfig(
        vocab_size=len(clip_words()[0]),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(kind: Any = T5EncoderModel, config: Any = T5Config) -> Any:
    """Another text encoder."""
    return kind(config(vocab_size=9, d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2, dropout_rate=0.0))


def vae(**config: Any) -> AutoencoderKL:
    """An autoencoder that halves the sides of an image."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(
        block_out_channels=[8, 8], latent_channels=4, norm_num_groups=4, sample_size=16, **(blocks | config)
    )


def unet(cross_attention_dim: int = 32, **config: Any) -> UNet2DConditionModel:
    """A U-Net with text conditioning."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        **config,
    )


def _parts(make: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Make the networks once, from a seed of their own, and in evaluation mode."""

    @functools.cache
    def once() -> dict[str, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            parts = make()
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
        return parts

    return once


@_parts
def sd15_parts() -> dict[str, Any]:
    return {"vae": vae(), "text_encoder": clip(), "tokenizer": clip_tokenizer(), "unet": unet()}


@_parts
def sdxl_parts() -> dict[str, Any]:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    added["projection_class_embeddings_input_dim"] = 6 * 8 + 32
    texts = {"text_encoder": clip(), "text_encoder_2": clip(projected=True)}
    return {"vae": vae(), "unet": unet(64, use_linear_projection=True, **added), **texts} | {
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
    }


@_parts
def sd3_parts() -> dict[str, Any]:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
    )
    for parameter in transformer.proj_out.parameters():  # the initialisation of these is zero
        torch.nn.init.normal_(parameter, std=0.2)
    return {
        "transformer": transformer,
        "vae": vae(shift_factor=0.06, scaling_factor=1.5),
        "text_encoder": clip(projected=True),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip(projected=True),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": t5(),
        "tokenizer_3": t5_tokenizer(),
    }


@_parts
def flux_parts() -> dict[str, Any]:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    texts = {"text_encoder": clip(), "text_encoder_2": t5()}
    return {"transformer": transformer, "vae": vae(shift_factor=0.06, scaling_factor=1.5), **texts} | {
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": t5_tokenizer(),
    }


@_parts
def pixart_parts() -> dict[str, Any]:
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
        use_additional_conditions=False,
    )
    return {"transformer": transformer, "vae": vae(), "text_encoder": t5(), "tokenizer": t5_tokenizer()}


@_parts
def wan_parts() -> dict[str, Any]:
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    videos = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.8, 1.2, 0.9, 1.1],
    )
    return {
        "transformer": transformer,
        "vae": videos,
        "text_encoder": t5(UMT5EncoderModel, UMT5Config),
        "tokenizer": t5_tokenizer(),
    }


@_parts
def stable_audio_parts() -> dict[str, Any]:
    transformer = StableAudioDiTModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=4,
        cross_attention_input_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
    )
    sounds = AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        sampling_rate=16,
    )
    return {
        "transformer": transformer,
        "vae": sounds,
        "text_encoder": t5(),
        "tokenizer": t5_tokenizer(),
        "projection_model": StableAudioProjectionModel(32, conditioning_dim=4, min_value=0, max_value=32),
    }


@_parts
def ddpm_parts() -> dict[str, Any]:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return {
        "unet": UNet2DModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **blocks)
    }


def _sd15() -> Any:
    scheduler = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(
        **sd15_parts(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    scheduler = EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1)
    return StableDiffusionXLPipeline(**sdxl_parts(), scheduler=scheduler, add_watermarker=False)


def _flux() -> Any:
    return FluxPipeline(**flux_parts(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True))


def _wan() -> Any:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return WanPipeline(**wan_parts(), scheduler=UniPCMultistepScheduler(**flow))


def _stable_audio() -> Any:
    """With the scheduler of the published model, or the nearest that does not need torchsde."""
    kind = CosineDPMSolverMultistepScheduler if HAS_TORCHSDE else EDMDPMSolverMultistepScheduler
    return StableAudioPipeline(**stable_audio_parts(), scheduler=kind(sigma_min=0.3, sigma_max=500.0, sigma_data=1.0))


_FAMILIES: dict[str, Callable[[], Any]] = {
    "sd15": _sd15,
    "sdxl": _sdxl,
    "sd3": lambda: StableDiffusion3Pipeline(**sd3_parts(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "flux": _flux,
    "pixart": lambda: PixArtAlphaPipeline(**pixart_parts(), scheduler=DPMSolverMultistepScheduler()),
    "wan": _wan,
    "stable_audio": _stable_audio,
    "ddpm": lambda: DDPMPipeline(**ddpm_parts(), scheduler=DDPMScheduler()),
}
