r"""What a network returned to a scheduler, as a denoised image.

    D = c_skip x + c_out F, with F the network's output and x in the coordinates of kinvert (VE, or x_t of a flow)

    prediction_type         c_skip                  c_out
    epsilon                 1                       -sigma
    v_prediction            1 / (1 + sigma^2)       -sigma / sqrt(1 + sigma^2)
    sample                  0                       1
    flow_prediction         1                       -t
    epsilon of EDM          sd^2 / (sigma^2 + sd^2) sigma sd / sqrt(sigma^2 + sd^2)
    v_prediction of EDM     sd^2 / (sigma^2 + sd^2) -sigma sd / sqrt(sigma^2 + sd^2)

Networks of Stable Audio are scaled as those of EDM.
After that the image is clipped if the scheduler says so: `clip_sample` to a range, `thresholding` to a quantile of each
image. Options of other classes that a config still holds do not count.

Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models (2022), arXiv 2206.00364.
Source: Saharia et al., Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding (2022), arXiv
2205.11487 (dynamic thresholding).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinvert.adapters.diffusers.host import class_name, option
from kinvert.adapters.diffusers.timetable import Space, space_of

__all__ = ["Clip", "Prediction", "read_prediction"]

KINDS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "original_sample": "x0", "flow_prediction": "flow"}


@dataclass(frozen=True)
class Clip:
    """How a scheduler clips the denoised image.

    Attributes:
        limit: of `clip_sample`; None for dynamic thresholding.
        ratio, largest: the quantile of dynamic thresholding, and the largest value that it may keep.
    """

    limit: float | None
    ratio: float = 1.0
    largest: float = 1.0

    def __call__(self, denoised: Tensor) -> Tensor:
        """Return the clipped image."""
        if self.limit is not None:
            return denoised.clamp(-self.limit, self.limit)
        flat = denoised.flatten(1)
        bound = torch.quantile(flat.abs(), self.ratio, dim=1, keepdim=True).clamp(1.0, self.largest)
        return (torch.maximum(torch.minimum(flat, bound), -bound) / bound).reshape(denoised.shape)


@dataclass(frozen=True)
class Prediction:
    """What a scheduler's network predicts.

    Attributes:
        kind: "eps", "v", "x0", "flow", "edm eps" or "edm v".
        sigma_data: standard deviation of the data that an EDM network is built for.
        clip: how the denoised image is clipped; None for not at all.
        has_variance: whether the network may return as many channels again, a variance that no sampler here uses.
    """

    kind: str
    sigma_data: float = 1.0
    clip: Clip | None = None
    has_variance: bool = False

    def scales(self, level: float) -> tuple[float, float]:
        """Return (c_skip, c_out)."""
        if self.kind in ("eps", "flow"):
            return 1.0, -level
        if self.kind == "x0":
            return 0.0, 1.0
        data = self.sigma_data
        total = math.hypot(level, data)
        sign = 1.0 if self.kind == "edm eps" else -1.0
        return (data / total) ** 2, sign * level * data / total

    def c_in(self, level: float) -> float:
        """Return the scale of the network's input, for a state in VE coordinates."""
        return 1.0 / math.hypot(level, self.sigma_data)

    def denoised(self, output: Tensor, x: Tensor, level: float) -> Tensor:
        """Return the denoised image before it is clipped, in x's dtype.

        Raises:
            ValueError: an output of another shape than x's.
        """
        if self.has_variance and output.shape[1] == 2 * x.shape[1]:
            output = output[:, : x.shape[1]]
        if output.shape != x.shape:
            raise ValueError(
                f"model_output must have the shape of the sample, {tuple(x.shape)}, got {tuple(output.shape)}; for a "
                "network that returns a variance too build the scheduler with variance_type='learned_range'"
            )
        skip, out = self.scales(level)
        return skip * x + out * output.to(x.dtype)


def read_prediction(scheduler: Any) -> Prediction:
    """Read what a scheduler's network predicts.

    Raises:
        ValueError: a prediction type that has no meaning in the scheduler's space.
    """
    space, name = space_of(scheduler), class_name(scheduler)
    given = option(scheduler, "prediction_type", "flow_prediction")
    kind = KINDS.get(given)
    data = float(option(scheduler, "sigma_data", 1.0))
    edm = name.startswith(("EDM", "CosineDPM"))
    if kind is None or not _fits(kind, space, edm):
        raise ValueError(
            f"{name}: prediction_type={given!r} has no meaning for states in {space} coordinates; use "
            + ("'flow_prediction'" if space == "flow" else "'epsilon' or 'v_prediction'")
        )
    return Prediction(
        f"edm {kind}" if edm else kind,
        sigma_data=data if edm else 1.0,
        clip=_clip(scheduler),
        has_variance=option(scheduler, "variance_type") in ("learned", "learned_range"),
    )


def _fits(kind: str, space: Space, edm: bool) -> bool:
    """Tell whether a prediction is defined in a space."""
    if edm:
        return kind in ("eps", "v")
    return kind == "x0" or (kind == "flow") == (space == "flow")


def _clip(scheduler: Any) -> Clip | None:
    """Return how a scheduler clips."""
    if option(scheduler, "thresholding"):
        ratio, largest = option(scheduler, "dynamic_thresholding_ratio"), option(scheduler, "sample_max_value")
        return Clip(None, float(ratio), float(largest))
    if option(scheduler, "clip_sample"):
        return Clip(float(option(scheduler, "clip_sample_range", 1.0)))
    return None
