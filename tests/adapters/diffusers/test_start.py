"""What belongs to the latents of an inversion is saved with the scheduler."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
import pipelines
from drives import bases, drive, noise
from torch import Tensor

import kinvert.adapters.diffusers as kd
from kinvert.adapters.diffusers import KinvertScheduler


def close(a: Tensor, b: Tensor, parts: float) -> None:
    assert float((a - b).abs().max()) <= parts * float(b.abs().max())


@pytest.mark.parametrize("sampler", ["edict", "mccallum_foster"])
def test_the_second_state_of_the_way_back_is_saved_with_a_pipeline(tmp_path: Path, sampler: str) -> None:
    pipe, image = pipelines.build("sd3"), pipelines.noise_for("sd3", seed=5)
    pipe.scheduler = KinvertScheduler.from_scheduler(pipe.scheduler, sampler, True)
    latents = pipelines.latents_of(pipe, "sd3", 4, latents=image)
    pipe.scheduler = pipe.scheduler.back()
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    close(pipelines.latents_of(loaded, "sd3", 4, latents=latents), image, 1e-5)
    copied = copy.deepcopy(loaded.scheduler)
    other = KinvertScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    for scheduler in (copied, other):
        pipe.scheduler = scheduler
        close(pipelines.latents_of(pipe, "sd3", 4, latents=latents), image, 1e-5)


def test_the_noises_of_an_inversion_are_saved(tmp_path: Path) -> None:
    pipe = pipelines.build("sdxl")
    image = pipelines.latents_of(pipe, "sdxl", 4)
    found = kd.extract_noise(pipe, image, num_inference_steps=4, **pipelines.CALLS["sdxl"])
    found.scheduler.save_pretrained(tmp_path)
    pipe.scheduler = KinvertScheduler.from_pretrained(tmp_path)
    close(pipelines.latents_of(pipe, "sdxl", 4, latents=found.latents), image, 1e-3)
    KinvertScheduler.from_scheduler(pipe.scheduler, "euler").save_pretrained(tmp_path)  # in the same folder
    assert [path.name for path in tmp_path.iterdir()] == ["scheduler_config.json"]
    KinvertScheduler.from_pretrained(tmp_path)


def test_a_saved_state_that_is_not_there_is_missed(tmp_path: Path) -> None:
    up = KinvertScheduler.from_scheduler(bases()["vp"], "edict", True)
    drive(up, noise())
    down = up.back()
    down.save_pretrained(tmp_path)
    for load in (lambda: KinvertScheduler.from_config(down.config), lambda: KinvertScheduler.from_pretrained(tmp_path)):
        (tmp_path / "kinvert_state.safetensors").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=r"saved with the tensors state.x, state.y, got none.*copy.deepcopy"):
            load()
