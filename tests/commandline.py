"""The command line, called from tests: what it prints, and how it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

from kinvert.cli import main

SMALL = ["demo", "--model", "digits", "--steps", "4", "--count", "3", "--samplers", "euler,dpmpp_2m"]


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def succeeds(*args: str | Path) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*args: str | Path) -> str:
    """The message of a refusal: status 2, no traceback, nothing on stdout."""
    result = run(*args)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


def python(code: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, where warnings are errors, but for the deprecations of others."""
    flags = ["-W", "error", "-W", "ignore::DeprecationWarning"]
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False)
