"""What a denoiser returned, when somebody else may write to it.

Networks that run from CUDA graphs or TensorRT engines return the same memory at every call, and samplers read an output
again after the next evaluation. No value has to be read to see this coming: a tensor that was made for its caller alone
is known to nobody else, and its memory to no other tensor. What is known to somebody, or lies in memory that torch did
not allocate, is copied where it has to outlive the next evaluation; what nobody holds is used as it is.
"""

from __future__ import annotations

from sys import getrefcount
from typing import Any

import torch
from torch import Tensor

from kinvert.denoisers.protocol import Denoiser, Guided


def keep(outputs: list[Any]) -> None:
    """Copy those outputs, tensors or `Guided` pairs of them, that others may write to, in place of themselves.

    The list must be all that the caller has of them: another name for an output counts as somebody who holds it. Where
    nobody can say who holds what (compiled and vectorised runs, tensor subclasses), every output is copied.
    """
    for i in range(len(outputs)):
        if isinstance(outputs[i], Guided):
            parts, outputs[i] = list(outputs[i]), None
            keep(parts)
            outputs[i] = Guided(*parts)
        elif isinstance(outputs[i], Tensor) and not (_can_tell() and _is_alone(outputs, i)):
            outputs[i] = outputs[i].clone()


def call_to_keep(denoiser: Denoiser, x: Tensor, sigma: Tensor, **conditioning: Any) -> Any:
    """What the denoiser returns, as nobody else can change it."""
    outputs = [denoiser(x, sigma, **conditioning)]
    keep(outputs)
    return outputs[0]


def lay_out(x: Tensor) -> Tensor:
    """x itself where it starts its memory and leaves no gaps, else a copy of that kind: a compiled network needs one
    version for all the tensors that it sees.
    """
    dense = x.is_contiguous() or x.stride() == torch.empty_like(x).stride()
    return x if dense and x.storage_offset() == 0 else x.clone()


def _can_tell() -> bool:
    """Whether tensors are what they seem, and torch has what is needed to count who holds them."""
    functorch = getattr(torch._C, "_functorch", None)
    return (
        not torch.compiler.is_compiling()
        and hasattr(torch._C, "_storage_Use_Count")
        and hasattr(functorch, "peek_interpreter_stack")
        and functorch.peek_interpreter_stack() is None  # type: ignore[union-attr]
    )


def _holders(outputs: list[Any], i: int) -> tuple[int, int]:
    """How many know the tensor, and how many its storage."""
    storage = outputs[i].untyped_storage()._cdata
    return getrefcount(outputs[i]), torch._C._storage_Use_Count(storage)


def _is_alone(outputs: list[Any], i: int) -> bool:
    return (
        type(outputs[i]) is Tensor
        and outputs[i].untyped_storage().resizable()  # else the memory is somebody else's, NumPy's or an engine's
        and _holders(outputs, i) == _ALONE
    )


_ALONE = _holders([torch.empty(1)], 0) if hasattr(torch._C, "_storage_Use_Count") else (0, 0)
