"""The one line of a `repr`: what a result is and how large, never the values of its tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["brief", "brief_repr", "never_fails", "one_line", "read_numbers", "size"]

T = TypeVar("T")
LONGEST = 400  # characters of a repr
WORD = 60  # characters of a value in it


def size(x: object) -> str:
    """Return dtype, shape and device of a tensor, e.g. `float32 (4, 1, 8, 8) on cuda:0`; the CPU is not named."""
    if not isinstance(x, Tensor):
        return brief(x)
    place = "" if x.device.type == "cpu" else f" on {x.device}"
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}{place}"


def brief(value: object) -> str:
    """Return a value in a few words: a tensor by its size, a long sequence by its ends, an object by its class."""
    if isinstance(value, Tensor):
        return size(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        names = [str(name) for name in value]
        return "{" + ", ".join(names if len(names) <= 4 else [*names[:3], f"... {len(names)} in all"]) + "}"
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        words = [*map(brief, value)] if len(value) <= 3 else [brief(value[0]), "...", brief(value[-1])]
        return f"({', '.join(words)}{'' if len(value) <= 3 else f'; {len(value)} values'})"
    return _word(value)


def _word(value: object) -> str:
    """Return the repr of a value if it is short, the start of a long text, the class of anything else."""
    if isinstance(value, torch.nn.Module) or (callable(value) and not is_dataclass(value)):
        return getattr(value, "__name__", type(value).__name__)
    words = one_line(repr(value))
    if len(words) <= WORD:
        return words
    return f"{words[:WORD]}..." if isinstance(value, (str, bytes)) else f"{type(value).__name__}(...)"


def one_line(text: str) -> str:
    """Return text with each run of blanks and line ends as one blank."""
    return " ".join(text.split())


def never_fails(text: Callable[[T], str]) -> Callable[[T], str]:
    """Wrap a `__repr__` so that a result that is half filled, or damaged, is named and not an error."""

    @functools.wraps(text)
    def safe(self: T) -> str:
        try:
            return text(self)
        except Exception as error:  # whatever is missing, a debugger must be able to go on
            return (
                f"<{type(self).__name__} that cannot be shown: {one_line(f'{type(error).__name__}: {error}')[:WORD]}>"
            )

    return safe


@never_fails
def brief_repr(self: object) -> str:
    """Return a dataclass, or a named tuple, with each field in a few words; use it as a `__repr__`.

    Fields that are missing, or at their default of None or nothing, are left out.
    """
    words = []
    for name, default in _fields(self):
        value = getattr(self, name, MISSING)
        if value is MISSING or (default in (None, (), MISSING) and value is default):
            continue
        if isinstance(value, (tuple, list, dict)) and not value:
            continue
        words.append(f"{name}={brief(value)}")
    text = ", ".join(words)
    return f"{type(self).__name__}({text if len(text) <= LONGEST else text[: LONGEST - 3] + '...'})"


def _fields(value: object) -> Iterable[tuple[str, object]]:
    if names := getattr(value, "_fields", None):
        return [(name, MISSING) for name in names]
    return [(f.name, f.default) for f in fields(value) if f.repr]  # type: ignore[arg-type]


def read_numbers(values: Callable[[], Iterable[Tensor]], beside: Tensor) -> list[float] | None:
    """Read a few numbers from a device, all at once.

    Args:
        values: returns tensors of one number each.
        beside: a tensor of the same device.

    Returns:
        The numbers; None if they cannot be read now: while a CUDA graph is recorded, which a read would end, for
        tensors without values, or for a batch of nothing.
    """
    if beside.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    try:
        with torch.no_grad():
            return torch.stack([value.detach().to(torch.float32).reshape(()) for value in values()]).tolist()
    except Exception:
        return None
