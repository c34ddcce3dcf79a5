"""Which digit an image shows: a small classifier for each embedded model, to measure whether an edit took.

`load("digits")(images)` returns logits. The classifiers saw the images that the denoisers were trained on
(`kinvert.models.train_classifier`), and none of `kinvert.models.held_out`; `data/NOTICE.md` says whose images these
are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from kinvert import models


@dataclass(frozen=True)
class Architecture:
    """The sizes of a classifier: all that is needed besides the weights to build it."""

    name: str
    shape: tuple[int, int, int]
    """`(1, H, W)`."""
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    """Of the 3x3 convolutions, one for each of the channels."""
    features: int
    """Values that are left for the last, linear layer."""
    num_classes: int = 10


class Classifier(nn.Module):
    """Convolutions and a linear layer.

    Attributes:
        name: which model's images it knows.
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


def load(name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Classifier:
    """Return a trained classifier, in eval mode and with frozen parameters.

    Args:
        name: `"digits"` (8x8) or `"mnist"` (28x28).
        dtype: floating dtype of the parameters, and of the images to call it with.
        device: where the parameters go.

    Raises:
        ValueError: no such name, or a dtype that is not floating point.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, got {dtype}")
    tensors, metadata = models._read("classifiers", name)
    arch = json.loads(metadata["architecture"])
    arch |= {key: tuple(arch[key]) for key in ("shape", "channels", "strides")}
    with torch.device("meta"):  # no random initialisation: the caller's random state stays as it is
        model = Classifier(Architecture(**arch))
    model.load_state_dict({k: v.to(device, dtype) for k, v in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)
