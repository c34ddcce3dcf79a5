"""Exact latents in the host: Invert, Extract Noise, RF-Inversion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from standin import NEGATIVE, POSITIVE, Host, Model, StoppedError, back, error, latent, model, run, sample_custom
from torch import Tensor

from kinvert.adapters.comfyui.samplers import make_schedule


def inputs(patcher: Model, **changes: Any) -> dict[str, Any]:
    given = {
        "model": patcher, "sampler_name": "euler", "sigmas": make_schedule(patcher, "even", 6), "cfg": 1.0,
        "tolerance": 0.0, "max_evaluations": 0, "positive": POSITIVE, "negative": NEGATIVE, "latent_image": latent(),
    }  # fmt: skip
    return given | changes


def noisy(patcher: Model, **changes: Any) -> dict[str, Any]:
    """Inputs of Extract Noise."""
    given = inputs(patcher, sampler_name="euler_ancestral", path="chain", seed=3) | changes
    return {name: value for name, value in given.items() if name not in ("tolerance", "max_evaluations")}


def steered(patcher: Model, **changes: Any) -> dict[str, Any]:
    """Inputs of RF-Inversion."""
    given = noisy(patcher, gamma=0.5, eta=0.0, until=0.0) | changes
    return {name: value for name, value in given.items() if name not in ("sampler_name", "path")}


def restored(patcher: Model, name: str, found: tuple[Any, ...], cfg: float = 1.0) -> Tensor:
    """What the host makes of the outputs of Invert: from NOISE at t = 1, else from LATENT."""
    samples, sigmas = found[0]["samples"], found[2]
    if float(sigmas[0]) == 1.0:
        empty = {"samples": torch.zeros_like(samples)}
        return back(patcher, name, sigmas, empty["samples"], cfg, found[1].generate_noise(empty))
    return back(patcher, name, sigmas, samples, cfg)


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize("name, cfg", [("euler", 1.0), ("heun", 3.0), ("dpmpp_2m", 1.0), ("euler_cfg_pp", 2.0)])
def test_the_host_restores_the_image(kind: str, name: str, cfg: float) -> None:
    """Each item has its own prompt, and items are dropped from the search one by one."""
    patcher = model(kind)
    found = run("KinvertInvert", **inputs(patcher, sampler_name=name, cfg=cfg))
    assert "converged        2 of 2" in found[3]
    assert f"called {len(patcher.model.calls)} times" in found[3]
    assert error(restored(patcher, name, found, cfg), latent()["samples"]) < 2e-5
    assert "the image is taken as the state at" in found[3]
    assert found[2].tolist() == make_schedule(patcher, "even", 6).tolist()[:-1]


@pytest.mark.usefixtures("comfy")
def test_an_item_of_a_batch_is_found_as_if_it_were_alone() -> None:
    patcher = model()
    together = run("KinvertInvert", **inputs(patcher))[0]["samples"]
    one = {"samples": latent()["samples"][1:]}
    alone = run("KinvertInvert", **inputs(patcher, latent_image=one, positive=POSITIVE[1:], negative=NEGATIVE[1:]))
    assert error(together[1:], alone[0]["samples"]) < 1e-3


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_a_mask_keeps_its_part_and_a_soft_one_is_made_hard(kind: str) -> None:
    patcher = model(kind)
    soft = torch.linspace(0, 1, 16).expand(2, 12, 16).clone()
    soft[1] = soft[1].flip(1)
    z = latent() | {"noise_mask": soft}
    sigmas = make_schedule(patcher, "even", 6)[1:]
    found = run("KinvertInvert", **inputs(patcher, latent_image=z, sigmas=sigmas))
    mask = found[0]["noise_mask"]
    assert mask.shape == (2, 1, 6, 8) and set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask[0, 0, 0].tolist() == mask[1, 0, 0].flip(0).tolist() == [0.0] * 4 + [1.0] * 4  # where it was above 0.5
    assert "the mask was rounded" in found[3]
    kept = (mask == 0).expand_as(z["samples"])
    torch.testing.assert_close(found[0]["samples"][kept], z["samples"][kept], rtol=3e-7, atol=0)
    sampler = run("KinvertSampler", sampler_name="euler")[0]
    result = sample_custom(
        patcher, 0 * z["samples"], 1.0, sampler, found[2], POSITIVE, NEGATIVE, found[0]["samples"], noise_mask=mask
    )
    assert error(result, z["samples"]) < 2e-5
    again = run("KinvertInvert", **inputs(patcher, latent_image=z | {"noise_mask": mask}, sigmas=sigmas))
    assert "the mask was rounded" not in again[3] and torch.equal(again[0]["noise_mask"], mask)


@pytest.mark.usefixtures("comfy")
def test_the_tolerance_counts_what_is_in_the_mask() -> None:
    """A small part of the image must be as exact as a whole one."""
    patcher = model()
    mask = torch.zeros(1, 6, 8)
    mask[:, 0, 0] = 1
    whole = run("KinvertInvert", **inputs(patcher, tolerance=1e-3))[3]
    part = run("KinvertInvert", **inputs(patcher, tolerance=1e-3, latent_image=latent() | {"noise_mask": mask}))[3]
    assert "tolerance 0.001 of" in whole and f"tolerance {1e-3 / 48**0.5:.3g} of" in part


@pytest.mark.usefixtures("comfy")
def test_what_has_no_exact_latent_is_refused_before_the_first_evaluation() -> None:
    patcher = model()
    sigmas = make_schedule(patcher, "even", 6)
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"sampler_name": "euler_ancestral"}, "eta=0"),
        ({"sampler_name": "edict"}, "no LATENT carries"),
        ({"sigmas": sigmas.flip(0)}, "remove FlipSigmas"),
        ({"sigmas": sigmas[-2:]}, "two levels above 0"),
        ({"sigmas": [1.0, 0.5]}, "must be SIGMAS"),
    ]
    for change, message in refusals:
        with pytest.raises(ValueError, match=message):
            run("KinvertInvert", **inputs(patcher, **change))
    assert patcher.model.calls == []


@pytest.mark.usefixtures("comfy")
def test_a_limit_is_kept_and_what_is_missing_is_said() -> None:
    patcher = model()
    report = run("KinvertInvert", **inputs(patcher, tolerance=1e-9, max_evaluations=40))[3]
    assert "converged        0 of 2" in report and "not inverted" in report
    assert len(patcher.model.calls) < 100


@pytest.mark.parametrize("after", [1, 6, 20])
def test_the_host_stops_a_search_at_once(comfy: Host, after: int) -> None:
    comfy.stop_after = after
    patcher = model()
    with pytest.raises(StoppedError):
        run("KinvertInvert", **inputs(patcher))
    assert len(patcher.model.calls) == after


def test_the_bar_of_a_search_ends_at_its_end(comfy: Host) -> None:
    run("KinvertInvert", **inputs(model()))
    assert comfy.shown[-1] == (5, 5) and all(step <= 5 for step, _ in comfy.shown)


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, "1e-05"), (torch.float16, "0.00781")])
def test_the_tolerance_is_what_the_network_allows(dtype: torch.dtype, tolerance: str) -> None:
    assert f"tolerance {tolerance} of" in run("KinvertInvert", **inputs(model(dtype=dtype)))[3]


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde"])
@pytest.mark.parametrize("path", ["independent", "chain"])
def test_noises_are_replayed(kind: str, name: str, path: str) -> None:
    patcher = model(kind)
    given = noisy(patcher, sampler_name=name, path=path, cfg=1.5)
    found, sampler, sigmas, report = run("KinvertExtractNoise", **given)
    assert "noises           5 maps" in report
    result = back(patcher, sampler, sigmas, found["samples"], 1.5)
    assert error(result, latent()["samples"]) < 1e-4
    again = run("KinvertExtractNoise", **given)
    assert torch.equal(again[0]["samples"], found["samples"])
    assert not torch.equal(run("KinvertExtractNoise", **(given | {"seed": 4}))[0]["samples"], found["samples"])
    with pytest.raises(ValueError, match="connect the sigmas"):
        back(patcher, sampler, sigmas[1:], found["samples"])


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("key, given", [("KinvertExtractNoise", noisy), ("KinvertRFInversion", steered)])
def test_a_mask_is_refused_where_it_has_no_meaning(key: str, given: Any) -> None:
    patcher = model()
    with pytest.raises(ValueError, match="remove the mask"):
        run(key, **given(patcher, latent_image=latent() | {"noise_mask": torch.ones(6, 8)}))
    assert patcher.model.calls == []


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_rf_inversion_tells_its_error_and_steers_back(kind: str) -> None:
    patcher = model(kind)
    z = latent()["samples"]
    found, sampler, sigmas, report = run("KinvertRFInversion", **steered(patcher))
    result = back(patcher, sampler, sigmas, found["samples"])
    told = float(report.split("rms of ")[1].split("\n")[0])
    missed = float((result - z).square().mean().sqrt()) * 0.2
    assert told > 1e-3 and abs(missed - told) < 0.02 * told
    found, sampler, sigmas, _ = run("KinvertRFInversion", **steered(patcher, eta=1.0))
    assert error(back(patcher, sampler, sigmas, found["samples"]), z) < 1e-3
    assert float(sigmas[0]) == (
        pytest.approx(0.9999) if kind == "flow" else float(make_schedule(patcher, "even", 6)[0])
    )


@pytest.mark.usefixtures("comfy")
def test_rf_inversion_with_gamma_1_adds_the_noise_of_its_seed() -> None:
    patcher = model()
    z = latent()["samples"]
    one, other = (run("KinvertRFInversion", **steered(patcher, gamma=1.0, seed=s))[0]["samples"] for s in (1, 2))
    sigmas = make_schedule(patcher, "even", 6)
    noise = (one - z) * 0.2 / float(sigmas[0] - sigmas[-2])
    assert abs(float(noise.std()) - 1) < 0.1 and error(one, other) > 0.1
