"""How many threads compute what: one for the models that come with kinvert, the user's for the user's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import kinvert as ki
from kinvert import bench, demo
from kinvert.bench import Cell
from kinvert.cli import main
from kinvert.folder import invert_folder

OWN = """
import torch
import kinvert as ki
from kinvert.bench import Problem

def model(count, seed, dtype):
    def denoise(x, sigma):  # 1 - 1 / threads at sigma 0: what a record says is what was computed with
        return x * (1 - 1 / torch.get_num_threads()) / (1 + sigma.reshape(-1, 1))

    return Problem(denoise, torch.ones(count, 3, dtype=dtype), ki.levels.edm(0.1, 10.0))
"""
OURS, MINE = "gaussian", "own:model"


@pytest.fixture(autouse=True)
def six_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Six threads in torch, and a module of the user's own that worker processes can import."""
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield
    assert torch.get_num_threads() == 6  # everything leaves them as they were
    torch.set_num_threads(before)
    sys.modules.pop("own", None)


def cells(*models: str, steps: tuple[int, ...] = (2,)) -> list[Cell]:
    return [Cell(model, steps=n, count=1, method="unsample") for model in models for n in steps]


def said(records: list[dict[str, Any]]) -> dict[str, set[str]]:
    """What the records of each model say, made sure by the numbers."""
    found: dict[str, set[str]] = {}
    for record in records:
        model, threads = record["cell"]["model"], record["versions"]["threads"]
        found.setdefault(model, set()).add(threads)
        if model == MINE:
            assert record["latent"]["histogram"] == histogram(record["cell"]["steps"], int(threads))
    return found


def histogram(steps: int, threads: int) -> dict[str, Any]:
    """As the library computes it with that many threads."""
    sigmas = ki.schedules.karras(steps + 1, 0.1, 10.0)[:-1]
    image = torch.ones(1, 3, dtype=torch.float64)
    up = ki.unsample(
        lambda x, sigma: x * (1 - 1 / threads) / (1 + sigma.reshape(-1, 1)), image, sigmas, sigma_offset=0.0
    )
    edges = np.linspace(-5.0, 5.0, 51)
    counts, _ = np.histogram((up / sigmas[0]).clamp(-5, 5).numpy(), edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


@pytest.mark.parametrize(("workers", "threads", "mine"), [(1, None, "6"), (1, 5, "5"), (3, None, "2")])
def test_threads_of_each_model_and_worker(workers: int, threads: int | None, mine: str, tmp_path: Path) -> None:
    """The user's model with torch's, shared among the workers (of which two find work), or as many as were asked for."""
    grid = cells(OURS, MINE) if workers > 1 else cells(OURS, MINE, steps=(2, 3))
    assert said(bench.run(grid, tmp_path / "out", workers=workers, threads=threads)) == {OURS: {"1"}, MINE: {mine}}


def test_measure_and_demo_pin_threads_of_built_in_models(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.measure(cells(OURS)[0])[0]["versions"]["threads"] == "1"
    assert bench.measure(cells(MINE)[0])[0]["versions"]["threads"] == "6"
    seen: list[int] = []
    load = demo.models.load
    monkeypatch.setattr(demo.models, "load", lambda *a, **k: seen.append(torch.get_num_threads()) or load(*a, **k))
    demo.run(demo.Settings(model="digits", samplers=("euler",), steps=2, count=1, invert=False))
    assert seen == [1]


def test_slurm_jobs_keep_the_threads_of_their_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Executor:
        def __init__(self, **given: Any) -> None: ...

        def update_parameters(self, **given: Any) -> None: ...

        def map_array(self, function: Any, *lists: Any) -> list[Any]:
            return [function(*given) for given in zip(*lists, strict=True)]

    monkeypatch.setitem(sys.modules, "submitit", type("submitit", (), {"AutoExecutor": Executor}))
    for threads, mine in ((None, "6"), (4, "4")):
        folder = tmp_path / mine
        folder.mkdir()  # as submitit does
        bench.submit_cells(cells(OURS, MINE), folder, workers=2, threads=threads)
        assert said(bench.run(cells(OURS, MINE), folder)) == {OURS: {"1"}, MINE: {mine}}


def test_manifest_has_the_number_of_threads(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", np.ones((2, 3)))
    np.save(tmp_path / "in" / "b.npy", np.ones((2, 16)))
    for model, file, args, want in ((MINE, "a", ["--threads", "2"], 2), (MINE, "a", [], 6), (OURS, "b", [], 1)):
        source, out = tmp_path / f"only-{file}", tmp_path / f"{file}{want}"
        source.mkdir(exist_ok=True)
        (source / f"{file}.npy").write_bytes((tmp_path / "in" / f"{file}.npy").read_bytes())
        options = ["--model", model, "--steps", "2", "--method", "unsample", *args]
        result = CliRunner().invoke(main, ["invert", str(source), "--out", str(out), *options])
        assert result.exit_code == 0, result.output
        rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
        assert [row["threads"] for row in rows] == [want, want]


def test_unused_threads_are_refused(tmp_path: Path) -> None:
    message = "threads is for models of your own, got 2 for gaussian; .* computed with one thread.*: leave threads out"
    with pytest.raises(ValueError, match=message):
        bench.run(cells(OURS), tmp_path / "out", threads=2)
    with pytest.raises(ValueError, match=message):
        bench.submit_cells(cells(OURS), tmp_path / "out", workers=1, threads=2)
    with pytest.raises(ValueError, match=message):
        invert_folder(tmp_path / "modules", tmp_path / "out", Cell(OURS), threads=2)
    result = CliRunner().invoke(main, ["bench", "--threads", "2", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "threads is for models of your own" in " ".join(result.stderr.split())
    for threads in (0, True, 1.5):
        with pytest.raises(ValueError, match="threads must be a positive int, or None to leave torch's"):
            bench.run(cells(MINE), tmp_path / "out", threads=threads)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
