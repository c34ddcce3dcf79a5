"""The certificate: every `Inversion` is built here, from what a method found and from sampling it again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kinvert.checks import plain
from kinvert.inversion.problem import Reason
from kinvert.inversion.result import Inversion, WayBack
from kinvert.inversion.verdict import image_size
from kinvert.plan import Plan
from kinvert.showing.brief import brief_repr
from kinvert.tensors import rms, wide_dtype

__all__ = ["Found", "certify"]


@dataclass(frozen=True, eq=False)
class Found:
    """What a method found for an image, and what it cost.

    Attributes:
        latent: shape (batch, *event).
        restored: what sampling made of it; None if nobody sampled it.
        evaluations: spent on each sample, the check included; a number, or shape (batch,).
        checking: those of `evaluations` that went into the certificate.
        residuals: shape (steps, batch), or (1, batch) for a run solved as one; None takes the round-trip error.
        reasons: why samples did not converge, by their place, for every one that did not; None if the method did not
            look, so that the certificate asks the device.
        otherwise: the reason of every sample that did not converge, if `reasons` is None.
        notes: what else to tell a reader.
        failures: what to tell of the samples that did not converge; `invert` warns of it.
        row_checks, noises, memory, embeddings, contraction, amplification, floor: see `Inversion`.
    """

    latent: Tensor
    restored: Tensor | None
    evaluations: Tensor | int
    checking: int
    residuals: Tensor | None = None
    reasons: Mapping[int, Reason] | None = None
    otherwise: Reason = Reason.STALLED
    notes: Sequence[str] = ()
    failures: Sequence[str] = ()
    row_checks: Tensor | None = None
    noises: Sequence[Tensor] = ()
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    contraction: Tensor | None = None
    amplification: float | None = None
    floor: Tensor | None = None

    __repr__ = brief_repr


def certify(plan: Plan, x: Tensor, tol: float, found: Found, back: WayBack, region: Tensor | None = None) -> Inversion:
    """Judge what was found by its round trip.

    Args:
        plan: the run that takes the latent to the image.
        x: the image, shape (batch, *event).
        tol: tolerance in parts of the image's size.
        found: the latent, and what sampling made of it.
        back: how the sampler goes back, for `Inversion.sample`.
        region: 1 where a value counts, of x's shape; None counts all.
    """
    x, wide = plain(x), wide_dtype(x.dtype)
    allowed = tol * image_size(x, plan.sigmas, region)
    if found.restored is None:
        restored, error = None, torch.full_like(allowed, math.nan)
    else:
        restored = plain(found.restored)
        error = rms(restored.to(wide) - x.to(wide), region).nan_to_num(math.inf)
    converged = error <= allowed
    evaluations = torch.zeros(len(x), dtype=torch.int64, device=x.device) + found.evaluations
    reasons = found.reasons
    if restored is None:
        reasons = dict.fromkeys(range(len(x)), Reason.UNCHECKED)
    elif reasons is None:
        reasons = dict.fromkeys((~converged).nonzero()[:, 0].tolist(), found.otherwise)
    reasons = {i: Reason.NOT_FINITE if error[i].isinf() else reason for i, reason in reasons.items()}
    return Inversion(
        latent=plain(found.latent).to(x.dtype),
        residuals=error[None] if found.residuals is None else plain(found.residuals),
        converged=converged,
        evaluations=evaluations,
        round_trip_error=error,
        tolerance=tol,
        allowed=allowed,
        sigmas=plan.sigmas,
        checking=found.checking,
        row_checks=found.row_checks,
        noises=tuple(map(plain, found.noises)),
        memory=dict(found.memory),
        embeddings=dict(found.embeddings),
        restored=None if restored is None else restored.to(x.dtype),
        contraction=found.contraction,
        amplification=found.amplification,
        floor=torch.zeros_like(allowed) if found.floor is None else found.floor.to(allowed),
        reasons=tuple(reasons.get(i, Reason.CONVERGED) for i in range(len(x))),
        back=back,
        warnings=(*found.notes, *found.failures),
    )
