"""Workers that die: the task, the signal and the lines of code are told, and the others go on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cells import cells

from kinvert import bench

DEADLY = """
import os, signal, sys
from dataclasses import replace
from kinvert.bench.problems import PROBLEMS

def deadly(count, seed, dtype):
    if seed == 1:
        sys.exit("I had enough")
    if seed == 2:
        os._exit(3)
    if seed == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if seed == 4:
        return 1 / 0
    if seed == 5:
        os._exit(0)
    return replace(PROBLEMS["gaussian"](count, seed, dtype), exact=False)

def always(count, seed, dtype):
    os._exit(4)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "modules" / "deadly.py"
    path.parent.mkdir()
    path.write_text(DEADLY)
    monkeypatch.syspath_prepend(path.parent)
    yield path
    sys.modules.pop("deadly", None)


def complaint(folder: Path, seeds: list[int], model: str = "deadly:deadly", **how: int) -> str:
    with pytest.raises(bench.UnfinishedError) as error:
        bench.run(cells(model=model, seed=seeds), folder, **how)
    return str(error.value)


def test_a_task_that_ends_its_worker_is_told_and_costs_itself_alone(tmp_path: Path, module: Path) -> None:
    said = complaint(tmp_path / "out", [10, 2, 11, 3, 12, 13, 14, 5, 15, 4, 16, 1], workers=2, threads=1)
    assert len(list((tmp_path / "out").glob("*.json"))) == 7
    assert said.startswith("5 of 12 are not done")
    for seed, why in (
        (2, "it ended its process, with exit status 3"),
        (3, "its process was killed by SIGSEGV"),
        (5, "it ended its process, with exit status 0"),
        (4, "ZeroDivisionError: division by zero"),
        (1, "SystemExit: I had enough"),
    ):
        assert f"seed {seed} count 2: {why}" in said
    assert "Fatal Python error: Segmentation fault" in said and "deadly.py" in said.partition("where it happened")[2]


@pytest.mark.slow
def test_workers_that_always_die_are_not_started_for_ever(tmp_path: Path, module: Path) -> None:
    said = complaint(tmp_path, list(range(14)), "deadly:always", workers=2, threads=1)
    assert said.startswith("14 of 14 are not done") and "with exit status 4" in said
    assert "not tried, because 3 processes died at the tasks before it" in said


def test_system_exit_of_a_model_is_a_failure_like_any_other(tmp_path: Path, module: Path) -> None:
    said = complaint(tmp_path, [0, 1, 4], workers=1, threads=1)
    assert said.startswith("2 of 3 are not done") and len(list(tmp_path.glob("*.json"))) == 1
    assert "seed 1 count 2: SystemExit: I had enough" in said and "seed 4 count 2: ZeroDivisionError" in said
    assert f'{module}:8 in deadly: sys.exit("I had enough")' in said
