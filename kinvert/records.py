"""Files of kinvert: a tree of plain data and tensors, with the kind of the file and its version.

A tree is made of None, bools, numbers, strings, tensors, lists, tuples and dicts. A tree with tensors becomes a
safetensors file: the tensors stand in it under their places in the tree, such as "latent" or "memory/y", and everything
else is JSON in its metadata "kinvert". A tree without tensors may be a JSON file. Numbers are exact, and nothing is
ever pickled.

What JSON does not have is a dict with one key: {"$tensor": name}, {"$tuple": [...]}, {"$number": "inf"}, {"$dict":
[[key, value], ...]} for keys that are no strings or begin with "$", {"$flow_times": tree} for a schedule of flow times,
and {"$rule": tree} and the like for a `Tagged` tree, of which other modules make objects.

The version of a file is (major, minor). A reader takes every file with its own major version, and tells of entries that
it does not know; a file with a newer major version is an error.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kinvert.checks import check_dense, check_values, is_integer, is_number, plain
from kinvert.files import make_folder, write_file
from kinvert.flowtimes import FlowTimes
from kinvert.telling import warn_user

__all__ = [
    "KEY",
    "VERSION",
    "DamagedError",
    "Header",
    "Tagged",
    "check_kind",
    "header_of",
    "is_json",
    "known_entries",
    "read_tree",
    "tree_bytes",
    "write_json",
    "write_tree",
]

KEY, SEAL = "kinvert", "sha256"
VERSION = (1, 0)
"""The version that this kinvert writes."""
_FORMATS = {"channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}


class DamagedError(ValueError):
    """A file is cut off, or has other content than was written."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        kind: what it holds, e.g. "inversion".
        version: of the file, (major, minor).
        versions: of the programs that wrote it, by name.
        content: the tree as JSON has it.
        checksum: of the content and the tensors; None in a JSON file, which may be edited.
    """

    kind: str
    version: tuple[int, int]
    versions: Mapping[str, str]
    content: Any
    checksum: str | None = None


@dataclass(frozen=True)
class Tagged:
    """A tree of which another module makes an object, by its tag."""

    tag: str
    tree: Any


def write_tree(path: Path | str, kind: str, tree: Any) -> None:
    """Write a tree as a safetensors file, whole or not at all.

    Args:
        path: the file to create or replace; its folder is made.
        kind: what it is.
        tree: the data.

    Raises:
        TypeError: something in the tree that a file cannot hold, with its place.
        ValueError: the file cannot be written.
    """
    _put(path, tree_bytes(kind, tree))


def tree_bytes(kind: str, tree: Any) -> bytes:
    """Return the content of the file that `write_tree` writes; equal trees give equal bytes."""
    packer = _Packer()
    content = packer.pack(tree, ())
    text = _json_text(kind, content, {SEAL: _checksum(content, packer.tensors)})
    return save(packer.tensors, {KEY: text})  # of one entry, because safetensors writes several in any order


def write_json(path: Path | str, kind: str, tree: Any) -> None:
    """Write a tree without tensors as a JSON file, with a line for each value; see `write_tree`."""
    packer = _Packer()
    content = packer.pack(tree, ())
    if packer.tensors:
        raise TypeError(f"a JSON file holds no tensors, and {next(iter(packer.tensors))} is one")
    _put(path, (_json_text(kind, content, {}, indent=1) + "\n").encode())


def _put(path: Path | str, contents: bytes) -> None:
    """Write the bytes of a file, and make its folder.

    Raises:
        ValueError: it cannot be written.
    """
    path = Path(path)
    try:
        make_folder(path.parent)
        write_file(path, contents)
    except OSError as error:
        raise ValueError(f"cannot write {str(path)!r}: {error.strerror or error}; choose another place") from error


def _json_text(kind: str, content: Any, more: Mapping[str, str], indent: int | None = None) -> str:
    """Return a packed tree with its header as JSON; floats are written so that they are read back exactly."""
    from kinvert import __version__  # here, because the package is not imported whole when this module is

    versions = {KEY: __version__, "torch": torch.__version__}
    head = {"kind": kind, "version": list(VERSION), "versions": versions, **more, "content": content}
    return json.dumps(head, allow_nan=False, indent=indent, ensure_ascii=False)


def _checksum(content: Any, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a packed tree and of its tensors, which are on the CPU."""
    found = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.flatten().clone(memory_format=torch.contiguous_format)  # of one value it has any stride
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def header_of(path: Path | str) -> Header | None:
    """Return what a file of kinvert says of itself, or None for a safetensors or JSON file of another program.

    Raises:
        ValueError: the file is missing, damaged (a `DamagedError`), or neither safetensors nor JSON; a newer major
            version.
    """
    path = Path(path)
    try:
        if is_json(path):
            text: str | None = path.read_text(encoding="utf-8")
        else:
            with safe_open(path, "pt") as opened:
                text = (opened.metadata() or {}).get(KEY)
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except (SafetensorError, UnicodeDecodeError) as error:
        raise DamagedError(
            f"cannot read {str(path)!r}: it is no safetensors file, or it is damaged or cut off ({error})"
        ) from error
    return None if text is None else _parsed(path, text)


def is_json(path: Path) -> bool:
    """Tell whether a file is text that begins with a brace; a safetensors file begins with a length of 8 bytes."""
    with path.open("rb") as file:
        start = file.read(8)
    return start[:1] == b"{" and b"\0" not in start


def _parsed(path: Path, text: str) -> Header | None:
    try:
        head = json.loads(text)
    except json.JSONDecodeError as error:
        raise DamagedError(f"cannot read {str(path)!r}: its JSON is damaged or cut off ({error})") from error
    if not isinstance(head, dict) or not {"kind", "version", "content"} <= head.keys():
        return None
    version = head["version"]
    if not (isinstance(version, list) and len(version) == 2 and all(map(is_integer, version))):
        raise ValueError(f"cannot read {str(path)!r}: its version is {version!r}, which is not [major, minor]")
    versions = head.get("versions") or {}
    if version[0] > VERSION[0]:
        raise ValueError(
            f"{str(path)!r} has the file version {version[0]}.{version[1]}, made by kinvert {versions.get(KEY, '?')}, "
            f"and this kinvert reads up to {VERSION[0]}: pip install -U kinvert"
        )
    return Header(str(head["kind"]), (version[0], version[1]), versions, head["content"], head.get(SEAL))


def read_tree(path: Path | str, header: Header) -> Any:
    """Return the tree of a file, with its tensors on the CPU.

    Raises:
        ValueError: a tensor of the tree is missing, or the file is damaged (a `DamagedError`).
    """
    path, tensors = Path(path), dict[str, Tensor]()
    try:
        if not is_json(path):
            with safe_open(path, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise DamagedError(f"cannot read {str(path)!r}: {error}") from error
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    if header.checksum is not None and header.checksum != _checksum(header.content, tensors):
        raise DamagedError(f"cannot read {str(path)!r}: it is damaged, its checksum is that of other content")
    try:
        return _unpack(header.content, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"cannot read {str(path)!r}: it is damaged, {type(error).__name__}: {error}") from error


def check_kind(path: Path | str, header: Header | None, kind: str) -> Header:
    """Return the header if the file is of a kind.

    Raises:
        ValueError: it is not.
    """
    if header is None or header.kind != kind:
        what = "a file of another program" if header is None else f"of the kind {header.kind!r}"
        raise ValueError(f"{str(path)!r} must be a file of the kind {kind!r}, and it is {what}; see `kinvert show`")
    return header


def known_entries(what: str, given: Mapping[str, Any], known: Mapping[str, bool]) -> dict[str, Any]:
    """Return the entries of a file that are known; tell of others, which a newer version may have written.

    Args:
        what: what it is, for messages.
        given: the entries.
        known: their names, and whether each must be there.

    Raises:
        ValueError: one that must be there is missing.

    Warns:
        RuntimeWarning: entries that are not known.
    """
    if missing := [name for name, needed in known.items() if needed and name not in given]:
        raise ValueError(f"{what} has no entry {missing[0]!r}, so that it is damaged, or was not written by kinvert")
    if others := [name for name in given if name not in known]:
        warn_user(
            f"{what} has entries that this version of kinvert does not know and leaves out: {', '.join(others)}; a "
            "newer version wrote it"
        )
    return {name: value for name, value in given.items() if name in known}


@dataclass
class _Packer:
    """Packs a tree: its JSON is returned, its tensors are collected."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    places: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def pack(self, tree: Any, place: tuple[str, ...]) -> Any:
        """Return a tree as JSON has it."""
        if tree is None or isinstance(tree, (bool, str)):
            return tree
        if is_number(tree):
            return _number(tree)
        if isinstance(tree, Tensor):
            held = self._tensor(tree, place)
            return {"$flow_times": held} if isinstance(tree, FlowTimes) else held
        if isinstance(tree, (list, tuple)):
            members = [self.pack(value, (*place, str(i))) for i, value in enumerate(tree)]
            return {"$tuple": members} if isinstance(tree, tuple) else members
        return self._named(tree, place)

    def _named(self, tree: Any, place: tuple[str, ...]) -> Any:
        if isinstance(tree, Mapping):
            return self._mapping(tree, place)
        if isinstance(tree, Tagged):
            return {f"${tree.tag}": self.pack(tree.tree, place)}
        if isinstance(tree, np.ndarray):
            return {"$numpy": self.pack(torch.from_numpy(np.ascontiguousarray(tree)), place)}
        raise TypeError(f"{'/'.join(place)} cannot be written to a file, it is a {type(tree).__name__}")

    def _mapping(self, tree: Mapping[Any, Any], place: tuple[str, ...]) -> Any:
        if all(isinstance(key, str) and not key.startswith("$") for key in tree):
            return {key: self.pack(value, (*place, key)) for key, value in tree.items()}
        pairs = [[self.pack(key, place), self.pack(value, (*place, str(key)))] for key, value in tree.items()]
        return {"$dict": pairs}

    def _tensor(self, value: Tensor, place: tuple[str, ...]) -> Any:
        name = "/".join(place)
        check_values(name, value, "a file holds values")
        check_dense(name, value)
        data = plain(value).detach()
        key = (data.data_ptr(), data.shape, data.stride(), data.dtype, str(data.device))
        if key not in self.places or not data.numel():
            self.places[key] = name
            self.tensors[name] = data.cpu().contiguous().clone()  # a file holds no two names of one memory
        kept = next((k for k, f in _FORMATS.items() if _is_in(data, f)), None)
        return {"$tensor": self.places[key], **({"memory_format": kept} if kept else {})}


def _is_in(data: Tensor, form: torch.memory_format) -> bool:
    fits = data.ndim == (4 if form is torch.channels_last else 5)
    return fits and data.is_contiguous(memory_format=form) and not data.is_contiguous()


def _number(value: float) -> Any:
    """Return a number of Python or NumPy as JSON has it."""
    number = int(value) if is_integer(value) else float(value)
    return number if math.isfinite(number) else {"$number": str(number)}


def _unpack(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(data, list):
        return [_unpack(value, tensors) for value in data]
    if not isinstance(data, dict):
        return data
    tag = next((key for key in data if key.startswith("$")), None)
    if tag is None:
        return {key: _unpack(value, tensors) for key, value in data.items()}
    value = data[tag]
    if tag == "$tensor":
        found = tensors[value]
        return found.to(memory_format=_FORMATS[data["memory_format"]]) if "memory_format" in data else found
    if tag == "$number":
        return float(value)
    inner = _unpack(value, tensors)
    readers: dict[str, Callable[[Any], Any]] = {
        "$dict": dict,
        "$tuple": tuple,
        "$flow_times": FlowTimes,
        "$numpy": Tensor.numpy,
    }
    return readers[tag](inner) if tag in readers else Tagged(tag[1:], inner)
