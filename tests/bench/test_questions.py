"""What a cell can ask beyond a round trip: the metrics of each question, and what a problem cannot answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cells import SMALL, cells, measured

import kinvert as ki
from kinvert import bench, models
from kinvert.bench import PROBLEMS, Cell, Problem
from kinvert.bench.measurement import setup_of
from kinvert.bench.problems import image_numbers, make_problem
from kinvert.bench.questions import QUESTIONS
from kinvert.tensors import rms

TRIP = {"mse", "nmse_db", "max_error", "bits", "message", "detected"}
OWN = {
    "reconstruction": {"mse", "nmse_db", "max_error", "psnr"},
    "edit": {"edit_error", "edit_gain_db", "edit_closer"},
    "density": {"bits_per_value", "margin", "prefers_own"},
    "uniqueness": TRIP | {"latents", "unique", "likeliest", "search_evaluations"},
}
TINY: dict[str, Any] = {"model": "digits", "steps": 2, "count": 2, "dtype": "float32", "cfg": 2.0}


@pytest.mark.parametrize("question", QUESTIONS)
def test_each_question_has_its_own_metrics_and_two_measurements_are_equal(question: str) -> None:
    model = {"edit": "emoji", "density": "mixture", "uniqueness": "mixture"}.get(question, "digits")
    settings = TINY | {"question": question, "model": model}
    record = measured(**settings)
    assert record["error"] is None
    own = set().union(*OWN.values(), TRIP)
    latents = {"latent_std", "latent_ks", "latent_kurtosis"}
    assert record["metrics"].keys() & own == OWN.get(question, TRIP) and latents <= record["metrics"].keys()
    assert set(QUESTIONS[question].measures) <= record["metrics"].keys()
    assert all(len(values) == 2 for values in record["metrics"].values())
    assert measured(**settings) == record


def test_records_and_keys_of_the_first_two_questions_are_as_before() -> None:
    """The keys that files of earlier versions have."""
    keys = [cell.key for cell in cells(question=["reconstruction", "recovery"])]
    assert keys == ["198411778cb7cb8c", "c2eaa8a1d54b8876"]
    problem = PROBLEMS["digits"](3, 0, torch.float32)
    assert Problem(problem.denoiser, problem.images, problem.levels).target is None


def test_bits_are_the_signs_of_the_latent() -> None:
    cell = Cell(**TINY | {"question": "recovery", "method": "reversible", "sampler": "o_belm", "dtype": "float64"})
    record, _ = bench.measure(cell)
    assert record["metrics"]["bits"] == record["metrics"]["message"] == record["metrics"]["detected"] == [1.0, 1.0]
    rough = measured(**TINY | {"question": "recovery", "method": "unsample"})["metrics"]
    assert all(bits < 1 for bits in rough["bits"]) and rough["message"] == [0.0, 0.0]


def test_a_blind_reader_is_told_nothing() -> None:
    """Neither the label, nor cfg, nor the steps, nor the sampler: the same as reading by hand without them."""
    seen: list[Any] = []
    bench.METHODS["watching"] = lambda setup, x: seen.append((setup, x)) or bench.METHODS["unsample"](setup, x)
    try:
        for sampler, other in (("euler", "dpmpp_2m"), ("dpmpp_2m", "euler")):
            measured(**TINY | {"question": "recovery_blind", "method": "watching", "sampler": sampler, "steps": 8})
            setup, _ = seen.pop()
            null = models.load("digits").null_label
            assert setup.guidance["cfg"] == 1.0 and setup.guidance["negative"] is None
            assert setup.guidance["positive"]["label"].tolist() == [null, null]
            assert setup.sampler == ki.sampler(other) and len(setup.sigmas) == 7 and not setup.memory
    finally:
        bench.METHODS.pop("watching")
    assert not any(measured(**TINY | {"question": "recovery_blind", "method": "unsample"})["metrics"]["message"])


def test_an_edit_with_the_true_latent_beats_none_and_is_compared_with_the_true_picture() -> None:
    """The denoiser of a data set knows the answers: its edit ends at the picture of the target."""
    index = torch.tensor([5, 20])
    pictures = models.variants("emoji").double()

    def known(count: int, seed: int, dtype: torch.dtype) -> Problem:
        images, truth = pictures[0, index % 6], pictures[0, (index + 1) % 6]

        def denoiser(x: torch.Tensor, sigma: torch.Tensor, *, label: torch.Tensor) -> torch.Tensor:
            return pictures[0, label].to(x)

        given = {"positive": {"label": index % 6}, "target": {"label": (index + 1) % 6}}
        return Problem(denoiser, images.to(dtype), ki.levels.edm(0.02, 80.0), truth=truth.to(dtype), **given)

    PROBLEMS["known"] = known
    try:
        found = measured(model="known", question="edit", steps=20)["metrics"]
    finally:
        PROBLEMS.pop("known")
    assert found["edit_closer"] == [1.0, 1.0] and max(found["edit_error"]) < 1e-3
    assert min(found["edit_gain_db"]) > 20


def test_the_edits_of_emoji_have_their_answers() -> None:
    problem, images = make_problem("emoji", 12, 3, torch.float32), models.held_out("emoji")[0]
    assert problem.target is not None and problem.truth is not None
    old, new = problem.positive["label"], problem.target["label"]
    assert not (old == new).any() and ((new - old) % 6 == 1 + torch.arange(12) % 5).all()
    numbers = image_numbers("emoji", 12, 3)
    for k, subject in enumerate(numbers or ()):
        assert torch.equal(problem.images[k], images[6 * subject + int(old[k])])
        assert torch.equal(problem.truth[k], images[6 * subject + int(new[k])])


def test_the_density_is_that_of_ki_log_prob() -> None:
    cell = Cell("mixture", question="density", method="invert", steps=4, count=2)
    problem = make_problem("mixture", 2, 0, torch.float64)
    setup = setup_of(cell, problem)
    record, _ = bench.measure(cell)
    values = []
    for given in (problem.positive, problem.target):
        found = ki.log_prob(problem.denoiser, problem.images, setup.sigmas, sampler="euler", positive=given)
        values.append(found.bits_per_dim())
    assert record["metrics"]["bits_per_value"] == pytest.approx(values[0].tolist(), rel=1e-9)
    assert record["metrics"]["margin"] == pytest.approx((values[1] - values[0]).tolist(), rel=1e-8)


def test_the_images_of_a_density_have_the_noise_of_the_smallest_level() -> None:
    _, arrays = bench.measure(Cell(**TINY | {"question": "density", "method": "unsample", "steps": 1, "cfg": 1.0}))
    clean = PROBLEMS["digits"](2, 0, torch.float32).images
    assert rms(arrays["image"] - clean).tolist() == pytest.approx([0.02, 0.02], rel=0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"question": "edit"}, "this problem has none; give Problem(..., target=..., truth=...)"),
        ({"question": "density"}, "this problem has no `target`"),
        ({"question": "recovery_jpeg"}, "attacks are for images of one or three channels"),
        (
            {"question": "density", "model": "mixture", "method": "reversible", "sampler": "o_belm"},
            "more than a latent",
        ),
        ({"question": "uniqueness", "sampler": "dpmpp_2m"}, "one whose steps remember nothing"),
        ({"question": "recovery_blind", "method": "extract_noise", "sampler": "euler_ancestral"}, "recovers none"),
    ],
)
def test_what_a_problem_or_a_method_cannot_answer_is_said(settings: dict[str, Any], message: str) -> None:
    record = measured(**SMALL | settings)
    assert message in record["error"] and record["metrics"] == {}
