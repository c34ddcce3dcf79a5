"""Results in files: what was damaged or edited is noticed, wherever."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from kinvert.resultfiles import check_data, measured, read_result, sealed, set_aside, write_result

DATA = save({"x": torch.arange(6.0)})
RECORD = {"key": "a", "numbers": [1.5, float("inf"), 2], "cell": {"steps": 3}, "none": None}


def look(folder: Path) -> dict[str, Any]:
    """Read a result as one that takes it as done."""
    record = read_result(folder / "a.json")
    check_data(folder / "a.safetensors", record)
    return record


def test_a_result_comes_back(tmp_path: Path) -> None:
    write_result(tmp_path, "a", RECORD, DATA)
    record = look(tmp_path)
    assert measured(record) == RECORD and record["data"]["bytes"] == len(DATA)
    assert record == sealed(record) == read_result(tmp_path / "a.json")
    write_result(tmp_path, "a", RECORD)
    assert look(tmp_path)["data"] is None  # whatever lies beside it


@settings(max_examples=150, deadline=None)
@given(st.booleans(), st.floats(0, 1, exclude_max=True), st.integers(-255, 255))
def test_damage_is_noticed(of_data: bool, where: float, change: int) -> None:
    """A byte changed, or the end cut off: an error, or the same result, as for a space between two words of JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_result(folder, "a", RECORD, DATA)
        path = folder / ("a.safetensors" if of_data else "a.json")
        content = bytearray(path.read_bytes())
        place = int(where * len(content))
        if change <= 0:
            del content[place:]
        else:
            content[place] ^= change
        path.write_bytes(content)
        try:
            found = look(folder)
        except ValueError:
            return
        assert not of_data and measured(found) == RECORD


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "it is no record but list"),
        (b'{"a": NaN}', "the word NaN is no JSON"),
        (b'{"a": -Infinity}', "the word -Infinity is no JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1, "sha256": "0"}', "it was edited or damaged"),
        (json.dumps({**sealed({"a": 1}), "b": 2}).encode(), "it was edited or damaged"),
    ],
)
def test_messages(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_result(tmp_path / "a.json")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        read_result(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a\.safetensors is gone"):
        check_data(tmp_path / "a.safetensors", {})
    set_aside(tmp_path / "a.json")  # another process was quicker
    (tmp_path / "a.json").write_text("{")
    assert set_aside(tmp_path / "a.json").read_text() == "{" and not (tmp_path / "a.json").exists()
