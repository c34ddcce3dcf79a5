"""What a device can do: found by trying, once. Runs without float64 are in test_modes.py."""

from __future__ import annotations

from pathlib import Path

import torch

from kinvert import devices
from kinvert.devices import has_float64, widest

PACKAGE = Path(devices.__file__).parent


def test_the_cpu_has_float64() -> None:
    assert has_float64(torch.device("cpu")) and widest(torch.device("cpu")) == torch.float64


def test_no_device_is_asked_for_its_name() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert '"mps"' not in path.read_text(), path.name
