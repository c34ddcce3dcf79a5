r"""Measures of edits: whether the class of an image changed and how much of it stayed, and walks between latents.

An exact inversion can return a latent that samples back to its image but is of no other use. Two tests show it:

* *Edits*: invert an image with its label, and sample the latent with another label. A small classifier tells whether
  the edit took; MSE and SSIM tell how much of the image stayed. Only both together mean something: a latent that
  forgot the image takes every edit, and a latent that ignores the label keeps everything.
* *Walks*: *self-interpolation* walks by `slerp` from the true latent of a sample to the recovered one, and measures
  whether all points on the way give the same image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import kinvert as ki
from kinvert import metrics
from kinvert.edits import slerp
from kinvert.models import EmbeddedDenoiser
from kinvert.models.classifier import Classifier
from kinvert.models.classifier import load as load_classifier
from kinvert.showing.brief import brief_repr

__all__ = ["Edit", "change_class", "edit", "edit_metrics", "lpips", "self_interpolation", "slerp"]


@dataclass(frozen=True, eq=False)
class Edit:
    """Images whose class was changed; `print` gives a short report.

    Attributes:
        latent: the latents that the inversion with the old labels found, shape (batch, 1, H, W).
        edited: the images sampled from them with the new labels, the same shape.
        measured: `edit_metrics` of the images, each of shape (batch,).
    """

    latent: Tensor
    edited: Tensor
    measured: dict[str, Tensor]

    __repr__ = brief_repr

    def __str__(self) -> str:
        took, count = int(self.measured["edit_took"].sum()), len(self.edited)
        kept = ", ".join(f"{name[5:]} {self.measured[name].median():.3g}" for name in ("edit_mse", "edit_ssim"))
        return f"{took} of {count} edits took; to the images before them, in the median: {kept}"


def edit(
    denoiser: EmbeddedDenoiser,
    image: Tensor,
    label: Tensor,
    target: Tensor,
    sigmas: Any,
    *,
    sampler: str | ki.Rule = "euler",
    method: Literal["unsample", "invert"] = "unsample",
    cfg: float = 1.0,
) -> Edit:
    """Invert images with their labels, sample the latents with other labels, and measure the edits.

    Args:
        denoiser: an embedded model, from `ki.models.load`.
        image: shape (batch, 1, H, W), in [-1, 1].
        label: the classes of the images, int64, shape (batch,).
        target: the classes to give them, int64, shape (batch,).
        sigmas: the sampling schedule, decreasing; for "invert" it ends above 0.
        sampler: the sampler of both directions.
        method: how to go up, without guidance: "unsample" or "invert".
        cfg: guidance towards the new class on the way down.

    Returns:
        An `Edit`.

    Raises:
        ValueError: an unknown method; as `change_class`, `ki.unsample` and `ki.invert`.
    """
    if method not in ("unsample", "invert"):
        raise ValueError(f"method must be 'unsample' or 'invert', got {method!r}")
    _check_target(target, image)
    done = ki.edit(
        denoiser, image, sigmas, sampler=sampler, method=method, cfg=cfg, source={"label": label},
        target={"label": target}, negative={"label": torch.full_like(target, denoiser.null_label)},
    )  # fmt: skip
    return _measured(denoiser, done.latent, done.image, image, target)


def change_class(
    denoiser: EmbeddedDenoiser,
    latent: Tensor,
    image: Tensor,
    target: Tensor,
    sigmas: Any,
    *,
    sampler: str | ki.Rule = "euler",
    cfg: float = 1.0,
    noise: ki.noise.Noise | None = None,
) -> Edit:
    """Sample latents, found by any method, with other classes than their images have, and measure the edits.

    Args:
        denoiser, target, sigmas, sampler, cfg: as in `edit`.
        latent: shape (batch, 1, H, W).
        image: the images that the latents belong to, the same shape.
        noise: for stochastic samplers, as in `ki.sample`, e.g. `ki.noise.replay(inversion.noises)`.

    Returns:
        An `Edit`.

    Raises:
        ValueError: the target does not have one class for each image; as `ki.sample`.
    """
    _check_target(target, image)
    edited = ki.sample(
        denoiser, latent, sigmas, sampler=sampler, cfg=cfg, noise=noise, positive={"label": target},
        negative={"label": torch.full_like(target, denoiser.null_label)},
    )  # fmt: skip
    return _measured(denoiser, latent, edited, image, target)


def _check_target(target: Tensor, image: Tensor) -> None:
    if target.shape != image.shape[:1]:
        raise ValueError(f"target must be one class an image, shape ({len(image)},), got {tuple(target.shape)}")


def _measured(denoiser: EmbeddedDenoiser, latent: Tensor, edited: Tensor, image: Tensor, target: Tensor) -> Edit:
    classifier = load_classifier(denoiser.name, dtype=edited.dtype, device=edited.device)
    return Edit(latent, edited, edit_metrics(edited, image, target, classifier))


@torch.no_grad()
def edit_metrics(edited: Tensor, image: Tensor, target: Tensor, classifier: Classifier) -> dict[str, Tensor]:
    """Measure whether edits took and how much of the images stayed.

    The metrics have the names that records use, each of shape (batch,). `edit_took` is 1 if the classifier finds the
    new class in the edited image, else 0. `edit_probability` is its probability of the new class. `edit_mse` and
    `edit_ssim` compare the edited image with the image before the edit.

    Args:
        edited: images in [-1, 1], shape (batch, 1, H, W).
        image: the images before the edit, the same shape.
        target: the new classes, int64, shape (batch,).
        classifier: a classifier from `kinvert.models.classifier.load`, in the dtype of the images.
    """
    odds = classifier(edited).softmax(1)
    return {
        "edit_took": (odds.argmax(1) == target).to(edited.dtype),
        "edit_probability": odds.gather(1, target[:, None]).squeeze(1),
        "edit_mse": metrics.mse(edited, image),
        "edit_ssim": metrics.ssim(edited, image),
    }


def self_interpolation(
    denoiser: ki.Denoiser, true: Tensor, recovered: Tensor, sigmas: Any, *, points: int = 5, **options: Any
) -> Tensor:
    """Compute how far images change on the way from the true latents to the recovered ones.

    Args:
        denoiser: `denoiser(x, sigma, **conditioning) -> denoised`.
        true: latents that images were sampled from, shape (batch, *event).
        recovered: latents that an inversion of those images found, the same shape.
        sigmas: the sampling schedule.
        points: number of points, evenly spaced from t = 0, where the error is 0, to t = 1, where it is the
            reconstruction error.
        options: `sampler`, `cfg`, `positive` and `negative`, as in `ki.sample`.

    Returns:
        Mean squared errors, shape (points, batch). They stay at 0 if the inversion found the latent, and rise between
        the ends if it found another latent of the same image.

    Raises:
        ValueError: fewer than two points; as `slerp` and `ki.sample`.
    """
    if points < 2:
        raise ValueError(f"points must be at least 2, the two ends, got {points}")
    image = ki.sample(denoiser, true, sigmas, **options)
    steps = [k / (points - 1) for k in range(points)]
    samples = (ki.sample(denoiser, slerp(true, recovered, t), sigmas, **options) for t in steps)
    return torch.stack([metrics.mse(x, image) for x in samples])


def lpips(reconstruction: Tensor, original: Tensor, net: str = "alex") -> Tensor:
    """Compute a learned perceptual distance per sample, shape (batch,), by the package `lpips` and its weights.

    Args:
        reconstruction: images in [-1, 1], shape (batch, 1 or 3, H, W); one channel is repeated to three. The networks
            need some 64 pixels a side.
        original: the same shape.
        net: the network whose features are compared: "alex", "vgg" or "squeeze". State it with the number.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: the shapes differ, or are not those of images with one or three channels.

    Source: Zhang, Isola, Efros, Shechtman and Wang, The Unreasonable Effectiveness of Deep Features as a Perceptual
    Metric (2018), arXiv 1801.03924.
    """
    try:
        import lpips as package  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("lpips needs the package of that name and its weights: pip install lpips") from error
    if original.ndim != 4 or original.shape[1] not in (1, 3) or reconstruction.shape != original.shape:
        raise ValueError(
            "reconstruction and original must be images of one shape (batch, 1 or 3, H, W), "
            f"got {tuple(reconstruction.shape)} and {tuple(original.shape)}"
        )
    network = package.LPIPS(net=net, verbose=False).to(original.device).eval()
    with torch.no_grad():
        distance: Tensor = network(*(x.float().expand(-1, 3, -1, -1) for x in (reconstruction, original)))
    return distance.reshape(len(original))
