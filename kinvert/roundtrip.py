"""Data -> latent -> data, measured: up by any way of inverting, down by the sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinvert import metrics
from kinvert.checks import check_choice
from kinvert.coordinates import settle
from kinvert.denoisers import Cfg, Denoiser, kept_cfg
from kinvert.engine import Callback, Progress
from kinvert.engine.contract import check_state
from kinvert.inversion import Inversion, extract_noise, invert
from kinvert.inversion.baselines import BASELINES
from kinvert.levels import FlowTimes
from kinvert.noise import Noise
from kinvert.packing import moved
from kinvert.records import write_tree
from kinvert.rules import Rule
from kinvert.sampling import Normalize, dropped_steps, sample, unsample
from kinvert.showing.brief import never_fails, read_numbers, size
from kinvert.showing.html import card, html_never_fails, report
from kinvert.showing.thumbnails import thumbnails
from kinvert.tensors import wide_dtype

__all__ = ["METHODS", "RoundTrip", "round_trip", "unit_latent"]


@dataclass(frozen=True, eq=False)
class RoundTrip:
    """Data -> latent -> data, measured. `print` gives a short report, a notebook shows it with pictures.

    Attributes:
        latent: what the way up found, shape (batch, *event).
        reconstruction: what sampling made of it, the same shape.
        sigma: noise level of the latent.
        evaluations: denoiser evaluations, up and down together (each a batch; guidance counts as one); for a method
            that returns an `Inversion`, those of the sample that took the most.
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

    @never_fails
    def __repr__(self) -> str:
        """Return size, cost and quality in one line; the device is read once."""
        parts = [size(self.latent), f"through sigma {self.sigma:.4g}", f"{self.evaluations} evaluations"]
        numbers = read_numbers(lambda: (self.psnr.median(), self.max_error.max()), beside=self.psnr)
        if numbers is not None:
            parts.append("psnr {:.1f} dB in the median, largest error {:.2g}".format(*numbers))
        return f"RoundTrip({', '.join(parts)})"

    @html_never_fails
    def _repr_html_(self) -> str:
        labels = [f"{decibels:.1f} dB" for decibels in self.psnr.tolist()]
        return card(
            repr(self),
            report(str(self)),
            thumbnails("latent / sigma", unit_latent(self), 3.0, labels),
            thumbnails("sampled back", self.reconstruction, None, labels),
        )

    def save(self, path: Path | str) -> None:
        """Write it to a safetensors file, which `ki.load` reads.

        Raises:
            ValueError: it cannot be written.
        """
        write_tree(path, "round_trip", {f.name: getattr(self, f.name) for f in fields(self)})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> RoundTrip:
        """Return it on another device; `dtype` is that of `latent` and `reconstruction`, measures stay as they are."""
        states = ("latent", "reconstruction")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return RoundTrip(**{name: moved(v, device, dtype if name in states else None) for name, v in values.items()})

    def __str__(self) -> str:
        """Return a short report."""
        lines = [
            f"round trip of {len(self.latent)} samples through sigma {self.sigma:g}, {self.evaluations} evaluations"
        ]
        for f in fields(self)[4:-1]:
            values = getattr(self, f.name)
            mean, low, high = (float(value) for value in (values.mean(), values.min(), values.max()))
            lines.append(f"  {f.name:<12} mean {mean:.4g}, from {low:.4g} to {high:.4g}")
        return "\n".join([*lines, f"  psnr is in dB for a data range of {self.data_range:g}"])


def unit_latent(trip: RoundTrip) -> Tensor:
    """Return the latent of a round trip in units of its noise level, whether or not it was normalized.

    A normalized latent has that unit already. Which of the two it is follows from the standard deviation of
    `latent / sigma`, which was measured.
    """
    latent = trip.latent.detach()
    flat = latent.reshape(len(latent), -1).to(wide_dtype(latent.dtype))
    size, known = flat.std(1, correction=0).nanmedian(), trip.latent_std.nanmedian()
    normalized = (size - known).abs() < (size / trip.sigma - known).abs()
    return torch.where(normalized, latent, latent / trip.sigma)


METHODS: tuple[str, ...] = ("unsample", "invert", "extract_noise", *BASELINES)
"""The ways up that `round_trip` knows."""


@torch.no_grad()
def round_trip(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    sampler: str | Rule = "euler",
    method: str = "unsample",
    end_at_step: int = 0,
    cfg: Cfg = 1.0,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
    normalize: Normalize = False,
    sigma_offset: float | None = None,
    data_range: float = 2.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    max_batch: int | None = None,
) -> RoundTrip:
    """Find the latent of `x`, sample it back with the same sampler, schedule and guidance, and measure.

    Args:
        method: how to go up: "unsample"; "invert" (exact; a sample that could not be inverted shows in its error) or
            "extract_noise", on a schedule that ends above 0; or a published inversion of
            `kinvert.inversion.baselines.BASELINES`, which belongs to its own sampler. What belongs to the latent, such
            as the auxiliary state of a reversible sampler, goes down with it.
        data_range: for psnr, the distance between the smallest and the largest possible value: 2 for data in [-1, 1],
            1 for [0, 1], 255 for bytes.
        noise: the noise source of both directions for samplers with churn, and for reversible ones under "invert"; of
            the states for "extract_noise".
        denoiser, x, sigmas, sampler, end_at_step, normalize, sigma_offset, cfg, positive, negative, mask, callback,
            progress, max_batch: as in `unsample`. With a mask the kept region is x itself. A normalized latent is
            scaled to `sigmas[end_at_step]` before it is sampled back.

    Returns:
        A `RoundTrip`.

    Raises:
        ValueError: an unknown method, or an argument that the method has no use for, with the fix.
        TypeError, ValueError: as in `unsample`, `invert` and `sample`.
    """
    check_choice("method", method, dict.fromkeys((*METHODS, *BASELINES)))  # with those registered later
    if method != "unsample" and (normalize or end_at_step):
        raise ValueError("normalize and end_at_step are for method='unsample'; cut the schedule, e.g. sigmas[2:]")
    if method != "unsample" and sigma_offset is not None:
        raise ValueError(f"sigma_offset is for method='unsample', got it for {method!r}; leave it out")
    x = check_state(x)
    coordinates, rule, levels = settle(denoiser, sampler, sigmas)
    # what they mean, for a denoiser that does not say
    schedule = FlowTimes(levels) if coordinates == "flow" else levels
    guidance: dict[str, Any] = {"cfg": cfg, "positive": positive, "negative": negative}
    shared: dict[str, Any] = {"mask": mask, "progress": progress, "max_batch": max_batch}
    up, down = _Counter(callback), _Counter(callback)
    if method != "unsample":
        found = _inverted(method, denoiser, x, schedule, rule, noise, guidance | shared)
        latent, spent = found.latent, int(found.evaluations.max())
        reconstruction = found.sample(denoiser, callback=down, progress=progress, max_batch=max_batch)
        return _measured(x, latent, latent / levels[0], reconstruction, levels[0], spent + down.evaluations, data_range)
    latent = unsample(
        denoiser, x, schedule, sampler=rule, end_at_step=end_at_step, normalize=normalize, sigma_offset=sigma_offset,
        noise=noise, callback=up, **guidance, **shared,
    )  # fmt: skip
    dropped = dropped_steps(levels, end_at_step)
    sigma = levels[dropped]
    guidance["cfg"] = kept_cfg(cfg, len(levels) - dropped - 1)
    reconstruction = sample(
        denoiser, latent * sigma if normalize else latent, schedule[dropped:], sampler=rule,
        latent=None if mask is None else x, noise=noise, callback=down, **guidance, **shared,
    )  # fmt: skip
    unit, spent = latent if normalize else latent / sigma, up.evaluations + down.evaluations
    return _measured(x, latent, unit, reconstruction, sigma, spent, data_range)


class _Counter:
    """A callback that counts evaluations and hands on."""

    def __init__(self, callback: Callback | None) -> None:
        self.callback, self.evaluations = callback, 0

    def __call__(self, step: Progress) -> None:
        self.evaluations = step.evaluations
        if self.callback is not None:
            self.callback(step)


def _inverted(
    method: str, denoiser: Denoiser, x: Tensor, sigmas: Any, rule: Rule, noise: Noise | None, options: dict[str, Any]
) -> Inversion:
    """Find the latent by a method that returns an `Inversion`; refuse what the method has no use for."""
    if method == "extract_noise":
        return extract_noise(denoiser, x, sigmas, sampler=rule, noise=noise, **options)  # type: ignore[arg-type]
    if method == "invert":
        return invert(denoiser, x, sigmas, sampler=rule, noise=noise, **options)
    if noise is not None:
        raise ValueError(f"noise is for kinvert's own methods, got it for {method!r}; leave it out")
    others = {name: options.pop(name) for name in ("mask", "progress", "max_batch")}
    if others["mask"] is not None or others["max_batch"] is not None:
        raise ValueError(f"mask and max_batch are for kinvert's own methods, got one for {method!r}; leave it out")
    found = BASELINES[method](denoiser, x, sigmas, **options)
    if found.back is not None and found.back.sampler != rule and method != "direct_inversion":
        own = found.back.sampler.name
        raise ValueError(f"{method!r} inverts the sampler {own!r}, got sampler={rule.name!r}; use sampler={own!r}")
    return found


def _measured(
    x: Tensor, latent: Tensor, unit: Tensor, reconstruction: Tensor, sigma: float, evaluations: int, data_range: float
) -> RoundTrip:
    """Measure a reconstruction, and the latent in units of its noise level."""
    flat = unit.reshape(len(unit), -1).to(wide_dtype(unit.dtype))
    return RoundTrip(
        latent=latent,
        reconstruction=reconstruction,
        sigma=sigma,
        evaluations=evaluations,
        mse=metrics.mse(reconstruction, x),
        psnr=metrics.psnr(reconstruction, x, data_range),
        max_error=metrics.max_error(reconstruction, x),
        latent_mean=flat.mean(1),
        latent_std=flat.std(1, correction=min(1, flat.shape[1] - 1)),
        data_range=data_range,
    )
