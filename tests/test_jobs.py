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
from writers import killed_while_it_writes, writing

from kinvert import bench
from kinvert.bench import METHODS, Setup


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


def test_a_bar_is_drawn_if_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bench.run(cells(), tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    bench.run(cells(), tmp_path / "shown", progress=True)
    assert "1/1 [" in capsys.readouterr().err


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


FULL = """
from dataclasses import replace
from kinvert.bench.problems import PROBLEMS

def full(count, seed, dtype):
    if seed >= 2:
        with open("/dev/full", "w") as file:
            file.write("no room")
    return replace(PROBLEMS["gaussian"](count, seed, dtype), exact=False)
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_ends_the_run_at_once_and_says_what_is_kept(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of twelve cells the first two are done, and nothing after the third is tried."""
    (tmp_path / "devfull.py").write_text(FULL)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(bench.UnfinishedError) as stopped:
            bench.run(cells(model="devfull:full", seed=list(range(12))), tmp_path / "out", workers=workers, threads=1)
    finally:
        sys.modules.pop("devfull", None)
    assert str(stopped.value) == (
        f"no room is left on the disk: 2 of 12 cells are kept in {tmp_path / 'out'}; the same command goes on once "
        "there is some ([Errno 28] No space left on device)"
    )
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_disk_that_is_full_when_results_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.run(cells(), tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(bench.UnfinishedError, match="no room is left on the disk: 1 of 1 cells are kept in"):
        bench.run(cells(), tmp_path)


def test_what_killed_processes_left_is_taken_away(tmp_path: Path) -> None:
    killed_while_it_writes(tmp_path / "result.json")
    with writing(tmp_path / "other.json"):  # a process that lives
        bench.run(cells(), tmp_path)
        assert len(list(tmp_path.glob(".*"))) == 1
    bench.run(cells(), tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_cell_that_another_run_has_done_meanwhile_is_not_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first cell lets a second run do all, as in another process; its damage is noticed too."""
    calls: list[int] = []

    def slow(setup: Setup, x: torch.Tensor) -> Any:
        calls.append(setup.seed)
        if len(calls) == 1:
            bench.run(grid, tmp_path)
            (tmp_path / f"{grid[2].key}.json").write_text("{")
        return METHODS["unsample"](setup, x)

    monkeypatch.setitem(METHODS, "slow", slow)
    grid = cells(method="slow", seed=[0, 1, 2])
    with pytest.warns(RuntimeWarning, match="1 damaged result is set aside"):
        assert len(bench.run(grid, tmp_path)) == 3
    assert calls == [0, 0, 1, 2, 2]


@pytest.mark.slow
def test_real_torchrun(tmp_path: Path) -> None:

    grid = tmp_path / "grid.toml"
    grid.write_text("model = 'gaussian'\nsteps = [2, 3, 4, 5]\ncount = 2\n")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *launcher, "-m", "kinvert.cli", "bench", str(grid), "--out", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True)
    bench.run(bench.read_grid(grid)[0], tmp_path / "one")
    assert (tmp_path / "one" / "results.jsonl").read_bytes() == (tmp_path / "out" / "results.jsonl").read_bytes()
