"""Unsampler and Round Trip, against `ki.unsample` on the same model without the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from standin import NEGATIVE, POSITIVE, SCALE, Host, Model, Nested, StoppedError, back, error, latent, model, run
from torch import Tensor

import kinvert as ki
from kinvert.adapters.comfyui.report import moments_line
from kinvert.adapters.comfyui.samplers import make_schedule


def inputs(patcher: Model, **changes: Any) -> dict[str, Any]:
    given = {
        "model": patcher, "steps": 8, "end_at_step": 0, "cfg": 1.0, "sampler_name": "euler", "scheduler": "even",
        "normalize": "disable", "positive": POSITIVE, "negative": NEGATIVE, "latent_image": latent(),
    }  # fmt: skip
    return given | changes


def unsampled(patcher: Model, kind: str, **options: Any) -> Tensor:
    """What `ki.unsample` returns on the model without the host."""

    def denoiser(x: Tensor, sigma: Tensor, shift: Tensor) -> Tensor:
        low = x.float()  # what the host evaluates
        return patcher.model.denoised(low, sigma.float(), shift).double() + (x - low.double())

    denoiser.coordinates = "flow" if kind == "flow" else "ve"  # type: ignore[attr-defined]
    falling = make_schedule(patcher, "even", 8)
    x = patcher.model.process_latent_in(latent()["samples"]).double()
    mask = torch.ones(6, 8) if kind == "flow" else None  # scales x to the time that the run starts at, as hosts do
    guidance = {"positive": {"shift": POSITIVE}, "negative": {"shift": NEGATIVE}}
    return ki.unsample(denoiser, x, falling, sigma_offset=1e-4, mask=mask, **guidance, **options)


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize(
    "options",
    [
        {"end_at_step": 1},
        {"end_at_step": 2, "cfg": 2.5, "sampler": "heun"},
        {"end_at_step": 20, "sampler": "ddim"},
        {"end_at_step": 1, "sampler": "uni_pc", "cfg": 1.5},
        {"end_at_step": 1, "sampler": "rf_solver"},
        {"end_at_step": 1, "sampler": "fireflow"},
    ],
)
def test_it_is_unsample_of_kinvert(kind: str, options: dict[str, Any]) -> None:
    patcher = model(kind)
    wanted = unsampled(patcher, kind, **options)
    name = options.get("sampler", "euler")
    sigmas = make_schedule(patcher, "even", 8)
    given = inputs(patcher, sampler_name=name, sigmas=sigmas) | {k: v for k, v in options.items() if k != "sampler"}
    result = run("KinvertUnsampler", **given)[0]["samples"]
    level = float(sigmas[min(options["end_at_step"], 7)])
    wanted = patcher.model.process_latent_out(patcher.model.model_sampling.undo(level, wanted))
    rounding = 1e-5 if options.get("cfg", 1.0) == 1.0 else 3e-4  # of guidance in float32, divided by sigma = 1e-4
    assert error(result, wanted) < rounding
    assert result.dtype == torch.float32


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_the_host_samples_the_latent_back(kind: str) -> None:
    """From LATENT and from NOISE alike; the offset of the way up is no part of the start."""
    patcher = model(kind)
    given = inputs(patcher, steps=200, end_at_step=60)
    found, noise, _ = run("KinvertUnsampler", **given)
    sigmas = make_schedule(patcher, "even", 200)[60:]
    image = given["latent_image"]["samples"]
    result = back(patcher, "euler", sigmas, found["samples"])
    assert error(result, image) < 0.05
    empty = torch.zeros_like(image)
    assert error(back(patcher, "euler", sigmas, empty, noise=noise.generate_noise({"samples": empty})), result) < 1e-4


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_noise_starts_the_whole_schedule_too(kind: str) -> None:
    """At the highest level the host scales noise in another way, and at t = 1 it ignores LATENT."""
    patcher = model(kind)
    found, noise, report = run("KinvertUnsampler", **inputs(patcher, steps=200))
    sigmas = make_schedule(patcher, "even", 200)
    empty = {"samples": torch.zeros_like(found["samples"])}
    result = back(patcher, "euler", sigmas, empty["samples"], noise=noise.generate_noise(empty))
    assert error(result, latent()["samples"]) < 0.05
    assert ("at t = 1" in report) == (kind == "flow")


@pytest.mark.usefixtures("comfy")
def test_normalize() -> None:
    patcher = model()
    plain = run("KinvertUnsampler", **inputs(patcher))[0]["samples"]
    found = {
        how: run("KinvertUnsampler", **inputs(patcher, normalize=how))[0]["samples"]
        for how in ("enable", "sample", "sigma")
    }
    torch.testing.assert_close(found["enable"], (plain - plain.mean()) / plain.std())
    one = plain[1]
    torch.testing.assert_close(found["sample"][1], (one - one.mean()) / one.std())
    torch.testing.assert_close(found["sigma"], plain * SCALE / (make_schedule(patcher, "even", 8)[0] + 1e-4))
    with pytest.raises(ValueError, match="unknown normalize"):
        run("KinvertUnsampler", **inputs(patcher, normalize="yes"))


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize("name", ["euler", "uni_pc", "euler_cfg_pp"])
def test_the_mask_of_each_item_keeps_its_part(kind: str, name: str) -> None:
    patcher = model(kind)
    z = latent()
    mask = torch.ones(2, 6, 8)
    mask[0, :, :4], mask[1, :3] = 0, 0
    given = inputs(patcher, latent_image=z | {"noise_mask": mask}, sampler_name=name, end_at_step=2)
    found = run("KinvertUnsampler", **given)[0]["samples"]
    kept = (mask == 0)[:, None].expand_as(found)
    torch.testing.assert_close(found[kept], z["samples"][kept], rtol=1e-5, atol=1e-5)
    assert error(found[~kept], z["samples"][~kept]) > 0.5


@pytest.mark.usefixtures("comfy")
def test_the_given_latent_stays_as_it_is_and_other_entries_are_kept() -> None:
    given = latent() | {"batch_index": [3, 4]}
    before = given["samples"].clone()
    found = run("KinvertUnsampler", **inputs(model(), latent_image=given))[0]
    assert torch.equal(given["samples"], before) and found["batch_index"] == [3, 4]
    assert found is not given and found["samples"] is not given["samples"]


@pytest.mark.usefixtures("comfy")
def test_half_precision_video_and_nested_latents() -> None:
    patcher = model()
    z = latent()["samples"]
    wanted = run("KinvertUnsampler", **inputs(patcher))[0]["samples"]
    half = run("KinvertUnsampler", **inputs(patcher, latent_image={"samples": z.half()}))[0]["samples"]
    assert half.dtype == torch.float32 and error(half, wanted) < 1e-2
    video = z[:, :, None].repeat(1, 1, 3, 1, 1)
    assert (
        error(
            run("KinvertUnsampler", **inputs(patcher, latent_image={"samples": video}))[0]["samples"][:, :, 2], wanted
        )
        < 1e-6
    )
    both = Nested([z, 2 * z[:, :2, 0]])
    found, noise, _ = run("KinvertUnsampler", **inputs(patcher, latent_image={"samples": both}))
    assert error(found["samples"].parts[0], wanted) < 1e-6
    assert [part.shape for part in noise.noise.parts] == [z.shape, (2, 2, 8)]
    unit = run("KinvertUnsampler", **inputs(patcher, latent_image={"samples": both}, normalize="sample"))[0]
    assert all(abs(float(part[0].std()) - 1) < 1e-5 for part in unit["samples"].parts)


@pytest.mark.usefixtures("comfy")
def test_a_schedule_with_more_steps_than_asked_for_is_run_to_its_end() -> None:
    report = run("KinvertUnsampler", **inputs(model(), scheduler="long"))[2]
    assert f"10 steps, 10 evaluations, from 0.0001 to {float(make_schedule(model(), 'long', 8)[0]):.4g}" in report


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "lcm"])
@pytest.mark.parametrize("key", ["KinvertUnsampler", "KinvertRoundTrip"])
def test_what_cannot_go_up_is_refused_before_the_first_evaluation(key: str, name: str) -> None:
    patcher = model()
    with pytest.raises(ValueError, match="use "):
        run(key, **inputs(patcher, sampler_name=name))
    assert patcher.model.calls == []


@pytest.mark.parametrize("key, after", [("KinvertUnsampler", 3), ("KinvertRoundTrip", 11)])
def test_the_host_stops_it_at_once(comfy: Host, key: str, after: int) -> None:
    comfy.stop_after = after
    patcher = model()
    with pytest.raises(StoppedError):
        run(key, **inputs(patcher))
    assert len(patcher.model.calls) == after


@pytest.mark.usefixtures("comfy")
def test_sampler_and_sigmas_take_the_place_of_names() -> None:
    patcher = model()
    sampler = run("KinvertSampler", sampler_name="euler_ancestral", options="eta=0")[0]
    sigmas = make_schedule(patcher, "even", 8)
    by_input = run("KinvertUnsampler", **inputs(patcher, steps=3, sampler_name="lms", sampler=sampler, sigmas=sigmas))
    assert error(by_input[0]["samples"], run("KinvertUnsampler", **inputs(patcher))[0]["samples"]) < 1e-6
    with pytest.raises(ValueError, match="remove FlipSigmas"):
        run("KinvertUnsampler", **inputs(patcher, sigmas=sigmas.flip(0)))


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize("normalize", ["disable", "sample"])
def test_the_round_trip_says_what_the_host_would_find(kind: str, normalize: str) -> None:
    patcher = model(kind)
    given = inputs(patcher, end_at_step=2, normalize=normalize)
    image, rms, report = run("KinvertRoundTrip", **given)
    z = given["latent_image"]["samples"]
    assert abs(rms - SCALE * float((image["samples"] - z).square().mean().sqrt())) < 1e-5
    assert f"rms error {rms:.3g}" in report and len(patcher.model.calls) == 12
    if normalize == "disable":
        found = run("KinvertUnsampler", **given)[0]["samples"]
        result = back(patcher, "euler", make_schedule(patcher, "even", 8)[2:], found)
        assert error(result, image["samples"]) < 1e-5


@pytest.mark.usefixtures("comfy")
def test_what_is_no_image_is_refused() -> None:
    patcher = model()
    with pytest.raises(TypeError, match="latent_image must be a LATENT, got Tensor"):
        run("KinvertUnsampler", **inputs(patcher, latent_image=torch.zeros(1, 4, 6, 8)))
    z = latent()
    z["samples"][0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        run("KinvertUnsampler", **inputs(patcher, latent_image=z))
    with pytest.raises(ValueError, match="normalize=sample needs a latent that varies"):
        flat = {"samples": torch.zeros(2, 4, 1, 1)}
        run("KinvertUnsampler", **inputs(patcher, latent_image=flat, normalize="sample", positive=POSITIVE * 0))
    assert patcher.model.calls == [2] * 8


@pytest.mark.usefixtures("comfy")
def test_the_report_has_the_moments_of_the_latent_by_its_level() -> None:
    found, _, report = run("KinvertUnsampler", **inputs(model(), normalize="sigma"))
    assert moments_line(found["samples"]) in report.splitlines()
