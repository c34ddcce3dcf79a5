"""The training of the denoisers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kinvert import models
from kinvert.models.network import Architecture, EmbeddedDenoiser
from kinvert.models.train import (
    RECIPES,
    Data,
    Recipe,
    augmented,
    averaging_weight,
    learning_rate,
    preview,
    split,
    train,
)

PACKAGE = Path(models.__file__).parent
LABELS = torch.arange(30) % 3


def tiny() -> Data:
    """Thirty images of three classes, each of one grey."""
    return Data((8 * LABELS).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8), LABELS, *split(LABELS))


SMALL = Architecture("tiny", (1, 8, 8), sigma_data=0.5, channels=(8, 8), blocks=1, embedding=8, num_classes=3)
TINY = Recipe(SMALL, tiny, maximum=16, licence="none", iterations=4, batch=6, bfloat16=False, rate=0.05)


def test_the_rate_grows_over_100_iterations_and_falls_as_a_cosine() -> None:
    rates = [learning_rate(TINY, i, 400) / TINY.rate for i in (0, 99, 200, 300, 400)]
    cosines = [1.0, (1 + math.cos(math.pi * 99 / 400)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0]
    assert rates == pytest.approx([0.01, *cosines[1:]], abs=1e-12)


def test_the_average_forgets_the_first_weights() -> None:
    """It begins with a mean over about i / 9 iterations, and ends with one over 1 / (1 - ema)."""
    assert averaging_weight(TINY, 0) == pytest.approx(0.9)
    assert averaging_weight(TINY, 80) == pytest.approx(0.1)
    assert averaging_weight(TINY, 10**6) == pytest.approx(1 - TINY.ema)


def test_training_on_pictures_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "tiny", TINY)
    lost = float("inf")
    for iterations in (1, 60):
        average = train("tiny", tmp_path, seed=0, iterations=iterations)
        with safe_open(tmp_path / "weights" / "tiny.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata["iterations"] == f"{iterations} of {iterations}" and metadata["licence"] == "none"
        assert float(metadata["held_out_loss"]) < 0.7 * lost
        lost = float(metadata["held_out_loss"])
    written = load_file(tmp_path / "weights" / "tiny.safetensors")
    assert all(torch.equal(written[name], value.half()) for name, value in average.state_dict().items())
    held = load_file(tmp_path / "data" / "tiny.safetensors")
    assert torch.equal(held["images"], tiny().images[split(LABELS)[1]])


def test_half_of_the_images_are_mirrored() -> None:
    x = torch.arange(8.0).expand(1000, 1, 8, 8)
    mirrored = augmented(x, replace(TINY, mirror=True))[:, 0, 0, 0] == 7
    assert 400 < int(mirrored.sum()) < 600
    assert augmented(x, TINY) is x


def test_a_preview_has_a_row_for_each_class_and_a_block_for_each_guidance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib_image = pytest.importorskip("matplotlib.image")

    def values(model: EmbeddedDenoiser, x: torch.Tensor, *args: Any, cfg: float, **given: Any) -> torch.Tensor:
        """An image of one grey: its class, and half a class more with guidance."""
        grey = (given["positive"]["label"] + (0.5 if cfg > 1 else 0.0)) / 3
        return (2 * grey - 1)[:, None, None, None].expand_as(x).clone()

    monkeypatch.setattr("kinvert.models.train.sample", values)
    preview(EmbeddedDenoiser(SMALL), tmp_path / "tiny.png", columns=2)
    seen = matplotlib_image.imread(tmp_path / "tiny.png")[:, :, 0]
    zoom, side = 8, 10  # an image of 8 has an edge of 1
    assert seen.shape == (3 * side * zoom, 4 * side * zoom)
    middle = seen[side * zoom // 2 :: side * zoom, side * zoom // 2 :: side * zoom]
    expected = [[k / 3, k / 3, (k + 0.5) / 3, (k + 0.5) / 3] for k in range(3)]
    assert middle == pytest.approx(torch.tensor(expected).numpy(), abs=1 / 128)


def test_training_repeats_itself_and_spares_the_held_out_images(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    _, labels, kept, held = RECIPES["digits"].read()
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(labels)))
    for folder in ("first", "second"):
        train("digits", tmp_path / folder, seed=3, iterations=2)
    first, second = (load_file(tmp_path / folder / "weights" / "digits.safetensors") for folder in ("first", "second"))
    assert all(t.dtype == torch.float16 and torch.equal(t, second[key]) for key, t in first.items())
    shipped, written = (load_file(folder / "data" / "digits.safetensors") for folder in (PACKAGE, tmp_path / "first"))
    assert all(torch.equal(t, shipped[key]) for key, t in written.items())


def test_training_ends_where_it_is_told(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    train("digits", tmp_path / "stopped", seed=3, iterations=4, stop=2, every=2)
    train("digits", tmp_path / "all", seed=3, iterations=4, every=5)
    train("digits", tmp_path / "short", seed=3, iterations=2)
    weights = {name: tmp_path / name / "weights" / "digits.safetensors" for name in ("stopped", "all", "short")}
    with safe_open(weights["stopped"], "pt") as file:
        assert file.metadata()["iterations"] == "2 of 4"
    with safe_open(weights["all"], "pt") as file:
        assert file.metadata()["iterations"] == "4 of 4"
    stopped, short = load_file(weights["stopped"]), load_file(weights["short"])
    assert any(not torch.equal(t, short[key]) for key, t in stopped.items())  # its learning rate falls more slowly


def test_the_shipped_weights_are_those_that_the_recipes_end_with() -> None:
    for name in models.NAMES:
        with safe_open(PACKAGE / "weights" / f"{name}.safetensors", "pt") as file:
            made = file.metadata()["iterations"]
        recipe = RECIPES[name]
        done = recipe.stop or recipe.iterations
        assert made in (str(done), f"{done} of {recipe.iterations}"), (name, made)
