"""Read the safetensors files that come with the package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kinvert.checks import check_choice

__all__ = ["NAMES", "load_module", "read"]

NAMES = ("digits", "mnist", "emoji")
"""The models that come with the package."""

_Module = TypeVar("_Module", bound=nn.Module)


def read(folder: str, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a model's file in a folder of this package.

    Raises:
        ValueError: an unknown name.
    """
    check_choice("model", name, NAMES)
    with safe_open(Path(__file__).parent / folder / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 (not a dict)


class _Uninitialised(TorchFunctionMode):
    """Modules are built without the initial values of `torch.nn.init`, for which "meta" tensors import the compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_module(
    folder: str, name: str, build: Callable[[dict[str, Any]], _Module], dtype: torch.dtype, device: torch.device | str
) -> _Module:
    """Return a trained module, in eval mode and with frozen parameters.

    Args:
        folder, name: which file; see `read`.
        build: makes the module from the architecture that the file names.
        dtype: floating dtype of the parameters.
        device: where the parameters go.

    Raises:
        ValueError: an unknown name, or a dtype that is not floating point.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, got {dtype}")
    tensors, metadata = read(folder, name)
    sizes = json.loads(metadata["architecture"])
    with torch.device("meta"), _Uninitialised():  # the caller's random state stays as it is
        module = build({key: tuple(value) if isinstance(value, list) else value for key, value in sizes.items()})
    module.load_state_dict({key: value.to(device, dtype) for key, value in tensors.items()}, assign=True)
    return module.eval().requires_grad_(False)
