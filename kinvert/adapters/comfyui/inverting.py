"""The nodes that find an exact latent, or steer: `KinvertInvert`, `KinvertExtractNoise`, `KinvertRFInversion`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kinvert.adapters.comfyui import host
from kinvert.adapters.comfyui.inside import Call, run_inside
from kinvert.adapters.comfyui.latents import FoundNoise, item_masks, replaced, samples_of
from kinvert.adapters.comfyui.report import NOTE_AT_ONE, gathered_warnings, moments_line
from kinvert.adapters.comfyui.samplers import RuleSampler, chosen_rule, sampler_names, strictly_falling
from kinvert.adapters.comfyui.spec import Input, Node, Output, choice
from kinvert.adapters.comfyui.unsampling import Start, give_noise, give_start
from kinvert.coordinates import settle
from kinvert.denoisers import Denoiser
from kinvert.inversion import Inversion, extract_noise, invert
from kinvert.inversion.baselines import rf_inversion, steer
from kinvert.inversion.extract import Path
from kinvert.inversion.verdict import tolerance as default_tolerance
from kinvert.noise import replay, white
from kinvert.plan import Plan, compile_plan
from kinvert.rules import Euler, Rule

__all__ = ["NODES"]

RUNS = 100
"""The evaluations that an item may cost by default, in sampling runs."""
HIGHEST = 0.9999
"""The flow time in place of 1 for methods that run in `sigma = t / (1 - t)`."""


def _positive_levels(sigmas: Any) -> tuple[Tensor, list[str]]:
    """Return the schedule without its step to 0, which forgets where it came from, and a note of that."""
    falling = strictly_falling(sigmas)
    if float(falling[-1]) > 0:
        return falling, []
    if len(falling) < 3:
        raise ValueError("sigmas must have two levels above 0, since the step to 0 has no inverse; use more steps")
    return falling[:-1], [
        f"the image is taken as the state at {float(falling[-2]):.4g}, since the step to 0 has no inverse: sample back "
        "with the sigmas of this node (KSampler Advanced: end_at_step one less than steps, with leftover noise)"
    ]


# -- invert -----------------------------------------------------------------------------------------------------------
def _hardened(latent: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """Return a LATENT whose mask is 0 or 1 at the latent's resolution, so that the host takes it as it is."""
    mask, samples = latent.get("noise_mask"), latent["samples"]
    if mask is None or not isinstance(samples, Tensor) or samples.ndim != 4:
        return latent, []
    soft = item_masks(mask, samples)
    hard = (soft > 0.5).float().cpu()
    note = "the mask was rounded to 0 or 1: with a soft one the way back would mix in noise that depends on the latent"
    return replaced(latent, samples, noise_mask=hard), [] if bool((hard == soft.cpu()).all()) else [note]


def _checked_plan(rule: Rule, call: Call) -> Plan:
    """Return the Plan of the way back; raise ValueError for a reversible sampler whose latent is a pair."""
    plan = compile_plan(*settle(call.denoiser, rule, call.levels[::-1])[1:])
    if plan.auxiliary:
        raise ValueError(
            f"{rule.name}: the exact latent of this sampler has a second part ({', '.join(plan.auxiliary)}), which no "
            "LATENT carries; use 'euler', 'heun' or 'dpmpp_2m'"
        )
    return plan


def _invert_node(
    model: Any,
    sampler_name: str,
    sigmas: Any,
    cfg: float,
    tolerance: float,
    max_evaluations: int,
    positive: Any,
    negative: Any,
    latent_image: Mapping[str, Any],
    sampler: Any = None,
) -> tuple[Any, FoundNoise, Tensor, str]:
    samples, rule = samples_of(latent_image), chosen_rule(sampler_name, sampler)
    falling, notes = _positive_levels(sigmas)
    latent, softened = _hardened(latent_image)

    def work(call: Call) -> tuple[Start, str]:
        settled = call.rule(rule)
        plan = _checked_plan(settled, call)
        if call.mask is not None and not bool(((call.mask == 0) | (call.mask == 1)).all()):
            raise ValueError("the noise mask must be 0 or 1 at the latent's resolution here; use Threshold Mask")
        call.show_search(8 * plan.evaluations)
        goal = tolerance or default_tolerance(None, call.x, network=call.denoiser.network_dtype)
        if call.mask is not None:  # the error is measured over the whole image, and must be made in the mask alone
            goal *= max(float(call.mask.flatten(1).mean(1).min()), 1e-6) ** 0.5
        denoiser = replace(call.denoiser_for(settled), narrow=False)
        found = invert(
            denoiser, call.x, call.levels[::-1], sampler=settled, tol=goal,
            max_evals=max_evaluations or RUNS * plan.evaluations,
        )  # fmt: skip
        latent = call.kept(found.latent, call.levels[-1])
        call.show(len(call.sigmas), found.latent, found.restored if found.restored is not None else call.x)
        return give_start(call, latent, call.levels[::-1]), _verdict(found, call)

    with gathered_warnings():
        start, report = run_inside(model, work, falling.flip(0), latent, cfg=cfg, positive=positive, negative=negative)
    lines = [report, *notes, *softened, *([NOTE_AT_ONE] if start.at_one else [])]
    output = replaced(latent, host.unpacked(start.latent, samples))
    return output, give_noise(start, samples), falling, "\n".join(lines)


def _verdict(found: Inversion, call: Call) -> str:
    """Return the report of an inversion."""
    return f"{found}\n  the host was called {call.denoiser.evaluations.count} times for the whole batch"


# -- extract noise ----------------------------------------------------------------------------------------------------
def _extract_node(
    model: Any,
    sampler_name: str,
    sigmas: Any,
    cfg: float,
    path: Path,
    seed: int,
    positive: Any,
    negative: Any,
    latent_image: Mapping[str, Any],
    sampler: Any = None,
) -> tuple[Any, Any, Tensor, str]:
    samples, rule = samples_of(latent_image), chosen_rule(sampler_name, sampler)
    falling, notes = _positive_levels(sigmas)
    if latent_image.get("noise_mask") is not None:
        raise ValueError(
            "latent_image has a noise mask, and noises are extracted for the whole image; remove the mask (Set Latent "
            "Noise Mask), or use Invert (kinvert), which takes one"
        )

    def work(call: Call) -> tuple[Inversion, Start, RuleSampler]:
        settled = call.rule(rule)
        found = extract_noise(
            call.denoiser_for(settled), call.x, call.levels[::-1], sampler=settled, path=path, noise=white(seed),
            callback=lambda step: call.show(step.index, step.x, step.denoised),
        )  # fmt: skip
        replaying = RuleSampler(settled, replay(found.noises), call.levels[::-1], found.latent)
        return found, give_start(call, found.latent, call.levels[::-1]), replaying

    with gathered_warnings():
        found, start, replaying = run_inside(
            model, work, falling.flip(0), latent_image, cfg=cfg, positive=positive, negative=negative
        )
    latent = replaced(latent_image, host.unpacked(start.latent, samples))
    return latent, host.to_sampler(replaying), falling, "\n".join([str(found), *notes])


# -- RF-Inversion -----------------------------------------------------------------------------------------------------
def _in_sigma(denoiser: Denoiser) -> Denoiser:
    """Return a denoiser in flow time as one in variance-exploding coordinates."""

    def denoise(x: Tensor, sigma: Tensor) -> Any:
        t = sigma / (1.0 + sigma)
        return denoiser((1.0 - t).reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) * x, t)

    return denoise


def _rf_node(
    model: Any,
    sigmas: Any,
    cfg: float,
    gamma: float,
    eta: float,
    until: float,
    seed: int,
    positive: Any,
    negative: Any,
    latent_image: Mapping[str, Any],
) -> tuple[Any, Any, Tensor, str]:
    samples = samples_of(latent_image)
    if latent_image.get("noise_mask") is not None:
        raise ValueError("latent_image has a noise mask, which this method has no formula for; remove the mask")
    falling, notes = _positive_levels(sigmas)
    if host.coordinates_of_model(model.get_model_object("model_sampling")) == "flow" and falling[0] > HIGHEST:
        falling = torch.cat([falling[:1].clamp(max=HIGHEST), falling[1:].clamp(max=HIGHEST - 1e-6)])
        notes.append(f"the schedule starts at t = {HIGHEST} in place of 1, since the method runs in t / (1 - t)")

    def work(call: Call) -> tuple[Start, Inversion, RuleSampler]:
        levels, x, denoiser = torch.tensor(call.levels[::-1], dtype=torch.float64, device="cpu"), call.x, call.denoiser
        if call.is_flow:
            levels, x = levels / (1.0 - levels), x / (1.0 - call.levels[0])
        noise = white(seed).bind(x)(1.0, 0.0)
        given: Denoiser = _in_sigma(denoiser) if call.is_flow else denoiser
        found = rf_inversion(given, x, levels, gamma=gamma, eta=eta, until=until, noise=noise)
        scale = 1.0 - call.levels[-1] if call.is_flow else 1.0
        start = give_start(call, found.latent * scale, call.levels[::-1])
        image, end = call.x, call.levels[0]

        def steered(other: Call) -> Denoiser:
            return steer(other.denoiser, image.to(other.x), end, eta=eta, until=until)

        return start, found, RuleSampler(Euler(), None, call.levels[::-1], steer=steered if eta else None)

    with gathered_warnings():
        start, found, steering = run_inside(
            model, work, falling.flip(0), latent_image, cfg=cfg, positive=positive, negative=negative
        )
    error = float(found.round_trip_error.square().mean().sqrt())
    lines = [
        f"RF-Inversion with gamma {gamma:g}, {len(falling) - 1} steps, {int(found.evaluations.max())} evaluations",
        f"sampled back with eta {eta:g} the image is off by an rms of {error:.3g}",
        moments_line(start.unit),
        *notes,
    ]
    latent = replaced(latent_image, host.unpacked(start.latent, samples))
    return latent, host.to_sampler(steering), falling, "\n".join(lines)


# -- the nodes --------------------------------------------------------------------------------------------------------
_MODEL = Input("model", "MODEL", "The model that samples.")
_SIGMAS = Input("sigmas", "SIGMAS", "The falling schedule to sample back with. Its step to 0 is left out.")
_CFG = Input("cfg", "FLOAT", "Guidance of the sampling.", {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.1})
_SEED = Input("seed", "INT", "Seed of what is drawn.", {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF})
_CONDITIONING = (
    Input("positive", "CONDITIONING", "What the image shows."),
    Input("negative", "CONDITIONING", "Used if cfg is not 1."),
    Input("latent_image", "LATENT", "The image."),
)
_SAMPLER = Input("sampler", "SAMPLER", "A Sampler (kinvert) in place of sampler_name.", {}, True)
_SIGMAS_BACK = Output("sigmas", "SIGMAS", "The schedule to sample back with.")
_REPORT = Output("report", "STRING", "How exact it is, what it cost, and what to know.")


def _number(name: str, tooltip: str, default: float, high: float) -> Input:
    """Return a FLOAT input from 0 on."""
    return Input(name, "FLOAT", tooltip, {"default": default, "min": 0.0, "max": high, "step": 0.01, "round": False})


NODES = (
    Node(
        "KinvertInvert",
        "Invert (kinvert)",
        "sampling",
        "Finds the latent that this sampler, on this schedule and with this guidance, turns into the image, and checks "
        "it. It takes many more evaluations than Unsampler.",
        (
            _MODEL,
            Input("sampler_name", sampler_names, "A deterministic sampler, the one to sample back with."),
            _SIGMAS,
            _CFG,
            Input(
                "tolerance",
                "FLOAT",
                "Error to reach, in parts of the size of the image. 0: what the model's precision allows.",
                {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.000001, "round": False},
            ),
            Input(
                "max_evaluations",
                "INT",
                "Most evaluations of the model for each item. 0: as many as 100 sampling runs.",
                {"default": 0, "min": 0, "max": 1000000},
            ),
            *_CONDITIONING,
            _SAMPLER,
        ),
        (
            Output("latent", "LATENT", "The latent, for a sampler with added noise disabled."),
            Output("noise", "NOISE", "The same as noise, for SamplerCustomAdvanced with an empty latent."),
            _SIGMAS_BACK,
            _REPORT,
        ),
        _invert_node,
    ),
    Node(
        "KinvertExtractNoise",
        "Extract Noise (kinvert)",
        "sampling",
        "Finds the noises with which a stochastic sampler makes exactly this image. Costs two runs.",
        (
            _MODEL,
            Input("sampler_name", sampler_names, "A stochastic sampler, such as euler_ancestral."),
            _SIGMAS,
            _CFG,
            Input(
                "path",
                choice("independent", "chain"),
                "independent: each level noised anew, friendly to edits; chain: noises nearly as a run draws them.",
            ),
            _SEED,
            *_CONDITIONING,
            _SAMPLER,
        ),
        (
            Output("latent", "LATENT", "The start, for SamplerCustom with add_noise off."),
            Output("sampler", "SAMPLER", "The sampler with the noises that were found."),
            _SIGMAS_BACK,
            _REPORT,
        ),
        _extract_node,
    ),
    Node(
        "KinvertRFInversion",
        "RF-Inversion (kinvert)",
        "sampling",
        "RF-Inversion (Rout et al. 2024) for any model: up, steered towards noise by gamma, and a sampler that is "
        "steered back to the image by eta. RF-Solver and FireFlow are samplers of Unsampler (kinvert).",
        (
            _MODEL,
            _SIGMAS,
            _CFG,
            _number("gamma", "How far the way up is steered towards noise, 0 to 1.", 0.5, 1.0),
            _number("eta", "How far the sampler is steered to the image, 0 to 1.", 0.9, 1.0),
            _number("until", "Steer at noise levels from here up only.", 0.0, 100000.0),
            _SEED,
            *_CONDITIONING,
        ),
        (
            Output("latent", "LATENT", "The start, for SamplerCustom with add_noise off."),
            Output("sampler", "SAMPLER", "Euler's method, steered to the image."),
            _SIGMAS_BACK,
            _REPORT,
        ),
        _rf_node,
    ),
)
