"""Everything of diffusers that the adapter uses, in one place.

Of the library:

| name | what for |
| --- | --- |
| `SchedulerMixin`, `ConfigMixin` | the base classes of `KinvertScheduler`: `config`, saving and loading |
| `BaseOutput` | what `step` returns |
| `randn_tensor` | noise from one generator, or from a list of them, on any device |
| `BrownianTreeNoiseSampler` | the noise of Stable Audio's scheduler, which it takes from torchsde |
| `getattr(diffusers, name)` | the class of a saved scheduler |
| `DiffusionPipeline.from_pretrained(DIR, local_files_only=True, dtype=)` | the command line |

Of the user's scheduler:

| attribute | what for |
| --- | --- |
| `set_timesteps(...)` | makes its levels and timesteps; called with the arguments that the pipeline gave |
| `timesteps` | the time that the network is given in each evaluation |
| `sigmas` | the noise levels of the run, one more than steps (schedulers that have them) |
| `alphas_cumprod`, `final_alpha_cumprod`, `initial_alpha_cumprod` | the levels of all others |
| `init_noise_sigma` | what the pipeline multiplies unit noise by |
| `config` | the options: prediction type, spacing, order, clipping |
| `tau_func(t)` | the noise of SA-Solver |
| `add_noise(x, noise, timesteps)` | noise for timesteps that are not of the run |
| `from_config(config)` | builds it again from what was saved |
| those of `SHARED` | read by some pipelines, handed on as they are |

Of a pipeline:

| name | what for |
| --- | --- |
| `pipe(latents=, num_inference_steps=, output_type="latent", ...)` | one evaluation, or a run |
| `pipe.scheduler` | its levels and timesteps; replaced in a copy |
| `pipe.encode_prompt`, `pipe.encode_image` | computed once for the same arguments, where the pipeline has them |
| `pipe.prepare_latents` | the shape of its latents, where the pipeline has it |
| `pipe.maybe_free_model_hooks` | does nothing in a copy, so that models are not moved after each evaluation |
| `pipe.set_progress_bar_config` | no bar in a copy |
| `pipe.unet`, `pipe.transformer`, `pipe.dtype` | the network's dtype; the network, if no `latents` can be given |
| `pipe.vae` and its `encode`, `decode`, `config` | `kd.encode`, `kd.decode` |
| `pipe._execution_device`, `pipe._pack_latents` | where it runs; whether it packs its latents as Flux does |
| `pipe.vae_scale_factor`, `pipe.vae_scale_factor_temporal` | pixels a cell, frames a latent |
| `vae.hop_length`, `vae.config.sampling_rate`, `vae.config.audio_channels`, `transformer.config.sample_size` | sounds |

Of a scheduler, all of them are public, and pipelines depend on them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kinvert.denoisers.dtypes import dtype_of

try:
    import diffusers
except ImportError as error:
    raise ImportError(
        "kinvert.adapters.diffusers needs diffusers, which is not installed: pip install 'kinvert[diffusers]'"
    ) from error

from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

__all__ = [
    "ENCODERS",
    "REPEATS",
    "SHARED",
    "BaseOutput",
    "ConfigMixin",
    "SchedulerMixin",
    "alphas_of",
    "belongs_to_rows",
    "built",
    "cell_of",
    "class_name",
    "copied",
    "default_guidance",
    "device_of",
    "diffusers",
    "encoded",
    "final_alphas",
    "first_noise",
    "frames_per_latent",
    "is_sound",
    "is_video",
    "loaded",
    "network_dtype",
    "noise_scales",
    "numbers",
    "option",
    "options_of",
    "overflows",
    "packs",
    "parameters_of",
    "parameters_of_network",
    "randn_tensor",
    "samples_of_sound",
    "scaling_of",
    "takes_latents",
    "tree_noise",
    "unconditional",
    "vae_of",
]

SHARED = frozenset({"alphas", "alphas_cumprod", "betas", "set_shift", "shift", "sigma_max", "sigma_min"})
"""What pipelines read of a scheduler beside its interface."""

REPEATS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
"""Arguments of a pipeline's call that say how many images one prompt gets."""
ENCODERS = ("encode_prompt", "encode_image")
"""Methods that depend on nothing but their arguments and the arguments of the call."""
NETWORKS = ("unet", "transformer", "transformer_2", "prior")
PACKED = ["latents", "batch_size", "num_channels_latents", "height", "width"]


def class_name(scheduler: object) -> str:
    """Return the name of a scheduler's class in diffusers, or a name with its module for a class from elsewhere."""
    kind = type(scheduler)
    return kind.__name__ if kind.__module__.startswith("diffusers.") else f"{kind.__module__}.{kind.__name__}"


def built(name: str, config: Mapping[str, Any]) -> Any:
    """Build a scheduler again from the name of its class and its config."""
    return getattr(diffusers, name).from_config(dict(config))


def loaded(directory: str, dtype: torch.dtype) -> Any:
    """Load a pipeline from a directory, from its files alone."""
    return diffusers.DiffusionPipeline.from_pretrained(directory, local_files_only=True, dtype=dtype)


def options_of(scheduler: Any) -> dict[str, Any]:
    """Return the options that a scheduler's class has; `config` may hold those of earlier classes as well."""
    names = inspect.signature(type(scheduler).__init__).parameters
    return {name: value for name, value in scheduler.config.items() if name in names}


def option(scheduler: Any, name: str, default: Any = None) -> Any:
    """Return one option of a scheduler, or the default if its class does not have it."""
    return options_of(scheduler).get(name, default)


def numbers(values: Any) -> list[float]:
    """Return the values of a tensor, an array or a list as floats on the host."""
    return [float(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]


def alphas_of(scheduler: Any) -> Tensor:
    """Return the cumulative products abar of the training levels, float64, on the CPU."""
    alphas: Tensor = scheduler.alphas_cumprod
    return alphas.detach().cpu().double()


def final_alphas(scheduler: Any) -> float:
    """Return abar of the level that a run ends at, or starts from if it rises, beyond its timesteps."""
    for name in ("final_alpha_cumprod", "initial_alpha_cumprod", "one"):
        if hasattr(scheduler, name):
            return float(getattr(scheduler, name))
    return 1.0


def noise_scales(scheduler: Any, timesteps: Iterable[float]) -> list[float]:
    """Return SA-Solver's noise scale tau at timesteps."""
    return [float(scheduler.tau_func(t)) for t in timesteps]


def tree_noise(scheduler: Any, like: Tensor, generator: Any) -> Callable[[float, float], Tensor]:
    """Return the noise of Stable Audio's scheduler: `(sigma_from, sigma_to) -> unit noise` of the shape of `like`.

    It is a Brownian path, whose seed is the one that the generator began with, wherever it stands.
    """
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    several = isinstance(generator, Sequence)
    seed = [one.initial_seed() for one in generator] if several else generator and generator.initial_seed()
    low, high = (option(scheduler, name) for name in ("sigma_min", "sigma_max"))
    noise: Callable[[float, float], Tensor] = BrownianTreeNoiseSampler(like, low, high, seed)
    return noise


def first_noise(scheduler: Any) -> float:
    """Return what the pipeline multiplies unit noise by; 1 for the schedulers of flow models, which have none."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


# -- the call of a pipeline -------------------------------------------------------------------------------------------
def parameters_of(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a pipeline's call."""
    return inspect.signature(type(pipe).__call__).parameters


def parameters_of_network(pipe: Any) -> list[str]:
    """Return what the network of a pipeline without latents takes beside the image and the timestep."""
    return list(inspect.signature(unconditional(pipe).forward).parameters)[2:]


def default_guidance(pipe: Any) -> float:
    """Return the scale by which a pipeline guides if the call does not say it; 1 if the scale goes into the network."""
    parameter = parameters_of(pipe).get("guidance_scale")
    configs = [getattr(getattr(pipe, name, None), "config", {}) for name in NETWORKS]
    inside = any("guidance_embeds" in config or config.get("time_cond_proj_dim") for config in configs)
    return 1.0 if inside or parameter is None or not parameter.default else float(parameter.default)


def takes_latents(pipe: Any) -> bool:
    """Tell whether a call of the pipeline can start from given latents."""
    return "latents" in parameters_of(pipe)


def belongs_to_rows(name: str) -> bool:
    """Tell whether an argument of a pipeline's call has an entry for each image: prompts, their embeddings, labels."""
    return "prompt" in name or name in ("attention_mask", "class_labels", "negative_attention_mask")


def copied(pipe: Any, scheduler: Any) -> Any:
    """Return a shallow copy of a pipeline with another scheduler and no progress bar.

    The pipeline stays as it is; the copy shares its networks and tokenizers.
    """
    other = copy.copy(pipe)
    own = vars(other)  # not by assignment, which would also write to the configuration
    own["scheduler"] = scheduler
    own["maybe_free_model_hooks"] = lambda: None
    other.set_progress_bar_config(disable=True)
    return other


def unconditional(pipe: Any) -> Any:
    """Return the network of a pipeline that takes no latents: it is called by itself.

    Raises:
        ValueError: the network needs more than the image and the timestep, which the pipeline would give.
    """
    name, network = type(pipe).__name__, getattr(pipe, "unet", None)
    if isinstance(network, nn.Module) and set(_modules(pipe)) == {"unet"}:
        return network
    raise ValueError(
        f"{name} has no argument latents=, so that it cannot be asked for one evaluation; make a denoiser of its "
        "network: kinvert.denoisers.from_eps(lambda x, t, **c: pipe.unet(x, t, **c).sample, levels)"
    )


def _modules(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def network_dtype(pipe: Any) -> torch.dtype:
    """Return the dtype that the denoising network of a pipeline computes in."""
    for name in NETWORKS:
        if (dtype := dtype_of(getattr(pipe, name, None))) is not None:
            return dtype
    found: torch.dtype = pipe.dtype
    return found


def device_of(pipe: Any) -> torch.device:
    """Return the device that a pipeline runs on, with offloading too; that of its parameters if it does not say."""
    for name in ("_execution_device", "device"):
        if isinstance(found := getattr(pipe, name, None), torch.device):
            return found
    parameters = (parameter for part in _modules(pipe).values() for parameter in part.parameters())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


# -- the autoencoder --------------------------------------------------------------------------------------------------
def vae_of(pipe: Any) -> Any:
    """Return the autoencoder of a pipeline; None if it has none.

    Raises:
        ValueError: one whose latents are scaled in a way that its configuration does not say.
    """
    vae = getattr(pipe, "vae", None)
    if vae is not None and isinstance(getattr(vae, "bn", None), nn.Module):
        raise ValueError(
            f"{type(pipe).__name__} normalises its latents by statistics inside the VAE, which kinvert does not know; "
            "encode and decode with the pipeline's own methods"
        )
    return vae


def encoded(vae: Any, pixels: Tensor) -> Tensor:
    """Return what a VAE encodes to: the mean of its distribution if it has one."""
    found = vae.encode(pixels)
    if hasattr(found, "latent_dist"):
        mean: Tensor = found.latent_dist.mode()
        return mean
    plain: Tensor = found.latents if hasattr(found, "latents") else found.latent
    return plain


def scaling_of(vae: Any) -> tuple[Any, Any, float | None, float]:
    """Return latents_mean, latents_std, shift_factor and scaling_factor of a VAE; None, and 1, if it has none."""
    mean, std, shift, factor = (
        vae.config.get(name) for name in ("latents_mean", "latents_std", "shift_factor", "scaling_factor")
    )
    return mean, std, shift, 1.0 if factor is None else float(factor)


def overflows(vae: Any) -> bool:
    """Tell whether a VAE has to compute in float32."""
    return bool(vae.config.get("force_upcast"))


def is_video(pipe: Any) -> bool:
    """Tell whether the VAE of a pipeline encodes videos."""
    vae = getattr(pipe, "vae", None)
    return vae is not None and any(isinstance(part, nn.Conv3d) for part in vae.modules())


def is_sound(pipe: Any) -> bool:
    """Tell whether a pipeline makes sounds.

    Raises:
        ValueError: from latents whose scale or length is not known here.
    """
    vae = getattr(pipe, "vae", None)
    parts = [] if vae is None else vae.modules()
    layers = [part for part in parts if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    if hasattr(pipe, "vocoder"):
        raise ValueError(
            f"{type(pipe).__name__} makes sounds of spectrograms, which kinvert does not; encode by pipe.vae.encode("
            "spectrogram).latent_dist.mode() * pipe.vae.config.scaling_factor, and decode by the pipeline's own methods"
        )
    if not layers or not all(isinstance(part, nn.Conv1d) for part in layers):
        return False
    if "initial_audio_waveforms" not in parameters_of(pipe):
        raise ValueError(
            f"{type(pipe).__name__} scales or cuts its sounds in its own way, which kinvert does not know; encode and "
            "decode with the pipeline's own methods"
        )
    return True


def samples_of_sound(pipe: Any) -> tuple[int, int, int]:
    """Return the channels, the samples and the samples a second of the sounds that a pipeline makes."""
    vae = pipe.vae
    samples = int(pipe.transformer.config.sample_size) * int(vae.hop_length)
    return int(vae.config.audio_channels), samples, int(vae.config.sampling_rate)


def frames_per_latent(pipe: Any) -> int:
    """Return how many frames of a video become one latent."""
    return int(getattr(pipe, "vae_scale_factor_temporal", 1))


def cell_of(pipe: Any) -> int:
    """Return the side of the square of pixels that becomes one cell of latents."""
    return int(pipe.vae_scale_factor)


def packs(pipe: Any) -> bool:
    """Tell whether a pipeline packs its latents as Flux does.

    Raises:
        ValueError: it packs them in another way.
    """
    pack = getattr(pipe, "_pack_latents", None)
    if pack is None:
        return False
    if list(inspect.signature(pack).parameters) != PACKED or is_video(pipe):
        raise ValueError(
            f"{type(pipe).__name__} packs its latents in its own way, which kinvert does not know; encode and decode "
            "with the pipeline's own methods"
        )
    return True
