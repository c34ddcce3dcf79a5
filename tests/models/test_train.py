"""The training of the denoisers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kinvert import models

PACKAGE = Path(models.__file__).parent


def test_training_repeats_itself_and_spares_the_held_out_images(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from kinvert.models.train import RECIPES, train

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
    from kinvert.models.train import train

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
    from kinvert.models.train import RECIPES

    for name in models.NAMES:
        with safe_open(PACKAGE / "weights" / f"{name}.safetensors", "pt") as file:
            made = file.metadata()["iterations"]
        recipe = RECIPES[name]
        done = recipe.stop or recipe.iterations
        assert made in (str(done), f"{done} of {recipe.iterations}"), (name, made)
