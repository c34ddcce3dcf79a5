"""The nodes that mix latents, and NOISE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from standin import SCALE, Nested, latent, model, run

from kinvert.adapters.comfyui.latents import FoundNoise, item_masks
from kinvert.adapters.comfyui.samplers import make_schedule
from kinvert.editing import slerp


def test_slerp_broadcasts_a_batch_of_one_and_refuses_other_shapes() -> None:
    four, one = latent(4), latent(1, seed=9)
    found = run("KinvertSlerpLatents", latents1=one, factor=0.3, latents2=four)[0]["samples"]
    torch.testing.assert_close(found, slerp(one["samples"].expand(4, -1, -1, -1), four["samples"], 0.3))
    assert torch.equal(run("KinvertSlerpLatents", latents1=one, factor=0.3)[0]["samples"], one["samples"])
    with pytest.raises(ValueError, match=r"\(4, 4, 6, 8\) and \(2, 4, 6, 8\)"):
        run("KinvertSlerpLatents", latents1=four, factor=0.3, latents2=latent(2))


def test_ends_of_the_arc_are_the_latents_and_equal_ones_stay() -> None:
    a, b = latent(), latent(seed=1)
    for factor, wanted in ((0.0, a), (1.0, b)):
        torch.testing.assert_close(
            run("KinvertSlerpLatents", latents1=a, factor=factor, latents2=b)[0]["samples"], wanted["samples"]
        )
    same = run("KinvertSlerpLatents", latents1=a, factor=0.4, latents2=a)[0]["samples"]
    torch.testing.assert_close(same, a["samples"])


@pytest.mark.usefixtures("comfy")
def test_noise_is_added_inside_the_mask_of_each_item() -> None:
    z, n = latent(), latent(1, seed=3)
    mask = torch.zeros(2, 6, 8)
    mask[0, :3] = 1
    found = run("KinvertInjectNoise", latents=z, strength=2.0, noise=n, mask=mask)[0]["samples"]
    wanted = z["samples"].clone()
    wanted[0, :, :3] += 2 * n["samples"][0, :, :3]
    torch.testing.assert_close(found, wanted)
    assert run("KinvertInjectNoise", latents=z, strength=2.0)[0] is z
    pair = [{"samples": Nested([x["samples"], x["samples"][:, 0]])} for x in (z, z)]
    twice = run("KinvertInjectNoise", latents=pair[0], strength=1.0, noise=pair[1])[0]["samples"]
    torch.testing.assert_close(twice.parts[1], 2 * z["samples"][:, 0])
    with pytest.raises(ValueError, match="nested"):
        run("KinvertInjectNoise", latents=pair[0], strength=1.0, noise=z)


def test_masks_are_repeated_and_resized_for_each_item() -> None:
    x = latent(3)["samples"]
    masks = item_masks(torch.stack([torch.zeros(48, 64), torch.ones(48, 64)]), x)
    assert masks.shape == (3, 1, 6, 8) and masks.flatten(1).mean(1).tolist() == [0.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="batch of images"):
        item_masks(torch.ones(6, 8), x[:, :, None])


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_the_strength_takes_an_image_to_a_level(kind: str) -> None:
    patcher = model(kind)
    given = {"model": patcher, "sampler_name": "euler", "scheduler": "even", "steps": 8, "end_at_step": 10000}
    strength = run("KinvertGetSigma", **given, start_at_step=2)[0]
    assert isinstance(strength, float)
    z, n = latent()["samples"], torch.randn(2, 4, 6, 8)
    made = run("KinvertInjectNoise", latents={"samples": z}, strength=strength, noise={"samples": n})[0]["samples"]
    level = make_schedule(patcher, "even", 8)[2]
    state = patcher.model.model_sampling.noise_scaling(level, 0 * n, patcher.model.process_latent_in(made), False)
    wanted = patcher.model.model_sampling.noise_scaling(level, n, patcher.model.process_latent_in(z), False)
    torch.testing.assert_close(state, wanted)
    if kind == "flow":
        with pytest.raises(ValueError, match="start_at_step=1"):
            run("KinvertGetSigma", **given, start_at_step=0)


@pytest.mark.usefixtures("comfy")
def test_channels_of_different_scale_have_no_one_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    patcher = model()
    scales = torch.tensor([1.0, 1.0, 2.0, 1.0]).reshape(1, 4, 1, 1)
    monkeypatch.setattr(patcher.model, "process_latent_in", lambda x: x * scales)
    with pytest.raises(ValueError, match="each channel"):
        run(
            "KinvertGetSigma",
            model=patcher,
            sampler_name="euler",
            scheduler="even",
            steps=8,
            start_at_step=0,
            end_at_step=8,
        )


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("source", ["CPU", "GPU"])
def test_noise_is_that_of_torch_and_its_state_is_left_alone(source: str) -> None:
    torch.manual_seed(5)
    wanted = torch.randn(2, 4, 8, 12)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    made = run("KinvertNoisyLatent", source=source, seed=5, width=96, height=64, batch_size=2)[0]["samples"]
    assert torch.equal(made, wanted) and torch.equal(torch.get_rng_state(), before)
    many = run("KinvertNoisyLatent", source=source, seed=5, width=96, height=64, batch_size=1, channels=16)[0]
    assert many["samples"].shape == (1, 16, 8, 12)


def test_noise_refuses_what_the_host_would_add_to_it() -> None:
    z = latent()["samples"]
    empty: Any = torch.full_like(z, 0.06)
    noise = FoundNoise(z, empty)
    for good in (torch.zeros_like(z), empty):
        assert noise.generate_noise({"samples": good}) is z
    with pytest.raises(ValueError, match="Empty Latent Image"):
        noise.generate_noise({"samples": z / SCALE})
    with pytest.raises(ValueError, match=r"shape \(2, 4, 6, 8\), and latent_image \(1, 4, 6, 8\)"):
        noise.generate_noise({"samples": z[:1]})
    assert FoundNoise(z).generate_noise({"samples": z}) is z
