"""What the scheduler refuses, by name, with the fix."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
import pipelines
import torch
from drives import bases, drive, noise

import kinvert as ki
from kinvert.adapters.diffusers import KinvertScheduler

from_scheduler = KinvertScheduler.from_scheduler


@pytest.mark.parametrize(
    ("scheduler", "what"),
    [
        (diffusers.EulerDiscreteScheduler, "got the class EulerDiscreteScheduler; pass pipe.scheduler"),
        ("euler", "builtins.str is none of those"),
        (diffusers.IPNDMScheduler(), "IPNDMScheduler is none of those.*DDIMScheduler, .*from_config"),
        (type("Mine", (diffusers.DDIMScheduler,), {})(), "Mine is none of those"),
    ],
)
def test_a_scheduler_that_is_not_known(scheduler: Any, what: str) -> None:
    with pytest.raises(TypeError, match=f"(?s)scheduler.*{what}"):
        from_scheduler(scheduler, "euler")


@pytest.mark.parametrize(
    ("kind", "options", "what"),
    [
        ("EulerDiscreteScheduler", {"prediction_type": "flow_prediction"}, "no meaning for states in ve"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "no meaning for states in flow.*'flow_prediction'"),
        ("EDMEulerScheduler", {"prediction_type": "sample"}, "no meaning"),
    ],
)
def test_a_prediction_without_meaning(kind: str, options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=f"{kind}: prediction_type=.*{what}"):
        from_scheduler(getattr(diffusers, kind)(**options), "euler")


@pytest.mark.parametrize(
    ("kind", "options", "what"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas=True"),
        ("PNDMScheduler", {}, "skip_prk_steps=True"),
    ],
)
def test_levels_that_are_no_schedule(kind: str, options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        from_scheduler(getattr(diffusers, kind)(**options), "euler").set_timesteps(5)


@pytest.mark.parametrize(
    ("sampler", "options", "what"),
    [
        ("eular", {}, "unknown sampler 'eular'"),
        ("euler", {"order": 2}, "euler has no option 'order'"),
        (None, {"eta": 0.0}, "options eta were given without a sampler"),
        ("euler_cfg_pp", {}, "combines the two before it calls the scheduler"),
        ("dpm_adaptive", {}, "chooses its steps on the way"),
    ],
)
def test_a_sampler_that_cannot_run(sampler: Any, options: dict[str, Any], what: str) -> None:
    with pytest.raises((ValueError, TypeError), match=what):
        from_scheduler(bases()["ve"], sampler, **options)


def test_noise_before_the_first_evaluation() -> None:
    with pytest.raises(ValueError, match=r"adds noise before its first evaluation.*switch it off \(s_churn=0"):
        from_scheduler(bases()["ve"], "euler", s_churn=5.0).set_timesteps(5)
    with pytest.raises(ValueError, match=r"shark adds noise before its first evaluation.*switch it off \(eta=0"):
        from_scheduler(bases()["ve"], "shark").set_timesteps(5)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_sde", "lcm", "ddpm"])
def test_a_sampler_that_cannot_go_up(name: str) -> None:
    with pytest.raises(ValueError, match="noise|forgets x"):
        from_scheduler(bases()["vp"], name, True).set_timesteps(5)


def test_calls_out_of_order() -> None:
    scheduler = from_scheduler(bases()["vp"], "heun")
    for call in (lambda: scheduler.schedule, lambda: scheduler.step(noise(), 1, noise())):
        with pytest.raises(RuntimeError, match=r"call set_timesteps\(num_inference_steps\) first"):
            call()
    scheduler.set_timesteps(4)
    times = scheduler.timesteps
    with pytest.raises(ValueError, match="timestep: no step begins at 5"):
        scheduler.step(noise(), 5, noise())
    scheduler.step(noise(), times[0], noise())
    with pytest.raises(ValueError, match=r"evaluation 1 of 8 is at 501, got 0; .*in order"):
        scheduler.step(noise(), times[-1], noise())
    drive(scheduler, noise(), 4)
    with pytest.raises(ValueError, match="the run is over; call set_timesteps"):
        scheduler.step(noise(), times[-1], noise())
    with pytest.raises(ValueError, match=r"no step of heun begins at evaluation 3, but at 0, 2, 4, 6"):
        scheduler.set_begin_index(3)


def test_tensors_of_another_shape() -> None:
    scheduler = from_scheduler(bases()["vp"])
    scheduler.set_timesteps(4)
    t = scheduler.timesteps
    with pytest.raises(ValueError, match=r"model_output must have the shape of the sample.*variance_type"):
        scheduler.step(torch.cat([noise(), noise()], 1), t[0], noise())
    scheduler.set_timesteps(4)
    x = scheduler.step(noise(), t[0], noise())[0]
    with pytest.raises(ValueError, match=r"sample must have the shape of the run, \(2, 4, 4, 4\), got \(1, 4, 4, 4\)"):
        scheduler.step(noise(1), t[1], x[:1])


@pytest.mark.parametrize("option", [{"eta": 0.5}, {"use_clipped_model_output": True}])
def test_options_of_a_step_that_the_sampler_has(option: dict[str, Any]) -> None:
    scheduler = from_scheduler(bases()["vp"])
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=next(iter(option))):
        scheduler.step(noise(), scheduler.timesteps[0], noise(), **option)


def test_eta_of_the_pipeline_call_is_not_lost() -> None:
    pipe = pipelines.build("sd15")
    pipe.scheduler = from_scheduler(pipe.scheduler)
    with pytest.raises(ValueError, match=r"eta=0.3: give it to the sampler"):
        pipelines.latents_of(pipe, "sd15", eta=0.3)


def test_levels_that_the_users_scheduler_does_not_take() -> None:
    scheduler = from_scheduler(bases()["vp"])
    with pytest.raises(TypeError, match="DDIMScheduler does not take sigmas"):
        scheduler.set_timesteps(sigmas=[3.0, 1.0])


def test_a_config_of_another_class() -> None:
    for config in (bases()["ve"].config, None):
        with pytest.raises(ValueError, match=r"use KinvertScheduler.from_scheduler\(pipe.scheduler"):
            KinvertScheduler.from_config(config)


def test_a_rule_that_cannot_be_saved(tmp_path: Any) -> None:
    scheduler = from_scheduler(bases()["ve"], ki.rules.McCallumFoster(ki.sampler("euler")))
    with pytest.raises(ValueError, match="cannot be saved"):
        scheduler.save_pretrained(tmp_path)


def test_back_before_the_end() -> None:
    with pytest.raises(RuntimeError, match="belongs to a scheduler that runs upwards"):
        from_scheduler(bases()["ve"]).back()
    scheduler = from_scheduler(bases()["ve"], inverse=True)
    scheduler.set_timesteps(4)
    with pytest.raises(RuntimeError, match="is not finished"):
        scheduler.back()


def test_an_inversion_with_embeddings() -> None:
    scheduler = from_scheduler(bases()["vp"], "euler")
    scheduler.set_timesteps(2)
    levels = scheduler.schedule
    denoiser = ki.denoisers.Gaussian(torch.zeros(4, dtype=torch.float64), 1.0)
    found = ki.invert(denoiser, torch.ones(1, 4, dtype=torch.float64), levels, sampler="euler")
    found.embeddings["text"] = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="it has embeddings for each step"):
        scheduler.begin_with(found)


def test_without_diffusers_the_error_names_the_extra() -> None:
    code = """
import sys
sys.modules["diffusers"] = None
import kinvert.adapters.diffusers as kd
try:
    kd.KinvertScheduler
except ImportError as error:
    print(error)
try:
    kd.nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'kinvert[diffusers]'" in done.stdout and "no attribute 'nothing'" in done.stdout


def test_the_package_is_imported_without_diffusers() -> None:
    code = "import sys, kinvert.adapters.diffusers; print('diffusers' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
