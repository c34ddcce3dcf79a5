"""A pipeline as a denoiser of kinvert."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kinvert.adapters.diffusers import host
from kinvert.adapters.diffusers.evaluation import PipelineNetwork, Rows
from kinvert.adapters.diffusers.own import uses_pair
from kinvert.adapters.diffusers.predictions import Prediction, read_prediction
from kinvert.adapters.diffusers.scheduler import KinvertScheduler
from kinvert.adapters.diffusers.timetable import Timetable, read_timetable
from kinvert.checks import suggestion
from kinvert.coordinates import Coordinates
from kinvert.denoisers.protocol import Guided, working_dtype

__all__ = ["PipelineDenoiser", "Settings", "denoiser", "settings_of"]

FIXED = ("latents", "num_inference_steps", "output_type", "return_dict", "callback", "callback_on_step_end")
"""Arguments of a pipeline's call that an evaluation sets itself."""


@dataclass(frozen=True, eq=False)
class PipelineDenoiser:
    """A pipeline as a denoiser, made by `denoiser`: `(x, sigma, **more arguments of the call) -> denoised`.

    Attributes:
        network: the pipeline as a network, with the arguments of the call.
        timetable: the levels of a run of the pipeline, and the network's time at each.
        prediction: what the network predicts.
        event: the shape of one latent of such a run; None if the pipeline does not say it.
        pair: whether it returns `Guided(clipped, unclipped)`, for a scheduler whose steps keep the unclipped noise.
    """

    network: PipelineNetwork
    timetable: Timetable
    prediction: Prediction
    event: tuple[int, ...] | None
    pair: bool = False

    @property
    def coordinates(self) -> Coordinates:
        """What x and sigma are: sigmas of variance-exploding coordinates, or flow times."""
        return "flow" if self.timetable.space == "flow" else "ve"

    @property
    def sigmas(self) -> Tensor:
        """The levels of a run of the pipeline, as its own scheduler has them: `FlowTimes` for flow models."""
        return self.timetable.schedule

    @property
    def network_dtype(self) -> torch.dtype:
        """The dtype that the network computes in."""
        return host.network_dtype(self.network.pipe)

    def take(self, index: Tensor) -> PipelineDenoiser:
        """Return the denoiser of the rows `index`, shape (n,): of their prompts."""
        return replace(self, network=self.network.take(index))

    def __call__(self, x: Tensor, sigma: Tensor, **more: Any) -> Tensor | Guided:
        """Return the denoised x, shape (batch, *event), by one call of the pipeline.

        Args:
            x: the state, x_t for flow models.
            sigma: its noise level or flow time, shape (batch,).
            more: other arguments of the pipeline's call for this evaluation, e.g. `prompt="a dog"`: what `positive`
                and `negative` of kinvert's verbs hold.

        Raises:
            ValueError: x of another shape than the pipeline's latents, another number of prompts than rows.
        """
        self.check_event(x)
        network, levels = self.network.with_arguments(more), sigma.tolist()
        if len(set(levels)) == 1:
            return self._at(x, levels[0], network)
        # A call of a pipeline has one timestep.
        rows = [torch.tensor([i], device=x.device) for i in range(len(x))]
        parts = [self._at(x[i], level, network.take(i)) for i, level in zip(rows, levels, strict=True)]
        if self.pair:
            return Guided(*(torch.cat([part[k] for part in parts]) for k in range(2)))
        return torch.cat([part for part in parts if isinstance(part, Tensor)])

    def _at(self, x: Tensor, level: float, network: PipelineNetwork) -> Tensor | Guided:
        """Return the denoised x at one level for all rows."""
        wide, given = working_dtype(x), x.to(working_dtype(x))
        scaled = given if self.coordinates == "flow" else given * self.prediction.c_in(level)
        output = network(scaled.to(self.network_dtype), self._timestep(level, x.device), level)
        denoised = self.prediction.denoised(output.to(x.device, wide), given, level)
        clip = self.prediction.clip
        clipped = denoised if clip is None else clip(denoised)
        return Guided(clipped.to(x.dtype), denoised.to(x.dtype)) if self.pair else clipped.to(x.dtype)

    def _timestep(self, level: float, device: torch.device) -> Tensor:
        """Return the network's time, shape (1,): an integer where the scheduler has integers."""
        t = self.timetable.timestep(level)
        dtype = torch.int64 if self.timetable.integral and t.is_integer() else torch.float32
        return torch.tensor([t], dtype=dtype, device=device)

    def check_event(self, x: Tensor) -> None:
        """Raise ValueError if x is no batch of the pipeline's latents."""
        if self.event is not None and tuple(x.shape[1:]) != self.event:
            name, known = type(self.network.pipe).__name__, host.parameters_of(self.network.pipe)
            fix = "give the call height= and width= of the image, or encode the image in that size"
            if "height" not in known:
                fix = "encode the sound by kd.encode, or give the call the length of the sound"
            raise ValueError(
                f"latents must have the shape that {name} gives them in this call, "
                f"(batch, {', '.join(map(str, self.event))}), got {tuple(x.shape)}; {fix}"
            )


def denoiser(pipe: Any, *, num_inference_steps: int = 50, **call: Any) -> PipelineDenoiser:
    """Make a denoiser of a pipeline, through the pipeline's own call.

    One evaluation is one call of the pipeline with a scheduler of one timestep. The conditioning, the guidance, the
    embeddings and the packing of latents are the pipeline's own. Prompts are encoded once. The pipeline itself stays
    as it is.

    Args:
        pipe: a pipeline of diffusers from text or nothing to an image, a video or a sound. Its call must take
            `latents=`; a pipeline of a U-Net alone, such as `DDPMPipeline`, has its network called by itself, and
            `call` holds what that takes, such as `class_labels`.
        num_inference_steps: the number of steps that `sigmas` are for.
        call: what the pipeline's call takes, as you would call it: `prompt`, `negative_prompt`, `guidance_scale`,
            `height`, `width`, ... A list of prompts has one for each row of the batch; a single prompt is that of all.

    Returns:
        The denoiser. Its `sigmas` are the levels of the pipeline's own scheduler, its `coordinates` say what they and x
        are: the state `x0 + sigma eps`, or `x_t = (1 - t) x0 + t eps` for flow models.

    Raises:
        ValueError: a pipeline or an argument that cannot work, with the fix; what the pipeline itself refuses.
    """
    rows = checked_call(pipe, call)
    network = PipelineNetwork(pipe, rows, num_inference_steps)
    settings = settings_of(network, pipe.scheduler)
    return denoiser_of(network, settings)


def denoiser_of(network: PipelineNetwork, settings: Settings) -> PipelineDenoiser:
    """Return the denoiser of a pipeline whose settings were seen."""
    base = settings.scheduler
    if isinstance(base, KinvertScheduler):
        base = base._base
    pair = uses_pair(base)
    return PipelineDenoiser(network, read_timetable(base), read_prediction(base), settings.event, pair)


def checked_call(pipe: Any, call: Mapping[str, Any], others: Sequence[str] = ()) -> Rows:
    """Return the arguments of a pipeline's call; raise TypeError for those that it does not take.

    `others` are names that the caller takes itself, which the message offers too.
    """
    taken = host.parameters_of(pipe) if host.takes_latents(pipe) else host.parameters_of_network(pipe)
    known = [name for name in taken if name not in ("self", "kwargs", *FIXED)]
    for name in call:
        if name in FIXED:
            raise TypeError(f"{name} is not for an evaluation of the pipeline, which sets it itself; leave it out")
        if name not in known:
            raise TypeError(f"{type(pipe).__name__} has no argument {name!r}; {suggestion(name, [*known, *others])}")
    return Rows.of(call)


# -- what a run of the pipeline would do ------------------------------------------------------------------------------
class _Seen(BaseException):
    """Ends a call of a pipeline when all that was asked for was seen; no pipeline catches it."""


@dataclass(frozen=True, eq=False)
class Settings:
    """What a run of a pipeline would do.

    Attributes:
        scheduler: a copy of its scheduler, after the pipeline has set the timesteps.
        event: the shape of one latent; None if the pipeline does not say it.
    """

    scheduler: Any
    event: tuple[int, ...] | None


def settings_of(network: PipelineNetwork, scheduler: Any) -> Settings:
    """Begin a run of the pipeline with a scheduler, and stop it before the first evaluation.

    So the levels are those that the pipeline asks for, with all that it tells its scheduler, and the latents have the
    shape that it makes. The scheduler stays as it is.
    """
    scheduler, pipe = copy.deepcopy(scheduler), network.pipe
    if not host.takes_latents(pipe):
        host.unconditional(pipe)
        scheduler.set_timesteps(network.steps)
        return Settings(scheduler, None)
    wanted, seen = {"set_timesteps"}, dict[str, Any]()
    options: dict[str, Any] = {}
    if "generator" in host.parameters_of(pipe):
        options["generator"] = torch.Generator().manual_seed(0)  # leaves the random numbers of the user alone

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)  # pipelines look at the parameters
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[method.__name__] = method(*args, **kwargs)
            if wanted <= seen.keys():
                raise _Seen
            return seen[method.__name__]

        return call

    scheduler.set_timesteps = watched(scheduler.set_timesteps)
    watch = {}
    if callable(getattr(pipe, "prepare_latents", None)):
        wanted.add("prepare_latents")
        watch["prepare_latents"] = watched
    call = network.rows.call(network.rows.batch or 1)
    with contextlib.suppress(_Seen):
        network.run(scheduler, call, watch=watch, **options)
    del scheduler.set_timesteps  # the watched one
    latents = seen.get("prepare_latents")
    latents = latents[0] if isinstance(latents, tuple) else latents
    return Settings(scheduler, None if latents is None else tuple(latents.shape[1:]))
