"""Which digit an image shows: a small classifier for each model of digits, to measure whether an edit worked.

`load("digits")(images)` returns logits. The classifiers saw the images that the denoisers were trained on
(`kinvert.models.train_classifier`), and none of `kinvert.models.held_out`; `data/NOTICE.md` says whose images these
are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from kinvert.checks import check_choice
from kinvert.models.stored import load_module

__all__ = ["NAMES", "Architecture", "Classifier", "check_judged", "load"]

NAMES = ("digits", "mnist")
"""The models that have a classifier."""


@dataclass(frozen=True)
class Architecture:
    """The sizes of a classifier: with the weights, all that is needed to build it."""

    name: str
    shape: tuple[int, int, int]
    """`(1, H, W)`."""
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    """Strides of the 3x3 convolutions, one for each entry of `channels`."""
    features: int
    """Number of inputs of the last, linear layer."""
    num_classes: int = 10


class Classifier(nn.Module):
    """Convolutions and a linear layer.

    Attributes:
        name: the model whose images it knows.
        shape: `(1, H, W)` of one image.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.name, self.shape = arch.name, arch.shape
        pairs = zip((1, *arch.channels), arch.channels, strict=False)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride, padding=1) for (i, o), stride in zip(pairs, arch.strides, strict=True)
        )
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(arch.features, arch.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (batch, 10).

        Args:
            images: shape (batch, 1, H, W), in [-1, 1], in the classifier's dtype.

        Raises:
            ValueError: another shape or dtype.
        """
        if images.shape[1:] != self.shape or images.dtype != self.head.weight.dtype:
            wanted = f"{self.head.weight.dtype} of shape (batch, {', '.join(map(str, self.shape))})"
            raise ValueError(f"images must be {wanted}, got {images.dtype} of {tuple(images.shape)}")
        h = images
        for convolution in self.convolutions:
            h = silu(convolution(h))
        return self.head(self.dropout(h.flatten(1)))


def check_judged(name: str) -> None:
    """Raise ValueError if a model has no classifier."""
    if name == "emoji":
        raise ValueError("model 'emoji' has no classifier; kinvert.models.variants has the true answers to its edits")
    check_choice("model", name, NAMES)


def load(name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Classifier:
    """Return a trained classifier, in eval mode and with frozen parameters.

    Args:
        name: "digits" (8x8) or "mnist" (28x28).
        dtype: floating dtype of the parameters, and of the images to call it with.
        device: where the parameters go.

    Raises:
        ValueError: an unknown name, "emoji", which has no classifier, or a dtype that is not floating point.
    """
    check_judged(name)
    return load_module("classifiers", name, lambda sizes: Classifier(Architecture(**sizes)), dtype, device)
