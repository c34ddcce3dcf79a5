"""The small pipelines as folders, and a photo: what the page of the documentation and the example run on."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pipelines import CALLS, build

__all__ = ["save"]

SIDE = 16
LAST = ("conv_out", "proj_out")
"""The last layers of the networks."""


def save(folder: Path, *families: str) -> None:
    """Save pipelines and `photo.png` in a folder.

    Their networks predict little, so that they have an inverse at every guidance scale, as random networks rarely do.
    """
    for family in families or CALLS:
        pipe = build(family)
        name = "transformer" if hasattr(pipe, "transformer") else "unet"
        network = copy.deepcopy(getattr(pipe, name))
        for parameter in (p for last in LAST if hasattr(network, last) for p in getattr(network, last).parameters()):
            with torch.no_grad():
                parameter.mul_(0.002)
        setattr(pipe, name, network)
        pipe.save_pretrained(folder / family)
    x, y = np.meshgrid(np.linspace(0, 1, SIDE), np.linspace(0, 1, SIDE))
    pixels = np.stack([x, y, np.sin(9 * x * y) ** 2], -1)
    Image.fromarray((255 * pixels).astype(np.uint8)).save(folder / "photo.png")
