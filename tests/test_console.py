"""Tables on terminals of several widths, in files, and in streams that are not UTF-8."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from typing import Any

import pytest
from commandline import succeeds

import kinvert as ki


def terminal(width: int, *args: str) -> str:
    """What a command prints to a terminal of so many columns."""
    master, slave = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    with subprocess.Popen([sys.executable, "-m", "kinvert", *args], stdout=slave, env=env) as job:
        os.close(slave)
        text = b""
        with suppress(OSError):  # how Linux says that the other side has closed
            while part := os.read(master, 65536):
                text += part
    os.close(master)
    assert job.returncode == 0
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", text.decode())


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize(("command", "names"), [("samplers", ki.SAMPLERS), ("schedules", ki.SCHEDULES)])
def test_a_listing_fits_the_terminal(command: str, names: dict[str, Any], width: int) -> None:
    lines = terminal(width, command).splitlines()
    assert max(map(len, lines)) <= width
    assert [line.split()[0] for line in lines if line[:1].strip() and line.split()[0] in names] == list(names)
    if width == 80:  # a line for each, and what the columns mean
        assert len(lines) < len(names) + 30
        assert any("Left out here:" in line and "options" in line for line in lines)
    else:
        assert not any("Left out" in line for line in lines) and any("options: " in line for line in lines)


def test_a_file_gets_every_column_in_lines_of_their_own() -> None:
    lines = succeeds("samplers").splitlines()
    (line,) = [line for line in lines if line.startswith("euler ")]
    assert line.split()[:6] == ["euler", "1", "1", "-", "yes", "stepwise"] and "s_tmax=inf" in line
    assert all(line == line.rstrip() for line in lines)


def test_output_that_is_not_utf8_can_be_printed() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from kinvert.cli import main; main(['samplers'])"],
        capture_output=True, check=False, env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert b"dpmpp_2m" in result.stdout
