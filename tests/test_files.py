"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from writers import killed_while_it_writes, writing

from kinvert.files import is_without_room, make_folder, remove_leftovers, write_file


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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_process_left_is_taken_away(number: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")
    killed_while_it_writes(path, number)
    assert len(list(tmp_path.iterdir())) == 2
    assert remove_leftovers(tmp_path) == 1 and remove_leftovers(tmp_path) == 0
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with writing(path) as process:
        assert remove_leftovers(tmp_path) == 0 and len(list(tmp_path.iterdir())) == 1
        write_file(path, b"whole")  # at the same time
        process.communicate("go on", timeout=60)
        assert process.returncode == 0
    assert path.read_bytes() == b"half and half" and list(tmp_path.iterdir()) == [path]


def test_a_file_taken_for_a_leftover_before_it_was_held_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, lock, locks = iter(["first", "second"]), fcntl.flock, []

    def late(file: BinaryIO, how: int) -> None:
        locks.append(how)
        if len(locks) == 1:
            (tmp_path / ".kinvert-first").unlink()
        lock(file, how)

    monkeypatch.setattr("secrets.token_hex", lambda length: next(names))
    monkeypatch.setattr("fcntl.flock", late)
    write_file(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole" and len(locks) == 2


def test_folders_are_flushed_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr("os.fsync", lambda file: (flushed.append(os.fstat(file).st_ino), fsync(file)))
    make_folder(tmp_path / "a" / "b")
    assert set(flushed) == {tmp_path.stat().st_ino, (tmp_path / "a").stat().st_ino}
    flushed.clear()
    write_file(tmp_path / "a" / "b" / "file", b"content")
    assert flushed == [(tmp_path / "a" / "b" / "file").stat().st_ino, (tmp_path / "a" / "b").stat().st_ino]


def test_a_folder_that_cannot_be_flushed_is_none_the_worse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> Any:
        def sync(file: int) -> None:
            if Path(f"/proc/self/fd/{file}").is_dir():
                raise OSError(number, os.strerror(number))

        return sync

    monkeypatch.setattr("os.fsync", refuse(errno.EINVAL))
    write_file(tmp_path / "file", b"content")
    monkeypatch.setattr("os.fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        write_file(tmp_path / "file", b"content")


def test_which_errors_come_from_a_full_disk() -> None:
    def raised(error: Exception) -> Exception:
        try:
            raise ValueError("cannot write") from error
        except ValueError as outer:
            return outer

    assert is_without_room(OSError(errno.ENOSPC, "full")) and is_without_room(raised(OSError(errno.EDQUOT, "quota")))
    assert not is_without_room(OSError(errno.EACCES, "no")) and not is_without_room(raised(KeyError()))
