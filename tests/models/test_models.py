"""What is shipped with the models: images, weights, their size and their sources."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kinvert import models
from kinvert.models import held_out, load, variants

PACKAGE = Path(models.__file__).parent


@pytest.mark.parametrize(("name", "each", "classes"), [("digits", 4, 10), ("mnist", 4, 10), ("emoji", 12, 6)])
def test_held_out_images_are_some_of_each_class(name: str, each: int, classes: int) -> None:
    model = load(name)
    images, labels = held_out(name)
    assert images.shape == (each * classes, *model.shape) and images.dtype == torch.float32
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [each] * classes == [each] * model.num_classes
    assert images.min() == -1 and images.max() == 1


@pytest.mark.parametrize("name", models.NAMES)
def test_loading_leaves_the_random_state_alone(name: str) -> None:
    before = torch.get_rng_state()
    load(name)
    assert torch.equal(before, torch.get_rng_state())


def test_loading_needs_no_compiler() -> None:
    """It takes a second to import, a hundred times as long as the file."""
    loads = "kinvert.models.load('emoji'); kinvert.models.classifier.load('mnist')"
    code = f"import sys, kinvert.models.classifier; {loads}; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parents[1], check=True)


def test_variants_are_equal_pictures_in_other_tones() -> None:
    pictures = variants()
    images, labels = held_out("emoji")
    assert pictures.shape == (12, 6, 3, 32, 32)
    for base, tone in ((0, 0), (3, 5), (11, 2)):
        assert torch.equal(pictures[base, tone], images[6 * base + tone]) and labels[6 * base + tone] == tone
    # The outline is the same in all tones, and pictures darken from "light" to "dark", not in each step: hair changes too.
    white = (pictures > 0.95).all(2)
    assert ((white == white[:, :1]).float().mean((1, 2, 3)) > 0.98).all()
    brightness = pictures.flatten(2).mean(2)
    assert (brightness[:, 5] < brightness[:, 1]).all()
    # Pictures of other things have other outlines.
    others = (white[:, None, 0] == white[None, :, 0]).float().mean((2, 3))
    assert (others.fill_diagonal_(0) < 0.98).all()


def test_only_emoji_has_variants() -> None:
    with pytest.raises(ValueError, match="unknown model 'mnist'; it must be one of emoji"):
        variants("mnist")


def test_everything_together_is_under_eight_megabytes() -> None:
    files = [f for f in PACKAGE.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) < 8_000_000
    assert all(f.stat().st_size < 4_000_000 for f in files)


def test_importing_reads_no_weights_and_no_training_libraries() -> None:
    heavy = "sklearn", "mlxtend", "matplotlib", "kinvert.models.train"
    code = f"import sys, kinvert.models; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parents[1], check=False).returncode == 0


def test_notice_names_all_three_sets() -> None:
    notice = (PACKAGE / "data" / "NOTICE.md").read_text()
    for part in (
        "Alpaydin",
        "Kaynak",
        "CC BY 4.0",
        "LeCun",
        "Cortes",
        "Burges",
        "CC BY-SA 3.0",
        "Noto Emoji",
        "Apache License 2.0",
    ):
        assert part in notice
    assert "Version 2.0, January 2004" in (PACKAGE / "data" / "LICENSE-Apache-2.0.txt").read_text()


def test_unknown_name() -> None:
    for function in (load, held_out):
        with pytest.raises(ValueError, match="unknown model 'cifar'; it must be one of digits, mnist, emoji"):
            function("cifar")
