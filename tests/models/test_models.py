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


def test_variants_differ_in_their_tone_alone() -> None:
    pictures = variants()
    images, labels = held_out("emoji")
    assert pictures.shape == (12, 6, 3, 32, 32)
    for base, tone in ((0, 0), (3, 5), (11, 2)):
        assert torch.equal(pictures[base, tone], images[6 * base + tone]) and labels[6 * base + tone] == tone
    # The outline is the same in all tones, and where a picture has skin, it darkens from "light" to "dark".
    white = (pictures > 0.95).all(2)
    assert ((white == white[:, :1]).float().mean((1, 2, 3)) > 0.98).all()
    skin = pictures.flatten(3).mean((2, 3))[:, 1:]
    assert (skin.diff(dim=1) < 0).all()
    # Pictures of one base are nearer to each other than to those of other bases.
    distance = torch.cdist(pictures.flatten(0, 1).flatten(1), pictures.flatten(0, 1).flatten(1)).view(12, 6, 12, 6)
    same = distance.diagonal(dim1=0, dim2=2).amax((0, 1))
    other = distance.masked_fill(torch.eye(12, dtype=torch.bool)[:, None, :, None], torch.inf).amin((1, 2, 3))
    assert (same < other).all()


def test_only_emoji_has_variants() -> None:
    with pytest.raises(ValueError, match="unknown model 'mnist'; it must be one of emoji"):
        variants("mnist")


def test_everything_together_is_under_seven_megabytes() -> None:
    files = [f for f in PACKAGE.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) < 7_000_000
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
