"""Grids that are run: results do not depend on who computed them, nor on how often a process was killed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import cells
from safetensors.torch import load_file

from kinvert import bench
from kinvert.bench import METHODS, PROBLEMS, Cell
from kinvert.bench.questions import QUESTIONS


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's own, `own`, that worker processes can import."""
    path = tmp_path / "modules" / "own.py"
    path.parent.mkdir()
    monkeypatch.syspath_prepend(path.parent)
    yield path
    sys.modules.pop("own", None)


DEADLY = """
import os, signal
from dataclasses import replace
from pathlib import Path
from kinvert.bench.problems import PROBLEMS

ALIVE = Path(__file__).parent / "alive"

def deadly(count, seed, dtype):
    if seed == 2 and not ALIVE.exists():
        ALIVE.touch()  # only one worker has seed 2
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(PROBLEMS["gaussian"](count, seed, dtype), exact=False)
"""


def test_results_do_not_depend_on_workers_or_on_being_killed(tmp_path: Path, module: Path) -> None:
    """The point of it all: one process, and two of which one is killed and the run resumed, leave equal files."""
    module.write_text(DEADLY)
    grid = cells(model="own:deadly", seed=[0, 1, 2, 3], steps=3, method=["unsample", "invert"], dtype=["float32"])
    with pytest.raises(bench.UnfinishedError, match=r"(?s)^1 of 8 are not done; .* seed 2 .*killed by SIGKILL"):
        bench.run(grid, tmp_path / "two", workers=2, threads=1)
    done = sorted(path.name for path in (tmp_path / "two").glob("*.json"))
    assert len(done) == 7 and not (tmp_path / "two" / "results.jsonl").exists()
    times = {name: (tmp_path / "two" / name).stat().st_mtime_ns for name in done}
    bench.run(grid, tmp_path / "two", workers=2, threads=1)
    assert times == {name: (tmp_path / "two" / name).stat().st_mtime_ns for name in done}
    bench.run(grid, tmp_path / "one", threads=1)
    one, two = ((tmp_path / name / "results.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two and one.count(b"\n") == 8
    assert bench.compare(tmp_path / "one", tmp_path / "two").same


def test_a_finished_cell_is_never_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setitem(METHODS, "counted", lambda setup, x: calls.append(len(x)) or METHODS["unsample"](setup, x))
    grid = cells(steps=[2, 3], method="counted")
    first = bench.run(grid, tmp_path)
    assert calls == [2, 2]
    assert bench.run(grid, tmp_path) == first and calls == [2, 2]


def test_a_cell_that_breaks_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setup: Any, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(METHODS, "broken", broken)
    grid = cells(method=["broken", "unsample"])
    with pytest.raises(bench.UnfinishedError, match=r"(?s)1 of 2 are not done.*broken euler.*RuntimeError: out of mem"):
        bench.run(grid, tmp_path)
    assert [record["cell"]["method"] for record in bench.load(tmp_path)] == ["unsample"]
    monkeypatch.setitem(METHODS, "broken", METHODS["unsample"])
    assert len(bench.run(grid, tmp_path)) == 2


def test_cells_of_every_question_are_resumed(tmp_path: Path) -> None:
    """A run that lost some results measures them again, and no others; the files are equal."""
    grid = cells(model="mixture", question=list(QUESTIONS)[2:], steps=1, dtype="float32", count=2)
    bench.run(grid, tmp_path / "whole")
    bench.run(grid[::2], tmp_path / "parts")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("?" * 16 + ".json")}
    assert len(times) == len(grid[::2])
    bench.run(grid, tmp_path / "parts")
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    whole, parts = ((tmp_path / name / "results.jsonl").read_bytes() for name in ("whole", "parts"))
    assert whole == parts and whole.count(b"\n") == len(grid)


OWN = """
import torch
import kinvert as ki
from kinvert.bench import METHODS, PROBLEMS, Problem

def model(count, seed, dtype):
    images = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return Problem(ki.denoisers.Gaussian(0.0, 1.0), images, ki.levels.edm(0.1, 10.0))

PROBLEMS["registered"] = model
METHODS["forward"] = lambda setup, x: x + setup.sigmas[0] * torch.randn(
    x.shape, generator=torch.Generator().manual_seed(setup.seed), dtype=x.dtype)
"""


def test_user_models_and_methods_in_worker_processes(tmp_path: Path, module: Path) -> None:
    module.write_text(OWN)
    grid = tmp_path / "grid.toml"
    grid.write_text(
        "imports = ['own']\nmodel = ['own:model', 'registered']\nmethod = ['forward', 'unsample']\n"
        "steps = 4\ncount = 2\n"
    )
    try:
        found, imports = bench.read_grid(grid)
        records = bench.run(found, tmp_path / "out", workers=2, imports=imports)
        assert len(records) == 4 and not any(record["error"] for record in records)
        by = {(r["cell"]["model"], r["cell"]["method"]): r for r in records}
        assert by["own:model", "unsample"]["metrics"] == by["registered", "unsample"]["metrics"]
        assert by["own:model", "forward"]["inversion_evaluations"] == [0, 0]
    finally:
        METHODS.pop("forward", None)
        PROBLEMS.pop("registered", None)


def test_run_keeps_images(tmp_path: Path) -> None:
    (record,) = bench.run([Cell("digits", steps=2, count=2, dtype="float32")], tmp_path)
    arrays = load_file(tmp_path / f"{record['key']}.safetensors")
    error = (arrays["restored"] - arrays["image"]).double().square().mean((1, 2, 3))
    assert record["metrics"]["mse"] == pytest.approx(error.tolist(), rel=1e-5)
