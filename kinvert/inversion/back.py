r"""The way back: what the sampler makes of a latent, with all that belongs to it.

A latent alone is enough for a deterministic sampler that starts from x alone. An algebraically reversible one needs its
auxiliary state, a stochastic one its noises, null-text inversion its embeddings, RF-Inversion its steering; and all
need the conditioning and the mask that they were inverted with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kinvert.checks import has_values, is_number, plain
from kinvert.coordinates import Coordinates, coordinates_of, settle
from kinvert.denoisers import BoundDenoiser, Cfg, Denoiser, Masked, expand, guide, step_cfg
from kinvert.engine import Callback, Progress, advance, check_state, run_state, stage_sigmas
from kinvert.flowtimes import FlowTimes
from kinvert.noise import replay
from kinvert.packing import refuse_unsaved
from kinvert.parts import in_parts
from kinvert.plan import Plan, Step, compile_plan
from kinvert.ready import with_bar
from kinvert.rules import Rule
from kinvert.sampling import sample
from kinvert.showing.brief import brief_repr

__all__ = ["Steering", "WayBack", "sample_embedded", "steer"]

Conditioning = Mapping[str, Any] | None


@dataclass(frozen=True)
class Steering:
    """How the sampler is steered towards the image; see `steer`."""

    eta: float
    until: float = 0.0

    __repr__ = brief_repr


@dataclass(frozen=True, eq=False)
class WayBack:
    """The sampling run that an inversion undid.

    Attributes:
        sampler: the rule, as it is in these coordinates.
        sigmas: its schedule, decreasing.
        coordinates: what the numbers of the schedule mean.
        cfg, positive, negative: the conditioning that was inverted with.
        mask: 1 where it was inverted, 0 where `image` was kept; None: everywhere.
        image: what was inverted, shape (batch, *event).
        steering: how the sampler is steered towards the image; None: not at all.
    """

    sampler: Rule
    sigmas: tuple[float, ...]
    coordinates: Coordinates = "ve"
    cfg: Cfg = 1.0
    positive: Conditioning = None
    negative: Conditioning = None
    mask: Tensor | None = None
    image: Tensor | None = None
    steering: Steering | None = None

    __repr__ = brief_repr

    def __post_init__(self) -> None:
        for name in ("mask", "image"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, plain(value).detach())

    def sample(
        self,
        denoiser: Denoiser,
        latent: Tensor,
        *,
        memory: Mapping[str, Tensor],
        noises: Sequence[Tensor],
        embeddings: Mapping[str, Tensor],
        callback: Callback | None = None,
        progress: bool = False,
        max_batch: int | None = None,
    ) -> Tensor:
        """Sample the latent with what belongs to it; see `Inversion.sample`."""
        for name in ("cfg", "positive", "negative"):
            refuse_unsaved(name, getattr(self, name))
        guidance: dict[str, Any] = {"cfg": self.cfg, "positive": self.positive, "negative": self.negative}
        sigmas = FlowTimes(self.sigmas) if self.coordinates == "flow" else self.sigmas
        if self.steering is not None and self.image is not None:
            guided = guide(denoiser, batch=len(latent), coordinates=self.coordinates, **guidance)
            steering = self.steering
            parts = in_parts(guided, latent, max_batch, graph=False)
            denoiser = steer(parts, self.image, self.sigmas[-1], eta=steering.eta, until=steering.until)
            guidance, max_batch = {}, None
        if embeddings:
            plan = compile_plan(self.sampler, self.sigmas)
            return sample_embedded(
                plan, denoiser, latent, embeddings, callback=callback, progress=progress, max_batch=max_batch,
                **guidance,
            )  # fmt: skip
        if memory:
            denoise = in_parts(self._bound(denoiser, latent, sigmas), latent, max_batch, graph=False)
            if self.mask is not None and self.image is not None:
                denoise = Masked(denoise, self.mask, self.image, coordinates=self.coordinates)
            return self._sample_pair(denoise, latent, memory, noises, callback, progress)
        kept: dict[str, Any] = {}
        if self.mask is not None and self.image is not None:
            kept = {"mask": self.mask, "latent": self.image, "mask_noise": torch.zeros_like(self.image)}
        return sample(
            denoiser, latent, sigmas, sampler=self.sampler, noise=replay(list(noises)) if noises else None,
            callback=callback, progress=progress, max_batch=max_batch, **guidance, **kept,
        )  # fmt: skip

    def _bound(self, denoiser: Denoiser, latent: Tensor, sigmas: Any) -> Any:
        _, rule, schedule = settle(denoiser, self.sampler, sigmas)
        pair = compile_plan(rule, schedule).is_guided
        cfg = step_cfg(self.cfg, schedule)
        return guide(
            denoiser, cfg, self.positive, self.negative, pair=pair, batch=len(latent), coordinates=self.coordinates
        )

    def bound(self, denoiser: Denoiser, image: Tensor) -> tuple[Plan, BoundDenoiser]:
        """Return the Plan of the run, and the denoiser with its conditioning and its mask around `image`."""
        for name in ("cfg", "positive", "negative"):
            refuse_unsaved(name, getattr(self, name))
        sigmas = FlowTimes(self.sigmas) if self.coordinates == "flow" else self.sigmas
        guided: BoundDenoiser = self._bound(denoiser, image, sigmas)
        if self.mask is not None:
            guided = Masked(guided, self.mask, image, coordinates=self.coordinates)
        return compile_plan(self.sampler, self.sigmas), guided

    def _sample_pair(
        self,
        denoiser: Denoiser,
        latent: Tensor,
        memory: Mapping[str, Tensor],
        noises: Sequence[Tensor],
        callback: Callback | None,
        bar: bool,
    ) -> Tensor:
        plan = compile_plan(self.sampler, self.sigmas).closed
        if bar:
            steps = sum(1 for step in plan.steps if step.stages)  # the first step of a given pair may need none
            callback = with_bar(callback, f"sample {self.sampler.name}", steps, plan.sigmas[-1])
        noise = replay(list(noises)) if noises else None
        image = run_state(plan, denoiser, {"x": latent, **memory}, noise, callback)["x"]
        if has_values(image) and not bool(image.isfinite().all()):
            raise ValueError(f"{self.sampler.name}: the result is not finite; check the denoiser, or use a wider dtype")
        return image

    def with_guidance(self, cfg: Cfg | None, positive: Conditioning, negative: Conditioning) -> WayBack:
        """Return the same way with other conditioning; None keeps what was inverted with."""
        return replace(
            self,
            cfg=self.cfg if cfg is None else cfg,
            positive=self.positive if positive is None else positive,
            negative=self.negative if negative is None else negative,
        )


def sample_embedded(
    plan: Plan,
    denoiser: Denoiser,
    x: Tensor,
    embeddings: Mapping[str, Tensor],
    *,
    cfg: float = 1.0,
    positive: Conditioning = None,
    negative: Conditioning = None,
    callback: Callback | None = None,
    progress: bool = False,
    max_batch: int | None = None,
) -> Tensor:
    """Sample with a negative conditioning for each step: `embeddings`, by keyword, shape (steps, batch, ...)."""
    if progress:
        callback = with_bar(callback, f"sample {plan.rule.name}", len(plan.steps), plan.sigmas[-1])
    for step in plan.steps:
        at_step = {key: value[step.index] for key, value in embeddings.items()}
        bound = guide(denoiser, cfg, positive, {**(negative or {}), **at_step}, batch=len(x))
        parts, level = in_parts(bound, x, max_batch, graph=False), stage_sigmas([step.sigma], x)
        state, seen = advance(step, parts, {"x": x}, lambda *_: x, level, watched=callback is not None)  # noqa: B023
        x = state["x"]
        if callback is not None and seen is not None:
            callback(Progress(step.index, step.sigma, step.sigma_next, *seen, evaluations=step.index + 1))
    return x


def guided_step(
    step: Step, denoiser: Denoiser, x: Tensor, cfg: Any, positive: Conditioning, negative: Conditioning
) -> Tensor:
    """Make one step of a deterministic one-step Plan with its own conditioning."""
    bound = guide(denoiser, cfg, positive, negative)
    return advance(step, bound, {"x": x}, lambda *_: x, stage_sigmas([step.sigma], x))[0]["x"]


def steer(denoiser: Denoiser, image: Tensor, sigma_end: float, *, eta: float, until: float = 0.0) -> Denoiser:
    r"""A denoiser steered towards an image: RF-Inversion's controlled sampling, `(1 - eta) D + eta D_0`.

    `D_0 = x - sigma (x - image) / (sigma - sigma_end)` is what a denoiser would return from which every Euler run ends
    at the image. Sample with it, and with other conditioning, to edit. `eta=1` gives the image back, `eta=0` the
    denoiser.

    Args:
        denoiser: `denoiser(x, sigma, **conditioning) -> denoised`.
        image: the state at `sigma_end`, shape (batch, *event).
        sigma_end: the last noise level of the run.
        eta: how far it is steered, 0 to 1.
        until: steer at noise levels from here up only.

    Raises:
        TypeError, ValueError: eta out of [0, 1], an image that is no batch of states; in a call, one that does not
            fit x.

    Source: Rout et al., Semantic Image Inversion and Editing using Rectified Stochastic Differential Equations (2024),
    arXiv 2410.10792, with sigma_end = 0.
    """
    check_unit("eta", eta)
    image = check_state(image)

    def steered(x: Tensor, sigma: Tensor, **conditioning: Any) -> Tensor:
        denoised: Any = denoiser(x, sigma, **conditioning)
        level = expand(sigma, x)
        if len(x) % len(image) or x.shape[1:] != image.shape[1:]:
            raise ValueError(f"image has shape {tuple(image.shape)}, which does not fit x's {tuple(x.shape)}")
        target = image.repeat(len(x) // len(image), *[1] * (x.ndim - 1))  # guidance may ask for two branches at once
        aim = torch.where(level > sigma_end, x - level * (x - target) / (level - sigma_end), target)
        return torch.where(level >= until, torch.lerp(denoised, aim, eta), denoised)

    steered.coordinates = coordinates_of(denoiser)  # type: ignore[attr-defined]  # its formula holds in both
    return steered


def check_unit(name: str, value: Any) -> None:
    """Raise ValueError if `value` is not a number from 0 to 1."""
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 (not steered) to 1, got {value!r}")
