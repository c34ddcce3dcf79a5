"""A newcomer's files, as CONTRIBUTING.md shows them: short, found by being there, and tested by being registered."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kinvert._discover import import_all

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
FILES = {  # path -> what is registered
    "kinvert/rules/two_thirds.py": "two_thirds",
    "kinvert/rules/adams_two.py": "adams_two",
    "kinvert/inversion/solvers/spectral.py": "spectral",
    "kinvert/inversion/baselines/midpoint_up.py": "midpoint_up",
}
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_each_file_is_shorter_than_30_lines() -> None:
    assert len(BLOCKS) == len(FILES)
    for path, block in zip(FILES, BLOCKS, strict=True):
        assert f"`{path}`" in PAGE
        assert block.count("\n") < 30, path


def test_every_module_of_a_package_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "newcomers"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text("here = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_all("newcomers", [str(package)])
    assert sys.modules.pop("newcomers.one").here
    sys.modules.pop("newcomers")


@pytest.mark.slow
def test_the_files_pass_the_linters_and_the_batteries(tmp_path: Path) -> None:
    for part in ("kinvert", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / part, tmp_path)
    for path, block in zip(FILES, BLOCKS, strict=True):
        (tmp_path / path).write_text(block)
    batteries = ["tests/test_laws.py", "tests/test_analysis.py", "tests/inversion"]
    for command in (
        ["ruff", "check", "kinvert"],
        ["ruff", "format", "--check", "kinvert"],
        ["mypy", *FILES],
        ["pytest", "-q", "-p", "no:cacheprovider", *batteries, "-k", " or ".join(FILES.values())],
    ):
        result = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) >= 40
