"""The demo: which images it takes, its picture, and its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kinvert as ki
from kinvert import demo, models
from kinvert.jsontext import to_json
from kinvert.models import classifier


def test_demo_takes_one_image_of_each_class_in_turn() -> None:
    outcome = demo.run(demo.Settings("digits", ("euler",), steps=2, count=12, invert=False))
    assert outcome.labels.tolist() == [*range(10), 0, 1]
    assert len({image.numpy().tobytes() for image in outcome.images}) == 12


def test_demo_in_colour_has_true_answers(tmp_path: Path) -> None:
    outcome = demo.run(demo.Settings("emoji", ("euler",), steps=2, count=13, invert=False))
    shown, truth = models.variants("emoji"), outcome.truth
    assert outcome.labels.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 1]
    assert outcome.targets.tolist() == [3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 2, 4]
    assert torch.equal(outcome.images[11], shown[11, 5]) and torch.equal(outcome.images[12], shown[0, 1])
    assert truth is not None and torch.equal(truth[12], shown[0, 4])
    before = ki.metrics.mse(outcome.images, truth)
    took = ki.metrics.mse(outcome.edited["euler"].clamp(-1, 1), truth) < before
    assert outcome.table()[0]["edits_took"] == int(took.sum())
    assert replace(outcome, edited={"euler": truth}).table()[0]["edits_took"] == 13
    assert replace(outcome, edited={"euler": outcome.images}).table()[0]["edits_took"] == 0
    paths = demo.save(outcome, tmp_path)
    assert paths["example"].name == "picture-emoji-3.png"
    words = {text.get_text() for text in demo.draw(outcome).texts}
    assert "truth" in words and "edited: 3, 4, 5, 0" in words
    assert "truth" in np.load(paths["npz"]).files


def test_every_picture_in_colour_is_shown_once() -> None:
    images, labels, targets, truth = demo._pick(demo.Settings("emoji", count=72))
    assert len({image.numpy().tobytes() for image in images}) == 72 and truth is not None
    held, classes = models.held_out("emoji")
    assert all(
        torch.equal(classes[(held == image).flatten(1).all(1)], label[None])
        for image, label in zip(images, labels, strict=True)
    )
    assert bool((targets != labels).all())


def test_picture_with_perfect_copy_and_long_name() -> None:
    outcome = demo.run(demo.Settings("digits", ("euler",), steps=2, count=1, invert=False))
    trip = outcome.trips["euler"]
    perfect = replace(trip, reconstruction=outcome.images, psnr=trip.psnr + torch.inf)
    name = "a_sampler_with_a_very_long_name"
    schedules, edited = {name: outcome.schedules["euler"]}, {name: outcome.edited["euler"]}
    outcome = replace(outcome, trips={name: perfect}, schedules=schedules, edited=edited)
    figure = demo.draw(outcome)
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in figure.texts}
    assert boxes[name].x1 < boxes["latent / sigma"].x0
    assert max(box.x1 for box in boxes.values()) < figure.bbox.x1
    assert json.loads(to_json(outcome.report()))["table"][0]["psnr"] is None


@pytest.mark.usefixtures("one_thread")  # which the demo has
def test_the_exact_row_and_the_edits_are_those_of_the_library() -> None:
    settings = demo.Settings("digits", ("heun",), steps=4, count=4)
    outcome = demo.run(settings)
    denoiser, sigmas = models.load("digits"), outcome.schedules["invert"]
    assert sigmas[-1] > 0 and list(outcome.trips) == ["heun", "invert"]
    found = ki.invert(denoiser, outcome.images, sigmas, positive={"label": outcome.labels})
    assert bool(found.converged.all())
    torch.testing.assert_close(outcome.trips["invert"].latent, found.latent)
    assert float(outcome.trips["invert"].max_error.max()) < 1e-3
    none = {"label": torch.full((4,), denoiser.null_label)}
    target = {"label": torch.tensor([5, 6, 7, 8])}
    edited = found.sample(denoiser, cfg=demo.EDIT_CFG, positive=target, negative=none)
    torch.testing.assert_close(outcome.edited["invert"], edited)
    took = classifier.load("digits")(edited).argmax(1) == target["label"]
    assert outcome.table()[1]["edits_took"] == int(took.sum()) and outcome.table()[1]["sampler"] == "euler"
    assert list(demo.run(replace(settings, invert=False)).trips) == ["heun"]
    assert list(demo.run(replace(settings, cfg=2.0)).trips) == ["heun"]
    assert list(demo.run(replace(settings, steps=1)).trips) == ["heun"]


def test_edits_of_normalized_latents_are_the_same() -> None:
    plain, normalized = (
        demo.run(demo.Settings("digits", ("heun",), steps=6, count=2, normalize=n, invert=False)) for n in (False, True)
    )
    assert normalized.trips["heun"].latent.std() == pytest.approx(1.0, abs=0.05)
    assert (normalized.edited["heun"] - plain.edited["heun"]).abs().mean() < 0.3


def test_the_example_is_a_three_if_there_is_one() -> None:
    outcome = demo.run(demo.Settings("digits", ("euler",), steps=1, count=5))
    assert outcome.example == 3
    assert demo.run(demo.Settings("digits", ("euler",), steps=1, count=2)).example in (0, 1)


def test_a_demo_never_leaves_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "demo-digits.png"
    kept.write_text("the picture from before")
    outcome = demo.run(demo.Settings("digits", ("euler",), steps=2, count=1, invert=False))

    class Broken:
        def savefig(self, file: Any, **_: Any) -> None:
            file.write(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "draw", lambda _: Broken())
    with pytest.raises(OSError, match="No space left"):
        demo.save(outcome, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    assert kept.read_text() == "the picture from before"
