"""A run of kinvert inside the host's own sampling.

The host samples with a function in place of its sampler (`host.to_sampler`) and calls it as

    function(model_k, x, sigmas, extra_args, callback, disable)

with x at the level `sigmas[0]` in the units of the network, and `model_k(x, sigma, **extra_args) -> denoised` for the
whole batch: with guidance, areas, masks, time ranges, ControlNets, hooks and patches of the model. `Call` is what such
a call gives to kinvert, and `HostDenoiser` is `model_k` as a denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from kinvert.adapters.comfyui import host
from kinvert.coordinates import Coordinates, settle
from kinvert.denoisers import Guided
from kinvert.devices import widest
from kinvert.engine import Progress
from kinvert.ready import Ready
from kinvert.rules import Rule, SASolver

__all__ = ["Call", "HostDenoiser", "Work", "run_inside"]

T = TypeVar("T")


@dataclass(eq=False)
class _Evaluations:
    """What all cuts of a denoiser share: how often the host was called, and who is told."""

    count: int = 0
    told: Callable[[int, Tensor, Tensor], None] | None = None
    uncond: Tensor | None = None


@dataclass(frozen=True, eq=False)
class HostDenoiser:
    """The host's `model_k` as a denoiser of some rows of its batch.

    The conditioning belongs to the whole batch, so a call for some rows is made for all, the others filled with copies,
    and its result is cut.

    Attributes:
        model_k: `model_k(x, sigma, **arguments) -> denoised`.
        arguments: the host's extra arguments.
        batch: number of rows that the host expects.
        rows: which of them this is the denoiser of; one may be there several times.
        coordinates: of x and sigma.
        levels: the host's model sampling.
        network_dtype: what the network computes in.
        pair: return `Guided`, for CFG++ samplers.
        narrow: give the host x in float32, as its own samplers do.
        evaluations: the books.
    """

    model_k: Callable[..., Tensor]
    arguments: Mapping[str, Any] = field(repr=False)
    batch: int
    rows: tuple[int, ...]
    coordinates: Coordinates
    levels: Any = field(repr=False)
    network_dtype: torch.dtype
    pair: bool = False
    narrow: bool = True
    evaluations: _Evaluations = field(default_factory=_Evaluations, repr=False)

    def take(self, index: Tensor) -> HostDenoiser:
        """Return the denoiser of the rows `index`, shape (n,)."""
        return replace(self, rows=tuple(self.rows[i] for i in index.tolist()))

    def paired(self) -> HostDenoiser:
        """Return the denoiser that returns the unconditional prediction too."""

        def remember(given: dict[str, Any]) -> Tensor:
            self.evaluations.uncond = given["uncond_denoised"]
            denoised: Tensor = given["denoised"]
            return denoised

        options = host.after_guidance(self.arguments.get("model_options", {}), remember)
        return replace(self, arguments={**self.arguments, "model_options": options}, pair=True)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor | Guided:
        """Return the denoised x, shape (n, *event), n the number of rows."""
        if self.rows == tuple(range(self.batch)) and (len(x) == 1 or bool((sigma == sigma[0]).all())):
            return self._evaluate(x, sigma)
        levels, todo = sigma.tolist(), list(range(len(x)))
        outputs: list[Any] = [None] * len(x)
        while todo:
            places, now = self._together(x, levels, todo)
            source = torch.tensor([places.get(row, todo[0]) for row in range(self.batch)], device=x.device)
            result = self._evaluate(x[source], sigma[source])
            for position in now:
                row = self.rows[position]
                outputs[position] = Guided(*(part[row] for part in result)) if self.pair else result[row]
            todo = [position for position in todo if position not in now]
        if self.pair:
            return Guided(*(torch.stack(parts) for parts in zip(*outputs, strict=True)))
        return torch.stack(outputs)

    def _together(self, x: Tensor, levels: list[float], todo: list[int]) -> tuple[dict[int, int], list[int]]:
        """Return where each row of one call of the host comes from, and which positions it answers.

        A call has one noise level. A row that is there several times takes several calls, unless all are equal.
        """
        places: dict[int, int] = {}
        now = []
        for position in todo:
            first = places.get(self.rows[position], position)
            if levels[position] == levels[todo[0]] and (first == position or torch.equal(x[first], x[position])):
                places[self.rows[position]] = first
                now.append(position)
        return places, now

    def _evaluate(self, x: Tensor, sigma: Tensor) -> Tensor | Guided:
        """Call the host for its whole batch.

        What is lost of x in float32 is added to D, since `x - D` is divided by sigma, which may be 1e-4.
        """
        host.check_interrupted()
        seen = x.to(torch.float32) if self.narrow else x
        lost = x - seen.to(x.dtype)
        denoised = self.model_k(seen, sigma.to(torch.float32), **self.arguments).to(x.dtype) + lost
        self.evaluations.count += 1
        if self.evaluations.told is not None:
            self.evaluations.told(self.evaluations.count, x, denoised)
        if not self.pair:
            return denoised
        uncond, self.evaluations.uncond = self.evaluations.uncond, None
        if uncond is None:
            raise RuntimeError(
                "the host gave no unconditional prediction, which a CFG++ sampler needs; take a sampler without "
                "'cfg_pp', or remove the patch that replaces the guidance of the model"
            )
        return Guided(denoised, uncond.to(x.dtype) + lost)


@dataclass(frozen=True, eq=False)
class Call:
    """What the host gives to a function in place of its sampler.

    Attributes:
        denoiser: of the whole batch.
        x: the state at `levels[0]`, shape (batch, *event), in the units of the network, float64 if the device has it.
        sigmas: the host's schedule.
        levels: the same as floats, without repeats.
        seed: of the noise.
        mask: the mask as the host prepared it, of x's shape, or None.
        guider: the host's guider, which knows the model.
        callback: the host's own, or None.
    """

    denoiser: HostDenoiser
    x: Tensor
    sigmas: Tensor
    levels: tuple[float, ...]
    seed: int
    mask: Tensor | None
    guider: Any
    callback: Callable[[dict[str, Any]], None] | None

    @classmethod
    def of(
        cls, model_k: Any, x: Tensor, sigmas: Tensor, extra_args: Mapping[str, Any] | None = None, callback: Any = None
    ) -> Call:
        """Read the arguments that the host calls a sampler with."""
        arguments = dict(extra_args or {})
        guider = model_k.inner_model
        patcher = getattr(guider, "model_patcher", None)
        sampling = guider.inner_model.model_sampling
        denoiser = HostDenoiser(
            model_k=model_k,
            arguments=arguments,
            batch=len(x),
            rows=tuple(range(len(x))),
            coordinates=host.coordinates_of_model(sampling),
            levels=sampling,
            network_dtype=x.dtype if patcher is None else host.network_dtype(patcher),
        )
        levels = tuple(torch.unique_consecutive(sigmas.detach().cpu()).tolist())
        seed, mask = int(arguments.get("seed") or 0), arguments.get("denoise_mask")
        return cls(denoiser, x.to(widest(x.device)), sigmas, levels, seed, mask, guider, callback)

    @property
    def is_flow(self) -> bool:
        """Tell whether the levels are flow times."""
        return self.denoiser.coordinates == "flow"

    def rule(self, rule: Rule) -> Rule:
        """Return the rule with what the host takes from the model: when `sa_solver` draws noise."""
        default = SASolver.sde_start, SASolver.sde_end
        if self.is_flow or not isinstance(rule, SASolver) or (rule.sde_start, rule.sde_end) != default:
            return rule
        start, end = (float(self.denoiser.levels.percent_to_sigma(p)) for p in (0.2, 0.8))
        return replace(rule, sde_start=start, sde_end=end)

    def denoiser_for(self, rule: Rule) -> HostDenoiser:
        """Return the denoiser as a sampler needs it: with the unconditional prediction for CFG++."""
        levels = self.levels if self.levels[0] > self.levels[-1] else self.levels[::-1]
        setting = settle(self.denoiser, rule, levels)
        return self.denoiser.paired() if Ready.of(setting.rule, setting.schedule).is_guided else self.denoiser

    def show(self, step: int, x: Tensor, denoised: Tensor) -> None:
        """Move the host's bar to the end of a step, and show what is denoised so far."""
        if self.callback is not None:
            step = max(0, min(step, len(self.sigmas) - 2))
            sigma = self.sigmas[step]
            self.callback({"i": step, "x": x, "denoised": denoised, "sigma": sigma, "sigma_hat": sigma})

    def on_step(self, progress: Progress) -> None:
        """Show a step: a callback for the verbs of kinvert. The last step fills the bar, however many there were."""
        last = progress.sigma_next == self.levels[-1]
        self.show(len(self.sigmas) - 2 if last else progress.index, progress.x, progress.denoised)

    def show_search(self, expected: int) -> None:
        """Show every evaluation from now on: a search has no steps, so the bar comes near its end and waits there."""
        steps = len(self.sigmas) - 1

        def told(count: int, x: Tensor, denoised: Tensor) -> None:
            self.show(math.floor((steps - 1) * count / (count + expected)), x, denoised)

        self.denoiser.evaluations.told = told

    def kept(self, x: Tensor, level: float) -> Tensor:
        """Return a state at a level with the image where the mask keeps it."""
        if self.mask is None:
            return x
        image = self.x * (1.0 - level) / (1.0 - self.levels[0]) if self.is_flow else self.x
        return torch.where(self.mask == 0, image, x)

    def latent(self, x: Tensor, level: float) -> Tensor:
        """Return a state at a level as LATENT has it: in its units, in flow divided by `1 - level` if that is not 0."""
        clean = x / (1.0 - level) if self.is_flow and level < 1.0 else x
        latent: Tensor = self.guider.inner_model.process_latent_out(clean.to(torch.float32))
        return latent.cpu()

    def noise_factor(self, falling: tuple[float, ...]) -> float:
        """Return what the host multiplies noise with where it starts this schedule."""
        return host.noise_factor(
            self.guider, self.denoiser.levels, torch.tensor(falling, dtype=torch.float32, device="cpu")
        )


class Work(Generic[T]):
    """A function in place of the host's sampler, which keeps what it found."""

    def __init__(self, work: Callable[[Call], T]) -> None:
        self.work = work
        self.found: list[T] = []

    def __call__(
        self,
        model_k: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Any = None,
        disable: bool | None = None,
    ) -> Tensor:
        """Do the work, and return x: what the host makes of that is not used."""
        self.found.append(self.work(Call.of(model_k, x, sigmas, extra_args, callback)))
        return x


def run_inside(model: Any, work: Callable[[Call], T], sigmas: Tensor, latent: Mapping[str, Any], **guidance: Any) -> T:
    """Do some work inside the host's sampling of `latent`, which is the state at `sigmas[0]`; return what it found.

    Args:
        model: the host's MODEL.
        work: takes a `Call`.
        sigmas: the schedule that the host is told, rising or falling, shape (steps + 1,).
        latent: the host's LATENT.
        guidance: `cfg`, `positive` and `negative`.

    Raises:
        RuntimeError: a patch of the model made the host sample more than once, or not at all.
    """
    function = Work(work)
    host.run_sampling(model, function, sigmas, latent, **guidance)
    if len(function.found) != 1:
        raise RuntimeError(
            f"the host sampled {len(function.found)} times where kinvert asked for one run; a patch of the model "
            "replaces its sampling (tiling, regions), which this node cannot follow: remove the patch"
        )
    return function.found[0]
