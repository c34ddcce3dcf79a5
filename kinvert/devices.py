"""What a device can do, found by trying: its name would say nothing about the next model or version."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

from kinvert.torch_hooks import constant_result

__all__ = ["available", "check_device", "has_float64", "memory_limit", "widest"]

_FLOAT64: dict[torch.device, bool] = {}


def available() -> list[str]:
    """Return the names of the devices that answer: the CPU, then every device of each kind that torch knows here."""
    names = ["cpu"]
    for module in (torch.cuda, torch.xpu, torch.mps):
        kind = module.__name__.rpartition(".")[2]
        count = module.device_count()
        names += [kind] * bool(count) + [f"{kind}:{i}" for i in range(count)]
    return names


def check_device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        ValueError: there is none, or it cannot be used on this machine.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {_first_line(error)}; use 'cpu'") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].removesuffix(".")


@constant_result
def has_float64(device: torch.device) -> bool:
    """Tell whether the device computes in float64; Apple GPUs, Intel Arc and some NPUs do not."""
    if device not in _FLOAT64:
        try:
            torch.ones(1, dtype=torch.float64, device=device).add_(1)  # some devices store float64 but cannot add it
            _FLOAT64[device] = True
        except torch.cuda.OutOfMemoryError:
            raise
        except (TypeError, RuntimeError):
            _FLOAT64[device] = False
    return _FLOAT64[device]


def memory_limit() -> int | None:
    """Return the bytes that all processes of this machine, or of this container, may take together, with swap.

    None if that is not known: on systems that do not tell it as Linux does.
    """
    limits: list[int] = []
    with suppress(OSError, ValueError, KeyError):
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        sizes = {words[0]: int(words[1]) * 1024 for words in lines}
        limits.append(sizes["MemTotal:"] + sizes["SwapTotal:"])
    with suppress(OSError, ValueError):  # "max" if there is no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=None)


def widest(device: torch.device) -> torch.dtype:
    """Return float64 if the device has it, else float32."""
    return torch.float64 if has_float64(device) else torch.float32
