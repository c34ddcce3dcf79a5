"""Imports run one way, and importing the package is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kinvert"

# Each module may import the ones above it (and those on its own line); nothing below. Unlisted files are an error.
LAYERS = [
    {
        "_discover",
        "_moved",
        "caches",
        "checks",
        "devices",
        "files",
        "jsontext",
        "pictures",
        "showing",
        "stops",
        "telling",
        "tensors",
        "torch_hooks",
        "torch_settings",
    },
    {"forms", "coefficients", "linalg"},
    {"rules"},
    {"plan", "plancard", "planfile", "records", "coordinates", "flowtimes"},
    {"levelbase", "levels", "timetables", "spacings"},
    {
        "moments",
        "schedules",
        "denoisers",
        "guidance",
        "analysis",
        "catalogue",
        "streams",
        "brownian",
        "noise",
        "fidelity",
        "detection",
        "attacks",
        "metrics",
    },
    {"engine", "program", "eager", "graphs", "adaptive"},
    {"packing", "parts", "ready"},
    {"sampling"},
    {"inversion"},
    {"roundtrip", "reference", "edits", "density"},
    {"optimal"},
    {"loading"},
    {"plot"},
    {"models"},
    {"resultfiles", "tasks", "workers", "jobs", "editing"},
    {"bench"},
    {"folder", "folderback"},
    {"adapters", "demo", "cli", "console", "__main__"},
]
BENCH = [
    {"problems", "questions"},
    {"methods"},
    {"grid", "answers"},
    {"measurement"},
    {"results"},
    {"runner"},
    {"report"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path.name}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    for name in imports(path):
        pieces = name.split(".")
        if pieces[0] == "kinvert" and len(pieces) > 1 and pieces[1] in RANK:
            assert RANK[pieces[1]] <= RANK[part(path)], f"{path.name} imports {name}"


def test_the_rooms_of_the_benchmark_are_entered_one_way() -> None:
    rank = {name: rank for rank, names in enumerate(BENCH) for name in names}
    for path in sorted((PACKAGE / "bench").rglob("*.py")):
        room = path.relative_to(PACKAGE / "bench").with_suffix("").parts[0]
        for name in imports(path) if room in rank else ():
            other = [*name.split("."), "", ""][2]
            if name.startswith("kinvert.bench.") and other in rank:
                assert rank[other] <= rank[room], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "rules").glob("*.py")), ids=lambda p: p.name)
def test_rules_import_no_tensors(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"torch", "numpy", "scipy"}


def test_plan_and_forms_import_no_tensors() -> None:
    for name in ("forms", "plan", "engine/kernels", "engine/operations", "analysis"):
        assert not {n.split(".")[0] for n in imports(PACKAGE / f"{name}.py")} & {"torch"}


def test_import_brings_no_extras() -> None:
    """Nor torch's compiler, which takes as long as the rest."""
    code = "import sys, kinvert; print(sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = ast.literal_eval(result.stdout)
    assert "torch._dynamo" not in modules
    loaded = {name.split(".")[0] for name in modules}
    assert not loaded & {"matplotlib", "click", "rich", "sklearn", "mlxtend", "pandas", "diffusers", "PIL", "scipy"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path: Path) -> None:
    """At most 430 lines, and 45 of code below a docstring."""
    text = path.read_text()
    assert text.count("\n") <= 430
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            code = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            lines = text.splitlines()[code[0].lineno - 1 : node.end_lineno]
            assert sum(bool(line.strip()) for line in lines) <= 45, node.name
