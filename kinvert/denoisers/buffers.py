"""Outputs of a denoiser that somebody else may write to.

Networks that run from CUDA graphs or TensorRT engines return the same memory at every call, and samplers read an output
again after the next evaluation. Such memory can be recognised without reading a value: a tensor that was made for its
caller alone has no other reference, and no other tensor shares its storage. An output that somebody else refers to, or
that lies in memory that torch did not allocate, is copied if it has to outlive the next evaluation; any other is used
as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kinvert import torch_hooks
from kinvert.denoisers.protocol import Denoiser, Guided

__all__ = ["call_to_keep", "keep", "lay_out"]


def keep(outputs: list[Any]) -> None:
    """Replace outputs that others may write to, tensors or `Guided` pairs of tensors, by copies.

    The list must hold the only references of the caller: another name for an output counts as another holder. If the
    holders cannot be counted (compiled and vectorised runs, tensor subclasses), every output is copied.
    """
    for i in range(len(outputs)):
        if isinstance(outputs[i], Guided):
            parts, outputs[i] = list(outputs[i]), None
            keep(parts)
            outputs[i] = Guided(*parts)
        elif isinstance(outputs[i], Tensor) and not (torch_hooks.can_count_holders() and _is_alone(outputs, i)):
            outputs[i] = outputs[i].clone()


def call_to_keep(denoiser: Denoiser, x: Tensor, sigma: Tensor, **conditioning: Any) -> Any:
    """Call the denoiser and return its output in memory that nobody else can change."""
    outputs = [denoiser(x, sigma, **conditioning)]
    keep(outputs)
    return outputs[0]


def lay_out(x: Tensor) -> Tensor:
    """Return x if it starts its memory and leaves no gaps, else a copy that does.

    A compiled network is then compiled once for all the tensors that it sees.
    """
    dense = x.is_contiguous() or x.stride() == torch.empty_like(x).stride()
    return x if dense and x.storage_offset() == 0 else x.clone()


def _is_alone(outputs: list[Any], i: int) -> bool:
    """Tell whether nobody else holds a tensor or its memory."""
    return (
        type(outputs[i]) is Tensor
        and outputs[i].untyped_storage().resizable()  # else the memory is NumPy's or an engine's
        and torch_hooks.count_holders(outputs, i) == _ALONE
    )


_ALONE = torch_hooks.count_holders([torch.empty(1, device="cpu")], 0) if torch_hooks.can_count_holders() else (0, 0)
