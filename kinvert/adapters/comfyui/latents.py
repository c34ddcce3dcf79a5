"""LATENT and NOISE of the host, and the nodes that mix them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kinvert.adapters.comfyui import host
from kinvert.adapters.comfyui.samplers import make_schedule, sampler_names, schedule_names
from kinvert.adapters.comfyui.spec import Input, Node, Output, choice
from kinvert.edits import slerp

__all__ = ["NODES", "FoundNoise", "each_part", "item_masks", "replaced", "samples_of"]

MAX_SIDE = 16384


@dataclass(frozen=True, eq=False)
class FoundNoise:
    """NOISE that starts a run of the host at a state that was found.

    Attributes:
        noise: what the host scales, of the shape of LATENT, on the CPU.
        empty: LATENT of an empty image, which the noise must be added to; None: any, since the host ignores it.
        seed: of a sampler that draws noise of its own.
    """

    noise: Any
    empty: Any = None
    seed: int = 0

    def generate_noise(self, input_latent: Mapping[str, Any]) -> Any:
        """Return the noise for a LATENT.

        Raises:
            ValueError: LATENT has another shape, or is an image, which would be added to the start.
        """
        samples = samples_of(input_latent)
        if self.empty is not None:
            each_part(_check_empty, samples, self.noise, self.empty)
        else:
            each_part(_check_shapes, samples, self.noise)
        return self.noise


def _check_shapes(samples: Tensor, noise: Tensor) -> Tensor:
    if samples.shape != noise.shape:
        raise ValueError(
            f"this noise has the shape {tuple(noise.shape)}, and latent_image {tuple(samples.shape)}; connect a LATENT "
            "of the same size and batch"
        )
    return samples


def _check_empty(samples: Tensor, noise: Tensor, empty: Tensor) -> Tensor:
    _check_shapes(samples, noise)
    gap = (samples.float().cpu() - empty).abs().max()
    if bool(samples.any()) and float(gap) > 1e-3 * (1.0 + float(empty.abs().max())):
        raise ValueError(
            "this noise is the whole start of the run, and latent_image is not empty, so the host would add an image "
            "to it; connect Empty Latent Image of the same size, or use the output latent with noise disabled instead"
        )
    return samples


# -- LATENT -----------------------------------------------------------------------------------------------------------
def samples_of(latent: Any, name: str = "latent_image") -> Any:
    """Return the samples of a LATENT: a tensor, or the host's nested one.

    Raises:
        TypeError: it is no LATENT.
        ValueError: values that are not finite.
    """
    samples = latent.get("samples") if isinstance(latent, Mapping) else None
    if not isinstance(samples, Tensor) and not getattr(samples, "is_nested", False):
        raise TypeError(f"{name} must be a LATENT, got {type(latent).__name__}; connect VAE Encode, for example")

    def check(part: Tensor) -> Tensor:
        if not bool(part.isfinite().all()):
            raise ValueError(f"{name} has values that are NaN or infinite; look at the node that made it")
        return part

    each_part(check, samples)
    return samples


def each_part(function: Callable[..., Tensor], samples: Any, *others: Any) -> Any:
    """Apply a function to samples, or to each part of nested ones; `others` are nested alike."""
    if not getattr(samples, "is_nested", False):
        return function(samples, *others)
    if not all(getattr(other, "is_nested", False) for other in others):
        raise ValueError("one latent is nested (audio and video) and the other is not; connect two of the same kind")
    parts = zip(samples.unbind(), *(other.unbind() for other in others), strict=True)
    return host.nested([function(*part) for part in parts])


def replaced(latent: Mapping[str, Any], samples: Any, **more: Any) -> dict[str, Any]:
    """Return a LATENT with other samples; the given one is not modified."""
    return {**latent, "samples": samples, **more}


def item_masks(mask: Tensor, x: Tensor) -> Tensor:
    """Return a MASK for each item of an image batch, shape (batch, 1, H, W), resized bilinearly to x.

    Like the host, a mask of fewer items is repeated.

    Raises:
        ValueError: x is not a batch of images.
    """
    if x.ndim != 4:
        raise ValueError(f"a mask is for a batch of images here, got a latent of shape {tuple(x.shape)}; remove it")
    masks = mask.reshape(-1, 1, *mask.shape[-2:]).to(x.device, torch.float32)
    if masks.shape[-2:] != x.shape[-2:]:
        masks = functional.interpolate(masks, x.shape[-2:], mode="bilinear").clamp(0, 1)
    return masks[torch.arange(len(x), device=x.device) % len(masks)]


def _together(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return two latents of one shape in float32; a batch of 1 belongs to all items of the other.

    Raises:
        ValueError: other shapes differ.
    """
    if first.shape[1:] != second.shape[1:] or (len(first) != len(second) and 1 not in (len(first), len(second))):
        raise ValueError(
            f"the latents have the shapes {tuple(first.shape)} and {tuple(second.shape)}; they must be equal, or one "
            "of them a batch of 1"
        )
    batch = max(len(first), len(second))
    one, other = (x.float().expand(batch, *x.shape[1:]) for x in (first, second))
    return one, other.to(one.device)


def _mixed(latents: Mapping[str, Any], other: Mapping[str, Any], mask: Tensor | None, mix: Any) -> dict[str, Any]:
    """Return `mix` of two LATENTs, inside a mask if there is one."""

    def one(first: Tensor, second: Tensor) -> Tensor:
        a, b = _together(first, second)
        mixed: Tensor = mix(a, b)
        return mixed if mask is None else torch.lerp(a, mixed, item_masks(mask, mixed))

    return replaced(latents, each_part(one, samples_of(latents, "latents"), samples_of(other, "the other latent")))


# -- the nodes --------------------------------------------------------------------------------------------------------
def _slerp_node(
    latents1: Mapping[str, Any], factor: float, latents2: Any = None, mask: Tensor | None = None
) -> tuple[Any]:
    return (latents1,) if latents2 is None else (_mixed(latents1, latents2, mask, lambda a, b: slerp(a, b, factor)),)


def _inject_node(
    latents: Mapping[str, Any], strength: float, noise: Any = None, mask: Tensor | None = None
) -> tuple[Any]:
    return (latents,) if noise is None else (_mixed(latents, noise, mask, lambda a, b: a + strength * b),)


def _noisy_node(source: str, seed: int, width: int, height: int, batch_size: int, channels: int = 4) -> tuple[Any]:
    device = torch.device("cpu") if source == "CPU" else host.compute_device()
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(batch_size, channels, height // 8, width // 8, generator=generator, device=device)
    return ({"samples": noise.cpu()},)


def _sigma_node(
    model: Any, sampler_name: str, scheduler: str, steps: int, start_at_step: int, end_at_step: int
) -> tuple[float]:
    """Return what a standard normal LATENT must be multiplied with to noise an image from one level to another."""
    sampling = model.get_model_object("model_sampling")
    levels = make_schedule(model, scheduler, steps, sampler_name).double().tolist()
    end = min(end_at_step, len(levels) - 1)
    start = min(start_at_step, end)
    if host.coordinates_of_model(sampling) == "flow":
        if levels[start] >= 1.0:
            raise ValueError(
                f"step {start} is at t = 1, where an image is no part of the state, so no strength gives it; use "
                "start_at_step=1 or more"
            )
        levels = [t / (1.0 - t) for t in levels[start:]]
        start, end = 0, end - start
    format_ = model.get_model_object("latent_format")
    ends = [
        format_.process_in(torch.full((1, format_.latent_channels, 1, 1), value, device="cpu")) for value in (0.0, 1.0)
    ]
    scales = (ends[1] - ends[0]).flatten()
    if not bool((scales - scales[0]).abs().max() <= 1e-4 * scales[0].abs()):
        raise ValueError("this model scales each channel of its latents differently, so no one strength fits all")
    return ((levels[start] - levels[end]) / float(scales[0]),)


_LATENT = (Output("latent", "LATENT", "The result."),)
_MASK = Input(
    "mask", "MASK", "Where to mix; outside, the first latent is kept. One for each item, or for all.", {}, True
)

NODES = (
    Node(
        "KinvertSlerpLatents",
        "Slerp Latents (kinvert)",
        "latent",
        "Interpolates two latents along the arc between them, each item by its own angle. Meant for noise, such as two "
        "unsampled images.",
        (
            Input("latents1", "LATENT", "The latent at factor 0."),
            Input("factor", "FLOAT", "Where on the arc.", {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01}),
            Input("latents2", "LATENT", "The latent at factor 1, or a batch of 1 for all items.", {}, True),
            _MASK,
        ),
        _LATENT,
        _slerp_node,
    ),
    Node(
        "KinvertGetSigma",
        "Get Sigma (kinvert)",
        "latent/noise",
        "The strength with which Inject Noise takes an image from the level of end_at_step to that of start_at_step. "
        "For flow models it is t / (1 - t).",
        (
            Input("model", "MODEL", "The model whose noise levels are used."),
            Input("sampler_name", sampler_names, "A few samplers have another schedule."),
            Input("scheduler", schedule_names, "Name of the schedule."),
            Input("steps", "INT", "Number of steps.", {"default": 10000, "min": 1, "max": 10000}),
            Input("start_at_step", "INT", "The noisy end.", {"default": 0, "min": 0, "max": 10000}),
            Input("end_at_step", "INT", "The clean end.", {"default": 10000, "min": 1, "max": 10000}),
        ),
        (Output("sigma", "FLOAT", "Strength, in units of LATENT."),),
        _sigma_node,
    ),
    Node(
        "KinvertInjectNoise",
        "Inject Noise (kinvert)",
        "latent/noise",
        "Adds noise to latents: latents + strength noise.",
        (
            Input("latents", "LATENT", "What noise is added to."),
            Input("strength", "FLOAT", "See Get Sigma.", {"default": 1.0, "min": 0.0, "max": 20000.0, "step": 0.01}),
            Input("noise", "LATENT", "Noise of unit variance, or a batch of 1 for all items.", {}, True),
            _MASK,
        ),
        _LATENT,
        _inject_node,
    ),
    Node(
        "KinvertNoisyLatent",
        "Noisy Latent Image (kinvert)",
        "latent/noise",
        "Standard normal noise as LATENT.",
        (
            Input("source", choice("CPU", "GPU"), "Where it is drawn; the numbers differ."),
            Input("seed", "INT", "Seed.", {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF}),
            Input("width", "INT", "Of the image, in pixels.", {"default": 512, "min": 16, "max": MAX_SIDE, "step": 8}),
            Input("height", "INT", "The same.", {"default": 512, "min": 16, "max": MAX_SIDE, "step": 8}),
            Input("batch_size", "INT", "Number of items.", {"default": 1, "min": 1, "max": 4096}),
            Input(
                "channels",
                "INT",
                "Channels of the model's latents: 4 for Stable Diffusion 1, 2 and XL, 16 for most flow models.",
                {"default": 4, "min": 1, "max": 1024},
                True,
            ),
        ),
        _LATENT,
        _noisy_node,
    ),
)
