"""What the published inversions share: the sampler they belong to, DDIM inversion, the certificate."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from kinvert.checks import plain
from kinvert.coordinates import VE_FIX, coordinates_of
from kinvert.denoisers import Denoiser, guide, refuse_history
from kinvert.engine import run
from kinvert.inversion.back import Steering, WayBack
from kinvert.inversion.certificate import Found, certify
from kinvert.inversion.exact import check_image, check_invertible, falling
from kinvert.inversion.problem import Reason
from kinvert.inversion.result import Inversion
from kinvert.inversion.verdict import tolerance
from kinvert.plan import Plan, compile_plan
from kinvert.rules import DDIMInverse, Rule
from kinvert.tensors import is_half

__all__ = ["Conditioning", "certified", "checked_plan", "ddim_path", "ddim_up", "in_ve", "noise_for"]

Conditioning = Mapping[str, Any] | None
GUIDANCE = ("cfg", "positive", "negative")
Method = TypeVar("Method", bound=Callable[..., Any])


def in_ve(method: Method) -> Method:
    """Make a method with formulas in variance-exploding coordinates refuse a denoiser or schedule in flow time."""

    @functools.wraps(method)
    def checked(denoiser: Denoiser, x: Tensor, sigmas: Any, *args: Any, **options: Any) -> Any:
        """Check the coordinates, call the method, and note the conditioning for the way back."""
        if "flow" in (coordinates_of(denoiser), coordinates_of(sigmas)):
            raise ValueError(
                f"{method.__name__} runs in variance-exploding coordinates, and the denoiser or sigmas are in flow "
                f'time; use from_velocity(model, levels, coordinates="ve") and {VE_FIX}'
            )
        refuse_history(options.get("cfg"), method.__name__, "goes through the steps more than once")
        found = method(denoiser, x, sigmas, *args, **options)
        if not isinstance(found, Inversion) or found.back is None:
            return found
        given = inspect.signature(method).bind(denoiser, x, sigmas, *args, **options)
        given.apply_defaults()
        return replace(found, back=found.back.with_guidance(*(given.arguments[name] for name in GUIDANCE)))

    return checked  # type: ignore[return-value]


def checked_plan(x: Tensor, rule: Rule, sigmas: Any) -> Plan:
    """Return the Plan of the sampler that a method belongs to; raise if it cannot be inverted."""
    check_image(x)
    if is_half(x.dtype):
        raise TypeError(f"x must be float32 or float64, got {x.dtype}; use x.float() and a network in float32")
    plan = compile_plan(rule, falling(sigmas))
    check_invertible(plan)
    return plan


def noise_for(x: Tensor, noise: Tensor | None) -> Tensor:
    """Return the noise that was given, or one from torch's global generator; raise if it does not fit x."""
    found = torch.randn_like(x) if noise is None else noise
    if not isinstance(found, Tensor) or found.shape != x.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"noise must be a tensor of x's shape {tuple(x.shape)}, got {got}")
    return found


def ddim_up(denoiser: Denoiser, x: Tensor, *levels: float) -> Tensor:
    """Run DDIM inversion ("noisy") of x along rising noise levels."""
    return run(compile_plan(DDIMInverse(), levels), denoiser, x)


@torch.no_grad()
def ddim_path(denoiser: Denoiser, x: Tensor, plan: Plan, positive: Conditioning) -> list[Tensor]:
    """Return the states of DDIM inversion ("noisy") without guidance at the levels of a Plan, noisiest first."""
    bound, states = guide(denoiser, 1.0, positive), [x]
    for low, high in itertools.pairwise(plan.sigmas[::-1]):
        states.insert(0, ddim_up(bound, states[0], low, high))
    return states


@torch.no_grad()
def certified(
    plan: Plan,
    x: Tensor,
    latent: Tensor,
    back: Tensor,
    evaluations: int | Tensor,
    residuals: list[Tensor] | None = None,
    noises: Sequence[Tensor] = (),
    embeddings: Mapping[str, Tensor] | None = None,
    steering: Steering | None = None,
) -> Inversion:
    """Return the result: `back` is what came of the latent, `evaluations` what it cost to find."""
    found = Found(
        latent=latent,
        restored=back,
        evaluations=evaluations + plan.evaluations,
        checking=plan.evaluations,
        residuals=None if residuals is None else torch.stack(residuals),
        otherwise=Reason.APPROXIMATE,
        noises=noises,
        embeddings=embeddings or {},
    )
    way = WayBack(plan.rule, plan.sigmas, image=plain(x), steering=steering)
    return certify(plan, x, tolerance(None, x), found, way)
