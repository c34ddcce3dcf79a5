"""What people pass: numbers and tensors of every origin, taken or refused by one rule each.

NumPy's integers and floats are numbers like Python's; a bool is none. A state, a mask or a noise is a dense tensor, of
a floating point format that torch can calculate in. A subclass of `torch.Tensor` (an image of MONAI or fastai, an
`nn.Parameter`) is taken as the plain tensor that it holds: the denoiser sees, and every function returns, plain
tensors. Tensors without values, on the device "meta" or fake, go where only shapes are asked for.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, TypeGuard

import torch
from torch import Tensor

from kinvert.torch_hooks import is_fake

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether `value` is an integer, of Python or of NumPy; a bool is not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a real number, of Python or of NumPy; a bool is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def has_values(x: Tensor) -> bool:
    """Whether there is anything to read: tensors on "meta" and fake ones have a shape only."""
    return not (x.is_meta or is_fake(x))


def plain(x: Tensor) -> Tensor:
    """The tensor that a subclass holds, with the same memory and the same graph.

    Subclasses that take over torch's operations (fake and distributed tensors) hold none; they stay what they are.
    """
    if type(x) is Tensor or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return x
    return x.as_subclass(Tensor)


def check_dense(name: str, x: Tensor) -> None:
    """Raise TypeError where samplers cannot calculate with `x`: sparse or nested layouts, floats of 8 bits."""
    if x.is_nested or x.layout is not torch.strided:
        kind = "nested" if x.is_nested else str(x.layout)
        fix = "pad it to one shape" if x.is_nested else f"use {name}.to_dense()"
        raise TypeError(f"{name} must be a dense tensor, got {kind}; {fix}")
    if x.is_floating_point() and x.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}; convert it, e.g. {name}.float()"
        )


def check_beside(name: str, value: Tensor, x: Tensor) -> None:
    """Raise TypeError or ValueError where `value` cannot be used with the state x: not dense, or without x's values."""
    check_dense(name, value)
    if has_values(x) and not has_values(value):
        raise ValueError(f"{name} has a shape but no values (meta or fake), and x, on {x.device}, has; give it values")


def check_values(name: str, x: Tensor, why: str) -> None:
    """Raise ValueError where `x` has no values and they are needed."""
    if not has_values(x):
        raise ValueError(f"{name} has a shape but no values (meta or fake), and {why}; give it values")


def count(name: str, value: Any, low: int = 1) -> int:
    """The count `value`, an int of Python's; ValueError where it is none."""
    if not is_integer(value) or value < low:
        raise ValueError(f"{name} must be an int of at least {low}, got {value!r}")
    return int(value)


def count_field(owner: Any, name: str, low: int = 1) -> None:
    """Check a field of a frozen dataclass that is a count; see `count`."""
    object.__setattr__(owner, name, count(name, getattr(owner, name), low))


def positive_number(name: str, value: Any) -> float:
    """The positive number `value`, a float; ValueError where it is none."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def check_callback(callback: Any) -> None:
    """Raise TypeError where a callback cannot be called, before the run instead of after its first step."""
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable as callback(progress) once a step, got {type(callback).__name__}")
