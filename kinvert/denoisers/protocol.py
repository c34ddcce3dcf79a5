"""What a denoiser is, and the checks that all denoisers share.

In variance-exploding coordinates, `x = x0 + sigma * eps` with `eps ~ N(0, I)`, a denoiser is

    D(x, sigma) ≈ E[x0 | x]

Everything else follows from it: the slope of the probability-flow ODE is `(x - D) / sigma`, the score is
`(D - x) / sigma**2`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kinvert.showing.brief import brief_repr
from kinvert.tensors import wide_dtype

__all__ = ["Denoiser", "Guided", "broadcasts", "check_output", "expand", "working_dtype"]


class Guided(NamedTuple):
    """What a denoiser returns to CFG++ samplers, which step to D along the slope of U.

    Attributes:
        denoised: the guided prediction `D`, of x's shape.
        uncond: the unconditional prediction `U`, of x's shape.

    Source: Chung et al., CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models (2024), arXiv
    2406.08070.
    """

    denoised: Tensor
    uncond: Tensor

    def __repr__(self) -> str:
        return brief_repr(self)


class Denoiser(Protocol):
    """`denoiser(x, sigma, **conditioning) -> denoised`: any callable of this form is a denoiser.

    `x` has shape (batch, *event) for any event shape, `sigma` has shape (batch,), and `denoised` (or both members of
    the `Guided` pair returned instead) has x's shape. `conditioning` stands for any keyword arguments.

    The result is read again later, by samplers that remember it and by guidance in two calls. If it is a buffer that
    the next call overwrites, it is copied (`kinvert.denoisers.buffers`); returning a new tensor each time saves the
    copy. A denoiser must not write to `x`, which is the caller's own tensor at the start of a run.
    """

    def __call__(self, x: Tensor, sigma: Tensor, /, *args: Any, **conditioning: Any) -> Tensor | Guided:
        """Return the denoised x."""
        ...


class BoundDenoiser(Protocol):
    """A denoiser whose conditioning is settled for the rows of one batch, and which can be cut into rows.

    `guide` returns one. A host whose conditioning belongs to the whole batch gives its denoiser a `take`; guidance,
    masks and inversion cut it by that, and call it with as many rows as it was cut to, never with a doubled batch.
    """

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor | Guided:
        """Return the denoised x, shape (batch, *event), for sigma of shape (batch,)."""
        ...

    def take(self, index: Tensor, /) -> BoundDenoiser:
        """Return the denoiser of the rows `index`, int64, shape (n,); a row may be there several times."""
        ...


def take_rows(denoiser: Denoiser, index: Tensor) -> Denoiser:
    """Return the denoiser of the rows `index`; one without `take` is the same for all rows."""
    cut: Denoiser = denoiser.take(index) if hasattr(denoiser, "take") else denoiser
    return cut


def working_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float64 for float64 x, float32 for float32 and half precision.

    Raises:
        TypeError: x is not a floating-point tensor.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, got {got}; use x.float()")
    return wide_dtype(x.dtype)


def expand(sigma: Tensor, x: Tensor) -> Tensor:
    """Reshape sigma (batch,) to (batch, 1, …, 1), so that it multiplies x (batch, *event), in x's working dtype.

    Raises:
        TypeError: sigma is not a tensor.
        ValueError: sigma does not have shape (batch,).
    """
    dtype = working_dtype(x)
    fix = "give every item its noise level, e.g. x.new_full((len(x),), 1.5)"
    if not isinstance(sigma, Tensor):
        got = type(sigma).__name__
        raise TypeError(f"sigma must be a tensor of shape (batch,), got {got}; {fix}")
    if sigma.shape != x.shape[:1]:
        got = tuple(sigma.shape)
        raise ValueError(f"sigma must have shape {tuple(x.shape[:1])}, got {got}; {fix}")
    return sigma.to(dtype).reshape(-1, *[1] * (x.ndim - 1))


def broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    """Tell whether a tensor of `shape` broadcasts to exactly `target`."""
    last = target[len(target) - len(shape) :]  # same length: torch.compile of torch 2.4 supports no other zip
    return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(shape, last, strict=True))


def check_output(output: Any, x: Tensor, name: str, call: str) -> Tensor:
    """Return `output` if it is a tensor of x's shape.

    Args:
        output: what the callable returned.
        x: its first argument.
        name: its name in messages, e.g. "model".
        call: its arguments as written in a lambda, e.g. "x, t, **c".

    Raises:
        TypeError: it is not a tensor; the message says how to unwrap it.
        ValueError: it has another shape; the message says how to drop a learned variance, if that is the cause.
    """
    wrap = f"wrap it: lambda {call}: {name}({call})"
    if not isinstance(output, Tensor):
        fix = "return the prediction itself"
        if hasattr(output, "sample"):
            fix = f"{wrap}.sample"
        elif isinstance(output, (list, tuple)):
            fix = f"{wrap}[0]"
        raise TypeError(f"{name} must return a tensor, got {type(output).__name__}; {fix}")
    if output.shape == x.shape:
        return output
    got = f"{name} must return the shape of its input, {tuple(x.shape)}, got {tuple(output.shape)}"
    if x.ndim > 1 and output.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        got += f"; twice the channels is a learned variance: keep the first half, {wrap}[:, :{x.shape[1]}]"
    raise ValueError(got)
