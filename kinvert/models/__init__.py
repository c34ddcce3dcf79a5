"""Two small trained denoisers that come with the package, and images they never saw.

``load("digits")`` knows 8x8 handwritten digits, ``load("mnist")`` 28x28 ones; both take a ``label`` or none, so that
classifier-free guidance can be tried for real:

    denoised = load("digits")(x, sigma, label=label)        # x = x0 + sigma * eps, x0 in [-1, 1]

:mod:`kinvert.models.train` made the weights; ``data/NOTICE.md`` says whose images they learned from.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from kinvert.checks import check_choice
from kinvert.models.network import Architecture, EmbeddedDenoiser

__all__ = ["NAMES", "EmbeddedDenoiser", "held_out", "load"]

NAMES = ("digits", "mnist")


def load(name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> EmbeddedDenoiser:
    """Return a trained denoiser, in eval mode and with frozen parameters.

    The weights are stored in half precision and converted, so every ``dtype`` from float32 up has the same ones.

    Args:
        name: ``"digits"`` (8x8) or ``"mnist"`` (28x28).
        dtype: floating dtype of the parameters, and of the ``x`` to call it with.
        device: where the parameters go.

    Raises:
        ValueError: no such name, or a dtype that is not floating point.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, got {dtype}")
    tensors, metadata = _read("weights", name)
    arch = json.loads(metadata["architecture"])
    arch |= {key: tuple(arch[key]) for key in ("shape", "channels")}
    with torch.device("meta"):  # no random initialisation: the caller's random state stays as it is
        model = EmbeddedDenoiser(Architecture(**arch))
    model.load_state_dict({k: v.to(device, dtype) for k, v in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)


def held_out(name: str) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, H, W), float32 in [-1, 1], and labels (N,), int64, that training never used: four a class.

    Raises:
        ValueError: no such name.
    """
    tensors, metadata = _read("data", name)
    return tensors["images"].float() * (2 / int(metadata["maximum"])) - 1, tensors["labels"]


def _read(folder: str, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    check_choice("model", name, NAMES)
    with safe_open(Path(__file__).parent / folder / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 (not a dict)
