"""What the published inversions share: the sampler they belong to, DDIM inversion, the certificate."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from kinvert.checks import plain
from kinvert.coordinates import VE_FIX, coordinates_of
from kinvert.denoisers import Denoiser, guide
from kinvert.engine import run
from kinvert.inversion.invert import check_image, check_invertible, falling
from kinvert.inversion.result import Inversion
from kinvert.inversion.verdict import image_size, tolerance
from kinvert.plan import Plan, compile_plan
from kinvert.rules import DDIMInverse, Rule
from kinvert.tensors import is_half, rms

Conditioning = Mapping[str, Any] | None
Method = TypeVar("Method", bound=Callable[..., Any])


def in_ve(method: Method) -> Method:
    """A method whose formulas are in variance-exploding coordinates: it refuses a denoiser or schedule in flow time."""

    @functools.wraps(method)
    def checked(denoiser: Denoiser, x: Tensor, sigmas: Any, *args: Any, **options: Any) -> Any:
        if "flow" in (coordinates_of(denoiser), coordinates_of(sigmas)):
            raise ValueError(
                f"{method.__name__} runs in variance-exploding coordinates, and the denoiser or sigmas are in flow "
                f'time; use from_velocity(model, levels, coordinates="ve") and {VE_FIX}'
            )
        return method(denoiser, x, sigmas, *args, **options)

    return checked  # type: ignore[return-value]


def checked_plan(x: Tensor, rule: Rule, sigmas: Any) -> Plan:
    """The Plan of the sampler that a method belongs to, checked: it must be one that can be inverted."""
    check_image(x)
    if is_half(x.dtype):
        raise TypeError(f"x must be float32 or float64, got {x.dtype}; use x.float() and a network in float32")
    plan = compile_plan(rule, falling(sigmas))
    check_invertible(plan)
    return plan


def ddim_up(denoiser: Denoiser, x: Tensor, *levels: float) -> Tensor:
    """DDIM inversion ("noisy") of x along rising noise levels."""
    return run(compile_plan(DDIMInverse(), levels), denoiser, x)


@torch.no_grad()
def ddim_path(denoiser: Denoiser, x: Tensor, plan: Plan, positive: Conditioning) -> list[Tensor]:
    """States of DDIM inversion ("noisy") without guidance at the levels of a Plan, noisiest first."""
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
    noises: tuple[Tensor, ...] = (),
    memory: dict[str, Tensor] | None = None,
) -> Inversion:
    """The result: `back` is what came of the latent, `evaluations` what it cost to find."""
    x, latent, back = plain(x), plain(latent), plain(back)
    error, goal = rms(back - x), tolerance(None, x)
    allowed = goal * image_size(x, plan.sigmas)
    spent = torch.zeros(len(x), dtype=torch.int64, device=x.device) + evaluations + plan.evaluations
    return Inversion(
        latent=latent,
        residuals=error[None] if residuals is None else plain(torch.stack(residuals)),
        converged=error <= allowed,
        evaluations=spent,
        round_trip_error=error,
        tolerance=goal,
        allowed=allowed,
        sigmas=plan.sigmas,
        checking=plan.evaluations,
        restored=back,
        noises=tuple(map(plain, noises)),
        memory=memory or {},
    )
