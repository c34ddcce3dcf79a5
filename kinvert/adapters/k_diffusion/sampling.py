r"""What the sampling file of k-diffusion offers: the functions `sample_*`, schedules, noise and small helpers.

The functions take the arguments of k-diffusion and run the samplers of kinvert. Every other sampler of
`kinvert.rules.SAMPLERS` has a function too, `sample_<name>`, which is made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kinvert import schedules
from kinvert.adapters.k_diffusion.brownian import BatchedBrownianTree, BrownianTreeNoiseSampler
from kinvert.adapters.k_diffusion.faces import FACES, Face, face_of, function_names
from kinvert.adapters.k_diffusion.running import NoiseSampler, make_function
from kinvert.adapters.k_diffusion.utils import append_dims
from kinvert.coefficients import ancestral_split

__all__ = [
    "BatchedBrownianTree",
    "BrownianTreeNoiseSampler",
    "append_dims",
    "append_zero",
    "default_noise_sampler",
    "get_ancestral_step",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_adaptive",
    "sample_dpm_fast",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
    "to_d",
]


def append_zero(x: Tensor) -> Tensor:
    """Append a 0 to a 1-D tensor."""
    return torch.cat([x, x.new_zeros(1)])


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the schedule `kinvert.schedules.karras` in torch's default dtype, n levels and a 0."""
    return _on(device, schedules.karras(n, float(sigma_min), float(sigma_max), float(rho)))


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu") -> Tensor:
    """Return the schedule `kinvert.schedules.exponential` in torch's default dtype, n levels and a 0."""
    return _on(device, schedules.exponential(n, float(sigma_min), float(sigma_max)))


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the schedule `kinvert.schedules.polyexponential` in torch's default dtype, n levels and a 0."""
    return _on(device, schedules.polyexponential(n, float(sigma_min), float(sigma_max), float(rho)))


def get_sigmas_vp(
    n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the schedule `kinvert.schedules.vp` in torch's default dtype, n levels and a 0."""
    return _on(device, schedules.vp(n, float(beta_d), float(beta_min), float(eps_s)))


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """Return the slope of the probability-flow ODE, `(x - denoised) / sigma`; sigma has shape () or (batch,)."""
    return (x - denoised) / append_dims(sigma, x.ndim)


def get_ancestral_step(sigma_from: Any, sigma_to: Any, eta: float = 1.0) -> tuple[Any, Any]:
    """Return `(down, up)` of an ancestral step, `down^2 + up^2 = sigma_to^2`; tensors if the levels are tensors.

    See `kinvert.coefficients.ancestral_split`; unlike it, a step upwards is an error.

    Raises:
        ValueError: `sigma_to > sigma_from`.
    """
    if not eta:
        return sigma_to, 0.0
    a, b = float(sigma_from), float(sigma_to)
    if b > a:
        raise ValueError(
            f"an ancestral step goes down, got {a:g} -> {b:g}: going up, the variance of its noise is negative; use "
            "eta=0"
        )
    down, up = ancestral_split(a, b, float(eta))
    like = next((level for level in (sigma_to, sigma_from) if isinstance(level, Tensor)), None)
    return (down, up) if like is None else (like.new_tensor(down), like.new_tensor(up))


def default_noise_sampler(x: Tensor) -> NoiseSampler:
    """Return a source of white noise like x from torch's global generator."""
    return lambda sigma, sigma_next: torch.randn_like(x)


def _on(device: torch.device | str, sigmas: Tensor) -> Tensor:
    return sigmas.to(device, torch.get_default_dtype())


def _function(face: Face) -> Callable[..., Any]:
    # Looked up in each call: programs replace this module's `torch` by an object with a `randn_like` of their own.
    return make_function(face, lambda x: default_noise_sampler(x))  # noqa: PLW0108


sample_euler = _function(FACES["euler"])
sample_heun = _function(FACES["heun"])
sample_dpm_2 = _function(FACES["dpm_2"])
sample_euler_ancestral = _function(FACES["euler_ancestral"])
sample_dpm_2_ancestral = _function(FACES["dpm_2_ancestral"])
sample_dpmpp_2s_ancestral = _function(FACES["dpmpp_2s_ancestral"])
sample_lms = _function(FACES["lms"])
sample_dpm_fast = _function(FACES["dpm_fast"])
sample_dpm_adaptive = _function(FACES["dpm_adaptive"])
sample_dpmpp_sde = _function(FACES["dpmpp_sde"])
sample_dpmpp_2m = _function(FACES["dpmpp_2m"])
sample_dpmpp_2m_sde = _function(FACES["dpmpp_2m_sde"])
sample_dpmpp_3m_sde = _function(FACES["dpmpp_3m_sde"])


def __getattr__(name: str) -> Any:
    """Make the function of another sampler."""
    if not name.startswith("sample_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = globals()[name] = _function(face_of(name))
    return function


def __dir__() -> list[str]:
    return sorted({*globals(), *function_names()})
