"""diffusers' schedulers against the samplers of kinvert that equal them, each in the same pipeline.

    python tests/adapters/diffusers/agreement.py    # writes benchmarks/results/diffusers.json, which the docs show

Import this module after `pytest.importorskip("diffusers")`.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pipelines
import torch

import kinvert as ki
from kinvert.adapters.diffusers import KinvertScheduler

EXACT = 1e-5
STEPS = 6


class Case(NamedTuple):
    """A scheduler with options that are not its defaults, in a pipeline.

    `bound` is the largest difference that is allowed, in parts of the largest value; above 1e-5 `reason` says why.
    """

    scheduler: str
    options: dict[str, Any]
    family: str = "sd15"
    steps: int = STEPS
    bound: float = EXACT
    reason: str = ""

    @property
    def title(self) -> str:
        """The options, as the table shows them."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items()) or "defaults"

    def build(self) -> Any:
        """The scheduler, with the levels of Stable Diffusion if it takes them and the model is none of a flow."""
        kind = getattr(diffusers, self.scheduler)
        flow = self.options.get("use_flow_sigmas")
        takes = "beta_schedule" in inspect.signature(kind).parameters and not flow
        return kind(**(pipelines.SD if takes else {}), **self.options)


def sd(scheduler: str, steps: int = STEPS, /, bound: float = EXACT, reason: str = "", **options: Any) -> Case:
    return Case(scheduler, options, "sd15", steps, bound, reason)


V, ZERO = {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
ROUNDING = (
    "diffusers computes the coefficients of DEIS in float32; with its levels in float64 the difference is below 1e-12"
)
LAST = {"final_sigmas_type": "sigma_min"}
SMALL = "rounding of float32: each is 6e-6 from the same run in float64, where they differ by 2e-14"
LARGE = "the first level is 4096, where diffusers rounds to float32; in float64 they differ by 4e-14"

EULER = [
    *(sd("EulerDiscreteScheduler", timestep_spacing=spacing) for spacing in ("linspace", "leading", "trailing")),
    *(sd("EulerDiscreteScheduler", **{f"use_{kind}_sigmas": True}) for kind in ("karras", "exponential", "beta")),
    sd("EulerDiscreteScheduler", **V),
    sd("EulerDiscreteScheduler", STEPS, 2e-5, SMALL, prediction_type="sample"),
    sd("EulerDiscreteScheduler", final_sigmas_type="sigma_min"),
    sd("EulerDiscreteScheduler", STEPS, 5e-5, LARGE, **V, **ZERO),
    Case("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, "sdxl"),
    sd("EulerAncestralDiscreteScheduler"),
]
HEUN = [
    *(sd("HeunDiscreteScheduler", timestep_spacing=spacing) for spacing in ("linspace", "leading", "trailing")),
    sd("HeunDiscreteScheduler", use_karras_sigmas=True),
    sd("HeunDiscreteScheduler", clip_sample=True),
    *(sd("KDPM2DiscreteScheduler", timestep_spacing=spacing) for spacing in ("linspace", "leading", "trailing")),
    sd("KDPM2DiscreteScheduler", use_karras_sigmas=True),
    sd("KDPM2AncestralDiscreteScheduler"),
    sd("LMSDiscreteScheduler"),
]
DDIM = [
    sd("DDIMScheduler", 8, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    sd("DDIMScheduler", 8, clip_sample=False, timestep_spacing="trailing"),
    sd("DDIMScheduler", 8, clip_sample=False, **V, **ZERO),
    sd("DDIMScheduler", clip_sample=True),
    sd("DDIMScheduler", clip_sample=False, thresholding=True),
    sd("DDIMScheduler", 12, 5e-2, "its steps have T // n timesteps, and its timesteps are T / n apart; kinvert "
       "goes from each timestep to the next", clip_sample=False, timestep_spacing="trailing"),
    sd("DDIMScheduler", 9, 1.0, "the same: its timesteps are (T - 1) / (n - 1) apart", clip_sample=False,
       timestep_spacing="linspace"),
    sd("DDIMInverseScheduler", clip_sample=False, steps_offset=1),
    sd("DDIMInverseScheduler", clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    sd("DDIMInverseScheduler", 8, clip_sample=False, timestep_spacing="trailing"),
    sd("DDPMScheduler"),
    sd("DDPMScheduler", clip_sample=False, **V),
]  # fmt: skip
DPM = [
    sd("DPMSolverMultistepScheduler", timestep_spacing="leading"),
    sd("DPMSolverMultistepScheduler", timestep_spacing="trailing"),
    sd("DPMSolverMultistepScheduler", **V),
    *(sd("DPMSolverMultistepScheduler", solver_order=order) for order in (1, 2, 3)),
    sd("DPMSolverMultistepScheduler", 20, solver_order=3),
    *(sd("DPMSolverMultistepScheduler", solver_order=order, solver_type="heun") for order in (2, 3)),
    *(sd("DPMSolverMultistepScheduler", n, final_sigmas_type="sigma_min") for n in (6, 20)),
    sd("DPMSolverMultistepScheduler", use_karras_sigmas=True),
    sd("DPMSolverMultistepScheduler", use_lu_lambdas=True),
    *(sd("DPMSolverMultistepScheduler", **{f"use_{k}": True}, **LAST) for k in ("beta_sigmas", "lu_lambdas")),
    *(sd("DPMSolverMultistepScheduler", n, use_karras_sigmas=True, **LAST) for n in (6, 20)),
    sd("DPMSolverMultistepScheduler", solver_type="heun", use_exponential_sigmas=True, **LAST),
    sd("DPMSolverMultistepScheduler", thresholding=True, sample_max_value=3.0),
    *(sd("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", solver_order=order) for order in (1, 2)),
    sd("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", solver_type="heun"),
    *(sd("DPMSolverMultistepInverseScheduler", n, solver_order=o) for n, o in ((6, 1), (6, 2), (20, 2), (6, 3))),
    sd("DPMSolverMultistepInverseScheduler", use_karras_sigmas=True, solver_type="heun"),
    Case("DPMSolverMultistepScheduler", {}, "pixart"),
]
MULTISTEP = [
    *(sd("UniPCMultistepScheduler", n) for n in (6, 20)),
    *(sd("UniPCMultistepScheduler", solver_order=order) for order in (1, 3)),
    *(sd("UniPCMultistepScheduler", solver_type="bh1", final_sigmas_type="sigma_min", solver_order=o) for o in (2, 3)),
    sd("UniPCMultistepScheduler", use_karras_sigmas=True),
    *(sd("DEISMultistepScheduler", solver_order=order) for order in (1, 2, 3)),
    sd("DEISMultistepScheduler", 20, solver_order=3),
    sd("DEISMultistepScheduler", use_karras_sigmas=True),
    *(sd("SASolverScheduler", predictor_order=p, corrector_order=c) for p, c in ((1, 1), (2, 2), (3, 4))),
    sd("SASolverScheduler", lower_order_final=False),
]
FLOWS = [
    *(Case("FlowMatchEulerDiscreteScheduler", {"shift": shift}, "sd3") for shift in (1.0, 3.0)),
    Case("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}, "flux"),
    Case("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_karras_sigmas": True}, "sd3"),
    Case("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, "sd3"),
    Case("DPMSolverMultistepScheduler", FLOW, "wan"),
    Case("UniPCMultistepScheduler", FLOW, "wan"),
    Case("UniPCMultistepScheduler", FLOW | {"solver_order": 3}, "wan"),
    *(Case("DEISMultistepScheduler", FLOW, "wan", n, 1e-4, ROUNDING) for n in (6, 20)),
]
EDM = [
    *(Case("EDMEulerScheduler", {"prediction_type": kind}, "sdxl") for kind in ("epsilon", "v_prediction")),
    Case("EDMEulerScheduler", {"sigma_schedule": "exponential"}, "sdxl"),
    *(Case("EDMDPMSolverMultistepScheduler", {"prediction_type": k}, "sdxl") for k in ("epsilon", "v_prediction")),
    Case("EDMDPMSolverMultistepScheduler", {"solver_order": 3}, "sdxl"),
    Case("EDMDPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, "sdxl"),
    Case("EDMDPMSolverMultistepScheduler", {}, "stable_audio"),
]
COSINE = [
    Case("CosineDPMSolverMultistepScheduler", options, "stable_audio", n)
    for n, options in (
        (6, {}),
        (20, {}),
        (6, {"solver_order": 1}),
        (6, {"solver_type": "heun", "sigma_schedule": "karras"}),
        (6, {"prediction_type": "epsilon", "sigma_data": 0.5}),
    )
]
"""Stable Audio, with the noise of torchsde."""
CASES = [*EULER, *HEUN, *DDIM, *DPM, *MULTISTEP, *FLOWS, *EDM, *(COSINE if pipelines.HAS_TORCHSDE else [])]


class Refused(NamedTuple):
    """A scheduler whose own method no sampler of kinvert equals."""

    scheduler: str
    options: dict[str, Any]
    reason: str


REFUSED = [
    Refused("DDIMInverseScheduler", {"clip_sample": True}, "keeps the noise of the unclipped image"),
    Refused("DDIMInverseScheduler", {"clip_sample": False, **V}, "reads at the level below"),
    Refused("DDPMScheduler", {"variance_type": "fixed_large"}, "variance_type='fixed_large'"),
    Refused("DEISMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 3}, "last step has no length"),
    Refused("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "does not vanish"),
    Refused(
        "DPMSolverMultistepScheduler",
        {"use_karras_sigmas": True, "solver_order": 3, "final_sigmas_type": "sigma_min"},
        "last step has no length",
    ),
    Refused("DPMSolverMultistepScheduler", {"euler_at_final": True, "final_sigmas_type": "sigma_min"}, "any length"),
    Refused("DPMSolverSinglestepScheduler", {}, "take turns in their order"),
    Refused("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "stochastic_sampling=True"),
    Refused("LCMScheduler", {}, "boundary conditions"),
    Refused("PNDMScheduler", {"skip_prk_steps": True}, "equal steps"),
    Refused("SASolverScheduler", {"use_karras_sigmas": True}, "corrects the state"),
    Refused("SASolverScheduler", {"algorithm_type": "noise_prediction"}, "noise_prediction"),
    Refused("UniPCMultistepScheduler", {"predict_x0": False}, "predict_x0=False"),
    Refused("UniPCMultistepScheduler", {"disable_corrector": [0]}, "disable_corrector"),
    Refused("UniPCMultistepScheduler", {"lower_order_final": False}, "lower_order_final=False"),
    Refused("UniPCMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, "no length"),
]


def difference(case: Case) -> tuple[float, KinvertScheduler]:
    """The largest difference of the latents that a pipeline makes with both schedulers, in parts of the largest."""
    base = case.build()
    found = []
    pipe = pipelines.build(case.family)
    for scheduler in (base, KinvertScheduler.from_scheduler(base)):
        pipe.scheduler = scheduler
        generator = torch.Generator().manual_seed(1)
        found.append(pipelines.latents_of(pipe, case.family, case.steps, generator=generator))
    theirs, ours = found
    return float((ours - theirs).abs().max() / theirs.abs().max()), pipe.scheduler


def equal_levels() -> list[tuple[str, Any, Any]]:
    """What makes levels in diffusers, what makes the same in kinvert, and the levels of both."""
    sd, edm = ki.levels.stable_diffusion(), ki.levels.edm(0.002, 80.0, 0.5)
    euler, dpm = "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"
    flow, ramp = "FlowMatchEulerDiscreteScheduler", [1 - i / 10 for i in range(10)]
    rows = [
        (euler, {"timestep_spacing": "linspace"}, {}, ("normal", sd)),
        (euler, {"timestep_spacing": "leading", "steps_offset": 1}, {}, ("ddim_uniform", sd)),
        (euler, {"timestep_spacing": "trailing"}, {}, ("simple", sd)),
        (euler, {"use_karras_sigmas": True}, {}, ("karras", sd)),
        (euler, {"use_exponential_sigmas": True}, {}, ("exponential", sd)),
        (dpm, {"timestep_spacing": "trailing"}, {}, ("simple", sd)),
        (dpm, {"use_karras_sigmas": True}, {}, ("karras", sd)),
        (dpm, {"use_lu_lambdas": True}, {}, ("exponential", sd)),
        (flow, {"shift": 3.0}, {}, ("normal", ki.levels.flow(3.0))),
        (flow, {"use_dynamic_shifting": True}, {"sigmas": ramp, "mu": 0.8}, ("simple", ki.levels.flux(0.8))),
        ("EDMEulerScheduler", {"sigma_schedule": "karras"}, {}, ("karras", edm)),
        ("EDMEulerScheduler", {"sigma_schedule": "exponential"}, {}, ("exponential", edm)),
    ]
    found = []
    for name, options, given, (schedule, levels) in rows:
        scheduler = KinvertScheduler.from_scheduler(Case(name, options).build(), "euler")
        scheduler.set_timesteps(**(given or {"num_inference_steps": 10}))
        found.append((f"{name} {options}", scheduler.schedule, ki.schedule(schedule, 10, levels)))
    return found


def measure() -> dict[str, Any]:
    """All cases, as the docs show them."""
    rows = []
    for case in CASES:
        off, scheduler = difference(case)
        row = {"scheduler": case.scheduler, "options": case.title, "pipeline": case.family, "steps": case.steps}
        rows.append(row | {"sampler": repr(scheduler.sampler), "difference": off, "reason": case.reason})
    versions = {name: importlib.metadata.version(name) for name in ("diffusers", "transformers", "torch")}
    return {"command": "python tests/adapters/diffusers/agreement.py", "versions": versions, "rows": rows}


if __name__ == "__main__":
    place = Path(__file__).parents[3] / "benchmarks" / "results" / "diffusers.json"
    place.write_text(json.dumps(measure(), indent=1) + "\n")
