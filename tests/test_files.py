"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kinvert.files import write_file


def test_half_a_file_is_never_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "file", b"half")
    assert not list(tmp_path.iterdir())
