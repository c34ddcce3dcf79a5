r"""Guidance beyond a scale: functions of the two predictions, for `cfg=` of every verb.

With C and U the conditional and the unconditional prediction, plain guidance is `U + w (C - U)`. Each class here
replaces it (`APG`, `CFGZeroStar`) or goes around it (`Rescale`, `Interval`, `DynamicThreshold`, which take a scale or
another of these functions). All are functions of one evaluation, of each sample by itself: so `invert` inverts them.
What needs the past (momentum) or the number of a step (setting the first steps to zero) is left out.

A method is defined on one kind of prediction, `space`: on the denoised images "x0", the noises "eps", "v" or the
velocities "velocity". On another kind it is another method. Norms, means and inner products are over a sample.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kinvert.checks import check_number
from kinvert.denoisers.branches import Branches, Combination, Combine, Function, Model, Space, check_kind, check_space
from kinvert.denoisers.cfg import NEAR, Linear, settled_cfg
from kinvert.denoisers.protocol import expand
from kinvert.tensors import per_sample

__all__ = [
    "APG",
    "Branches",
    "CFGZeroStar",
    "Combination",
    "DynamicThreshold",
    "Function",
    "Interval",
    "Modifier",
    "Rescale",
]


@dataclass(frozen=True)
class APG(Combination):
    r"""Adaptive projected guidance: less of what is parallel to the conditional prediction.

    `d = (C - U) min(1, r / |C - U|)`, `p = C <d, C> / <C, C>`, and the result is `C + (w - 1) (d - p + eta p)`. With
    `eta = 1` and r infinite it is plain guidance. The momentum of the publication, a mean over earlier steps, is left
    out.

    Args:
        scale: w.
        eta: how much of the parallel part is kept.
        norm_threshold: r, the largest norm of `C - U`; infinite for none.
        space: the kind of prediction; that of the publication is the denoised image.

    Raises:
        TypeError, ValueError: a scale or eta that is not a finite number, a threshold that is not positive, an unknown
            space; where it is used, a space that the model does not have.

    Source: Sadat, Hilliges and Weber, Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion
    Models (2024), arXiv 2410.02416.
    """

    scale: float
    eta: float = 0.0
    norm_threshold: float = math.inf
    space: Space = "x0"

    def __post_init__(self) -> None:
        check_number("scale", self.scale)
        check_number("eta", self.eta)
        if self.norm_threshold != math.inf:
            check_number("norm_threshold", self.norm_threshold, above=0, fix="math.inf sets no threshold")
        check_space(self.space)

    def combine(self, branches: Branches) -> Tensor:
        """See `Combination`."""
        return branches.combined(self._projected, self.space)

    def check(self, model: Model, pair: bool) -> None:
        """See `Combination`."""
        check_kind(self.space, model)

    def _projected(self, cond: Tensor, uncond: Tensor, sigma: Tensor) -> Tensor:
        difference = cond - uncond
        if self.norm_threshold != math.inf:
            shrink = _ratio(torch.full_like(sigma, self.norm_threshold), _norm(difference)).clamp(max=1.0)
            difference = difference * per_sample(shrink, cond)
        parallel = cond * per_sample(_ratio(_dot(difference, cond), _dot(cond, cond)), cond)
        return cond + (self.scale - 1.0) * (difference - parallel + self.eta * parallel)


@dataclass(frozen=True)
class CFGZeroStar(Combination):
    r"""The optimised scale of CFG-Zero*: the unconditional prediction is scaled to fit the conditional one first.

    `s = <C, U> / <U, U>`, and the result is `s U + w (C - s U)`. At `w = 1` it is C. The zero-init of the publication,
    which leaves out the first steps, is a matter of the schedule and left out here. CFG++ samplers, which step along
    U itself, refuse it.

    Args:
        scale: w.
        space: the kind of prediction; that of the publication is the velocity.

    Raises:
        TypeError, ValueError: a scale that is not a finite number, an unknown space; where it is used, a space that the
            model does not have.

    Source: Fan et al., CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models (2025), arXiv 2503.18886.
    """

    scale: float
    space: Space = "velocity"

    def __post_init__(self) -> None:
        check_number("scale", self.scale)
        check_space(self.space)

    def combine(self, branches: Branches) -> Tensor:
        """See `Combination`."""
        return branches.combined(self._fitted, self.space)

    def check(self, model: Model, pair: bool) -> None:
        """See `Combination`."""
        check_kind(self.space, model)
        if pair:
            raise ValueError(
                f"cfg={self!r} does not go with CFG++ samplers: it scales the unconditional prediction, along which "
                "they step; use a sampler without cfg_pp in its name, or a number"
            )

    def _fitted(self, cond: Tensor, uncond: Tensor, sigma: Tensor) -> Tensor:
        fitted = uncond * per_sample(_ratio(_dot(cond, uncond), _dot(uncond, uncond)), cond)
        return torch.lerp(fitted, cond, self.scale)


@dataclass(frozen=True)
class Modifier(Combination):
    """A change of what another guidance gives.

    Attributes:
        guidance: that guidance: a scale, one of this module, or a function `(cond, uncond, sigma) -> denoised`.
    """

    guidance: float | Combination | Combine

    def __post_init__(self) -> None:
        found = settled_cfg(self.guidance)
        if not isinstance(found, Combination) and not callable(found):
            found = check_number("guidance", found, fix="pass a scale, or a function (cond, uncond, sigma) -> denoised")
        object.__setattr__(self, "guidance", found)

    @property
    def stateful(self) -> bool:
        """See `Combination`."""
        return self._guidance.stateful

    @property
    def _guidance(self) -> Combination:
        return self.guidance if isinstance(self.guidance, Combination) else Linear(self.guidance)  # type: ignore[arg-type]

    def combine(self, branches: Branches) -> Tensor:
        """See `Combination`."""
        return self._changed(self._guidance.combine(branches), branches)

    def check(self, model: Model, pair: bool) -> None:
        """See `Combination`."""
        self._guidance.check(model, pair)

    @abstractmethod
    def _changed(self, guided: Tensor, branches: Branches) -> Tensor:
        """Return what becomes of the guided D."""


@dataclass(frozen=True)
class Rescale(Modifier):
    r"""CFG-rescale: guided predictions with the standard deviation of the conditional ones, or closer to it.

    With G the guided prediction, `G (1 - f + f std(C) / std(G))`. At `f = 0` it is G.

    Args:
        guidance: what G is: a scale, or another guidance.
        factor: f, from 0 to 1; 0.7 in the publication.
        space: the kind of prediction; None is the kind that the network predicts, as in the publication, where the
            network predicts v.

    Raises:
        TypeError, ValueError: a factor that is not a number from 0 to 1, an unknown space; where it is used, a space
            that the model does not have, or None with a denoiser that does not say what its network predicts.

    Source: Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed (2023), arXiv 2305.08891, Eqs. 15
    and 16.
    """

    factor: float = 0.7
    space: Space | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("factor", self.factor, low=0.0, below=1.0 + 1e-12, fix="pass a number from 0 to 1")
        if self.space is not None:
            check_space(self.space)

    def check(self, model: Model, pair: bool) -> None:
        """See `Combination`."""
        super().check(model, pair)
        space = self.space or model.prediction
        if space is None:
            raise ValueError(
                f"cfg={self!r} rescales what the network predicts, and the denoiser does not say what that is; give "
                "Rescale(..., space=): 'eps', 'v', 'velocity' or 'x0'"
            )
        check_kind(space, model)

    def _changed(self, guided: Tensor, branches: Branches) -> Tensor:
        space = self.space or branches.model.prediction or "x0"
        other = Branches(branches.cond, guided, branches.x, branches.sigma, branches.model)
        return other.combined(self._rescaled, space)

    def _rescaled(self, cond: Tensor, guided: Tensor, sigma: Tensor) -> Tensor:
        ratio = _ratio(_spread(cond), _spread(guided), otherwise=1.0)
        return guided * per_sample(1.0 - self.factor + self.factor * ratio, cond)


@dataclass(frozen=True)
class Interval(Modifier):
    r"""Guidance at noise levels in `(low, high]` only; at all others the conditional prediction.

    CFG++ samplers refuse it: without guidance they have no plain form, since they step along U at every level.

    Args:
        guidance: what to use in the interval: a scale, or another guidance.
        low, high: noise levels, in the unit of the run: sigmas, or flow times. Which are good depends on the
            model.

    Raises:
        TypeError, ValueError: levels that are not numbers with `0 <= low < high`; where it is used, a CFG++ sampler, or
            levels above 1 for a model in flow time.

    Source: Kynkäänniemi et al., Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
    Diffusion Models (2024), arXiv 2404.07724.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("low", self.low, low=0.0, fix="0 guides down to the last level")
        if self.high != math.inf:
            check_number("high", self.high, above=self.low, fix="it is the noisier end; math.inf guides from the start")

    def check(self, model: Model, pair: bool) -> None:
        """See `Combination`."""
        super().check(model, pair)
        if pair:
            raise ValueError(
                f"cfg={self!r} does not go with CFG++ samplers, which step along the unconditional prediction outside "
                "of the interval, too; use a sampler without cfg_pp in its name"
            )
        if model.coordinates == "flow" and self.low >= 1.0:
            raise ValueError(
                f"cfg={self!r} is for sigmas, and the model is in flow time, from 0 to 1; convert them by "
                "t = sigma / (1 + sigma)"
            )

    def _changed(self, guided: Tensor, branches: Branches) -> Tensor:
        sigma = expand(branches.sigma, guided)
        inside = (sigma > self.low * (1 + NEAR)) & (sigma <= self.high * (1 + NEAR))
        return torch.where(inside, guided, branches.cond)


@dataclass(frozen=True)
class DynamicThreshold(Modifier):
    r"""Dynamic thresholding: guided images that leave their range are clipped to a percentile and scaled back.

    `s = max(limit, the percentile of |D|)`, and the result is `clip(D, -s, s) limit / s`, of the denoised image D. It
    is for models of pixels; the values of latents have no limit.

    Args:
        guidance: what D is: a scale, or another guidance.
        percentile: the part of the values that are not clipped, between 0 and 1; 0.995 in the publication.
        limit: the largest absolute value of the data.

    Raises:
        TypeError, ValueError: a percentile that is not a number between 0 and 1, a limit that is not positive.

    Source: Saharia et al., Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding (2022), arXiv
    2205.11487.
    """

    percentile: float = 0.995
    limit: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("percentile", self.percentile, above=0.0, below=1.0, fix="0.995 is that of the publication")
        check_number("limit", self.limit, above=0.0)

    def _changed(self, guided: Tensor, branches: Branches) -> Tensor:
        highest = per_sample(_quantile(guided.abs(), self.percentile).clamp(min=self.limit), guided)
        return torch.maximum(torch.minimum(guided, highest), -highest) * (self.limit / highest)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each sample, shape (batch,)."""
    return (a * b).reshape(len(a), -1).sum(1)


def _norm(a: Tensor) -> Tensor:
    return a.reshape(len(a), -1).norm(dim=1)


def _spread(a: Tensor) -> Tensor:
    """Return the standard deviation of each sample times the root of the number of its values."""
    flat = a.reshape(len(a), -1)
    return _norm(flat - flat.mean(1, keepdim=True))


def _ratio(a: Tensor, b: Tensor, otherwise: float = 0.0) -> Tensor:
    """Return a / b, and `otherwise` where b is 0."""
    there = b != 0
    return torch.where(there, a / torch.where(there, b, 1.0), otherwise)


def _quantile(values: Tensor, share: float) -> Tensor:
    """Return the quantile of each sample, interpolated linearly, shape (batch,); torch's has a limit of size."""
    flat = values.reshape(len(values), -1)
    place = share * (flat.shape[1] - 1)
    above = flat.topk(flat.shape[1] - math.floor(place), dim=1).values
    low, high = above[:, -1], above[:, -2] if above.shape[1] > 1 else above[:, -1]
    return low + (place - math.floor(place)) * (high - low)
