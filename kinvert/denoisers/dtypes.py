"""Which dtype a network is called in, and the message for a network that fails on another."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from kinvert.checks import FLOATS
from kinvert.denoisers.protocol import Denoiser

__all__ = ["call", "checked_dtype", "dtype_of", "explain"]

_RAW = re.compile(
    r"same dtype|same type|scalar type|dtypes? match|not implemented for '(Half|BFloat16|Float|Double)'"
    r"|(?:Input|Expected) type \((?P<a>\S+)\) and (?:weight|bias) type \((?P<b>\S+)\) should be the same"
)


def checked_dtype(dtype: Any) -> torch.dtype | None:
    """Return `dtype` if it is None or a dtype that networks compute in.

    Raises:
        TypeError: anything else.
    """
    if dtype is not None and dtype not in FLOATS:
        names = ", ".join(map(str, FLOATS))
        raise TypeError(f"dtype must be what the network is called in, one of {names}, or None, got {dtype!r}")
    return dtype


def dtype_of(model: Any) -> torch.dtype | None:
    """Return the dtype that a module expects: that of its first floating point parameter; None if it has none."""
    if not isinstance(model, nn.Module):
        return None
    return next((p.dtype for p in model.parameters() if p.dtype in FLOATS), None)


def explain(error: RuntimeError, x: Tensor) -> TypeError | None:
    """Return a clearer error if a denoiser failed on dtypes; None if it failed on something else."""
    found = _RAW.search(str(error))
    if found is None or (found["a"] and _without_device(found["a"]) == _without_device(found["b"])):
        return None
    said = str(error).partition("\n")[0].rstrip(".")
    return TypeError(
        f"the denoiser failed on dtypes, called with x in {x.dtype}: {said}. Give x in the network's dtype, e.g. "
        "x.to(torch.float16), or call the network in its own: dtype=torch.float16 of the adapter (from_eps, from_v, "
        "from_x0, from_velocity), or by hand, network(x.half(), ...).to(x.dtype); conditioning has to fit, too"
    )


def call(denoiser: Denoiser, x: Tensor, sigma: Tensor, **conditioning: Any) -> Any:
    """Call a denoiser, and explain a failure on dtypes: torch's own message names neither x nor the fix.

    Raises:
        TypeError: the denoiser failed on dtypes. Other exceptions pass unchanged.
    """
    if torch.compiler.is_compiling():
        return denoiser(x, sigma, **conditioning)
    try:
        return denoiser(x, sigma, **conditioning)
    except RuntimeError as error:
        said = explain(error, x)
        if said is None:
            raise
        raise said from error


def _without_device(name: str) -> str:
    return re.sub(r"torch\.(cuda\.)?|CUDA|CPU", "", name)
