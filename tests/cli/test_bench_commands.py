"""`kinvert bench`: run, compare, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cells import cells, rewrite
from click.testing import CliRunner

from kinvert import bench
from kinvert.bench import METHODS
from kinvert.cli import main


def command(*args: Any) -> Any:
    return CliRunner().invoke(main, [str(a) for a in args])


def test_commands(tmp_path: Path) -> None:
    grid, a, b = tmp_path / "grid.toml", tmp_path / "a", tmp_path / "b"
    grid.write_text("model = 'gaussian'\nsteps = [2, 3]\ncount = 2\ncfg = [1.0, 2.0]\n")
    for args in (["bench", grid, "--out", a], ["bench", "run", grid, "--out", b]):
        result = command(*args)
        assert result.exit_code == 0, result.output
        assert "4 of 4 cells" in result.output and "2 of them with an error" in result.output
    same = command("bench", "compare", a, b)
    assert same.exit_code == 0 and "4 cells are equal" in same.output
    next(b.glob("*.json")).unlink()
    differs = command("bench", "compare", a, b)
    assert differs.exit_code == 1 and f"only in {a}: gaussian" in differs.output


def test_compare_prints_the_differences(tmp_path: Path) -> None:
    for name, steps in (("a", 2), ("b", 3)):
        bench.run(cells(steps=steps), tmp_path / name)
    (a,), (b,) = ((tmp_path / name).glob("*.json") for name in "ab")
    a.write_text(b.read_text())
    rewrite(a, lambda record: record.update(sampling_evaluations=[4, 3]))
    a.rename(tmp_path / "a" / b.name)
    output = command("bench", "compare", tmp_path / "a", tmp_path / "b").output
    assert "sampling_evaluations" in output and "[4, 3]" in output and "0 cells are equal" in output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bench", "--preset", "quik"], "did you mean 'quick'?"),
        (["bench", "grid.toml", "--preset", "quick"], "choose one"),
        (["bench", "nowhere.toml"], "cannot read the grid"),
        (["bench", "--import", "no_such_module"], "cannot import 'no_such_module'"),
        (["bench", "compare", "nowhere", "here"], "there are no results at 'nowhere'"),
        (["bench", "--slurm", "sixty"], "--slurm must be KEY=VALUE"),
    ],
)
def test_commands_refuse(args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = command(*args)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_dtype_and_device_stand_for_those_of_the_grid(tmp_path: Path) -> None:
    grid, out = tmp_path / "grid.toml", tmp_path / "out"
    grid.write_text("model = 'gaussian'\nsteps = 2\ncount = 2\ndtype = ['float64', 'float32']\n")
    assert "1 of 1 cells" in command("bench", grid, "--dtype", "float32", "--device", "cpu", "--out", out).output
    assert [record["cell"]["dtype"] for record in bench.load(out)] == ["float32"]
    assert "2 of 2 cells" in command("bench", grid, "--out", out).output
    refused = command("bench", grid, "--device", "abacus", "--out", out)
    assert refused.exit_code == 2 and "device 'abacus' cannot be used here" in " ".join(refused.stderr.split())


def test_unfinished_runs_end_with_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "unsample", lambda job, x: 1 / 0)
    grid = tmp_path / "grid.toml"
    grid.write_text("model = 'gaussian'\nsteps = 2\n")
    result = command("bench", grid, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "ZeroDivisionError" in result.stderr and "Traceback" not in result.stderr


OWN = """
import torch
import kinvert as ki
from kinvert.bench import Problem

def small(count, seed, dtype):
    images = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype) - 0.5
    return Problem(ki.denoisers.Gaussian(0.0, 0.5), images, ki.levels.edm(0.1, 10.0))
"""


def test_a_grid_is_measured_on_a_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model cannot answer is a record that says so."""
    (tmp_path / "own_small.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    grid = tmp_path / "grid.toml"
    questions = ["reconstruction", "recovery_jpeg", "edit"]
    grid.write_text(f"model = ['mixture', 'digits']\nquestion = {questions}\nsteps = [2, 3]\ncount = 40\n")
    out = tmp_path / "out"
    args = ("bench", grid, "--model", "own_small:small", "--count", 2, "--where", "steps=2", "--out", out)
    result = command(*args)
    assert result.exit_code == 0 and "3 of 3 cells" in result.output and "1 of them with an error" in result.output
    records = bench.load(out)
    assert {(r["cell"]["model"], r["cell"]["count"], r["cell"]["steps"]) for r in records} == {
        ("own_small:small", 2, 2)
    }
    (error,) = (record["error"] for record in records if record["error"])
    assert "this problem has none; give Problem(..., target=..., truth=...)" in error


def test_a_preset_takes_as_many_images_as_a_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bench.Cell] = []
    monkeypatch.setattr(bench, "run", lambda cells, *_, **__: seen.extend(cells) or [])
    where = ("--where", "question=recovery_jpeg,edit", "--where", "method=unsample")
    assert command("bench", "--preset", "inversion", "--model", "emoji", *where, "--out", tmp_path).exit_code == 0
    assert {cell.model for cell in seen} == {"emoji"} and {cell.count for cell in seen} == {40, 24}
    assert {cell.question for cell in seen} == {"recovery_jpeg", "edit"}
    result = command("bench", "--preset", "inversion", "--model", "emoji", "--prompt", "a cat", "--out", tmp_path)
    assert result.exit_code == 2 and "--prompt is for a pipeline in a directory" in " ".join(result.stderr.split())
