"""The scheduler in the loop of a pipeline, up and down, and in real pipelines."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
import drives
import pipelines
import torch
from drives import SD, bases, denoiser_of, drive, noise, start_of
from torch import Tensor

import kinvert as ki
from kinvert.adapters.diffusers import KinvertScheduler

# Linear multistep rules in flow time make few steps too wide, and the scheduler warns of it as `ki.sample` does.
pytestmark = pytest.mark.filterwarnings("ignore:.*makes unit Gaussian data:RuntimeWarning")
REVERSIBLE = ("bdia", "edict", "leapfrog", "mccallum_foster", "o_belm", "reversible_heun")
SPACES = ("ve", "vp", "flow")


def make(space: str, sampler: str | ki.Rule | None = None, **options: Any) -> KinvertScheduler:
    return KinvertScheduler.from_scheduler(bases()[space], sampler, **options)


def close(a: Tensor, b: Tensor, parts: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= parts * float(b.abs().max())


def by_kinvert(scheduler: KinvertScheduler, latents: Tensor, source: Any = None) -> Tensor:
    """What `ki.run` makes of the same sampler, levels and network."""
    plan = ki.compile_plan(scheduler.sampler, scheduler.schedule)
    out = ki.run(plan, denoiser_of(scheduler), start_of(scheduler, latents), source)
    return out / scheduler._course_now().table.to_x(plan.sigmas[-1])


# Samplers whose noise is a Brownian path, so that the order of the draws is not that of a generator.
PATHS = ("dpmpp_sde", "dpmpp_sde_gpu")
# Samplers that diverge at t near 1, which the scheduler refuses as `ki.sample` does.
WIDE = ("dpmpp_2m_sde_heun", "dpmpp_3m", "dpmpp_3m_sde", "res_multistep_ancestral", "restart")


@pytest.mark.parametrize("space", SPACES)
def test_every_sampler_makes_what_the_engine_makes(space: str) -> None:
    ran = []
    for name in drives.names():
        if space == "flow" and name.removesuffix("_gpu") in WIDE:
            with pytest.raises(ValueError, match="too wide"):
                make(space, name).set_timesteps(6)
            continue
        scheduler = make(space, name)
        found = drive(scheduler, noise(), generator=torch.Generator().manual_seed(1))
        again = torch.Generator().manual_seed(1)
        if name not in PATHS:
            close(found, by_kinvert(scheduler, noise(), lambda a, b: torch.randn(found.shape, generator=again)))  # noqa: B023
        ran.append(name)
        assert len(scheduler.sigmas) == len(scheduler.timesteps) + 1 and scheduler.num_inference_steps
    assert len(ran) > 50


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "uni_pc", "rk4", "lms", "ddim_inverse"])
def test_upwards_is_the_plan_on_the_rising_levels(space: str, name: str) -> None:
    scheduler = make(space, name, inverse=True)
    found = drive(scheduler, noise())
    assert scheduler.init_noise_sigma == 1 and scheduler.schedule.diff().min() > 0
    close(found * bases_unit(scheduler), by_kinvert(scheduler, noise()))
    assert drive(scheduler.back(), found).isfinite().all()


def bases_unit(scheduler: KinvertScheduler) -> float:
    """What the pipeline multiplies the result by."""
    return scheduler.back().init_noise_sigma


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", REVERSIBLE)
def test_a_reversible_sampler_comes_back_to_rounding(space: str, name: str) -> None:
    image = 0.5 * noise(seed=1)
    up = make(space, name, inverse=True)
    latents = drive(up, image, 5)
    down = up.back()
    tolerance = 2e-3 if name in ("o_belm", "mccallum_foster") else 1e-4  # they magnify rounding
    close(drive(down, latents, 5), image, tolerance)
    down.set_timesteps(5)
    with pytest.raises(ValueError, match="not those that belong"):
        down.step(noise(), down.timesteps[0], 2 * latents * down.init_noise_sigma)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "pixart"])
def test_a_pipeline_gets_its_image_back_from_a_reversible_sampler(family: str) -> None:
    pipe = pipelines.build(family)
    image = pipelines.noise_for(family, seed=3)
    pipe.scheduler = KinvertScheduler.from_scheduler(pipe.scheduler, "edict", inverse=True)
    latents = pipelines.latents_of(pipe, family, 5, latents=image)
    pipe.scheduler = pipe.scheduler.back()
    close(pipelines.latents_of(pipe, family, 5, latents=latents), image, 1e-3)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "heun", "bdia", "euler_ancestral"])
def test_an_inversion_is_handed_to_the_pipeline(space: str, name: str) -> None:
    scheduler = make(space, name)
    scheduler.set_timesteps(4)
    levels = scheduler.schedule
    image = (0.4 * noise(1, seed=4)).double()
    table = scheduler._course_now().table
    given = levels[:-1] if levels[-1] == 0 else levels
    x = image * table.to_x(float(given[-1]))
    verb = ki.extract_noise if name == "euler_ancestral" else ki.invert
    found = verb(denoiser_of(scheduler), x, given, sampler=scheduler.sampler)
    latents, ready = scheduler.begin_with(found)
    close(drive(ready, latents, 4), image, 1e-4)
    with pytest.raises(ValueError, match=r"found: its latent is at level"):
        ready.set_timesteps(5)
        ready.begin_with(found)


def test_two_stages_repeat_the_timesteps_as_diffusers_does() -> None:
    for ours, theirs in ((None, diffusers.HeunDiscreteScheduler(**SD)), (None, diffusers.KDPM2DiscreteScheduler(**SD))):
        scheduler = KinvertScheduler.from_scheduler(theirs, ours)
        for one in (scheduler, theirs):
            one.set_timesteps(7)
        assert scheduler.order == theirs.order == 2 and len(scheduler.timesteps) == 13
        torch.testing.assert_close(scheduler.timesteps, theirs.timesteps.float(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "DDIMScheduler", "HeunDiscreteScheduler"])
def test_timesteps_have_the_dtype_of_the_scheduler(kind: str) -> None:
    base = getattr(diffusers, kind)(**SD)
    base.set_timesteps(5)
    scheduler = KinvertScheduler.from_scheduler(base, "euler")
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.dtype == base.timesteps.dtype
    torch.testing.assert_close(scheduler.timesteps, base.timesteps[:: base.order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("space", SPACES)
def test_half_precision_keeps_its_dtype_and_a_wider_state(space: str, dtype: torch.dtype) -> None:
    for name in ("dpmpp_2m", "heun"):
        found = drive(make(space, name), noise(dtype=dtype))
        assert found.dtype == dtype
        close(found.float(), drive(make(space, name), noise(dtype=dtype).float()), 30 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("space", SPACES)
def test_edits_of_a_callback_count_as_in_the_scheduler_itself(space: str, in_place: bool) -> None:
    def edit(i: int, x: Tensor) -> Tensor:
        if i not in (1, 3):
            return x
        return x.mul_(0.8) if in_place else 0.8 * x

    close(drive(make(space), noise(), edit=edit), drive(bases()[space], noise(), edit=edit))


def test_an_edit_moves_the_state_of_samplers_with_a_corrector() -> None:
    """A denoised image that never changes makes all these samplers the same; so they are with an edit."""

    def constant(scheduler: KinvertScheduler) -> Tensor:
        scheduler.set_timesteps(6)
        x = noise()
        for i, t in enumerate(scheduler.timesteps):
            level = scheduler.sigmas[i]
            x = scheduler.step((x * math.hypot(1, level) - 0.3) / level, t, x)[0]
            x = x + 0.2 if i == 2 else x
        return x

    expected = constant(make("vp", "euler"))
    for name in ("dpmpp_2m", "uni_pc", "uni_pc_bh2", "sa_solver"):
        close(constant(make("vp", name, **({"eta": 0.0} if name == "sa_solver" else {}))), expected)


def test_a_copy_goes_on_alone() -> None:
    for name in ("dpmpp_2m", "heun", "euler_ancestral", "uni_pc", "edict"):
        scheduler = make("ve", name)
        scheduler.set_timesteps(5)
        x, other, copied = 10 * noise(), None, None
        for i, t in enumerate(scheduler.timesteps):
            if i == 3:
                other, copied = copy.deepcopy(scheduler), x
            output = drives.network(scheduler.scale_model_input(x, t), float(t))
            x = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(i))[0]
        assert other is not None and copied is not None and other.step_index == 3
        for i, t in list(enumerate(other.timesteps))[3:]:
            output = drives.network(other.scale_model_input(copied, t), float(t))
            copied = other.step(output, t, copied, generator=torch.Generator().manual_seed(i))[0]
        torch.testing.assert_close(copied, x)


def test_noise_follows_the_generator() -> None:
    for name in ("euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde"):
        runs = [drive(make("vp", name), noise(), generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
        assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2])
        both = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        one = drive(make("vp", name), noise()[:1], generator=[torch.Generator().manual_seed(0)])
        close(drive(make("vp", name), noise(), generator=both)[:1], one)
        torch.manual_seed(5)
        first = drive(make("vp", name), noise())
        torch.manual_seed(5)
        assert torch.equal(first, drive(make("vp", name), noise()))


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_add_noise_is_the_schedulers_own(kind: str) -> None:
    flow = kind.startswith("Flow")
    base = getattr(diffusers, kind)(**({} if flow else SD))
    add = "scale_noise" if flow else "add_noise"
    scheduler = KinvertScheduler.from_scheduler(base, "heun")
    x, n = noise(seed=1), noise(seed=2)
    given = (x, n) if not flow else (x,)
    if not flow:
        t = base.timesteps[[3, 500]]
        close(scheduler.add_noise(x, n, t), base.add_noise(x, n, t))
    base.set_timesteps(5)
    scheduler.set_timesteps(5)
    t = base.timesteps[[1, 3]]
    own = base.scale_noise(x, t, n) if flow else base.add_noise(*given, t)
    close(getattr(scheduler, add)(*((x, t, n) if flow else (x, n, t))), own)
    scheduler.set_begin_index(6)
    if hasattr(base, "set_begin_index"):
        base.set_begin_index(3)
    t = base.timesteps[[3, 3]]
    own = base.scale_noise(x, t, n) if flow else base.add_noise(*given, t)
    close(getattr(scheduler, add)(*((x, t, n) if flow else (x, n, t))), own)


IMAGE_TO_IMAGE = {
    "sd15": "StableDiffusionImg2ImgPipeline",
    "sdxl": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Img2ImgPipeline",
    "flux": "FluxImg2ImgPipeline",
}


@pytest.mark.parametrize("family", IMAGE_TO_IMAGE)
def test_image_to_image_begins_in_the_middle(family: str) -> None:
    pipe = pipelines.build(family)
    kind = getattr(diffusers, IMAGE_TO_IMAGE[family])
    parts = pipe.components | ({"requires_safety_checker": False} if family == "sd15" else {})
    other = kind(**parts)
    other.set_progress_bar_config(disable=True)
    call = {
        k: v for k, v in pipelines.CALLS[family].items() if k not in ("height", "width") or family in ("sd3", "flux")
    }
    call |= {"image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), "strength": 0.6}
    flow = {"sd3", "flux"} & {family}
    schedulers = [pipe.scheduler]
    if not flow:
        schedulers += [
            diffusers.DPMSolverMultistepScheduler(**SD, final_sigmas_type="sigma_min"),
            diffusers.HeunDiscreteScheduler(**SD),
            diffusers.DDIMScheduler(**SD, clip_sample=False),
        ]
    for base in schedulers:
        found = []
        for scheduler in (base, KinvertScheduler.from_scheduler(base)):
            other.scheduler = scheduler
            out = other(
                **call, num_inference_steps=20, output_type="latent", generator=torch.Generator().manual_seed(0)
            )
            found.append(out.images)
        close(found[1], found[0])


def test_a_sampler_that_cannot_begin_in_the_middle_says_so() -> None:
    scheduler = make("vp", "leapfrog")
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(3)
    with pytest.raises(ValueError, match="cannot begin at step 2"):
        scheduler.step(noise(), scheduler.timesteps[3], noise())


@pytest.mark.parametrize(
    ("sampler", "options", "inverse"),
    [
        (None, {}, False),
        ("dpmpp_3m", {}, False),
        ("sa_solver", {"eta": 0.0, "use_pece": True}, True),
        ("edict", {}, True),
    ],
)
def test_a_saved_scheduler_is_the_same(tmp_path: Path, sampler: Any, options: dict[str, Any], inverse: bool) -> None:
    base = diffusers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True, thresholding=True)
    scheduler = KinvertScheduler.from_scheduler(base, sampler, inverse, **options)
    scheduler.save_pretrained(tmp_path)
    loaded = KinvertScheduler.from_pretrained(tmp_path)
    public = [{k: v for k, v in one.config.items() if not k.startswith("_")} for one in (loaded, scheduler)]
    assert public[0] == public[1] and loaded.config["kinvert"]["options"].keys() == options.keys()
    assert torch.equal(drive(loaded, noise()), drive(scheduler, noise()))


def test_the_way_back_of_an_inverse_scheduler_is_saved(tmp_path: Path) -> None:
    up = KinvertScheduler.from_scheduler(diffusers.DDIMInverseScheduler(**SD, clip_sample=False))
    latents = drive(up, noise(), 20)
    down = up.back()
    down.save_pretrained(tmp_path)
    found = drive(KinvertScheduler.from_pretrained(tmp_path), latents, 20)
    assert torch.equal(found, drive(down, latents, 20))
    close(found, noise(), 0.5)  # DDIM inversion, approximately


def test_a_pipeline_is_saved_with_its_scheduler(tmp_path: Path) -> None:
    pipe = pipelines.build("sdxl")
    pipe.scheduler = KinvertScheduler.from_scheduler(pipe.scheduler, "dpmpp_2m", True)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.scheduler, KinvertScheduler)
    image = pipelines.noise_for("sdxl", seed=5)
    close(*(pipelines.latents_of(one, "sdxl", 4, latents=image) for one in (loaded, pipe)))
    again = diffusers.EulerDiscreteScheduler.from_config(loaded.scheduler.config)
    assert again.config.timestep_spacing == "leading"
    back = KinvertScheduler.from_scheduler(loaded.scheduler, "heun")
    assert back.config["kinvert"]["scheduler"] == "EulerDiscreteScheduler" and not back.config["kinvert"]["inverse"]


def test_the_config_is_that_of_the_users_scheduler() -> None:
    base = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0, use_dynamic_shifting=True, base_shift=0.4)
    scheduler = KinvertScheduler.from_scheduler(base, "heun")
    assert scheduler.config.base_shift == 0.4 and scheduler.config.get("use_dynamic_shifting") is True
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.3], mu=0.7)
    base.set_timesteps(sigmas=[1.0, 0.6, 0.3], mu=0.7)
    torch.testing.assert_close(scheduler.schedule.float(), base.sigmas)
    assert scheduler.shift == 2.0 and len(scheduler) == 1000
    assert isinstance(scheduler.schedule, ki.levels.FlowTimes)


def test_clipping_holds_for_every_sampler() -> None:
    base = diffusers.DDIMScheduler(**SD, clip_sample=True, clip_sample_range=0.5)
    scheduler = KinvertScheduler.from_scheduler(base, "dpmpp_2m")
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        out = scheduler.step(noise(), t, noise())
        assert out.pred_original_sample.abs().max() <= 0.5
    base = diffusers.DPMSolverMultistepScheduler(**SD, thresholding=True)
    scheduler = KinvertScheduler.from_scheduler(base, "heun")
    scheduler.set_timesteps(4)
    out = scheduler.step(noise(), scheduler.timesteps[0], noise())
    assert out.pred_original_sample.abs().max() <= 1.0


def test_options_of_earlier_classes_do_not_count() -> None:
    """The config that a scheduler was built from may hold them."""
    earlier = diffusers.DDIMScheduler(**SD, clip_sample=True)
    base = diffusers.EulerDiscreteScheduler.from_config(earlier.config)
    assert base.config.clip_sample
    close(drive(KinvertScheduler.from_scheduler(base), noise()), drive(base, noise()))
