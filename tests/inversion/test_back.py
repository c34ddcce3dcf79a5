"""`Inversion.sample`: the image comes back, whatever belongs to the latent; and what is said of a latent left alone."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inverting import MIXTURE, images, schedule
from problems import mixture
from publications import guidance, labelled, shifted
from torch import Tensor

import kinvert as ki
from kinvert.inversion.baselines import BASELINES, null_text, rf_inversion
from kinvert.inversion.result import Inversion
from kinvert.tensors import rms

REVERSIBLE = ["edict", "bdia", "o_belm", "leapfrog", "reversible_heun", "mccallum_foster"]
STOCHASTIC = ["euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "sa_solver_pece", "ddpm"]
PAIRS = ["euler_cfg_pp", "dpmpp_2m_cfg_pp"]
MASK = torch.tensor([[1.0, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
SIGMAS = schedule(6)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def stochastic(name: str) -> ki.Rule:
    return ki.sampler(name, **({"sde_end": 0} if name.startswith("sa_solver") else {}))


def pair(x: Tensor, sigma: Tensor) -> ki.Guided:
    denoised = MIXTURE(x, sigma)
    return ki.Guided(denoised, 0.9 * denoised + 0.1 * ki.denoisers.Gaussian(0.0, 0.7)(x, sigma))


def in_flow_time(x: Tensor, t: Tensor) -> Tensor:
    return MIXTURE(x / (1.0 - t)[:, None], t / (1.0 - t))


in_flow_time.coordinates = "flow"  # type: ignore[attr-defined]


def assert_comes_back(found: Inversion, denoiser: Any, x: Tensor, mask: Tensor | None = None, **options: Any) -> None:
    """The error of `found.sample` is the one that the certificate says, to rounding."""
    error = rms(found.sample(denoiser, **options) - x, None if mask is None else mask.expand_as(x))
    torch.testing.assert_close(error, found.round_trip_error, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize(("cfg", "mask", "max_batch"), [(1.0, None, None), (3.0, MASK, 1), (3.0, MASK[0], None)])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", *REVERSIBLE])
def test_an_inverted_image_comes_back(sampler: str, cfg: float, mask: Tensor | None, max_batch: int | None) -> None:
    x, given = images(4), guidance(cfg)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # guided pairs magnify rounding
        found = ki.invert(labelled, x, SIGMAS, sampler=sampler, mask=mask, tol=1e-7, max_evals=300, **given)
    assert (
        found.converged.any() or cfg > 1
    )  # six steps of strong guidance are hard; what was found comes back all the same
    assert_comes_back(found, labelled, x, mask, max_batch=max_batch)


@pytest.mark.parametrize("sampler", PAIRS)
@pytest.mark.parametrize("mask", [None, MASK])
def test_guided_pairs_come_back(sampler: str, mask: Tensor | None) -> None:
    found = ki.invert(pair, images(4), SIGMAS, sampler=sampler, mask=mask, tol=1e-7)
    assert found.converged.all()
    assert_comes_back(found, pair, images(4), mask)


@pytest.mark.parametrize(("mask", "max_batch"), [(None, None), (MASK, 3)])
@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_an_image_with_its_noises_comes_back(sampler: str, mask: Tensor | None, max_batch: int | None) -> None:
    x = images(4)
    found = ki.extract_noise(
        labelled, x, SIGMAS, sampler=stochastic(sampler), mask=mask, max_batch=max_batch, generator=seeded(),
        **guidance(3.0),
    )  # fmt: skip
    assert found.converged.all()
    again = found.sample(labelled, max_batch=max_batch)
    assert float(rms(again - x).max()) <= 1e-11  # with a mask, the kept region is x
    assert_comes_back(found, labelled, x)


def test_extraction_in_parts_is_the_same() -> None:
    """`max_batch` splits the calls of the denoiser and nothing else; a white source gives each sample its noises."""
    rows: list[int] = []

    def counting(x: Tensor, sigma: Tensor) -> Tensor:
        rows.append(len(x))
        return MIXTURE(x, sigma)

    whole, parts = (
        ki.extract_noise(counting, images(5), SIGMAS, max_batch=most, noise=ki.noise.white([3, 1, 4, 1, 5]))
        for most in (None, 2)
    )
    assert max(rows[-2 * 6 * 3 :]) == 2
    rows.clear()
    ki.extract_noise(counting, images(3), SIGMAS, max_batch=1)
    assert rows[:3] == [2, 2, 1] and max(rows[2:]) == 1  # two rows are needed to see whether it mixes them
    assert torch.equal(whole.latent, parts.latent) and torch.equal(whole.latent[1], whole.latent[1])
    for one, other in zip(whole.noises, parts.noises, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    alone = ki.extract_noise(MIXTURE, images(5)[3:4], SIGMAS, noise=ki.noise.white([1]))
    torch.testing.assert_close(alone.latent[0], whole.latent[3])


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("name", BASELINES)
def test_published_inversions_come_back(name: str, cfg: float) -> None:
    torch.manual_seed(0)
    found = BASELINES[name](labelled, images(4), SIGMAS, **guidance(cfg))
    assert_comes_back(found, labelled, images(4))
    assert_comes_back(found, labelled, images(4), max_batch=1)


def test_null_text_comes_back_with_its_embeddings() -> None:
    given: dict[str, Any] = {
        "cfg": 3.0, "positive": {"shift": torch.full((1, 6), 0.5, dtype=torch.float64)},
        "negative": {"shift": torch.zeros(1, 6, dtype=torch.float64)},
    }  # fmt: skip
    found = null_text(shifted, images(3), SIGMAS, lr=0.1, iterations=3, **given)
    assert_comes_back(found, shifted, images(3))
    seen: list[Any] = []
    rows: list[int] = []

    def counting(x: Tensor, sigma: Tensor, shift: Tensor) -> Tensor:
        rows.append(len(x))
        return shifted(x, sigma, shift)

    again = found.sample(counting, callback=seen.append, max_batch=2)
    torch.testing.assert_close(again, found.sample(shifted), rtol=0, atol=1e-12)
    assert [progress.index for progress in seen] == list(range(6)) and max(rows) <= 4
    options = {**given, "sampler": "euler"}
    with pytest.warns(RuntimeWarning, match="without its embeddings euler makes another image"):
        ki.sample(shifted, found.latent, SIGMAS, **options)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_steering_comes_back(eta: float) -> None:
    torch.manual_seed(0)
    found = rf_inversion(labelled, images(4), SIGMAS, eta=eta, until=0.5, **guidance(3.0))
    assert_comes_back(found, labelled, images(4))
    assert_comes_back(found, labelled, images(4), max_batch=3)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "o_belm"])
@pytest.mark.parametrize("mask", [None, MASK])
def test_flow_time_comes_back(sampler: str, mask: Tensor | None) -> None:
    times = SIGMAS / (1.0 + SIGMAS)
    found = ki.invert(in_flow_time, images(4), times, sampler=sampler, mask=mask, tol=1e-7)
    assert found.converged.all()
    assert_comes_back(found, in_flow_time, images(4), mask)


def test_noises_in_flow_time_come_back() -> None:
    times = ki.levels.FlowTimes(torch.linspace(1, 0.1, 8, dtype=torch.float64))

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return 0.64 * (1 - t)[:, None] / (0.64 * (1 - t)[:, None] ** 2 + t[:, None] ** 2) * x

    found = ki.extract_noise(denoiser, images(3), times, sampler="euler_ancestral", generator=seeded())
    assert found.converged.all()
    assert_comes_back(found, denoiser, images(3))


def test_other_conditioning_edits() -> None:
    """None keeps what was inverted with, a value replaces it, `{}` gives none."""
    found = ki.invert(labelled, images(4), SIGMAS, **guidance(1.0))
    other = found.sample(labelled, positive={"label": torch.zeros(4)})
    torch.testing.assert_close(other, ki.sample(mixture(seed=1), found.latent, SIGMAS))
    strong = found.sample(labelled, cfg=2.0)
    torch.testing.assert_close(strong, ki.sample(labelled, found.latent, SIGMAS, **guidance(2.0)))
    with pytest.raises(TypeError, match="label"):
        found.sample(labelled, positive={})


def test_callbacks_and_progress_of_the_way_back(capsys: pytest.CaptureFixture[str]) -> None:
    for sampler in ("euler", "o_belm"):
        seen: list[Any] = []
        ki.invert(MIXTURE, images(2), SIGMAS, sampler=sampler).sample(MIXTURE, callback=seen.append, progress=True)
        steps = range(sampler == "o_belm", 6)  # its pair holds what the first step would evaluate
        assert [progress.index for progress in seen] == list(steps)
        assert f"{len(steps)}/{len(steps)}" in capsys.readouterr().err


def test_an_inversion_made_by_hand_does_not_know_its_sampler() -> None:
    found = ki.invert(MIXTURE, images(2), SIGMAS)
    by_hand = Inversion(**{name: getattr(found, name) for name in (
        "latent", "residuals", "converged", "evaluations", "round_trip_error", "tolerance", "allowed", "sigmas")})  # fmt: skip
    with pytest.raises(ValueError, match="does not know its sampler"):
        by_hand.sample(MIXTURE)


# -- a latent that is not enough -------------------------------------------------------------------------------------
def inverted() -> Inversion:
    return ki.invert(MIXTURE, images(2), SIGMAS, sampler="o_belm")


def extracted() -> Inversion:
    return ki.extract_noise(MIXTURE, images(2), SIGMAS, sampler="euler_ancestral", generator=seeded())


NOT_ENOUGH = {"o_belm": (inverted, "auxiliary state"), "euler_ancestral": (extracted, "noises")}


@pytest.mark.parametrize("sampler", NOT_ENOUGH)
def test_a_latent_without_what_belongs_to_it_is_warned_of(sampler: str) -> None:
    find, what = NOT_ENOUGH[sampler]
    found = find()
    with pytest.warns(
        RuntimeWarning, match=f"without its {what} {sampler} makes another image.*found.sample"
    ) as caught:
        ki.sample(MIXTURE, found.latent, SIGMAS, sampler=sampler)
    assert caught[0].filename == __file__
    for given in ({"sampler": "euler"}, {"sampler": sampler, "noise": ki.noise.replay(found.noises)}):
        if sampler == "o_belm" and "noise" in given:
            continue
        ki.sample(MIXTURE, found.latent, SIGMAS, **given)  # another sampler, or with its noises: nothing is missing
    ki.sample(MIXTURE, found.latent.clone(), SIGMAS, sampler=sampler)
    found.sample(MIXTURE)


@pytest.mark.parametrize("sampler", NOT_ENOUGH)
def test_latents_and_inversions_are_saved_and_copied(sampler: str) -> None:
    found = NOT_ENOUGH[sampler][0]()
    assert not vars(found.latent)  # it is an ordinary tensor
    file = io.BytesIO()
    torch.save({"latent": found.latent, "noises": list(found.noises), **found.memory}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(loaded["latent"], found.latent)
    ways: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]
    for way in ways:
        assert torch.equal(way(found.latent), found.latent)
        torch.testing.assert_close(way(found).sample(MIXTURE), images(2), rtol=0, atol=1e-9)
    ki.sample(MIXTURE, loaded["latent"], SIGMAS, sampler=sampler)


def test_what_is_known_of_a_latent_goes_with_it() -> None:
    from kinvert import sampling

    found, before = inverted(), len(sampling._NEEDS)
    del found
    assert len(sampling._NEEDS) == before - 1
