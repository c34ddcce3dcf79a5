"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import pytest

from kinvert.files import write_file


def test_bytes_or_a_function_are_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"one")
    assert path.read_bytes() == b"one"
    write_file(path, lambda file: file.write(b"two"))
    assert path.read_bytes() == b"two" and list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        write_file(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_half_a_file_is_never_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "file", b"half")
    assert not list(tmp_path.iterdir())
