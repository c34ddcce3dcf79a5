"""Settings of torch for the process are read, set to torch's defaults, and set back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from kinvert import torch_settings
from kinvert.torch_settings import changes, default_settings, read_settings, restored_settings

EDITS = {
    "precision": "torch.set_float32_matmul_precision('medium')",
    "dtype": "torch.set_default_dtype(torch.float64)",
    "device": "torch.set_default_device('meta')",
    "threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "deterministic": "torch.use_deterministic_algorithms(True, warn_only=True)",
    "gradients": "torch.set_grad_enabled(False)",
    "denormal": "torch.set_flush_denormal(True)",
    "attention": "torch.backends.cuda.enable_flash_sdp(False)",
    "autocast": "torch.set_autocast_enabled('cpu', True)",
    "benchmark": "setattr(torch.backends.cudnn, 'benchmark', True)",
    "tf32": "setattr(torch.backends.cudnn, 'allow_tf32', False)",
    "fill": "setattr(torch.utils.deterministic, 'fill_uninitialized_memory', False)",
}
KEPT = {"threads", "gradients"}
"""What `default_settings` leaves as it is."""
NEW_NAMES = ("backends", "backends.cuda.matmul", "backends.mkldnn.matmul")
CYCLE = """
import torch
from kinvert.torch_settings import default_settings, read_settings
usual = read_settings()
torch.{owner}.fp32_precision = {value!r}
before = read_settings()
assert before != usual
with default_settings() as inside:
    assert inside == read_settings() == usual and torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision("medium")
assert read_settings() == before
"""


@pytest.fixture(autouse=True)
def everything_is_set_back() -> Iterator[None]:
    with restored_settings() as before:
        yield
    assert read_settings() == before


def test_a_fresh_process_has_the_defaults() -> None:
    """As the table has them, for this version of torch."""
    code = (
        "from kinvert.torch_settings import *; r = read_settings()\nwith default_settings() as d: assert d == r, (d, r)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", EDITS)
def test_a_setting_is_seen_and_set_back(name: str) -> None:
    with default_settings() as usual:
        eval(EDITS[name])
        (change,) = (c for c in changes(usual, read_settings()) if "fp32_precision" not in c)
        with default_settings() as inside:
            assert (inside == usual) == (name not in KEPT) and inside == read_settings()
        assert change in changes(usual, read_settings())
    with restored_settings() as before:
        eval(EDITS[name])
        assert read_settings() != before
    assert read_settings() == before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="the newer names of precisions")
@pytest.mark.parametrize("owner", [NEW_NAMES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in NEW_NAMES[1:])])
def test_precisions_by_their_newer_names(owner: str) -> None:
    """In a process of its own, since torch refuses to tell them by the older names afterwards."""
    subprocess.run([sys.executable, "-c", CYCLE.format(owner=owner, value="tf32")], check=True)


def test_a_setting_that_torch_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = torch_settings._attribute("backends.cudnn.not_there", default=True)
    monkeypatch.setattr(torch_settings, "_SETTINGS", (*torch_settings._SETTINGS, lacking))
    monkeypatch.setattr(torch_settings, "_DEFAULTS", {**torch_settings._DEFAULTS, lacking.name: True})
    with default_settings() as inside:
        assert lacking.name not in inside
    assert not hasattr(torch.backends.cudnn, "not_there")


def test_the_default_precision_by_name_is_no_change() -> None:
    with restored_settings() as before:
        torch.set_float32_matmul_precision("medium")
        assert changes(before, read_settings())
        torch.set_float32_matmul_precision("highest")
        assert not changes(before, read_settings())
