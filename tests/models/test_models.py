"""What is shipped with the models: images, weights, their size and their sources."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kinvert import models
from kinvert.models import held_out, load

PACKAGE = Path(models.__file__).parent


@pytest.mark.parametrize("name", models.NAMES)
def test_held_out_images_are_four_of_each_class(name: str) -> None:
    model = load(name)
    images, labels = held_out(name)
    assert images.shape == (40, *model.shape) and images.dtype == torch.float32
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [4] * 10
    assert images.min() == -1 and images.max() == 1


@pytest.mark.parametrize("name", models.NAMES)
def test_loading_leaves_the_random_state_alone(name: str) -> None:
    before = torch.get_rng_state()
    load(name)
    assert torch.equal(before, torch.get_rng_state())


def test_everything_together_is_under_three_megabytes() -> None:
    files = [f for f in PACKAGE.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) < 3_000_000


def test_importing_reads_no_weights_and_no_training_libraries() -> None:
    heavy = "sklearn", "mlxtend", "matplotlib", "kinvert.models.train"
    code = f"import sys, kinvert.models; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parents[1], check=False).returncode == 0


def test_notice_names_both_data_sets() -> None:
    notice = (PACKAGE / "data" / "NOTICE.md").read_text()
    for part in ("Alpaydin", "Kaynak", "CC BY 4.0", "LeCun", "Cortes", "Burges", "CC BY-SA 3.0"):
        assert part in notice


def test_unknown_name() -> None:
    for function in (load, held_out):
        with pytest.raises(ValueError, match="unknown model 'cifar'; it must be one of digits, mnist"):
            function("cifar")
