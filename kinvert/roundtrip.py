r"""Data -> latent -> data, measured: up by `unsample` or `invert`, down by `sample`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from kinvert import metrics
from kinvert.checks import check_choice
from kinvert.coordinates import settle
from kinvert.denoisers import Cfg, Denoiser, kept_cfg
from kinvert.engine import Callback, Progress
from kinvert.engine.contract import check_state
from kinvert.inversion.invert import invert
from kinvert.levels import FlowTimes
from kinvert.rules import Rule
from kinvert.sampling import Normalize, dropped_steps, sample, unsample
from kinvert.tensors import wide_dtype


@dataclass(frozen=True, eq=False)
class RoundTrip:
    """Data -> latent -> data, measured. `print` gives a short report.

    Attributes:
        latent: what unsampling found, shape (batch, *event).
        reconstruction: what sampling made of it, the same shape.
        sigma: noise level of the latent.
        evaluations: denoiser evaluations, up and down together (each a batch; guidance counts as one); for
            "invert" those of the sample that took the most.
        mse: mean squared error of the reconstruction, shape (batch,).
        psnr: peak signal-to-noise ratio of the reconstruction in dB, shape (batch,), for data of `data_range`.
        max_error: largest absolute error of the reconstruction, shape (batch,).
        latent_mean: mean of `latent / sigma`, shape (batch,); 0 for pure noise.
        latent_std: standard deviation of `latent / sigma`, shape (batch,); 1 for pure noise.
        data_range: distance between the smallest and the largest possible value that psnr was measured for.
    """

    latent: Tensor
    reconstruction: Tensor
    sigma: float
    evaluations: int
    mse: Tensor
    psnr: Tensor
    max_error: Tensor
    latent_mean: Tensor
    latent_std: Tensor
    data_range: float = 2.0

    def __str__(self) -> str:
        lines = [
            f"round trip of {len(self.latent)} samples through sigma {self.sigma:g}, {self.evaluations} evaluations"
        ]
        for f in fields(self)[4:-1]:
            values = getattr(self, f.name)
            mean, low, high = (float(value) for value in (values.mean(), values.min(), values.max()))
            lines.append(f"  {f.name:<12} mean {mean:.4g}, from {low:.4g} to {high:.4g}")
        return "\n".join([*lines, f"  psnr is in dB for a data range of {self.data_range:g}"])


@torch.no_grad()
def round_trip(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    sampler: str | Rule = "euler",
    method: Literal["unsample", "invert"] = "unsample",
    end_at_step: int = 0,
    cfg: Cfg = 1.0,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
    normalize: Normalize = False,
    sigma_offset: float | None = None,
    data_range: float = 2.0,
    callback: Callback | None = None,
    progress: bool = False,
) -> RoundTrip:
    """Unsample `x`, sample the latent back with the same sampler, schedule and guidance, and measure.

    Args:
        method: how to go up: "unsample", or "invert" on a schedule that ends above 0 (exact; a sample that could not
            be inverted shows in its error). Of an algebraically reversible sampler the latent alone is sampled back,
            without the auxiliary state that `invert` returns with it, so that this is not exact.
        data_range: for psnr, the distance between the smallest and the largest possible value: 2 for data in [-1, 1],
            1 for [0, 1], 255 for bytes.
        denoiser, x, sigmas, sampler, end_at_step, cfg, positive, negative, mask, normalize, sigma_offset, callback,
            progress: as in `unsample`. With a mask the kept region is x itself. A normalized latent is scaled to
            `sigmas[end_at_step]` before it is sampled back.

    Returns:
        A `RoundTrip`.

    Raises:
        TypeError, ValueError: as in `unsample` and `sample`.
    """
    check_choice("method", method, ("unsample", "invert"))
    if method == "invert" and (normalize or end_at_step):
        raise ValueError("normalize and end_at_step are for method='unsample'; cut the schedule, e.g. sigmas[2:]")
    x = check_state(x)
    coordinates, rule, levels = settle(denoiser, sampler, sigmas)
    # what they mean, for a denoiser that does not say
    schedule = FlowTimes(levels) if coordinates == "flow" else levels
    evaluations = [0, 0]

    def counted(direction: int) -> Callback:
        def count(step: Progress) -> None:
            evaluations[direction] = step.evaluations
            if callback is not None:
                callback(step)

        return count

    shared: dict[str, Any] = {
        "sampler": rule, "cfg": cfg, "positive": positive, "negative": negative, "mask": mask, "progress": progress,
    }  # fmt: skip
    if method == "invert":
        found = invert(denoiser, x, schedule, **shared)
        latent, evaluations[0] = found.latent, int(found.evaluations.max())
    else:
        latent = unsample(
            denoiser, x, schedule, end_at_step=end_at_step, normalize=normalize, sigma_offset=sigma_offset,
            callback=counted(0), **shared,
        )  # fmt: skip
    dropped = dropped_steps(levels, end_at_step)
    back, sigma = schedule[dropped:], levels[dropped]
    start = latent * sigma if normalize else latent
    clean = None if mask is None else x
    shared["cfg"] = kept_cfg(cfg, len(back) - 1)
    reconstruction = sample(denoiser, start, back, latent=clean, callback=counted(1), **shared)
    flat = latent.reshape(len(latent), -1).to(wide_dtype(latent.dtype))
    flat = flat if normalize else flat / sigma
    return RoundTrip(
        latent=latent,
        reconstruction=reconstruction,
        sigma=sigma,
        evaluations=sum(evaluations),
        mse=metrics.mse(reconstruction, x),
        psnr=metrics.psnr(reconstruction, x, data_range),
        max_error=metrics.max_error(reconstruction, x),
        latent_mean=flat.mean(1),
        latent_std=flat.std(1, correction=min(1, flat.shape[1] - 1)),
        data_range=data_range,
    )
