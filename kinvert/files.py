"""Write files whole: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["write_file"]


def write_file(path: Path, content: bytes | Callable[[BinaryIO], Any]) -> None:
    """Write `content` to a file beside `path`, flush it to the disk, and rename it to `path`.

    Args:
        path: the file to create or replace; its folder must exist.
        content: the bytes, or a function that writes them to an open binary file.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            partial.unlink()
        raise
