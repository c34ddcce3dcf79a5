r"""A pipeline as a network: one evaluation is one call of the pipeline, with a scheduler of one timestep.

So the prompt, the guidance, the embeddings of sizes and the packing are the pipeline's own, and what is inverted is
what the pipeline does. The call is made on a shallow copy of the pipeline, which has its own scheduler: the user's
pipeline stays as it is, in another thread and after an exception too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kinvert.adapters.diffusers import host

__all__ = ["Memo", "OneTimestep", "PipelineNetwork", "Rows"]

KEPT = 32  # results of encoding prompts
GUIDANCE = "guidance_scale"


class OneTimestep:
    """A scheduler of one timestep, which hands the latents on and keeps what the network returned.

    Everything else that a pipeline asks of its scheduler, such as its configuration, is answered by the pipeline's own.

    Attributes:
        timesteps: the one timestep.
        sigmas: its noise level, and 0.
        seen: the prediction and the latents of each call of `step`.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, base: Any, timestep: Tensor, sigma: float) -> None:
        self.base = base
        self.timesteps = timestep.reshape(1)
        self.sigmas = torch.tensor([sigma, 0.0], dtype=torch.float32, device="cpu")
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # not set yet, while this is copied
            raise AttributeError(name)
        return getattr(self.base, name)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        **_: Any,
    ) -> None:
        """Keep the timestep, whatever is asked for."""
        self.timesteps = self.timesteps.to(device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Do nothing: there is one timestep."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the latents, which are scaled already."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, return_dict: bool = True, **__: Any
    ) -> Any:
        """Keep the prediction, and return the latents as they are."""
        self.seen.append((model_output, sample))
        return host.BaseOutput(prev_sample=sample) if return_dict else (sample,)


class Memo:
    """Results of methods of a pipeline, by their arguments; tensors are the same if they are the same object."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Any, Any]] = {}

    def around(self, method: Callable[..., Any], call: Mapping[str, Any]) -> Callable[..., Any]:
        """Return a method that is computed once for the same arguments of its own and of the pipeline's call."""

        def remembered(*args: Any, **kwargs: Any) -> Any:
            given = (method.__name__, call, args, kwargs)
            key = _key(given)
            if key not in self._known:
                while len(self._known) >= KEPT:
                    del self._known[next(iter(self._known))]
                # The arguments are kept, so that no other object gets the identity of one of them.
                self._known[key] = method(*args, **kwargs), given
            return self._known[key][0]

        return remembered


def _key(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((name, _key(value[name])) for name in sorted(value))
    if isinstance(value, (list, tuple)):
        return (type(value), *map(_key, value))
    plain = isinstance(value, (str, int, float, bool, type(None), torch.device, torch.dtype))
    return (type(value), value) if plain else id(value)


class Rows(NamedTuple):
    """Arguments of a pipeline's call, with an entry for each row of the batch where they belong to rows.

    Attributes:
        each: lists and tensors of `batch` entries, by name.
        shared: what belongs to all rows.
        batch: the number of rows; None if no argument says it, so that all rows are alike.
    """

    each: dict[str, Any]
    shared: dict[str, Any]
    batch: int | None

    @classmethod
    def of(cls, call: Mapping[str, Any]) -> Rows:
        """Sort the arguments of a call.

        Prompts, and embeddings and masks of prompts, belong to rows: a list or a tensor has an entry for each, or one
        for all. With several images a prompt, its entries are repeated.

        Raises:
            ValueError: different numbers of entries.
        """
        repeats = {name: int(call[name]) for name in host.REPEATS if call.get(name) is not None}
        repeat = max(repeats.values(), default=1)
        each, shared = dict[str, Any](), {name: 1 if name in repeats else value for name, value in call.items()}
        for name, value in call.items():
            if not host.belongs_to_rows(name) or isinstance(value, str) or value is None or name in host.REPEATS:
                continue
            if not isinstance(value, (list, tuple, Tensor)) or (isinstance(value, Tensor) and not value.ndim):
                continue
            if len(value) == 0:
                raise ValueError(f"{name} is empty; give one prompt for all images, or one for each")
            del shared[name]
            if isinstance(value, Tensor):
                each[name] = value.repeat_interleave(repeat, 0)
            else:
                each[name] = [entry for entry in value for _ in range(repeat)]
        counts = {name: len(value) for name, value in each.items() if len(value) > 1}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(f"arguments of the call must have one entry for all images, or one for each, got {said}")
        return cls(each, shared, max(counts.values(), default=None))

    def take(self, index: Tensor) -> Rows:
        """Return the arguments of the rows `index`."""
        each = {name: _taken(value, index) if len(value) > 1 else value for name, value in self.each.items()}
        return Rows(each, self.shared, None if self.batch is None else len(index))

    def joined(self, more: Mapping[str, Any]) -> Rows:
        """Return the arguments with others in place of some."""
        new = Rows.of(more)
        each, shared = ({k: v for k, v in old.items() if k not in more} for old in (self.each, self.shared))
        return Rows({**each, **new.each}, {**shared, **new.shared}, new.batch or self.batch)

    def call(self, batch: int) -> dict[str, Any]:
        """Return the arguments of a call for `batch` rows: strings and single entries are repeated.

        Raises:
            ValueError: there are other numbers of entries.
        """
        call = dict(self.shared)
        for name, value in self.shared.items():
            if host.belongs_to_rows(name) and isinstance(value, str):
                call[name] = [value] * batch
        for name, value in self.each.items():
            if len(value) not in (1, batch):
                raise ValueError(
                    f"{name} has {len(value)} entries, but there are {batch} latents; give one for all, or one for each"
                )
            if len(value) == batch:
                call[name] = value
            else:
                call[name] = value.expand(batch, *value.shape[1:]) if isinstance(value, Tensor) else value * batch
        return call


def _taken(value: Any, index: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[index.to(value.device)]
    return [value[i] for i in index.tolist()]


@dataclass(frozen=True, eq=False)
class PipelineNetwork:
    """The network of a pipeline: `(network input, timestep) -> prediction`, by one call of the pipeline.

    Attributes:
        pipe: the pipeline, which is copied for each call.
        rows: the arguments of the call.
        steps: the number of steps of the run that the evaluation belongs to, which some pipelines look at.
        memo: what encoding prompts gave.
    """

    pipe: Any
    rows: Rows
    steps: int
    memo: Memo = field(default_factory=Memo, repr=False)

    def take(self, index: Tensor) -> PipelineNetwork:
        """Return the network of the rows `index`."""
        return replace(self, rows=self.rows.take(index))

    def with_arguments(self, more: Mapping[str, Any]) -> PipelineNetwork:
        """Return the network with other arguments of the call.

        Raises:
            ValueError: another prompt where the pipeline guides by a scale that nobody named. Two prompts may be the
                branches of kinvert's guidance, and both would be guided by the pipeline again.
        """
        if not more:
            return self
        scale = host.default_guidance(self.pipe)
        named = GUIDANCE in self.rows.shared or GUIDANCE in more
        if scale > 1 and not named and any(host.belongs_to_rows(name) for name in more):
            raise ValueError(
                f"the denoiser is called with other prompts, and {type(self.pipe).__name__} guides each by its "
                f"default, {GUIDANCE}={scale:g}; say what you want: kd.denoiser(pipe, {GUIDANCE}=1.0) for guidance by "
                f"kinvert (cfg, positive, negative), or {GUIDANCE}={scale:g} for that of the pipeline"
            )
        return replace(self, rows=self.rows.joined(more))

    def run(
        self,
        scheduler: Any,
        call: Mapping[str, Any],
        watch: Mapping[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = MappingProxyType({}),
        **more: Any,
    ) -> Any:
        """Call a copy of the pipeline with another scheduler, to latents; `watch` has wrappers of its methods."""
        pipe = host.copied(self.pipe, scheduler)
        for name, wrap in watch.items():
            vars(pipe)[name] = wrap(getattr(pipe, name))
        for name in host.ENCODERS:
            if callable(method := getattr(pipe, name, None)):
                vars(pipe)[name] = self.memo.around(method, self.rows.shared)
        return pipe(num_inference_steps=self.steps, output_type="latent", **call, **more)

    def __call__(self, x: Tensor, timestep: Tensor, sigma: float) -> Tensor:
        """Return the prediction for x, shape (batch, *event), at one timestep for all rows; sigma is told to the host.

        Raises:
            ValueError: a pipeline that changes its latents before the network sees them, or makes more than one step.
        """
        call, name = self.rows.call(len(x)), type(self.pipe).__name__
        if not host.takes_latents(self.pipe):
            output = host.unconditional(self.pipe)(x, timestep, **call)
            sample: Tensor = output.sample
            return sample
        scheduler = OneTimestep(self.pipe.scheduler, timestep, sigma)
        self.run(scheduler, call, latents=x)
        if len(scheduler.seen) != 1:
            raise ValueError(
                f"{name} calls its scheduler {len(scheduler.seen)} times a step, so that one step is no evaluation of "
                "one network; make a denoiser of its network by hand (kinvert.denoisers)"
            )
        output, given = scheduler.seen[0]
        if given.shape != x.shape or not torch.equal(given, x.to(given)):
            raise ValueError(
                f"{name} changes the latents that it is given, as pipelines from image to image do; use the pipeline "
                "from text to image of the same model: its from_pipe(pipe); leave out an image or a sound to start from"
            )
        return output
