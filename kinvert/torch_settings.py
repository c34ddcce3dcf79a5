"""The settings of torch that belong to the process and change numbers: read, set to torch's defaults, set back.

A module that is imported, or a model while it computes, may change any of them for everything that runs later in the
same process. Settings that a version of torch does not have are left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from operator import attrgetter, methodcaller
from typing import Any, NamedTuple

import torch
from torch.torch_version import TorchVersion

__all__ = ["changes", "default_settings", "loading", "read_settings", "restored_settings", "tell_once"]


class _Setting(NamedTuple):
    """A setting: how to read it and to set it, and its default; None if that is what it is at present."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    default: Any


def _attribute(path: str, default: Any) -> _Setting:
    """Return the setting that is the attribute `torch.<path>`."""
    owner, _, name = path.rpartition(".")
    return _Setting(
        f"torch.{path}",
        lambda: attrgetter(path)(torch),
        lambda value: setattr(attrgetter(owner)(torch), name, value),
        default,
    )


def _attention(kind: str, default: bool = True) -> _Setting:
    """Return the setting that allows a kind of scaled dot-product attention on CUDA devices."""
    return _Setting(
        f"torch.backends.cuda.enable_{kind}",
        lambda: methodcaller(f"{kind}_enabled")(torch.backends.cuda),
        lambda value: methodcaller(f"enable_{kind}", value)(torch.backends.cuda),
        default,
    )


def _autocast(device: str) -> _Setting:
    return _Setting(
        f"torch.set_autocast_enabled({device!r})",
        lambda: torch.is_autocast_enabled(device),
        lambda value: torch.set_autocast_enabled(device, value),
        False,
    )


def _flushes_denormal() -> bool:
    """Tell whether numbers near 0 are flushed to it, which torch sets but does not tell."""
    return bool((torch.full((1,), 1e-310, dtype=torch.float64, device="cpu") * 0.5 == 0).item())


def _default_device() -> torch.device:
    """Return where tensors are made."""
    try:
        return torch.get_default_device()
    except AttributeError:  # of torch 2.4, if a default was set and taken back
        return torch.device("cpu")


_SETTINGS = (
    _Setting("torch.set_default_dtype", torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    _Setting("torch.set_default_device", _default_device, torch.set_default_device, None),
    _Setting("torch.set_num_threads", torch.get_num_threads, torch.set_num_threads, None),
    _Setting("torch.set_flush_denormal", _flushes_denormal, torch.set_flush_denormal, False),
    _Setting("torch.set_grad_enabled", torch.is_grad_enabled, torch.set_grad_enabled, None),
    _Setting(
        "torch.use_deterministic_algorithms",
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
        (False, False),
    ),
    _Setting(
        "torch.set_float32_matmul_precision",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
        "highest",
    ),
    *(
        _attribute(f"backends{name}.fp32_precision", default="none")
        for name in ("", ".cuda.matmul", ".cudnn", ".mkldnn")
    ),
    *(_attribute(f"backends.cudnn.{name}.fp32_precision", default="tf32") for name in ("conv", "rnn")),
    *(_attribute(f"backends.mkldnn.{name}.fp32_precision", default="none") for name in ("matmul", "conv", "rnn")),
    _attribute("utils.deterministic.fill_uninitialized_memory", default=True),
    *map(_attention, ("flash_sdp", "mem_efficient_sdp", "math_sdp")),
    _attention("cudnn_sdp", default=TorchVersion(torch.__version__) >= "2.5"),  # which torch 2.4 has, but not allowed
    *map(_autocast, ("cpu", "cuda")),
    _attribute("backends.cuda.matmul.allow_fp16_reduced_precision_reduction", default=True),
    _attribute("backends.cuda.matmul.allow_bf16_reduced_precision_reduction", default=True),
    _attribute("backends.cuda.matmul.allow_fp16_accumulation", default=False),
    _attribute("backends.cudnn.enabled", default=True),
    _attribute("backends.cudnn.benchmark", default=False),
    _attribute("backends.cudnn.deterministic", default=False),
    _attribute("backends.cudnn.allow_tf32", default=True),
    _attribute("backends.mkldnn.enabled", default=True),
    _attribute("backends.mkldnn.deterministic", default=False),
)
"""All settings, in the order in which they are set."""
_DEFAULTS = {setting.name: setting.default for setting in _SETTINGS if setting.default is not None}
_ABSENT, _UNTOLD = "absent", "untold"


def read_settings() -> dict[str, Any]:
    """Return the settings by name, without those that this version of torch does not have or does not tell."""
    found = {setting.name: _read(setting) for setting in _SETTINGS}
    return {name: value for name, value in found.items() if value not in (_ABSENT, _UNTOLD)}


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Describe the settings that are not what they were, e.g. "torch.set_num_threads: 1 -> 4".

    A precision of "none" is that of the setting above it, by default "ieee", which is listed itself if it changed. So a
    mere `torch.set_float32_matmul_precision("highest")`, which writes "ieee", is no change.
    """
    pairs = {name: (before.get(name), value) for name, value in after.items() if before.get(name) != value}
    return [f"{name}: {old} -> {new}" for name, (old, new) in pairs.items() if {old, new} != {"none", "ieee"}]


@contextmanager
def restored_settings() -> Iterator[dict[str, Any]]:
    """Set everything back at the end of the `with` block; gives the settings at its beginning."""
    before = read_settings()
    try:
        yield before
    finally:
        _write(_DEFAULTS | before)


@contextmanager
def default_settings() -> Iterator[dict[str, Any]]:
    """Compute with torch's defaults in the `with` block, and set everything back; gives the settings inside.

    The number of threads and the mode of gradients stay as they are. The default device is the CPU.
    """
    with restored_settings() as before, ExitStack() as stack:
        if before["torch.set_default_device"].type != "cpu":
            stack.enter_context(torch.device("cpu"))
        _write(_DEFAULTS)
        yield read_settings()


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Load a model, or its module, in the `with` block, and set back what it sets for the whole process.

    Warns:
        RuntimeWarning: once for each model, what it set.
    """
    with restored_settings() as before:
        yield
        found = changes(before, read_settings())
    if found:
        tell_once(
            f"{model} changed settings of torch when it was loaded ({'; '.join(found)}); they are set back, so that no "
            "other model is computed with them; set them in the denoiser, and back after each evaluation"
        )


@lru_cache(maxsize=64)
def tell_once(text: str) -> None:
    """Give a RuntimeWarning, the first time that it is asked for in this process."""
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def _write(wanted: dict[str, Any]) -> None:
    """Set what differs, one after the other: some settings follow others."""
    for setting in _SETTINGS:
        if setting.name in wanted and _read(setting) not in (_ABSENT, wanted[setting.name]):
            setting.write(wanted[setting.name])


def _read(setting: _Setting) -> Any:
    """Return the value of a setting, `_ABSENT` if torch does not have it, `_UNTOLD` if torch refuses to tell it."""
    try:
        return setting.read()
    except AttributeError:
        return _ABSENT
    except RuntimeError:  # precisions were set by names of two kinds
        return _UNTOLD
