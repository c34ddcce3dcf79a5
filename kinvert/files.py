"""Write files whole: a reader sees the old file or the new one, never half of one.

The content goes to a hidden file beside the place, which is renamed once it is on the disk. A process that is killed
leaves the hidden file behind. Its writer holds it by a lock of the system, which ends with the process, so that
`remove_leftovers` takes away what nobody holds, and leaves the files of other processes alone.
"""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["is_without_room", "make_folder", "remove_leftovers", "write_file"]

HIDDEN = ".kinvert-"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # of a folder: the file system has no such thing, or we may not


def write_file(path: Path, content: bytes | Callable[[BinaryIO], Any]) -> None:
    """Write `content` to a file beside `path`, flush it to the disk, and rename it to `path`.

    Args:
        path: the file to create or replace; its folder must exist.
        content: the bytes, or a function that writes them to an open binary file.
    """
    partial, file = _open_hidden(path.parent)
    try:
        with file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if sys.platform != "win32":  # there an open file cannot be renamed
                partial.replace(path)
        if sys.platform == "win32":
            partial.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            partial.unlink()
        raise
    _sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, and flush their names to the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync_folder(folder.parent)


def remove_leftovers(folder: Path) -> int:
    """Delete the hidden files of processes that were killed while they wrote to a folder, and return how many."""
    removed = 0
    for path in folder.glob(f"{HIDDEN}*"):
        with suppress(OSError):  # somebody else was quicker, or holds it
            if sys.platform == "win32":  # there an open file cannot be deleted
                path.unlink()
            else:
                with path.open("r+b") as file:
                    _hold(file, wait=False)
                    path.unlink()
            removed += 1
    return removed


def is_without_room(error: BaseException | None) -> bool:
    """Tell whether an error comes from a disk that is full, or from a quota that is used up."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def _open_hidden(folder: Path) -> tuple[Path, BinaryIO]:
    """Open a new hidden file, and hold it until it is closed."""
    while True:
        path = folder / f"{HIDDEN}{secrets.token_hex(6)}"
        file = path.open("xb")
        with suppress(OSError):  # of a file system without locks, where `remove_leftovers` leaves all files alone
            _hold(file, wait=True)
        if path.exists():  # and was not taken for a leftover before it was held
            return path, file
        file.close()


def _hold(file: BinaryIO, wait: bool) -> None:
    """Lock a file until it is closed; raise OSError if that cannot be. Windows keeps open files without it."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    if sys.platform == "win32":  # which cannot open folders
        return
    try:
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
