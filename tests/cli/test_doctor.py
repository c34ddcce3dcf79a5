"""`kinvert doctor`: what is installed, and a test that can fail."""

from __future__ import annotations

import json
import platform
from typing import Any

import pytest
import torch
from commandline import fails, run, succeeds

import kinvert as ki


def test_doctor_says_what_is_here_and_passes() -> None:
    text = succeeds("doctor")
    assert f"kinvert    {ki.__version__}, " in text and f"python     {platform.python_version()}, " in text
    for package in ("torch", "numpy", "scipy", "safetensors", "tqdm", "click", "matplotlib"):
        assert f"{package} " in text
    assert "self-test  passed on cpu: a digit was inverted, and came back with an error of at most" in text


def test_doctor_json() -> None:
    found = json.loads(succeeds("doctor", "--json"))
    test = found["self-test"]
    assert test["passed"] and test["converged"] and test["largest_error"] < 1e-4 and test["evaluations"] > 20
    assert found["packages"]["torch"] == torch.__version__ or found["packages"]["torch"] in torch.__version__
    assert set(found["extras"]) == {"cli", "diffusers", "slurm"} and "cpu" in found["devices"]


def test_extras_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinvert.cli.doctor.EXTRAS", {"slurm": ("click", "no-such-package")})
    assert "without no-such-package: pip install 'kinvert[slurm]'" in succeeds("doctor")


class Broken(torch.nn.Module):
    sigma_min, sigma_max = 0.02, 80.0

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, label: Any = None) -> torch.Tensor:
        if isinstance(self.value, Exception):
            raise self.value
        return x.round(decimals=1) + self.value


@pytest.mark.parametrize(
    ("value", "message"),
    [(RuntimeError("no kernel"), "RuntimeError: no kernel"), (0.0, "a digit was not inverted"), (torch.nan, "NaN")],
)
def test_doctor_fails_where_the_digit_does_not_come_back(
    value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ki.models, "load", lambda *args, **kwargs: Broken(value))
    result = run("doctor")
    assert result.exit_code == 1 and "self-test  FAILED on cpu: " in result.stdout and message in result.stdout


def test_doctor_refuses_a_device_that_is_not_here() -> None:
    assert "device 'abacus' cannot be used here" in fails("doctor", "--device", "abacus")


def test_other_devices_are_listed_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for one that is no GPU of CUDA's."""
    monkeypatch.setattr("kinvert.cli.doctor.available", lambda: ["cpu", "meta", "meta:0"])
    devices = json.loads(succeeds("doctor", "--json"))["devices"]
    assert list(devices) == ["cpu", "meta:0"] and devices["meta:0"] == ""
