"""Every private name of torch and of CPython that kinvert uses: why it is needed, and what happens without it.

* `sys.getrefcount` counts who holds a tensor: the denoiser may keep its input, or use its output again. Without it:
  the plain loop, and copies of outputs.
* `torch._C._storage_Use_Count` with `UntypedStorage._cdata` counts who shares a tensor's memory. Without it: the plain
  loop, and copies of outputs.
* `torch._C._functorch.peek_interpreter_stack` tells whether `torch.func` vectorises or differentiates. Without it: the
  plain loop, and copies of outputs.
* `torch.autograd.forward_ad._current_level` tells whether forward-mode derivatives are computed. Without it: the plain
  loop.
* `is_traceable_wrapper_subclass` tells whether a subclass takes over torch's operations. Without it: the plain loop for
  every subclass.
* `Tensor._version` counts the writes into a tensor. Without it: a denoiser that writes into x is not noticed, and what
  is otherwise kept on the device (noise levels, coefficients, cast parameters) is uploaded every time.
* `Tensor._is_view` tells whether a tensor is a part of another. Without it: tensors that a denoiser gets are copied.
* `FakeTensor` tells whether a tensor has values. Without it: torch fails where a fake tensor is read.
* `_dynamo_marked_constant` is the mark of `torch.compiler.assume_constant_result`, which would import the compiler (a
  second) at every start. Without it: `torch.compile` reads the function itself.

The plain loop is the one of `kinvert.engine` that makes a new tensor for every value; `kinvert.denoisers.buffers` makes
the copies. The results are the same in each case. Names are looked up when they are used, so that a test can remove
them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

with contextlib.suppress(ImportError):
    import torch._subclasses
    import torch.utils._python_dispatch

Function = TypeVar("Function", bound=Callable[..., Any])

__all__ = [
    "can_count_holders",
    "can_reuse_memory",
    "constant_result",
    "count_holders",
    "holder_counters",
    "is_fake",
    "is_forward_mode",
    "is_transformed",
    "is_view",
    "is_wrapper",
    "storage_key",
    "total_version",
    "version",
]


def constant_result(function: Function) -> Function:
    """Mark a function: `torch.compile` calls it once a graph and takes its result as a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def can_count_holders() -> bool:
    """Tell whether holders can be counted here: the names are there, and tensors are not stand-ins of a transform."""
    functorch = getattr(torch._C, "_functorch", None)
    return (
        not torch.compiler.is_compiling()
        and hasattr(sys, "getrefcount")
        and hasattr(torch._C, "_storage_Use_Count")
        and hasattr(functorch, "peek_interpreter_stack")
        and functorch.peek_interpreter_stack() is None  # type: ignore[union-attr]
    )


def count_holders(tensors: list[Tensor], i: int) -> tuple[int, int]:
    """Count the references to a tensor in a list, and the tensors that share its storage."""
    return sys.getrefcount(tensors[i]), torch._C._storage_Use_Count(tensors[i].untyped_storage()._cdata)


def can_reuse_memory() -> bool:
    """Tell whether everything is there that shows whether memory may be overwritten."""
    names = (sys, "getrefcount"), (torch._C, "_storage_Use_Count"), (forward_ad, "_current_level")
    return all(hasattr(*name) for name in names) and _functorch_stack() is not None


def holder_counters() -> tuple[Callable[[object], int], Callable[[int], int]]:
    """Return two functions: the number of references to an object, and of tensors that share a storage, by its key.

    The first counts the names of its caller as well, so only numbers of the same place can be compared.
    """
    return sys.getrefcount, torch._C._storage_Use_Count


def storage_key(x: Tensor) -> int:
    """Return a number that tensors share if they share their memory."""
    return x.untyped_storage()._cdata


def is_transformed() -> bool:
    """Tell whether `torch.func` or `torch.compile` may watch, so that no value can be read; True if unknown."""
    if torch.compiler.is_compiling():
        return True
    stack = _functorch_stack()
    return stack is None or stack() is not None


def is_forward_mode() -> bool:
    """Tell whether forward-mode derivatives are computed; True if unknown."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def is_wrapper(x: Tensor) -> bool:
    """Tell whether x is of a subclass that takes over torch's operations; True for any subclass if unknown."""
    if type(x) is Tensor:
        return False
    known = getattr(getattr(torch.utils, "_python_dispatch", None), "is_traceable_wrapper_subclass", None)
    return known is None or known(x)


def is_fake(x: Tensor) -> bool:
    """Tell whether x has a shape but no values, as under torch's `FakeTensorMode`; False if unknown."""
    fake = getattr(getattr(torch, "_subclasses", None), "FakeTensor", None)
    return fake is not None and isinstance(x, fake)


def is_view(x: Tensor) -> bool:
    """Tell whether x is a part of another tensor, in the eyes of autograd; True if unknown."""
    known = getattr(x, "_is_view", None)
    return known is None or known()


def version(x: Tensor) -> int | None:
    """Return a number that grows with every write into x, 0 for tensors of inference mode; None if unknown.

    It is unknown while torch compiles, which cannot trace the question.
    """
    if torch.compiler.is_compiling():
        return None
    return 0 if x.is_inference() else getattr(x, "_version", None)


def total_version(tensors: Sequence[Tensor]) -> int | None:
    """Return a number that grows with every write into one of the tensors, 0 if they are as they were made.

    None if unknown, and in inference mode.
    """
    try:
        return sum([x._version for x in tensors])
    except (AttributeError, RuntimeError):
        return None


def _functorch_stack() -> Callable[[], object] | None:
    """Return the function that gives the innermost transform of `torch.func`, or None if torch has none."""
    return getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
