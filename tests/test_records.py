"""Files of a tree: what is written comes back exactly; what is damaged, foreign or newer is said."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kinvert as ki
from kinvert.records import (
    KEY,
    Tagged,
    check_kind,
    header_of,
    known_entries,
    read_tree,
    tree_bytes,
    write_json,
    write_tree,
)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.sampled_from(DTYPES).map(lambda dtype: torch.tensor([[1, 0, 3]]).to(dtype))
    | st.just(Tagged("rule", {"name": "x"}))
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(0, 5), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    """Equal in value, type, dtype and bits."""
    if isinstance(a, torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Tagged):
        return isinstance(b, Tagged) and a.tag == b.tag and same(a.tree, b.tree)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and repr(a) == repr(b)


def returned(tree: Any, path: Path) -> Any:
    write_tree(path, "thing", tree)
    header = check_kind(path, header_of(path), "thing")
    return read_tree(path, header)


@given(TREES)
@settings(max_examples=150, deadline=None)
def test_a_tree_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "tree.safetensors"
    assert same(tree, returned(tree, path))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -0.0, 5e-324, 0.1, 2**60, np.float32(0.1)])
def test_numbers_are_exact(value: Any, tmp_path: Path) -> None:
    assert same(value.item() if isinstance(value, np.generic) else value, returned([value], tmp_path / "a")[0])


def test_arrays_schedules_and_memory_formats_come_back(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tree = {"t": ki.levels.FlowTimes([1.0, 0.5]), "n": np.arange(3.0), "x": x, "empty": torch.empty(0, 2)}
    again = returned(tree, tmp_path / "a")
    assert type(again["t"]) is ki.levels.FlowTimes and again["n"].tolist() == [0.0, 1.0, 2.0]
    assert again["x"].is_contiguous(memory_format=torch.channels_last) and torch.equal(again["x"], x)
    assert again["empty"].shape == (0, 2)


def test_views_and_shared_memory_are_kept_apart(tmp_path: Path) -> None:
    x = torch.arange(12.0).reshape(3, 4)
    again = returned(
        {"x": x, "same": x, "row": x[1], "turned": x.T, "grad": x.clone().requires_grad_(), "one": x[:1, 1]},
        tmp_path / "a",
    )
    assert torch.equal(again["one"], x[:1, 1])  # a column of one value, as of a batch of one
    assert torch.equal(again["same"], x) and torch.equal(again["row"], x[1]) and torch.equal(again["turned"], x.T)
    assert not again["grad"].requires_grad


def test_what_a_file_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"a/0 cannot be written to a file, it is a object"):
        write_tree(tmp_path / "a", "thing", {"a": [object()]})
    with pytest.raises(ValueError, match="x has a shape but no values"):
        write_tree(tmp_path / "a", "thing", {"x": torch.empty(2, device="meta")})
    with pytest.raises(TypeError, match="a JSON file holds no tensors, and x is one"):
        write_json(tmp_path / "a", "thing", {"x": torch.zeros(1)})
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*; choose another place"):
        write_tree(tmp_path / "file" / "a", "thing", 1)


def test_damaged_foreign_and_newer_files_are_told_apart(tmp_path: Path) -> None:
    path, text = tmp_path / "a.safetensors", tmp_path / "a.json"
    write_tree(path, "thing", {"x": torch.zeros(100)})
    write_json(text, "thing", {"x": [0.5, (1,)]})
    assert read_tree(text, check_kind(text, header_of(text), "thing")) == {"x": [0.5, (1,)]}
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) - 10):
        (tmp_path / "cut").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cannot read .*cut.*damaged or cut off"):
            header_of(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(text.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cannot read .*cut.*its JSON is damaged or cut off"):
        header_of(tmp_path / "cut")
    with pytest.raises(ValueError, match=r"cannot read .*nowhere.*No such file"):
        header_of(tmp_path / "nowhere")
    (tmp_path / "other.json").write_text('{"kind": 3}')
    assert header_of(tmp_path / "other.json") is None
    with pytest.raises(ValueError, match=r"must be a file of the kind 'plan', and it is of the kind 'thing'"):
        check_kind(path, header_of(path), "plan")
    with pytest.raises(ValueError, match="and it is a file of another program"):
        check_kind(path, None, "plan")
    head = json.loads(text.read_text())
    text.write_text(json.dumps(head | {"version": [2, 0], "versions": {KEY: "9.0"}}))
    with pytest.raises(ValueError, match=r"file version 2\.0, made by kinvert 9\.0, .*pip install -U kinvert"):
        header_of(text)
    text.write_text(json.dumps(head | {"version": "new"}))
    with pytest.raises(ValueError, match="its version is 'new'"):
        header_of(text)
    text.write_text(json.dumps(head | {"content": {"x": {"$tensor": "gone"}}}))
    with pytest.raises(ValueError, match=r"cannot read .*it is damaged, KeyError: 'gone'"):
        read_tree(text, check_kind(text, header_of(text), "thing"))


def test_a_later_minor_version_is_read(tmp_path: Path) -> None:
    text = tmp_path / "a.json"
    write_json(text, "thing", {"x": 1})
    text.write_text(json.dumps(json.loads(text.read_text()) | {"version": [1, 7], "more": 3}))
    header = header_of(text)
    assert header is not None and header.version == (1, 7) and read_tree(text, header) == {"x": 1}
    with pytest.warns(RuntimeWarning, match=r"f has entries that this version of kinvert does not know.*: new;"):
        assert known_entries("f", {"x": 1, "new": 2}, {"x": True}) == {"x": 1}
    with pytest.raises(ValueError, match="f has no entry 'y'"):
        known_entries("f", {"x": 1}, {"x": True, "y": True})


def test_equal_trees_give_equal_bytes() -> None:
    tree = {"x": torch.ones(2), "y": [torch.zeros(1), {"z": torch.ones(1)}], "n": 1.5}
    assert len({tree_bytes("thing", tree) for _ in range(30)}) == 1


@settings(max_examples=60, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_changed_bit_is_noticed(where: float, bit: int) -> None:
    """Wherever it is: the file is refused, or says that another program or kind wrote it, or holds what was written."""
    tree = {"x": torch.arange(20.0), "y": [torch.tensor(True), torch.empty(0, 3), 1.5], "z": torch.ones(2) * 1j}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        write_tree(path, "thing", tree)
        assert same(read_tree(path, check_kind(path, header_of(path), "thing")), tree)
        content = bytearray(path.read_bytes())
        content[int(where * len(content))] ^= 1 << bit
        path.write_bytes(content)
        try:
            found = read_tree(path, check_kind(path, header_of(path), "thing"))
        except ValueError:
            return
        assert same(found, tree)
