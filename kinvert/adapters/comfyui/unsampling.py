"""The nodes that go up by a sampler: `KinvertUnsampler`, and `KinvertRoundTrip`, which also comes back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinvert.adapters.comfyui import host
from kinvert.adapters.comfyui.inside import Call, run_inside
from kinvert.adapters.comfyui.latents import FoundNoise, each_part, replaced, samples_of
from kinvert.adapters.comfyui.report import NOTE_AT_ONE, gathered_warnings, moments_line
from kinvert.adapters.comfyui.samplers import (
    RuleSampler,
    chosen_rule,
    make_schedule,
    sampler_names,
    schedule_names,
    strictly_falling,
)
from kinvert.adapters.comfyui.spec import Input, Node, Output, choice
from kinvert.checks import check_choice
from kinvert.rules import Rule
from kinvert.sampling import dropped_steps, rising_schedule, sample

__all__ = ["NODES", "Start", "give_noise", "give_start"]

OFFSET = 1e-4  # of the node that this one continues
NORMALIZE = ("disable", "enable", "sample", "sigma")


@dataclass(frozen=True, eq=False)
class Start:
    """A state that a run can start from, as the host takes it.

    Attributes:
        latent: as LATENT, the samples of it.
        noise: as NOISE, what the host scales.
        unit: divided by its noise level.
        empty: LATENT of an empty image.
        at_one: whether it is at t = 1 of a flow model, where LATENT is multiplied with 0.
    """

    latent: Tensor
    noise: Tensor
    unit: Tensor
    empty: Tensor
    at_one: bool


def give_start(call: Call, x: Tensor, falling: tuple[float, ...]) -> Start:
    """Return a state, found in a call, as the start of a falling schedule in the host's terms."""
    level = falling[0]
    zeros = call.guider.inner_model.process_latent_out(torch.zeros_like(x, dtype=torch.float32)).cpu()
    noise, unit = ((x / scale).to(torch.float32).cpu() for scale in (call.noise_factor(falling), call.levels[-1]))
    return Start(call.latent(x, level), noise, unit, zeros, call.is_flow and level >= 1.0)


def give_noise(start: Start, samples: Any) -> FoundNoise:
    """Return NOISE of a start, for a LATENT like `samples`."""
    empty = None if start.at_one else host.unpacked(start.empty, samples)
    return FoundNoise(host.unpacked(start.noise, samples), empty)


def _falling(model: Any, steps: int, scheduler: str, rule: Rule, sigmas: Any) -> Tensor:
    if sigmas is not None:
        return strictly_falling(sigmas)
    return make_schedule(model, scheduler, steps, rule.name)


def _rising(model: Any, falling: Tensor, end_at_step: int) -> Tensor:
    """Return the schedule upwards: with the offset, and without the noisiest `end_at_step` steps."""
    flow = host.coordinates_of_model(model.get_model_object("model_sampling")) == "flow"
    levels = rising_schedule(falling, end_at_step, OFFSET, 1.0 if flow else math.inf)
    return torch.tensor(levels, dtype=torch.float32, device="cpu")


def _go_up(call: Call, rule: Rule, level: float) -> Tensor:
    """Unsample along the rising schedule of a call, to the start of a run down from `level`."""
    return call.kept(RuleSampler(rule).run(call), level)


def _normalized(samples: Tensor, how: str) -> Tensor:
    """Return samples with mean 0 and standard deviation 1, over the whole batch or for each item."""
    dims = tuple(range(samples.ndim)) if how == "enable" else tuple(range(1, samples.ndim))
    std = samples.std(dims, keepdim=True)
    if not bool((std > 0).all()):
        raise ValueError(f"normalize={how} needs a latent that varies, got standard deviation 0; use normalize=sigma")
    return (samples - samples.mean(dims, keepdim=True)) / std


def _unsampler_node(
    model: Any,
    steps: int,
    end_at_step: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    normalize: str,
    positive: Any,
    negative: Any,
    latent_image: Mapping[str, Any],
    sigmas: Any = None,
    sampler: Any = None,
) -> tuple[Any, Any, str]:
    check_choice("normalize", normalize, NORMALIZE)
    samples, rule = samples_of(latent_image), chosen_rule(sampler_name, sampler)
    falling = _falling(model, steps, scheduler, rule, sigmas)
    kept = tuple(falling[dropped_steps(tuple(falling.tolist()), end_at_step) :].tolist())
    rising = _rising(model, falling, end_at_step)

    def work(call: Call) -> tuple[Start, int, str]:
        x = _go_up(call, rule, kept[0])
        evaluations = call.denoiser.evaluations.count
        return give_start(call, x, kept), evaluations, moments_line(x / call.levels[-1])

    with gathered_warnings() as notes:
        start, evaluations, moments = run_inside(
            model, work, rising, latent_image, cfg=cfg, positive=positive, negative=negative
        )
    latent, noise = host.unpacked(start.latent, samples), give_noise(start, samples)
    if normalize != "disable":
        unit = host.unpacked(start.unit, samples)
        latent = unit if normalize == "sigma" else each_part(lambda part: _normalized(part, normalize), latent)
        noise = FoundNoise(latent, noise.empty)
    elif start.at_one:
        notes.append(NOTE_AT_ONE)
    lines = [
        f"unsampled by {rule.name} in {len(rising) - 1} steps, {evaluations} evaluations, from {rising[0]:.4g} to "
        f"{rising[-1]:.4g}",
        moments,
        *notes,
    ]
    return replaced(latent_image, latent), noise, "\n".join(lines)


def _round_trip_node(
    model: Any,
    steps: int,
    end_at_step: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    normalize: str,
    positive: Any,
    negative: Any,
    latent_image: Mapping[str, Any],
    sigmas: Any = None,
    sampler: Any = None,
) -> tuple[Any, float, str]:
    check_choice("normalize", normalize, NORMALIZE)
    samples, rule = samples_of(latent_image), chosen_rule(sampler_name, sampler)
    falling = _falling(model, steps, scheduler, rule, sigmas)
    down = falling[dropped_steps(tuple(falling.tolist()), end_at_step) :]
    rising = _rising(model, falling, end_at_step)

    def work(call: Call) -> tuple[Tensor, Sequence[float], int, str]:
        latent, level = _go_up(call, rule, float(down[0])), call.levels[-1]
        if normalize in {"enable", "sample"}:
            latent = level * _normalized(latent, normalize)
        settled = call.rule(rule)
        again = sample(call.denoiser_for(settled), latent, tuple(down.tolist()), sampler=settled)
        image = call.x / (1.0 - call.levels[0]) if call.is_flow else call.x
        errors = (again - image).flatten(1).square().mean(1).sqrt()
        ends = float(down[-1])
        return call.latent(again, ends), errors.tolist(), call.denoiser.evaluations.count, moments_line(latent / level)

    with gathered_warnings() as notes:
        again, errors, evaluations, moments = run_inside(
            model, work, rising, latent_image, cfg=cfg, positive=positive, negative=negative
        )
    rms = math.sqrt(sum(error**2 for error in errors) / len(errors))
    lines = [
        f"round trip by {rule.name}: {len(rising) - 1} steps up and down, {evaluations} evaluations, through "
        f"{rising[-1]:.4g}",
        f"rms error {rms:.3g}, of each item " + ", ".join(f"{error:.3g}" for error in errors),
        moments,
        *notes,
    ]
    return replaced(latent_image, host.unpacked(again, samples)), rms, "\n".join(lines)


_INPUTS = (
    Input("model", "MODEL", "The model to go up with."),
    Input("steps", "INT", "Number of steps of the schedule.", {"default": 20, "min": 1, "max": 10000}),
    Input("end_at_step", "INT", "Leave out this many steps at the noisy end.", {"default": 0, "min": 0, "max": 10000}),
    Input(
        "cfg",
        "FLOAT",
        "Guidance. 1 is best: guidance makes the way up and the way down differ.",
        {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.1},
    ),
    Input("sampler_name", sampler_names, "A deterministic sampler. Others are refused, with the one to use instead."),
    Input("scheduler", schedule_names, "Name of the schedule."),
    Input(
        "normalize",
        choice(*NORMALIZE),
        "enable: mean 0 and standard deviation 1 over the batch; sample: for each item; sigma: divide by the last "
        "noise level.",
    ),
    Input("positive", "CONDITIONING", "What the image shows."),
    Input("negative", "CONDITIONING", "Used if cfg is not 1."),
    Input("latent_image", "LATENT", "The image. A noise mask on it says what is unsampled."),
    Input("sigmas", "SIGMAS", "A falling schedule in place of steps and scheduler.", {}, True),
    Input("sampler", "SAMPLER", "A Sampler (kinvert) in place of sampler_name.", {}, True),
)

NODES = (
    Node(
        "KinvertUnsampler",
        "Unsampler (kinvert)",
        "sampling",
        "Runs a sampler upwards, from an image to the noise behind it, approximately. Sample the latent back with the "
        "same settings and no added noise.",
        _INPUTS,
        (
            Output("latent", "LATENT", "The noisy latent, for a sampler with added noise disabled."),
            Output("noise", "NOISE", "The same as noise, for SamplerCustomAdvanced with an empty latent."),
            Output("report", "STRING", "What was done, and what to know."),
        ),
        _unsampler_node,
    ),
    Node(
        "KinvertRoundTrip",
        "Round Trip (kinvert)",
        "sampling",
        "Unsamples an image, samples it back, and measures the difference: how far a sampler and a schedule can be "
        "trusted.",
        _INPUTS,
        (
            Output("latent", "LATENT", "The image after the round trip."),
            Output("rms", "FLOAT", "Root mean square of its difference, in units of the network."),
            Output("report", "STRING", "What was done, and what to know."),
        ),
        _round_trip_node,
    ),
)
