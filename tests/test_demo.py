"""The demo: which images it takes, its picture, and its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kinvert import demo
from kinvert.jsontext import to_json


def test_demo_takes_one_image_of_each_class_in_turn() -> None:
    outcome = demo.run(demo.Settings("digits", ("euler",), steps=2, count=12))
    assert outcome.labels.tolist() == [*range(10), 0, 1]
    assert len({image.numpy().tobytes() for image in outcome.images}) == 12


def test_picture_with_perfect_copy_and_long_name() -> None:
    outcome = demo.run(demo.Settings("digits", ("euler",), steps=2, count=1))
    trip = outcome.trips["euler"]
    perfect = replace(trip, reconstruction=outcome.images, psnr=trip.psnr + torch.inf)
    name = "a_sampler_with_a_very_long_name"
    outcome = replace(outcome, trips={name: perfect}, schedules={name: outcome.schedules["euler"]})
    figure = demo.draw(outcome)
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in figure.texts}
    assert boxes[name].x1 < boxes["latent / sigma"].x0
    assert max(box.x1 for box in boxes.values()) < figure.bbox.x1
    assert json.loads(to_json(outcome.report()))["table"][0]["psnr"] is None


def test_a_demo_never_leaves_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "demo-digits.png"
    kept.write_text("the picture from before")
    outcome = demo.run(demo.Settings("digits", ("euler",), steps=2, count=1))

    class Broken:
        def savefig(self, file: Any, **_: Any) -> None:
            file.write(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "draw", lambda _: Broken())
    with pytest.raises(OSError, match="No space left"):
        demo.save(outcome, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    assert kept.read_text() == "the picture from before"
