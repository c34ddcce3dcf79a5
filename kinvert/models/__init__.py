"""Two small trained denoisers that come with the package, and images that they never saw.

`load("digits")` knows 8x8 handwritten digits, `load("mnist")` 28x28 ones. Both take a `label` or none, so that
classifier-free guidance can be tried for real:

    denoised = load("digits")(x, sigma, label=label)        # x = x0 + sigma * eps, x0 in [-1, 1]

The weights were made by `kinvert.models.train`; `data/NOTICE.md` says whose images they learned from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kinvert.models.network import Architecture, EmbeddedDenoiser
from kinvert.models.stored import NAMES, load_module, read

__all__ = ["NAMES", "EmbeddedDenoiser", "held_out", "load"]


def load(name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> EmbeddedDenoiser:
    """Return a trained denoiser, in eval mode and with frozen parameters.

    The weights are stored in half precision and converted, so they are the same in every `dtype` from float32 up.

    Args:
        name: "digits" (8x8) or "mnist" (28x28).
        dtype: floating dtype of the parameters, and of the `x` to call it with.
        device: where the parameters go.

    Raises:
        ValueError: an unknown name, or a dtype that is not floating point.
    """
    return load_module("weights", name, lambda sizes: EmbeddedDenoiser(Architecture(**sizes)), dtype, device)


def held_out(name: str) -> tuple[Tensor, Tensor]:
    """Return the images that training never used, four of each class, and their labels.

    Returns:
        Images (N, 1, H, W), float32 in [-1, 1]; labels (N,), int64.

    Raises:
        ValueError: an unknown name.
    """
    tensors, metadata = read("data", name)
    return tensors["images"].float() * (2 / int(metadata["maximum"])) - 1, tensors["labels"]
