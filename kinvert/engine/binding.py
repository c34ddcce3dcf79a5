"""What a run binds to its denoiser: conditioning, guidance, and the region that a mask keeps.

`sample` and `ki.run` share the equations of this file. All of them keep the graph of gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kinvert.checks import check_beside, check_finite, plain
from kinvert.coordinates import Coordinates, coordinates_of
from kinvert.denoisers import Cfg, Denoiser, Masked, guide, step_cfg
from kinvert.engine.contract import check_state, warn_if_drowned
from kinvert.moments import check_kept
from kinvert.plan import Plan
from kinvert.tensors import wide_dtype

__all__ = ["bind", "kept_outside"]


def bind(
    plan: Plan,
    denoiser: Denoiser,
    x: Tensor,
    cfg: Cfg,
    positive: Mapping[str, Any] | None,
    negative: Mapping[str, Any] | None,
    mask: Tensor | None,
    latent: Tensor | None,
    mask_noise: Tensor | None,
) -> Denoiser:
    """Return the denoiser of a run of `plan` from x, with all that `sample` would bind to it; see `ki.run`."""
    x = check_state(x)
    coordinates = coordinates_of(denoiser) or plan.coordinates or ("flow" if plan.rule.is_in_flow else "ve")
    schedule = plan.sigmas[::-1] if plan.is_rising else plan.sigmas
    scales = step_cfg(cfg, schedule, plan.sigmas)
    guided = guide(denoiser, scales, positive, negative, pair=plan.is_guided, batch=len(x), coordinates=coordinates)
    if mask is not None and plan.is_rising:
        check_kept(plan, coordinates)
    return kept_outside(guided, x, plan.sigmas[0], coordinates, mask, latent, mask_noise)


def kept_outside(
    denoiser: Denoiser,
    x: Tensor,
    sigma: float,
    coordinates: Coordinates,
    mask: Tensor | None,
    latent: Tensor | None,
    mask_noise: Tensor | None,
) -> Denoiser:
    """Return the denoiser of a run from x at level `sigma` that keeps `latent` where the mask is 0; see `sample`."""
    if mask is None:
        if latent is not None or mask_noise is not None:
            name = "mask_noise" if latent is None else "latent"
            raise ValueError(f"{name} was given without mask; pass the mask of what to sample, or leave {name} out")
        return denoiser
    if latent is None:
        raise ValueError("mask was given without latent; pass the clean latent that the kept region shows")
    latent = _like_x("latent", latent, x)
    signal = latent if coordinates == "ve" else (1 - sigma) * latent
    kept = _mask_noise(mask_noise, x, signal, sigma)  # of x itself, wherever the sampler starts
    return Masked(denoiser, mask, latent, noise=kept, coordinates=coordinates)


def _like_x(name: str, value: Any, x: Tensor) -> Tensor:
    """Return `value`, a finite floating point tensor of x's shape, as a plain tensor, or raise."""
    if isinstance(value, Tensor):
        check_beside(name, value, x)
    if not isinstance(value, Tensor) or value.shape != x.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a tensor of x's shape {tuple(x.shape)}, got {got}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {value.dtype}; convert it, e.g. {name}.to(x)")
    check_finite(name, value)
    return plain(value)


def _mask_noise(given: Tensor | None, x: Tensor, signal: Tensor, sigma: float) -> Tensor:
    """Return the noise of the kept region: the given one, or what x has there beside the signal."""
    if given is not None:
        return _like_x("mask_noise", given, x)
    warn_if_drowned(x, sigma, "the noise of the kept region, (x - latent) / sigma,", "or give mask_noise", stacklevel=6)
    wide = wide_dtype(x.dtype)
    return (x.to(wide) - signal.to(wide)) / sigma
