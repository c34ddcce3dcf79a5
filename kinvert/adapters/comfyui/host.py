"""Everything of ComfyUI that the nodes use, in one place.

The host's modules are imported when a node runs, so this package can be imported without them. `CALLS` lists what is
used of the modules; of the host's objects the nodes use, besides,

| object | what | for |
| --- | --- | --- |
| `MODEL` | `model`, `get_model_object`, `model_dtype` | the model, its noise levels, its dtype |
| its model | `process_latent_out`, `manual_cast_dtype` | from states of the network to LATENT |
| latent format | `process_in`, `latent_channels` | how LATENT is scaled |
| model sampling | `sigma_max`, `percent_to_sigma`, `noise_scaling` | noise levels; what the host makes of noise |
| denoiser of a sampler | `model_k(x, sigma, **extra_args)`, `model_k.inner_model.inner_model` | an evaluation |

Each of them is the same in the versions 0.3.64 and 0.33.0, if `CALLS` says nothing else.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CALLS",
    "HostCall",
    "after_guidance",
    "check_interrupted",
    "compute_device",
    "coordinates_of_model",
    "discards_penultimate",
    "nested",
    "network_dtype",
    "noise_factor",
    "progress_callback",
    "run_sampling",
    "schedule_of",
    "scheduler_names",
    "to_sampler",
    "unpacked",
]


class HostCall(NamedTuple):
    """A name of a module of the host: since which version it was seen, and what it is for."""

    name: str
    since: str
    purpose: str


CALLS = (
    HostCall("comfy.sample.sample_custom", "0.3.64", "run a sampler with the model, conditioning and mask of a node"),
    HostCall("comfy.sample.fix_empty_latent_channels", "0.3.64", "give an image the dimensions of a video model"),
    HostCall("comfy.sample.prepare_empty_noise", "0.33.0", "zeros like a nested latent (absent before: zeros)"),
    HostCall("comfy.samplers.KSAMPLER", "0.3.64", "make a SAMPLER of a function"),
    HostCall("comfy.samplers.KSampler", "0.3.64", "which samplers discard the last level but one"),
    HostCall("comfy.samplers.calculate_sigmas", "0.3.64", "the schedule of a model"),
    HostCall("comfy.samplers.SCHEDULER_NAMES", "0.3.64", "the names of the host's schedules"),
    HostCall("comfy.model_patcher.set_model_options_post_cfg_function", "0.3.64", "see the unconditional prediction"),
    HostCall("comfy.model_sampling.CONST", "0.3.64", "tell flow models"),
    HostCall("comfy.model_sampling.IMG_TO_IMG", "0.3.64", "tell models that do not start from noise"),
    HostCall("comfy.model_sampling.IMG_TO_IMG_FLOW", "0.33.0", "the same, of flow models (absent before)"),
    HostCall("comfy.model_management.throw_exception_if_processing_interrupted", "0.3.64", "stop when the user does"),
    HostCall("comfy.model_management.get_torch_device", "0.3.64", "the GPU that makes noise on request"),
    HostCall("comfy.utils.unpack_latents", "0.33.0", "the parts of a nested latent"),
    HostCall("comfy.nested_tensor.NestedTensor", "0.33.0", "a nested latent"),
    HostCall("latent_preview.prepare_callback", "0.3.64", "the progress bar and the preview of a node"),
)
"""What the nodes use of the host's modules."""


def _of_host(name: str, default: Any = None) -> Any:
    """Return something of the host by its full name; `default`, if given, where this version lacks it."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if default is not None:
            return default
        raise ImportError(
            f"the nodes of kinvert run inside ComfyUI, and {name} was not found there: {error}. Outside of ComfyUI use "
            "ki.unsample, ki.invert, ...; inside it, report the version of ComfyUI to kinvert"
        ) from error


# -- sampling ---------------------------------------------------------------------------------------------------------
def run_sampling(
    model: Any,
    function: Callable[..., Tensor],
    sigmas: Tensor,
    latent: Mapping[str, Any],
    *,
    cfg: float,
    positive: Any,
    negative: Any,
) -> None:
    """Let the host sample without noise, with `function` in place of its sampler, see `to_sampler`.

    The host prepares model, conditioning and mask as for its own samplers, and shows progress and previews. What
    `function` found it keeps itself: the host would divide the result of a flow model by `1 - sigmas[-1]`.
    """
    samples = latent["samples"]
    samples = _of_host("comfy.sample.fix_empty_latent_channels")(model, samples.float())  # a copy, or not written to
    zeros = _of_host("comfy.sample.prepare_empty_noise", torch.zeros_like)(samples)
    _of_host("comfy.sample.sample_custom")(
        model,
        zeros,
        cfg,
        to_sampler(function),
        sigmas.to(torch.float32),
        positive,
        negative,
        samples,
        noise_mask=latent.get("noise_mask"),
        callback=progress_callback(model, len(sigmas) - 1),
        seed=0,
    )


def to_sampler(function: Callable[..., Tensor]) -> Any:
    """Return the SAMPLER of a function `(model_k, x, sigmas, extra_args, callback, disable) -> x`."""
    return _of_host("comfy.samplers.KSAMPLER")(function)


def after_guidance(options: Mapping[str, Any], function: Callable[[dict[str, Any]], Tensor]) -> dict[str, Any]:
    """Return options of a model with a function that sees both predictions, and what guidance made of them."""
    changed: dict[str, Any] = _of_host("comfy.model_patcher.set_model_options_post_cfg_function")(
        dict(options), function, disable_cfg1_optimization=True
    )
    return changed


def check_interrupted() -> None:
    """Raise the host's own exception if the user stopped the workflow."""
    _of_host("comfy.model_management.throw_exception_if_processing_interrupted")()


def progress_callback(model: Any, steps: int) -> Callable[..., None]:
    """Return a callback `(step, denoised, x, steps)` that moves the node's bar and its preview."""
    callback: Callable[..., None] = _of_host("latent_preview.prepare_callback")(model, steps)
    return callback


def compute_device() -> torch.device:
    """Return the device that the host computes on."""
    device: torch.device = _of_host("comfy.model_management.get_torch_device")()
    return device


# -- models -----------------------------------------------------------------------------------------------------------
def coordinates_of_model(model_sampling: Any) -> Literal["ve", "flow"]:
    """Return what the noise levels of a model are: sigmas, or flow times.

    Raises:
        ValueError: a model that starts from an image, not from noise.
    """
    image_to_image = (
        _of_host("comfy.model_sampling.IMG_TO_IMG"),
        _of_host("comfy.model_sampling.IMG_TO_IMG_FLOW", ()),
    )
    if isinstance(model_sampling, image_to_image):
        raise ValueError(
            "this model goes from image to image and not from noise to image, so there is no noise behind an image; "
            "use a model that starts from noise"
        )
    return "flow" if isinstance(model_sampling, _of_host("comfy.model_sampling.CONST")) else "ve"


def network_dtype(model: Any) -> torch.dtype:
    """Return the dtype that the network of a model computes in."""
    cast = getattr(model.model, "manual_cast_dtype", None)
    dtype = model.model_dtype() if cast is None else cast
    known = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return dtype if dtype in known else torch.bfloat16  # weights of 8 bits are computed with in half precision


def noise_factor(guider: Any, model_sampling: Any, sigmas: Tensor) -> float:
    """Return what the host multiplies noise with to start a schedule; it is not `sigmas[0]` for all models."""
    most = to_sampler(lambda *_, **__: torch.zeros(1, device="cpu")).max_denoise(guider, sigmas)
    one, zero = torch.ones(1, device="cpu"), torch.zeros(1, device="cpu")
    return float(model_sampling.noise_scaling(sigmas[:1].cpu().float(), one, zero, most))


def unpacked(x: Tensor, samples: Any) -> Any:
    """Return states as `samples` are: as they come, or as the parts of a nested latent."""
    if not getattr(samples, "is_nested", False):
        return x
    shapes = [part.shape for part in samples.unbind()]
    return nested(_of_host("comfy.utils.unpack_latents")(x, shapes))


def nested(parts: Sequence[Tensor]) -> Any:
    """Return a nested latent of parts."""
    return _of_host("comfy.nested_tensor.NestedTensor")(list(parts))


# -- schedules --------------------------------------------------------------------------------------------------------
def scheduler_names() -> list[str]:
    """Return the names of the host's schedules, with those that other packs added."""
    return list(_of_host("comfy.samplers.SCHEDULER_NAMES"))


def schedule_of(model: Any, scheduler: str, steps: int) -> Tensor:
    """Return the schedule of a model by the host: decreasing, ending in 0, of about `steps` steps."""
    sigmas: Tensor = _of_host("comfy.samplers.calculate_sigmas")(
        model.get_model_object("model_sampling"), scheduler, steps
    )
    if not all(math.isfinite(sigma) for sigma in sigmas.tolist()):
        raise ValueError(f"the host's schedule {scheduler!r} has no finite levels for {steps} steps; use more steps")
    return sigmas.cpu()


def discards_penultimate(sampler: str) -> bool:
    """Tell whether the host leaves out the last level but one for a sampler."""
    return sampler in _of_host("comfy.samplers.KSampler").DISCARD_PENULTIMATE_SIGMA_SAMPLERS
