"""Samplers and schedules of kinvert for every node of the host that takes SAMPLER and SIGMAS."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinvert import noise as noise_sources
from kinvert.adapters.comfyui import host
from kinvert.adapters.comfyui.inside import Call
from kinvert.adapters.comfyui.spec import Input, Node, Output
from kinvert.checks import check_integer, check_number
from kinvert.denoisers import Denoiser
from kinvert.levels import DiscreteLevels, FlowLevels, Levels
from kinvert.noise import Noise, NoiseFunction
from kinvert.rules import SAMPLERS, Rule
from kinvert.rules import sampler as build
from kinvert.sampling import sample, unsample
from kinvert.schedules import SCHEDULES
from kinvert.schedules import schedule as build_schedule

__all__ = [
    "NODES",
    "RuleSampler",
    "chosen_rule",
    "make_schedule",
    "parse_options",
    "sampler_names",
    "schedule_names",
    "strictly_falling",
]

SAME = 1e-5
"""How far two schedules may differ, in parts, to count as the same."""


@dataclass(frozen=True, eq=False)
class RuleSampler:
    """A sampler of kinvert as the host calls its samplers. A rising schedule runs it upwards, as `ki.unsample` does.

    Attributes:
        rule: the sampler.
        noise: where its noise comes from; None: from the seed of the host's noise.
        sigmas: the only schedule that `noise` is for; None: any.
        start: the state at a first level of t = 1, where the host would multiply LATENT with 0; None: x.
        steer: makes another denoiser of the denoiser of a `Call`; None: it stays as it is.
    """

    rule: Rule
    noise: Noise | None = None
    sigmas: tuple[float, ...] | None = None
    start: Tensor | None = None
    steer: Any = None

    def __call__(
        self,
        model_k: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Any = None,
        disable: bool | None = None,
    ) -> Tensor:
        """Sample, in the way the host's own samplers do."""
        call = Call.of(model_k, x, sigmas, extra_args, callback)
        return x if len(call.levels) < 2 else self.run(call).to(x.dtype)

    def run(self, call: Call) -> Tensor:
        """Run along the schedule of a call: down as `ki.sample`, up as `ki.unsample`."""
        self._check_schedule(call.levels)
        rule = call.rule(self.rule)
        denoiser: Denoiser = call.denoiser_for(rule)
        if call.levels[0] < call.levels[-1]:
            return unsample(denoiser, call.x, call.levels[::-1], sampler=rule, sigma_offset=0.0, callback=call.on_step)
        if self.steer is not None:
            denoiser = self.steer(call)
        noise = self.noise
        if noise is None:
            noise = getattr(noise_sources, rule.default_noise)(call.seed)
        factor = float(getattr(call.denoiser.levels, "noise_scale", 1.0))
        if factor != 1.0 and self.noise is None:
            noise = _scaled(noise, call.x, factor)
        return sample(denoiser, self._start(call), call.levels, sampler=rule, noise=noise, callback=call.on_step)

    def _start(self, call: Call) -> Tensor:
        """Return the state to start from; raise ValueError if the host made nothing of it."""
        if call.is_flow and call.levels[0] >= 1.0:
            if self.start is not None:
                return self.start.to(call.x)
            if not bool(call.x.any()):
                raise ValueError(
                    "the start at t = 1 is all zeros: there the host multiplies LATENT with 1 - t = 0; connect the "
                    "output noise to SamplerCustomAdvanced, or begin one step later (end_at_step=1)"
                )
        return call.x

    def _check_schedule(self, levels: tuple[float, ...]) -> None:
        """Raise ValueError if the noises of this sampler belong to another schedule."""
        mine = self.sigmas
        if mine is None:
            return
        if len(levels) != len(mine) or any(abs(a - b) > SAME * max(a, b) for a, b in zip(levels, mine, strict=True)):
            raise ValueError(
                f"this sampler replays noises of a schedule from {mine[0]:.4g} to {mine[-1]:.4g} in {len(mine) - 1} "
                f"steps, got one from {levels[0]:.4g} to {levels[-1]:.4g} in {len(levels) - 1}; connect the sigmas of "
                "the node that made it"
            )


def _scaled(noise: Any, x: Tensor, factor: float) -> NoiseFunction:
    """Return the noise of a model whose noise has another standard deviation than 1."""
    draw = noise_sources.bind(noise, x)
    return lambda sigma_from, sigma_to: factor * draw(sigma_from, sigma_to)


def sampler_names() -> list[str]:
    """Return the names of all samplers, "euler" first."""
    return list(SAMPLERS)


def chosen_rule(sampler_name: str, sampler: Any = None) -> Rule:
    """Return the rule of a node's inputs: of SAMPLER if it is connected, else of the name.

    Raises:
        TypeError: a SAMPLER that does not come from a node of kinvert.
    """
    if sampler is None:
        return build(sampler_name)
    function = getattr(sampler, "sampler_function", sampler)
    if not isinstance(function, RuleSampler):
        name = getattr(function, "__name__", type(function).__name__)
        raise TypeError(
            f"sampler must come from the node Sampler (kinvert), got {name}: kinvert must know the formulas of what it "
            "inverts; choose it by sampler_name, or with options by Sampler (kinvert)"
        )
    return function.rule


def parse_options(text: str) -> dict[str, Any]:
    """Return the options of a sampler that are written as "eta=0, s_churn=1".

    Values are numbers, True or False, None, or words such as heun.

    Raises:
        ValueError: something else than `name=value` between commas, or a name that is there twice.
    """
    options: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in text.replace("\n", ",").split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name.isidentifier() or not value:
            raise ValueError(f"options must be written as name=value, name=value, got {part!r}; e.g. eta=0, s_noise=1")
        if name in options:
            raise ValueError(f"options has {name} twice, in {text!r}; leave one out")
        options[name] = _value(value)
    return options


def _value(text: str) -> Any:
    """Return the value that a text stands for; a word stands for itself."""
    words = {"true": True, "false": False, "none": None, "inf": float("inf")}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if text.isidentifier():
            return text
        raise ValueError(f"options: {text!r} is no value; write a number, True, False or a word such as heun") from None


def schedule_names() -> list[str]:
    """Return the names of the host's schedules, and of those that kinvert has besides."""
    names = host.scheduler_names()
    return [*names, *(name for name in SCHEDULES if name not in names)]


def make_schedule(model: Any, scheduler: str, steps: int, sampler: str = "", denoise: float = 1.0) -> Tensor:
    """Return the falling schedule that the host makes for a sampler, or that kinvert makes by a name of its own.

    Args:
        model: the host's MODEL.
        scheduler: a name of `schedule_names`.
        steps: number of steps; some schedules have more or fewer.
        sampler: for a few samplers the host leaves out the last level but one.
        denoise: fraction of the schedule to keep, from its clean end.

    Returns:
        float32, shape (steps + 1,), on the CPU; without repeats.

    Raises:
        ValueError: steps or denoise out of range.
    """
    steps = check_integer("steps", steps, fix="pass e.g. 20")
    denoise = check_number("denoise", denoise, above=0, fix="1 is all of the schedule")
    total = steps if denoise > 0.9999 else int(steps / denoise)
    discard = host.discards_penultimate(sampler)
    if scheduler in host.scheduler_names():
        sigmas = host.schedule_of(model, scheduler, total + discard)
    else:
        sigmas = build_schedule(scheduler, total + discard, _levels(model))
    if discard:
        sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
    return torch.unique_consecutive(sigmas if denoise > 0.9999 else sigmas[-(steps + 1) :]).to(torch.float32)


def _levels(model: Any) -> Levels:
    """Return the noise levels of a model for the schedules of kinvert."""
    sampling = model.get_model_object("model_sampling")
    table = getattr(sampling, "sigmas", None)
    if not isinstance(table, Tensor):
        raise ValueError("this model has no table of noise levels, which the schedule needs; choose one of the host's")
    table = table.detach().cpu().double()
    return FlowLevels(table) if host.coordinates_of_model(sampling) == "flow" else DiscreteLevels(table)


def strictly_falling(sigmas: Any) -> Tensor:
    """Return SIGMAS without repeats; raise ValueError if they do not fall."""
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1:
        raise ValueError(f"sigmas must be SIGMAS, a list of noise levels, got {type(sigmas).__name__}")
    levels = torch.unique_consecutive(sigmas.detach().cpu().to(torch.float32))
    if len(levels) < 2 or not bool((levels.diff() < 0).all()):
        raise ValueError(
            f"sigmas must be a falling schedule of two levels or more, got {levels.tolist()[:8]}; this node turns it "
            "around itself, so remove FlipSigmas"
        )
    return levels


def _sampler_node(sampler_name: str, options: str = "") -> tuple[Any]:
    return (host.to_sampler(RuleSampler(build(sampler_name, **parse_options(options)))),)


def _scheduler_node(model: Any, scheduler: str, steps: int, denoise: float = 1.0) -> tuple[Tensor]:
    return (make_schedule(model, scheduler, steps, denoise=denoise),)


NODES = (
    Node(
        "KinvertSampler",
        "Sampler (kinvert)",
        "sampling/custom_sampling/samplers",
        "Any sampler of kinvert, with its options, for nodes that take SAMPLER. With a rising schedule (FlipSigmas) it "
        "unsamples.",
        (
            Input("sampler_name", sampler_names, "Name of the sampler."),
            Input(
                "options",
                "STRING",
                "Options of the sampler as name=value, name=value, e.g. eta=0, s_noise=1.",
                {"default": "", "multiline": False},
                optional=True,
            ),
        ),
        (Output("sampler", "SAMPLER", "The sampler."),),
        _sampler_node,
    ),
    Node(
        "KinvertScheduler",
        "Scheduler (kinvert)",
        "sampling/custom_sampling/schedulers",
        "The host's schedules, and those that kinvert has besides, for a model.",
        (
            Input("model", "MODEL", "The model whose noise levels are used."),
            Input("scheduler", schedule_names, "Name of the schedule."),
            Input("steps", "INT", "Number of steps.", {"default": 20, "min": 1, "max": 10000}),
            Input(
                "denoise",
                "FLOAT",
                "Fraction of the schedule to keep, from its clean end.",
                {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01},
                optional=True,
            ),
        ),
        (Output("sigmas", "SIGMAS", "Noise levels, falling to 0."),),
        _scheduler_node,
    ),
)
