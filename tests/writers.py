"""A process that writes a file and is killed, or waits, in the middle of it. It loads no PyTorch."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILES = Path(__file__).parent.parent / "kinvert" / "files.py"
WRITER = """
import sys, time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

spec = spec_from_file_location("files", sys.argv[1])
files = module_from_spec(spec)
spec.loader.exec_module(files)

def write(file):
    file.write(b"half")
    file.flush()
    print("writes", flush=True)
    if sys.stdin.read():
        file.write(b" and half")

files.write_file(Path(sys.argv[2]), write)
"""


@contextmanager
def writing(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has written half of a file; it goes on if it is sent a word."""
    command = [sys.executable, "-c", WRITER, str(FILES), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writes\n"
        try:
            yield process
        finally:
            process.kill()


def killed_while_it_writes(path: Path, number: int = signal.SIGKILL) -> None:
    """Let a process die in the middle of writing a file."""
    with writing(path) as process:
        process.send_signal(number)
        process.wait(60)
