r"""Inversion jobs on a pipeline: from the latents of an image to latents that go into `pipe(latents=...)`.

The image is the state at the last noise level of the run. A run of the pipeline whose schedule ends in 0 returns the
denoised image of its last step and forgets the state. So `invert`, `extract_noise` and the methods of `round_trip` that
use them leave that step out: the image is taken as the state at the last positive level, and the scheduler that they
return ends there too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kinvert as ki
from kinvert.adapters.diffusers import host
from kinvert.adapters.diffusers.denoising import PipelineDenoiser, checked_call, denoiser_of, settings_of
from kinvert.adapters.diffusers.evaluation import PipelineNetwork
from kinvert.adapters.diffusers.scheduler import KinvertScheduler
from kinvert.checks import check_choice, check_integer, describe
from kinvert.denoisers.dtypes import checked_dtype
from kinvert.roundtrip import METHODS
from kinvert.rules import Rule
from kinvert.sampling import offset_for
from kinvert.showing.brief import brief_repr

__all__ = ["Inverted", "Unsampled", "extract_noise", "invert", "round_trip", "unsample"]


MADE = ("denoiser", "x", "sigmas", "sampler")
"""Arguments of a verb that a job makes itself."""


class Inverted(NamedTuple):
    """What `invert` and `extract_noise` return.

    Attributes:
        inversion: the certificate: what converged, to which error, at which cost. Its `latent` is in the coordinates of
            kinvert.
        latents: the same latent as the pipeline takes it, in the dtype of its network.
        scheduler: the scheduler with which the pipeline makes the image of them, with what belongs to the latent.
    """

    inversion: ki.Inversion
    latents: Tensor
    scheduler: KinvertScheduler

    def __repr__(self) -> str:
        return brief_repr(self)


class Unsampled(NamedTuple):
    """What `unsample` returns.

    Attributes:
        latents: the latents for `pipe(latents=...)`.
        scheduler: the scheduler of the run down.
    """

    latents: Tensor
    scheduler: KinvertScheduler

    def __repr__(self) -> str:
        return brief_repr(self)


def invert(
    pipe: Any,
    latents: Tensor,
    *,
    sampler: str | Rule | None = None,
    num_inference_steps: int = 50,
    tol: float | None = None,
    max_evals: int | None = None,
    dtype: torch.dtype | None = None,
    **call: Any,
) -> Inverted:
    """Find the latents from which a pipeline makes an image again, to a tolerance, and check it.

        found = kd.invert(pipe, kd.encode(pipe, photo), prompt="a cat", num_inference_steps=30)
        pipe.scheduler = found.scheduler
        pipe(prompt="a dog", latents=found.latents, num_inference_steps=30)

    Args:
        pipe: a pipeline of diffusers; see `denoiser`.
        latents: the latents of the image, from `encode` or `pipe(output_type="latent")`, of the shape that the
            pipeline gives them in this call.
        sampler: a deterministic sampler, by name or as a rule; None takes the one that equals the pipeline's scheduler.
        num_inference_steps: steps of the run, as the pipeline counts them.
        tol, max_evals: as in `ki.invert`.
        dtype: of the state; None takes that of the network. A network in half precision is exact to its own rounding
            only, whatever the state is.
        call: what the pipeline's call takes, such as `prompt`, `guidance_scale`, `height` and `width`, as for
            `denoiser`, and what `ki.invert` takes: `method`, `mask`, `callback`, `progress`, `max_batch`, ...

    Returns:
        The inversion, the latents and the scheduler. Call the pipeline with this scheduler, these latents, the same
        arguments and the same `num_inference_steps`, and it makes the image; with another prompt, an edit of it.

    Raises:
        TypeError, ValueError: as `denoiser` and `ki.invert`; a scheduler that runs upwards.
    """
    given = {"tol": tol, "max_evals": max_evals, **call}
    job = _Job.of(ki.invert, pipe, sampler, num_inference_steps, dtype, given)
    found: ki.Inversion = job.run(latents, job.above_zero)
    return job.started(found)


def extract_noise(
    pipe: Any,
    latents: Tensor,
    *,
    sampler: str | Rule | None = "euler_ancestral",
    num_inference_steps: int = 50,
    tol: float | None = None,
    dtype: torch.dtype | None = None,
    **call: Any,
) -> Inverted:
    """Extract the noises with which a stochastic sampler makes an image again, from latents that come with them.

    Args:
        sampler: a stochastic sampler, by name or as a rule; None takes the one that equals the pipeline's scheduler.
        pipe, latents, num_inference_steps, tol, dtype: as in `invert`.
        call: what the pipeline's call takes, and what `ki.extract_noise` takes: `path`, `generator`, `mask`, ...

    Returns:
        The inversion, the latents and the scheduler, which holds the noises and draws them in place of new ones.

    Raises:
        TypeError, ValueError: as `denoiser` and `ki.extract_noise`; a scheduler that runs upwards.
    """
    job = _Job.of(ki.extract_noise, pipe, sampler, num_inference_steps, dtype, {"tol": tol, **call})
    found: ki.Inversion = job.run(latents, job.above_zero)
    return job.started(found)


def unsample(
    pipe: Any,
    latents: Tensor,
    *,
    sampler: str | Rule | None = None,
    num_inference_steps: int = 50,
    dtype: torch.dtype | None = None,
    **call: Any,
) -> Unsampled:
    """Run a sampler upwards, from an image to latents from which the pipeline makes nearly the same image.

    It costs one run; `invert` is exact. A schedule that ends in 0 begins at a small level instead.

    Args:
        pipe, latents, sampler, num_inference_steps, dtype: as in `invert`.
        call: what the pipeline's call takes, and what `ki.unsample` takes: `mask`, `callback`, `progress`, ...

    Returns:
        The latents, and the scheduler for the way down.

    Raises:
        TypeError, ValueError: as `denoiser` and `ki.unsample`; `end_at_step` and `normalize`, whose latents belong
            to no run of the pipeline.
    """
    for name in ("end_at_step", "normalize", "sigma_offset"):
        if name in call:
            raise TypeError(
                f"{name} makes latents that no run of the pipeline begins with; leave it out, or use ki.unsample"
            )
    job = _Job.of(ki.unsample, pipe, sampler, num_inference_steps, dtype, {**call, "sigma_offset": 0.0})
    latent: Tensor = job.run(latents, job.from_small)
    return Unsampled(job.to_latents(latent), job.scheduler)


def round_trip(
    pipe: Any,
    latents: Tensor,
    *,
    sampler: str | Rule | None = None,
    num_inference_steps: int = 50,
    method: str = "unsample",
    dtype: torch.dtype | None = None,
    **call: Any,
) -> ki.RoundTrip:
    """Find the latents of an image, sample them back with the same sampler, levels and guidance, and measure.

    Args:
        method: how to go up, as in `ki.round_trip`: "unsample", "invert", "extract_noise" or a published inversion.
        pipe, latents, sampler, num_inference_steps, dtype: as in `invert`.
        call: what the pipeline's call takes, and what `ki.round_trip` takes: `mask`, `data_range`, ...

    Returns:
        A `RoundTrip`, whose errors are of latents.

    Raises:
        TypeError, ValueError: as `denoiser` and `ki.round_trip`; a scheduler that runs upwards.
    """
    check_choice("method", method, METHODS)
    job = _Job.of(ki.round_trip, pipe, sampler, num_inference_steps, dtype, {"method": method, **call})
    result: ki.RoundTrip = job.run(latents, job.schedule if method == "unsample" else job.above_zero)
    return result


@dataclass(frozen=True, eq=False)
class _Job:
    """A verb of kinvert on a pipeline.

    Attributes:
        verb: it.
        denoiser: the pipeline.
        scheduler: the sampler on the pipeline's levels, after `set_timesteps`.
        dtype: of the state.
        options: of the verb.
    """

    verb: Callable[..., Any]
    denoiser: PipelineDenoiser
    scheduler: KinvertScheduler
    dtype: torch.dtype
    options: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        verb: Callable[..., Any],
        pipe: Any,
        sampler: str | Rule | None,
        steps: int,
        dtype: torch.dtype | None,
        given: Mapping[str, Any],
    ) -> _Job:
        """Sort the arguments into those of the verb and those of the pipeline, and see what the pipeline would do."""
        steps = check_integer("num_inference_steps", steps)
        own = [
            name for name in inspect.signature(verb).parameters if name not in ("denoiser", "x", "sigmas", "sampler")
        ]
        rows = checked_call(pipe, {name: value for name, value in given.items() if name not in own}, own)
        scheduler = KinvertScheduler.from_scheduler(pipe.scheduler, sampler)
        network = PipelineNetwork(pipe, rows, steps)
        settings = settings_of(network, scheduler)
        made, options = denoiser_of(network, settings), {name: given[name] for name in own if name in given}
        job = cls(verb, made, settings.scheduler, checked_dtype(dtype) or made.network_dtype, options)
        if job.schedule[0] < job.schedule[-1]:
            raise ValueError(
                "pipe.scheduler runs upwards, and inversion needs the run down that it inverts; give the pipeline the "
                "scheduler that it samples with"
            )
        return job

    @property
    def schedule(self) -> Tensor:
        """The levels of the run."""
        return self.scheduler.schedule

    @property
    def above_zero(self) -> Tensor:
        """The levels without a last one of 0."""
        return self.schedule[:-1] if self.schedule[-1] == 0 else self.schedule

    @property
    def from_small(self) -> Tensor:
        """Return the levels with a small one in place of a last 0, so that a run upwards can start there."""
        levels = self.schedule.clone()
        if levels[-1] == 0:
            levels[-1] = min(offset_for(self.dtype, tuple(levels.tolist())), 0.1 * float(levels[-2]))
        return levels

    def run(self, latents: Any, schedule: Tensor) -> Any:
        """Run the verb on latents of the pipeline, as the state at the last level of `schedule`."""
        if not isinstance(latents, Tensor) or not latents.is_floating_point():
            raise TypeError(
                f"latents must be a floating point tensor, got {describe(latents)}; encode an image by kd.encode"
            )
        given = latents.to(host.device_of(self.denoiser.network.pipe), self.dtype)
        self.denoiser.check_event(given)
        x = given * self.denoiser.timetable.to_x(float(schedule[-1]))
        return self.verb(self.denoiser, x, schedule, sampler=self.scheduler.sampler, **self.options)

    def to_latents(self, state: Tensor) -> Tensor:
        """Return the state at the first level as the pipeline takes it."""
        scale = self.denoiser.timetable.to_x(float(self.schedule[0])) * host.first_noise(self.scheduler)
        return (state / scale).to(self.denoiser.network_dtype)

    def started(self, found: ki.Inversion) -> Inverted:
        """Return an inversion with the latents and the scheduler that belong to it."""
        latents, scheduler = self.scheduler.begin_with(found)
        return Inverted(found, latents.to(self.denoiser.network_dtype), scheduler)
