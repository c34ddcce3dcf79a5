"""The suite in an environment of its own, with the oldest or the newest versions that pyproject.toml allows.

    python tests/versions.py oldest    # the floors of pyproject.toml, on Python 3.11
    python tests/versions.py newest    # whatever pip finds, on every Python from 3.11 to 3.14 that is there

Environments stay, in `.venv-oldest-3.11` and so on, and are used again: delete them for newer versions. Each file of
tests has a process and a time limit of its own. The counts go to benchmarks/results/versions.json, which the docs show.
Only the standard library is needed here. Installing PyTorch may take some gigabytes; no GPU is used.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "versions.json"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
SHOWN = (
    "torch",
    "numpy",
    "scipy",
    "safetensors",
    "tqdm",
    "click",
    "rich",
    "matplotlib",
    "pillow",
    "diffusers",
    "transformers",
    "pytest",
    "hypothesis",
)
COUNTED = ("passed", "failed", "error", "skipped", "xfailed")


def interpreter(version: str) -> str | None:
    """The command of a Python of that minor version, if there is one that runs."""
    installed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for command in (shutil.which(f"python{version}"), *map(str, reversed(installed))):
        if command and subprocess.run([command, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            return command
    return None


def requirements(oldest: bool) -> list[str]:
    """What kinvert, its command and its tests need, "name==floor" for the oldest; diffusers needs a newer torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    hosts = [] if oldest else extras["diffusers"]
    found = []
    for text in (*project["dependencies"], *extras["cli"], *extras["dev"], *hosts):
        name, floor = re.fullmatch(r"([\w-]+)>=([\d.]+).*", text).groups() if ">=" in text else (text, "")
        if floor:  # linters and kinvert itself have none
            found.append(f"{name}=={floor}" if oldest else text)
    return found


def build(kind: str, version: str) -> Path | None:
    """The Python of the environment, made if it is not there; None where there is no such interpreter."""
    folder = ROOT / f".venv-{kind}-{version}"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if ready.exists():
        return python
    base = interpreter(version)
    if base is None:
        return None
    subprocess.run([base, "-m", "venv", "--clear", folder], check=True)
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, *requirements(kind == "oldest"), "-e", ROOT], check=True)
    ready.touch()
    return python


def versions(python: Path) -> dict[str, str]:
    """Of what is installed."""
    code = "import json, platform, sys; from importlib.metadata import distributions; "
    code += "have = {d.metadata['Name'].lower(): d.version for d in distributions()}; "
    code += "print(json.dumps({'python': platform.python_version()} | {n: have[n] for n in sys.argv[1:] if n in have}))"
    return dict(json.loads(subprocess.check_output([python, "-c", code, *SHOWN])))


def counts(output: str) -> Counter[str]:
    """From the last line of pytest."""
    last = next((line for line in reversed(output.splitlines()) if re.search(r"\d+ \w+.* in [\d.]+s", line)), "")
    return Counter({name: int(n) for n, name in re.findall(rf"(\d+) ({'|'.join(COUNTED)})", last)})


def run(python: Path, files: list[Path], limit: float) -> dict[str, Any]:
    """Run files of tests, one after the other."""
    total: Counter[str] = Counter()
    failures = []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for path in files:
        command = [python, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", path]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=limit, capture_output=True, text=True, check=False
            )
            found = counts(done.stdout)
            failures += re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
            if done.returncode not in (0, 1, 5):  # 5: all are for a GPU, or slow
                found["error"] += not found["error"]
        except subprocess.TimeoutExpired:
            found = Counter(error=1)
            failures.append(f"{path.relative_to(ROOT)}: no end after {limit:g} s")
        print(f"{path.name}: {', '.join(f'{n} {what}' for what, n in found.items())}", flush=True)
        total += found
    return {**{name: total[name] for name in COUNTED}, "failures": failures, "files": len(files)}


def main() -> None:
    """Build, run, keep the counts; the exit status is 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["oldest", "newest"])
    parser.add_argument("--python", action="append", choices=PYTHONS, help="repeatable; 3.11 for the oldest, else all")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds that a file may take")
    parser.add_argument("tests", nargs="*", type=Path, help="files; all by default, and only then the counts are kept")
    given = parser.parse_args()
    files = [path.resolve() for path in given.tests] or sorted((ROOT / "tests").rglob("test_*.py"))
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    failed = False
    for version in given.python or (PYTHONS[:1] if given.kind == "oldest" else PYTHONS):
        python = build(given.kind, version)
        if python is None:
            print(f"Python {version} is not here")
            continue
        row = {"kind": given.kind, "versions": versions(python), **run(python, files, given.limit)}
        print(json.dumps(row))
        failed |= bool(row["failed"] or row["error"])
        if not given.tests:
            place = given.kind, version
            rows = [r for r in rows if (r["kind"], r["versions"]["python"].rpartition(".")[0]) != place]
            rows = sorted([*rows, row], key=lambda r: (r["kind"] == "newest", r["versions"]["python"]))
            RESULT.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
