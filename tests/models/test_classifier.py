"""The classifiers that judge edits: they know the images, in every dtype, and their training repeats itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import kinvert as ki
from kinvert import models
from kinvert.models import classifier

PACKAGE = Path(models.__file__).parent


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", classifier.NAMES)
def test_classifiers_know_images_they_never_saw(name: str) -> None:
    images, labels = models.held_out(name)
    model = classifier.load(name)
    assert model.name == name and not model.training and not any(p.requires_grad for p in model.parameters())
    right = (model(images).argmax(1) == labels).sum().item()
    assert right >= 39
    # A faint noise, as sampling leaves, changes nothing.
    assert (model(images + 0.1 * torch.randn_like(images)).argmax(1) == labels).sum().item() >= 38


@pytest.mark.parametrize("name", classifier.NAMES)
def test_classifiers_judge_samples_of_the_denoiser(name: str) -> None:
    denoiser, label = models.load(name), torch.arange(10)
    x = ki.sample(
        denoiser, 80 * noise(10, *denoiser.shape, dtype=torch.float32), ki.schedules.karras(12, 0.002, 80.0),
        sampler="heun", positive={"label": label},
    )  # fmt: skip
    assert (classifier.load(name)(x).argmax(1) == label).sum() >= 9


def test_classifiers_in_every_dtype_leave_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    single, double = classifier.load("digits"), classifier.load("digits", dtype=torch.float64)
    assert torch.equal(before, torch.get_rng_state())
    images, _ = models.held_out("digits")
    torch.testing.assert_close(single(images).double(), double(images.double()), rtol=1e-4, atol=1e-4)


def test_classifiers_are_small() -> None:
    assert sum(file.stat().st_size for file in (PACKAGE / "classifiers").iterdir()) < 60_000


def test_bad_calls_of_classifiers() -> None:
    with pytest.raises(ValueError, match="dtype must be floating point, got torch.int64"):
        classifier.load("digits", dtype=torch.int64)
    with pytest.raises(ValueError, match="unknown model 'cifar'; it must be one of digits, mnist"):
        classifier.load("cifar")
    with pytest.raises(ValueError, match=r"'emoji' has no classifier; kinvert\.models\.variants has the true answers"):
        classifier.load("emoji")
    model = classifier.load("digits")
    for images in (noise(1, 1, 8, 9, dtype=torch.float32), noise(1, 1, 8, 8)):
        with pytest.raises(ValueError, match=r"images must be torch.float32 of shape \(batch, 1, 8, 8\)"):
            model(images)


def test_training_a_classifier_repeats_itself(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from kinvert.models.train_classifier import train

    for folder in ("first", "second"):
        train("digits", tmp_path / folder, seed=3, iterations=3)
    first, second = (
        load_file(tmp_path / folder / "classifiers" / "digits.safetensors") for folder in ("first", "second")
    )
    assert all(t.dtype == torch.float16 and torch.equal(t, second[key]) for key, t in first.items())
    shipped = load_file(PACKAGE / "classifiers" / "digits.safetensors")
    assert {key: t.shape for key, t in shipped.items()} == {key: t.shape for key, t in first.items()}
