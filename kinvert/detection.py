"""How well bits are recovered and classes are told apart. Public in `kinvert.metrics`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kinvert.checks import check_dense, check_finite, check_number, check_values, describe

__all__ = ["auc", "bit_accuracy", "tpr_at_fpr"]

Scores = Tensor | Sequence[float]


def bit_accuracy(latent: Tensor, truth: Tensor) -> Tensor:
    """Compute the share of coordinates whose sign is right, shape (batch,): 1 if all are, 0.5 ± 0.5/sqrt(n) by chance.

    The signs of `truth` are a message of n bits, one for each coordinate of the event. A coordinate of `latent` that is
    0 or NaN has no sign, and counts as half.

    Args:
        latent: recovered latents, shape (batch, *event), of any scale: only signs count.
        truth: the latents that carry the message, or the message as -1 and 1; the same shape.

    Returns:
        float64, on the CPU.

    Raises:
        TypeError: not floating point tensors.
        ValueError: shapes that differ, empty tensors, or a coordinate of `truth` that is 0 or not finite.
    """
    for name, value in (("latent", latent), ("truth", truth)):
        _check_floating(name, value)
    if latent.shape != truth.shape or truth.ndim < 2 or truth.numel() == 0:
        raise ValueError(
            f"latent has shape {tuple(latent.shape)} and truth {tuple(truth.shape)}; they must be equal, "
            "(batch, *event), and not empty"
        )
    check_finite("truth", truth)
    bits = truth.detach().cpu().double().sign().flatten(1)
    if not bool(bits.all()):
        raise ValueError(f"truth has {int((bits == 0).sum())} zeros, whose sign is no bit; give -1 or 1")
    agree = latent.detach().cpu().double().flatten(1) * bits
    return ((agree > 0).double() + (~(agree < 0)).double()).mean(1) / 2


def auc(positive: Scores, negative: Scores) -> float:
    """Compute the area under the curve of true over false positives: the chance that a positive score is the higher.

    Of all pairs of a positive and a negative score it is the share in which the positive one is higher; equal scores
    count as half. It is 1 if all positives are above all negatives, and 0.5 if the scores say nothing.

    Args:
        positive: scores of what is to be detected, shape (n,), higher where it is more likely; infinite ones count.
        negative: scores of the rest, shape (m,).

    Raises:
        TypeError, ValueError: not real numbers in one dimension, none of them, or a NaN.
    """
    p, n = _scores("positive", positive), _scores("negative", negative).sort().values
    below = torch.searchsorted(n, p) + torch.searchsorted(n, p, right=True)  # those below, and those not above
    return int(below.sum()) / (2 * len(p) * len(n))


def tpr_at_fpr(positive: Scores, negative: Scores, fpr: float) -> float:
    """Compute the largest share of positives above a threshold that at most a share `fpr` of the negatives exceeds.

    What equals the threshold is not above it, so equal scores are detected together or not at all.

    Args:
        positive: scores of what is to be detected, shape (n,), higher where it is more likely.
        negative: scores of the rest, shape (m,).
        fpr: the largest share of false positives, from 0 to below 1; 0 allows none among the given negatives.

    Raises:
        TypeError, ValueError: as in `auc`; an `fpr` out of range; one above 0 but below 1/m, which m negatives cannot
            measure.
    """
    p, n = _scores("positive", positive), _scores("negative", negative).sort(descending=True).values
    fpr = check_number("fpr", fpr, low=0.0, below=1.0)
    allowed = math.floor(fpr * len(n) * (1 + 1e-12))  # 0.29 * 100 is 28.999999999999996
    if fpr > 0 and not allowed:
        raise ValueError(
            f"fpr must be 0 or at least 1/{len(n)}, since there are {len(n)} negative scores, got {fpr:g}; "
            f"give at least {math.ceil(1 / fpr)} of them"
        )
    return int((p > n[allowed]).sum()) / len(p)


# -- parts -------------------------------------------------------------------------------------------------------------
def _check_floating(name: str, x: object) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {describe(x)}")
    check_dense(name, x)
    check_values(name, x, "its signs are read")


def _scores(name: str, values: Scores) -> Tensor:
    """Return scores as float64 on the CPU."""
    if isinstance(values, Tensor):
        check_values(name, values, "its values are compared")
    scores = torch.as_tensor(values, device="cpu")
    if scores.is_complex():
        raise TypeError(f"{name} must be real scores, got {scores.dtype}")
    scores = scores.detach().to("cpu", torch.float64).contiguous()
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"{name} must be scores of shape (n,), at least one, got shape {tuple(scores.shape)}")
    if bool(scores.isnan().any()):
        raise ValueError(f"{name} has {int(scores.isnan().sum())} NaN among its scores, which cannot be ordered")
    return scores
