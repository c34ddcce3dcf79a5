"""How the command line starts: help, version, and what must be installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commandline import SMALL, python, succeeds

import kinvert as ki
from kinvert.cli import main


def test_help_explains_every_command_and_option() -> None:
    text = succeeds("--help")
    for name, command in main.commands.items():
        assert name in text
        assert command.help
        for param in command.params:
            if param.param_type_name == "option":
                assert getattr(param, "help", None), f"{name} {param.name}"
    assert "..." not in text.split("Commands:")[1]


def test_version() -> None:
    assert succeeds("--version").strip() == f"kinvert, version {ki.__version__}"


def test_module_and_command_are_the_same() -> None:
    result = subprocess.run([sys.executable, "-m", "kinvert", "--help"], capture_output=True, text=True, check=True)
    expected = succeeds("--help").replace("Usage: main", "Usage: kinvert")
    assert result.stdout.split() == expected.split()  # lines break where the terminal ends


@pytest.mark.parametrize("args", [["samplers"], ["--help"]])
def test_closed_stdout_ends_in_a_sentence(args: list[str]) -> None:
    command = f"{sys.executable} -m kinvert {' '.join(args)} >&-"
    result = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "Error: stdout is closed, so that nothing can be printed; use > /dev/null instead\n"


def test_wrong_matplotlib_backend_is_refused_for_pictures_only(tmp_path: Path) -> None:
    code = "import os; os.environ['MPLBACKEND'] = 'bogus'; from kinvert.cli import main; main({})"
    assert python(code.format("['plan', 'euler']")).returncode == 0
    result = python(code.format([*SMALL, "--out", str(tmp_path)]))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "'bogus' is not a valid value" in result.stderr and "MPLBACKEND" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_package_does_not_import_the_extras() -> None:
    result = python("import sys, kinvert, kinvert.analysis; print({'click', 'rich', 'matplotlib'} & set(sys.modules))")
    assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.parametrize(("missing", "args", "status"), [("click", [], 1), ("rich", [], 1), ("matplotlib", SMALL, 2)])
def test_the_command_says_which_extra_is_missing(missing: str, args: list[str], status: int) -> None:
    result = python(f"import sys; sys.modules[{missing!r}] = None; from kinvert.cli import main; main({args})")
    assert result.returncode == status
    assert "pip install 'kinvert[cli]'" in result.stderr and missing in result.stderr
    assert "Traceback" not in result.stderr
