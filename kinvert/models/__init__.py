"""Three small trained denoisers that come with the package, and images that they never saw.

`load("digits")` knows 8x8 handwritten digits, `load("mnist")` 28x28 ones, and `load("emoji")` 32x32 pictures of people
and hands in colour, whose label is one of six skin tones (`kinvert.models.emoji.TONES`). All take a `label` or none, so
that classifier-free guidance can be tried for real:

    denoised = load("digits")(x, sigma, label=label)        # x = x0 + sigma * eps, x0 in [-1, 1]

The weights were made by `kinvert.models.train`; `data/NOTICE.md` says whose images they learned from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kinvert.checks import check_choice
from kinvert.models.network import Architecture, EmbeddedDenoiser
from kinvert.models.stored import NAMES, load_module, read

__all__ = ["NAMES", "EmbeddedDenoiser", "held_out", "load", "variants"]


def load(name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> EmbeddedDenoiser:
    """Return a trained denoiser, in eval mode and with frozen parameters.

    The weights are stored in half precision and converted, so they are the same in every `dtype` from float32 up.

    Args:
        name: "digits" (8x8), "mnist" (28x28) or "emoji" (32x32 in colour).
        dtype: floating dtype of the parameters, and of the `x` to call it with.
        device: where the parameters go.

    Raises:
        ValueError: an unknown name, or a dtype that is not floating point.
    """
    return load_module("weights", name, lambda sizes: EmbeddedDenoiser(Architecture(**sizes)), dtype, device)


def held_out(name: str) -> tuple[Tensor, Tensor]:
    """Return images that training never used, and their labels.

    They are four of each class for "digits" and "mnist", and twelve of each for "emoji".

    Returns:
        Images (N, channels, H, W), float32 in [-1, 1]; labels (N,), int64.

    Raises:
        ValueError: an unknown name.
    """
    tensors, metadata = read("data", name)
    return tensors["images"].float() * (2 / int(metadata["maximum"])) - 1, tensors["labels"]


def variants(name: str = "emoji") -> Tensor:
    """Return the held-out pictures by what they show and by class: equal pictures but for skin and hair.

    So `variants()[i, b]` is the true answer to the edit of `variants()[i, a]` from class a to class b.

    Args:
        name: "emoji", the only model whose images come in all classes.

    Returns:
        Shape (12, 6, 3, 32, 32), float32 in [-1, 1]; the classes are the six skin tones.

    Raises:
        ValueError: another name.
    """
    check_choice("model", name, ("emoji",))
    images, labels = held_out(name)
    return images.unflatten(0, (-1, int(labels.max()) + 1))
