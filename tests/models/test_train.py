"""The training of the denoisers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
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
