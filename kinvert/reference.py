r"""Reference solutions of the probability-flow ODE, the limit of samplers for infinitely many steps.

    dx/dsigma = (x - D(x, sigma)) / sigma,    or    dx/du = x - D(x, e^u)  with  u = log sigma

In u the right-hand side has no singularity, and its scale does not change over the decades of sigma. DOP853, the pair
of order 8 with error estimates of orders 5 and 3, integrates it in float64 with adaptive steps. Each sample is
integrated separately, so that its result does not depend on its neighbours.

A reference splits the error of a latent. Let z be the latent that a method finds for an image in the image's dtype, and
Z the one it finds in float64. Let E be the exact inverse of the sampler and O the solution of the ODE, both from the
image upwards. Then

    z - O = (z - Z) + (Z - E) + (E - O)
            round-off  solver   discretisation

Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I (1993), section II.10.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinvert.checks import check_finite, check_number, check_values
from kinvert.denoisers import Denoiser, Guided, guide, refuse_history
from kinvert.engine.contract import check_state
from kinvert.inversion import invert
from kinvert.plan import as_schedule
from kinvert.rules import Rule
from kinvert.showing.brief import brief_repr
from kinvert.tensors import rms

__all__ = ["SMALLEST_RTOL", "ErrorSplit", "solve_ode", "split_error"]

SMALLEST_RTOL = 1e-13  # about 450 times the rounding of float64


@torch.no_grad()
def solve_ode(
    denoiser: Denoiser,
    x: Tensor,
    sigma_from: float,
    sigma_to: float,
    *,
    rtol: float = 1e-10,
    atol: float = 1e-12,
    max_evals: int = 100_000,
    cfg: float = 1.0,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
) -> Tensor:
    """Solve the probability-flow ODE from noise level `sigma_from` to `sigma_to`, up or down, to high accuracy.

    Args:
        denoiser: `denoiser(x, sigma, **conditioning) -> denoised`. It is called with x of shape (1, *event) and sigma
            of shape (1,), both in float64, and must compute in float64. It should be smooth in x and sigma: if it
            rounds sigma to training levels (`quantize=True`), the adaptive steps become tiny.
        x: state at `sigma_from`, shape (batch, *event), any floating dtype.
        sigma_from, sigma_to: noise levels, both positive: at 0 the ODE is singular.
        rtol, atol: tolerances of one step, on the root mean square of a sample's error. The error of the result is
            about ten times `rtol` of x, times the factor by which the ODE amplifies errors (upwards about
            `sigma_to / sigma_from` for data narrower than sigma_from).
        max_evals: the most evaluations for one sample.
        cfg, positive, negative: guidance, as in `sample`; conditioning tensors cover the whole batch.

    Returns:
        The state at `sigma_to`, of x's shape, on its device, in float64.

    Raises:
        TypeError: a denoiser that does not return float64, or another input of the wrong type.
        ValueError: a noise level that is not positive and finite, a tolerance that float64 cannot meet, NaN or infinity
            in x or from the denoiser, too many evaluations; the message names the sample and the sigma.
    """
    x = check_state(x)
    check_values("x", x, "the ODE is solved for them")
    check_finite("x", x)
    for name, sigma in (("sigma_from", sigma_from), ("sigma_to", sigma_to)):
        fix = "pass a noise level; the ODE is singular at 0, stop at the last positive level"
        check_number(name, sigma, above=0, fix=fix)
    check_number("rtol", rtol, low=SMALLEST_RTOL, fix=f"pass at least {SMALLEST_RTOL:g}, what float64 can meet")
    check_number("atol", atol, above=0, fix="pass an absolute tolerance, e.g. 1e-12")
    check_number("max_evals", max_evals, above=0, fix="pass a number of evaluations")
    refuse_history(cfg, "solve_ode", "chooses its own steps")
    bound = guide(denoiser, cfg, positive, negative, batch=len(x))
    ends = math.log(sigma_from), math.log(sigma_to)
    out = torch.empty(x.shape, dtype=torch.float64, device=x.device)
    for i in range(len(x)):
        one = x[i : i + 1].to(torch.float64)
        drift = _Drift(bound.take(torch.tensor([i], device=x.device)), one, max_evals, f"sample {i}: ")
        end = _integrate(drift, one.reshape(-1).cpu().numpy(), ends, float(rtol), float(atol))
        out[i] = torch.from_numpy(end).reshape(x.shape[1:])
    return out


@dataclass(frozen=True, eq=False)
class ErrorSplit:
    """The sources of a latent's error, as root mean squares of shape (batch,); `print` gives a short report.

    Attributes:
        total: the latent against the solution of the ODE.
        discretisation: the sampler's exact inverse against the ODE; more steps or a higher order reduce it.
        solver: the latent found in float64 against the exact inverse; a better inversion reduces it.
        round_off: the latent against the one found in float64.
        converged: whether the exact inverse was found, bool; if not, solver and discretisation mean little.
    """

    total: Tensor
    discretisation: Tensor
    solver: Tensor
    round_off: Tensor
    converged: Tensor

    __repr__ = brief_repr

    @classmethod
    def of(cls, latent: Tensor, fine: Tensor, exact: Tensor, ode: Tensor, converged: Tensor) -> ErrorSplit:
        """Split the error of latents whose four versions are known, each of shape (batch, *event), in float64.

        Args:
            latent: what the method found in the image's dtype.
            fine: what it found in float64.
            exact: the sampler's exact inverse.
            ode: the solution of the ODE.
            converged: whether the exact inverse was found, bool, shape (batch,).
        """
        return cls(
            total=rms(latent - ode),
            discretisation=rms(exact - ode),
            solver=rms(fine - exact),
            round_off=rms(latent - fine),
            converged=converged,
        )

    def __str__(self) -> str:
        lines = [f"error of {len(self.total)} latents, exact inverse found for {int(self.converged.sum())}"]
        for name in ("total", "discretisation", "solver", "round_off"):
            values = getattr(self, name)
            lines.append(f"  {name:<15} median {values.median():.3g}, worst {values.max():.3g}")
        return "\n".join(lines)


def split_error(
    find: Callable[[Tensor], Tensor],
    denoiser: Denoiser,
    image: Tensor,
    sigmas: Any,
    *,
    sampler: str | Rule = "euler",
    cfg: float = 1.0,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
) -> ErrorSplit:
    """Split the error of the latent that a method finds for an image into its three sources.

    Args:
        find: the method, `find(image) -> latent` at `sigmas[0]`, e.g. `lambda x: ki.unsample(denoiser, x, sigmas)`. It
            is called in image's dtype and in float64.
        denoiser, cfg, positive, negative: as in `solve_ode`.
        image: the state at `sigmas[-1]`, shape (batch, *event).
        sigmas: the decreasing sampling schedule, ending above 0.
        sampler: the deterministic sampler to invert.

    Raises:
        TypeError, ValueError: as in `solve_ode` and `invert`; the latent does not have the image's shape.
    """
    image = check_state(image)
    schedule, wide = as_schedule(sigmas), image.to(torch.float64)
    guidance: dict[str, Any] = {"cfg": cfg, "positive": positive, "negative": negative}
    exact = invert(denoiser, wide, schedule, sampler=sampler, **guidance)
    ode = solve_ode(denoiser, image, schedule[-1], schedule[0], **guidance)
    found = [find(state) for state in (image, wide)]
    if any(latent.shape != image.shape for latent in found):
        got = [tuple(latent.shape) for latent in found]
        raise ValueError(f"find must return a latent of image's shape {tuple(image.shape)}, got {got[0]} and {got[1]}")
    narrow, fine = (latent.to(torch.float64) for latent in found)
    return ErrorSplit.of(narrow, fine, exact.latent, ode, exact.converged)


class _Drift:
    """`dx/du = x - D(x, e^u)` of one sample as a function of a number and a flat array."""

    def __init__(self, denoiser: Callable[[Tensor, Tensor], Any], like: Tensor, max_evals: int, where: str) -> None:
        self.denoiser, self.like, self.left, self.where = denoiser, like, max_evals, where

    def __call__(self, u: float, flat: np.ndarray) -> np.ndarray:
        sigma = math.exp(u)
        if self.left <= 0:
            raise ValueError(
                f"{self.where}max_evals are spent at sigma {sigma:g}; is the denoiser smooth there (no rounding of "
                "sigma to training levels)? Else raise max_evals, or rtol"
            )
        self.left -= 1
        x = torch.from_numpy(flat.copy()).to(self.like.device).reshape(self.like.shape)
        out = self.denoiser(x, x.new_full((1,), sigma))
        denoised = out.denoised if isinstance(out, Guided) else out
        if denoised.dtype != torch.float64:
            raise TypeError(
                f"the denoiser must return float64 for float64 x, got {denoised.dtype}; load the network in float64"
            )
        slope: np.ndarray = (x - denoised).reshape(-1).cpu().numpy()
        if not np.isfinite(slope).all():
            raise ValueError(f"{self.where}the denoiser returned NaN or infinity at sigma {sigma:g}; check it there")
        return slope


def _integrate(drift: _Drift, x: np.ndarray, ends: tuple[float, float], rtol: float, atol: float) -> np.ndarray:
    from scipy.integrate import DOP853  # here, because importing it takes long

    if ends[0] == ends[1]:
        return x
    first = min(
        abs(ends[1] - ends[0]), rtol**0.125
    )  # the error of a step h is h^8; scipy < 1.14 may start outside the range
    solver = DOP853(drift, ends[0], x, ends[1], first_step=first, rtol=rtol, atol=atol)
    while solver.status == "running":
        message = solver.step()
    if solver.status == "failed":
        raise ValueError(
            f"{drift.where}{message} at sigma {math.exp(solver.t):g}: the denoiser jumps there; raise rtol and atol"
        )
    y: np.ndarray = solver.y
    return y
