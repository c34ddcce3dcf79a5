"""Tasks shared out to processes, on the cells of the benchmark."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from cells import cells

from kinvert import bench


def test_workers_stop_if_their_parent_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = types.SimpleNamespace(is_alive=lambda: False)
    monkeypatch.setattr("multiprocessing.parent_process", lambda: gone)
    assert bench.run(cells(), tmp_path) == [] and not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert len(bench.run(cells(), tmp_path)) == 1


def test_torchrun_ranks_share_the_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = cells(steps=[2, 3, 4, 5, 6])
    monkeypatch.setenv("WORLD_SIZE", "2")
    counts = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        counts.append(len(bench.run(grid, tmp_path / "ranks")))
        assert (tmp_path / "ranks" / "results.jsonl").exists() == (rank == "1")
    assert counts == [3, 5]
    with pytest.raises(ValueError, match="workers must be 1 under torchrun, which started 2 processes, got 2"):
        bench.run(grid, tmp_path / "ranks", workers=2)
    for rank, message in (("2", "are no place in a group"), ("first", "must be ints")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ValueError, match=message):
            bench.run(grid, tmp_path / "ranks")
    monkeypatch.undo()
    bench.run(grid, tmp_path / "one")
    assert (tmp_path / "one" / "results.jsonl").read_bytes() == (tmp_path / "ranks" / "results.jsonl").read_bytes()


def test_bad_workers_and_folders_are_refused(tmp_path: Path) -> None:
    for workers in (0, 1.5, True):
        with pytest.raises(ValueError, match="workers must be a positive int"):
            bench.run(cells(), tmp_path, workers=workers)  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to .*choose another folder"):
        bench.run(cells(), tmp_path / "file" / "below")


def test_threads_are_restored(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    bench.run(cells(), tmp_path)
    assert torch.get_num_threads() == before


class FakeExecutor:
    """submitit's, as far as it is used: it does the jobs at once."""

    parameters: ClassVar[dict[str, Any]] = {}

    def __init__(self, folder: Path, cluster: str | None) -> None:
        self.parameters |= {"folder": folder, "cluster": cluster}

    def update_parameters(self, **parameters: Any) -> None:
        self.parameters.update(parameters)

    def map_array(self, function: Any, *lists: Any) -> list[Any]:
        arguments = list(zip(*lists, strict=True))
        for each in arguments:
            function(*each)
        return [types.SimpleNamespace(job_id=f"7_{i}") for i in range(len(arguments))]


def test_slurm_jobs_do_all_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=FakeExecutor))
    grid = cells(steps=[2, 3, 4])
    jobs = bench.submit_cells(grid, tmp_path, workers=2, timeout_min=60)
    assert len(jobs) == 2 and FakeExecutor.parameters["timeout_min"] == 60
    assert len(bench.load(tmp_path)) == 3
    assert len(bench.run(grid, tmp_path)) == 3 and (tmp_path / "results.jsonl").exists()
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'kinvert\[slurm\]'"):
        bench.submit_cells(grid, tmp_path, workers=2)


@pytest.mark.slow
def test_real_torchrun(tmp_path: Path) -> None:

    grid = tmp_path / "grid.toml"
    grid.write_text("model = 'gaussian'\nsteps = [2, 3, 4, 5]\ncount = 2\n")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *launcher, "-m", "kinvert.cli", "bench", str(grid), "--out", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True)
    bench.run(bench.read_grid(grid)[0], tmp_path / "one")
    assert (tmp_path / "one" / "results.jsonl").read_bytes() == (tmp_path / "out" / "results.jsonl").read_bytes()
