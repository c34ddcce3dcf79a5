"""Checks of what callers pass. Each names the argument, what was got and, if there is one, the fix.

A value of the wrong type raises TypeError, a value out of range ValueError. NumPy's integers and floats are numbers
like Python's; a bool is not a number. A state, a mask or a noise is a dense tensor in a floating point format that
torch can compute in. A subclass of `torch.Tensor` (an image of MONAI or fastai, an `nn.Parameter`) is taken as the
plain tensor that it holds: the denoiser sees plain tensors, and every function returns them. Tensors without values, on
the device "meta" or fake, are accepted by all functions that need only shapes.
"""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Iterable, Sequence, Sized
from typing import Any, TypeGuard

import torch
from torch import Tensor

from kinvert.torch_hooks import is_fake

__all__ = [
    "FLOATS",
    "MOST_STEPS",
    "check_beside",
    "check_callback",
    "check_choice",
    "check_count",
    "check_count_field",
    "check_decreasing",
    "check_dense",
    "check_finite",
    "check_integer",
    "check_length",
    "check_number",
    "check_positive",
    "check_values",
    "describe",
    "has_values",
    "is_integer",
    "is_number",
    "nearest",
    "plain",
    "reduced",
    "suggestion",
    "unknown",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes of states."""

MOST_STEPS = 1_000_000
"""Steps of a schedule, at most: a Plan takes about a kilobyte for each, or more."""


# -- numbers -----------------------------------------------------------------------------------------------------------
def is_integer(value: object) -> TypeGuard[int]:
    """Tell whether `value` is an integer of Python or NumPy; a bool is not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether `value` is a real number of Python or NumPy; a bool is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_integer(name: str, value: object, low: int = 1, high: float = math.inf, fix: str = "") -> int:
    """Return `value` as an int.

    Args:
        name: the argument.
        value: its value.
        low, high: the smallest and the largest integer allowed.
        fix: what to do instead; the end of the message.

    Raises:
        TypeError: not an integer.
        ValueError: out of range.
    """
    fix = f"; {fix}" if fix else ""
    if not is_integer(value):
        raise TypeError(f"{name} must be an int, got {describe(value)}{fix}")
    if not low <= value <= high:
        wanted = f"be from {low} to {high}" if high < math.inf else f"be at least {low}" if low else "not be negative"
        raise ValueError(f"{name} must {wanted}, got {value}{fix}")
    return int(value)


def check_count(name: str, value: object, low: int = 1) -> int:
    """Return the count `value` as an int; raise ValueError if it is not an integer of at least `low`."""
    if not is_integer(value) or value < low:
        raise ValueError(f"{name} must be an int of at least {low}, got {value!r}")
    return int(value)


def check_count_field(owner: object, name: str, low: int = 1) -> None:
    """Check a count that is a field of a frozen dataclass, and store it as an int; see `check_count`."""
    object.__setattr__(owner, name, check_count(name, getattr(owner, name), low))


def check_number(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    low: float = -math.inf,
    below: float = math.inf,
    fix: str = "",
) -> float:
    """Return a finite number as a float.

    Args:
        name: the argument.
        value: its value.
        above, low, below: bounds: `above < value`, `low <= value`, `value < below`.
        fix: what to do instead; the end of the message.

    Raises:
        TypeError: not a real number (bools, strings and tensors are not).
        ValueError: not finite, or out of bounds.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {describe(value)}; {fix or 'pass a float'}")
    number, fix = float(value), f"; {fix}" if fix else ""
    if not (math.isfinite(number) and low <= number and above < number < below):
        raise ValueError(f"{name} must be {_bounds(above, low, below)}, got {value}{fix}")
    return number


def _bounds(above: float, low: float, below: float) -> str:
    """Say in words which numbers are allowed."""
    limits = [f"above {above:g}"] * (above > -math.inf) + [f"below {below:g}"] * (below < math.inf)
    limits += ["not negative" if low == 0 else f"at least {low:g}"] * (low > -math.inf)
    return "positive and finite" if limits == ["above 0"] else " and ".join(["finite", *limits])


def check_positive(name: str, value: object) -> float:
    """Return the positive number `value` as a float; raise ValueError if it is not one."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def check_length(name: str, values: object) -> None:
    """Raise ValueError if a schedule has more than `MOST_STEPS` steps; its values are not read."""
    shape = getattr(values, "shape", None)
    steps = (math.prod(shape) if shape is not None else len(values) if isinstance(values, Sized) else 0) - 1
    if steps > MOST_STEPS:
        raise ValueError(
            f"{name} must have at most {MOST_STEPS} steps, got {steps}; a Plan of so many would take "
            f"{steps * 1e-6:,.0f} GB or more"
        )


def check_decreasing(name: str, values: Sequence[float], hint: str = "") -> None:
    """Raise ValueError if a monotone schedule rises; `hint` says why it must not."""
    if values[0] < values[-1]:
        raise ValueError(
            f"{name} must be the decreasing sampling schedule, got a rising one from {values[0]:g} to {values[-1]:g}; "
            f"{hint}{'; ' if hint else ''}use {name}.flip(0)"
        )


def describe(value: object) -> str:
    """Describe a value of the wrong type for a message: its type and shape if it has a shape, else its repr."""
    shape = getattr(value, "shape", None)
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return f"a {type(value).__name__} of {describe(value[0])}"
    return f"{type(value).__name__} of shape {tuple(shape)}" if shape else repr(value)


# -- names -------------------------------------------------------------------------------------------------------------
_WORDS = {"a": "ancestral", "ad": "adaptive", "ka": "karras"}
_CLASSES = ("discretescheduler", "scheduler")


def check_choice(name: str, value: object, known: Iterable[str], hint: str = "") -> None:
    """Raise ValueError if `value` is not one of the `known` names; `hint` is added to the message as it is."""
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        raise ValueError(unknown(name, value, known) + hint)


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """Return the error message for a name that is not `known`."""
    return f"unknown {what} {name!r}; {suggestion(name, known)}"


def suggestion(name: object, known: Iterable[str]) -> str:
    """Return the second half of such a message: the nearest known name, then all of them."""
    known = list(known)
    if not known:
        return "there are none"
    near = nearest(name, known)
    return f"{f'did you mean {near!r}? It' if near else 'it'} must be one of {', '.join(known)}"


def nearest(name: object, known: Iterable[str]) -> str | None:
    """Return the known name that is most like `name`, ignoring case and separators; None if no name is like it."""
    places = {reduced(one): one for one in known}
    close = difflib.get_close_matches(reduced(str(name)), places, n=1, cutoff=0.5)
    return places[close[0]] if close else None


def reduced(name: str) -> str:
    """Reduce a name to its letters and digits, so that different spellings of it are equal.

    Case, separators, a leading `k_` or `sample_` and a trailing `Scheduler` are dropped. `++` becomes `pp`, the word
    `a` becomes `ancestral`, `ad` becomes `adaptive`, and a last word `k` or `ka` becomes `karras`.
    """
    words = re.findall(r"[a-z0-9]+", name.lower().replace("++", "pp"))
    if len(words) > 1 and words[-1] == "k":
        words[-1] = "karras"
    words = [_WORDS.get(word, word) for word in words]
    while len(words) > 1 and words[0] in ("k", "sample", "diffusion", "sampling", "diffusers"):
        del words[0]
    text = "".join(words).replace("dpmsolverpp", "dpmpp")
    for ending in _CLASSES:
        text = text.removesuffix(ending)
    return text


# -- tensors -----------------------------------------------------------------------------------------------------------
def has_values(x: Tensor) -> bool:
    """Tell whether `x` can be read: tensors on "meta" and fake ones have only a shape."""
    return not (x.is_meta or is_fake(x))


def plain(x: Tensor) -> Tensor:
    """Return the tensor that a subclass holds, with the same memory and the same graph.

    Subclasses that replace torch's operations (fake and distributed tensors) are returned unchanged.
    """
    if type(x) is Tensor or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return x
    return x.as_subclass(Tensor)


def check_dense(name: str, x: Tensor) -> None:
    """Raise TypeError if samplers cannot compute with `x`: a sparse or nested layout, or floats of 8 bits."""
    if x.is_nested or x.layout is not torch.strided:
        kind = "nested" if x.is_nested else str(x.layout)
        fix = "pad it to one shape" if x.is_nested else f"use {name}.to_dense()"
        raise TypeError(f"{name} must be a dense tensor, got {kind}; {fix}")
    if x.is_floating_point() and x.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}; convert it, e.g. {name}.float()"
        )


def check_beside(name: str, value: Tensor, x: Tensor) -> None:
    """Raise an error if `value` cannot be used together with the state x.

    Raises:
        TypeError: `value` is not dense.
        ValueError: x has values and `value` has none.
    """
    check_dense(name, value)
    if has_values(x) and not has_values(value):
        raise ValueError(f"{name} has a shape but no values (meta or fake), and x, on {x.device}, has; give it values")


def check_values(name: str, x: Tensor, why: str) -> None:
    """Raise ValueError if `x` has no values; `why` says what they are needed for."""
    if not has_values(x):
        raise ValueError(f"{name} has a shape but no values (meta or fake), and {why}; give it values")


def check_finite(name: str, x: Tensor) -> None:
    """Raise ValueError if `x` has NaN or infinite values, with their number. Reads the device once."""
    if has_values(x) and not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} has {int((~torch.isfinite(x)).sum())} NaN or infinite values; clean the input")


# -- functions ---------------------------------------------------------------------------------------------------------
def check_callback(callback: Any, use: str = "callback(progress) once a step") -> None:
    """Raise TypeError if a callback cannot be called as `use` says: before the run, not after its first step."""
    if callback is not None and not callable(callback):
        name = use.partition("(")[0]
        raise TypeError(f"{name} must be callable as {use}, got {type(callback).__name__}")
