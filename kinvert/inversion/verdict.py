r"""What an inversion is judged by: its tolerance, the size of an image, and whether the denoiser can be trusted.

Tolerances are relative. An image i has the size `s_i = max(rms(x_i), sigma_N)`, over the processed region if there is a
mask. It is reproduced if `rms(sample(latent_i) - x_i) <= tol s_i`. So data, noise levels and denoiser in other units
give the same latents, in those units, and the same verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinvert.checks import is_number
from kinvert.denoisers import BoundDenoiser, Guidance, Guided, refuse_history
from kinvert.engine import stage_sigmas
from kinvert.noise import white
from kinvert.telling import warn_user
from kinvert.tensors import rms, wide_dtype

__all__ = [
    "MIXING",
    "ROWS",
    "TOLERANCES",
    "Widened",
    "check_guidance",
    "check_rows",
    "image_size",
    "rounding_note",
    "tolerance",
]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
MIXING = {torch.float64: 1e-6, torch.float32: 1e-3}  # half precision: 1e-2
ROWS = 4
"""The most evaluations of a sample that `check_rows` takes."""


def tolerance(
    tol: float | None,
    x: Tensor,
    defaults: Mapping[torch.dtype, float] = TOLERANCES,
    network: torch.dtype | None = None,
) -> float:
    """Return what a round trip may miss, in parts of the image's size: `tol`, or what the dtypes allow.

    In half precision that is 8 eps: 0.0078 in float16, 0.0625 in bfloat16.
    """
    if tol is None:
        return max(defaults.get(dtype, 8 * torch.finfo(dtype).eps) for dtype in (x.dtype, network or x.dtype))
    if not is_number(tol):
        raise TypeError(f"tol must be a float or None, got {tol!r}")
    if not 0 < tol < math.inf:
        raise ValueError(
            f"tol must be a positive number, the round-trip error in parts of the image's rms, got {tol!r}; None takes "
            "the default of x's dtype"
        )
    return float(tol)


def image_size(x: Tensor, sigmas: Sequence[float], region: Tensor | None = None) -> Tensor:
    """Return `max(rms(x), sigma_N)` per sample, shape (batch,); for an image of zeros the last positive level."""
    size = rms(x, region).nan_to_num(0.0, 0.0).clamp(min=sigmas[-1])
    return torch.where(size > 0, size, sigmas[-2])


def rounding_note(tol: float | None, goal: float, x: Tensor, network: torch.dtype) -> list[str]:
    """Warn, with the fix, if rounding of x or of the network exceeds the tolerance or sets it; return the text."""
    eps, rough = torch.finfo(x.dtype).eps, torch.finfo(network).eps
    note = ""
    if rough > eps and tol is None:
        note = (
            f"the network computes in {network}, whose rounding is {rough:.2g}, so that tol is {goal:.2g} of the "
            f"image's size instead of {tolerance(None, x):.2g} for x in {x.dtype}; give the network in "
            "x's dtype, or tol"
        )
    elif goal < max(eps, rough):
        dtype = network if rough > eps else x.dtype
        wider = "; give x in float64, x.double()" if x.dtype == torch.float32 else "; give x in float32, x.float()"
        wider = f"; give the network in {x.dtype}" if rough > eps else wider if x.dtype != torch.float64 else ""
        note = (
            f"tol={goal:.2g} is below the rounding of {dtype}, {max(eps, rough):.2g} of the image's size, so that few "
            f"images or none can reach it{wider}, or leave tol out"
        )
    if note:
        warn_user(note)
    return [note] if note else []


@dataclass(frozen=True, eq=False)
class Widened:
    """A denoiser of states in one dtype, for states in a wider one: they are rounded for each call alone."""

    denoiser: BoundDenoiser
    dtype: torch.dtype

    def take(self, index: Tensor) -> Widened:
        """Return the denoiser of the rows `index`."""
        return Widened(self.denoiser.take(index), self.dtype)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor | Guided:
        """Call the denoiser with x in its dtype, and return the result in the dtype of x."""
        out = self.denoiser(x.to(self.dtype), sigma.to(wide_dtype(self.dtype)))
        return Guided(*(part.to(x.dtype) for part in out)) if isinstance(out, Guided) else out.to(x.dtype)


def check_guidance(guided: Guidance, x: Tensor, sigmas: Sequence[float], verb: str) -> None:
    """Raise ValueError if the `cfg` of a user is a function that cannot be inverted; the network is not called.

    It must give the same for the same input after another evaluation, and for a sample alone as in its batch.
    """
    if isinstance(guided.cfg, float):
        return
    refuse_history(guided.cfg, verb, "evaluates a step more than once")

    def at(level: float, rows: int) -> Tensor:
        state = x[:rows]
        noisy = stage_sigmas([level], state)[0].clone()
        return guided.combine(0.9 * state, 0.2 * state.flip(-1) - 0.5 * state, state, noisy)

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.nan_to_num().abs().max()), equal_nan=True)

    first, _, again = at(sigmas[0], len(x)), at(sigmas[-2], len(x)), at(sigmas[0], len(x))
    if not same(first, again):
        raise ValueError(
            f"cfg={guided.cfg!r} depends on earlier evaluations: it does not return the same for the same predictions. "
            f"{verb} evaluates a step more than once, so it needs a function of (cond, uncond, sigma) alone; leave out "
            "momentum, and put a noise level in the place of the number of a step"
        )
    if len(x) > 1 and not same(at(sigmas[0], 1), first[:1]):
        raise ValueError(
            f"cfg={guided.cfg!r} mixes the samples of a batch: a sample alone comes out different. Take means, norms "
            "and the like for each sample, e.g. value.flatten(1).norm(dim=1)"
        )


def check_rows(denoiser: BoundDenoiser, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Raise ValueError for a denoiser that mixes the rows of its batch, from one row beside two different neighbours.

    All calls are of two rows, since the precision of a network may change with the size of the batch; a `FewBatches`
    fills them up with the neighbour. A denoiser that is not a function of its input gets a RuntimeWarning. If there is
    no memory for two rows, nothing is checked.

    Args:
        denoiser: of the whole batch, as `guide(..., batch=len(x))` returns it.
        x: images, shape (batch, *event); nothing is done for one alone.
        sigmas: levels of the run; the test is at the one nearest to the size of the image.

    Returns:
        The evaluations that it took of each sample, shape (batch,).
    """
    spent = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    if len(x) < 2:
        return spent
    size = float(image_size(x[:1], sigmas))
    level = min(sigmas[:-1], key=lambda s: abs(math.log(s / size)))
    u = (x[:2] + level * white(0).bind(x[:2])(level, 0.0)).to(x.dtype)
    noise_levels = stage_sigmas([level], u)[0].clone()  # a compiled network asks where a tensor starts

    def first_row(neighbour: int) -> Tensor:
        index = torch.tensor([neighbour, 0], device=x.device)
        out = denoiser.take(index)(u[index], noise_levels)
        spent.index_add_(0, index, torch.ones_like(index))
        return (out.denoised if isinstance(out, Guided) else out)[1:].to(wide_dtype(x.dtype))

    try:
        one = first_row(1)
    except torch.cuda.OutOfMemoryError:
        return spent

    def differs(other: Tensor) -> float:
        return float(rms(one - other) / rms(one).clamp(min=size))

    limit = MIXING.get(x.dtype, 1e-2)
    off = differs(first_row(0))
    if off > limit:
        again = differs(first_row(1))
        if not again > limit:
            raise ValueError(
                f"the denoiser mixes the samples of its batch: beside another neighbour the same sample comes out "
                f"different by {off:.2g} of its size (sigma {level:.4g}), so that what holds for some samples does not "
                "for others. Is it batch normalisation in training mode? Call model.eval(), or give one sample at a "
                "time, here and to sample (max_batch=1)"
            )
        warn_user(
            f"the denoiser does not return the same for the same input: {again:.2g} of its size apart (sigma "
            f"{level:.4g}), so that no round trip can be exact. Is it dropout? Call model.eval()",
        )
    return spent
