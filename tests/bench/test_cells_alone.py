"""A cell does not depend on the cells before it, whatever a model sets for the whole process."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kinvert import bench, torch_settings
from kinvert.bench import Cell, measurement
from kinvert.jsontext import canonical_json
from kinvert.torch_settings import read_settings, restored_settings

MODULE = """
import random
import numpy as np
import torch
import kinvert as ki
from kinvert.bench import Problem

{at_import}

def problem(denoise):
    def make(count, seed, dtype):
        return Problem(denoise, torch.ones(count, 3, dtype=dtype), ki.levels.edm(0.1, 10.0))
    return make

def denoise(x, sigma):
    # what the settings are is in the numbers, and so are the random numbers of all three kinds
    shown = torch.get_num_threads() + 10 * (torch.get_float32_matmul_precision() != "highest")
    return x * (1 - 1 / (shown + 1)) / (1 + sigma.reshape(-1, 1)) + 1e-3 * drawn

drawn = 0.0
calm = problem(denoise)

def loud(count, seed, dtype):
    torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    return calm(count, seed, dtype)

def drawing(count, seed, dtype):
    offset = random.random() + np.random.rand() + torch.rand(()).item()
    return problem(lambda x, sigma: denoise(x, sigma) + 1e-3 * offset)(count, seed, dtype)

def changing(x, sigma):
    torch.set_float32_matmul_precision("medium")
    return denoise(x, sigma)

rude = problem(changing)
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    with restored_settings():
        yield tmp_path
    for name in ("plain", "setting"):
        sys.modules.pop(name, None)


def forget(*modules: str) -> None:
    """Go on as a new process would."""
    for cached in (measurement.problem_of, torch_settings.tell_once, measurement._solve_up, measurement._exact_inverse):
        cached.cache_clear()
    for name in modules:
        sys.modules.pop(name, None)


def measured(model: str) -> str:
    return canonical_json(bench.measure(Cell(model, steps=2, count=1, method="unsample", dtype="float32"))[0])


@pytest.mark.filterwarnings("ignore:.*settings of torch:RuntimeWarning")
def test_any_order_of_cells_gives_the_same_records(models: Path) -> None:
    """Models that set things when they are imported or built, one that draws when it is built, and a calm one."""
    (models / "plain.py").write_text(MODULE.format(at_import=""))
    (models / "setting.py").write_text(MODULE.format(at_import="torch.set_float32_matmul_precision('medium')"))
    names = "plain:calm", "plain:loud", "plain:drawing", "setting:calm"
    found: dict[str, list[str]] = {name: [] for name in names}
    for order in itertools.permutations(names):
        forget("plain", "setting")
        random.random(), np.random.rand(), torch.rand(3)
        for name in order:
            found[name].append(measured(name))
    for records in found.values():
        assert '"error":null' in records[0] and all(record == records[0] for record in records)


@pytest.mark.filterwarnings("ignore:.*settings of torch:RuntimeWarning")
def test_nothing_is_left_behind(models: Path) -> None:
    (models / "plain.py").write_text(MODULE.format(at_import="torch.set_default_dtype(torch.float64)"))
    forget("plain")
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(3)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = read_settings()
    for name in ("plain:loud", "plain:rude", "plain:drawing"):
        measured(name)
    assert read_settings() == before
    assert (random.random(), np.random.rand()) == expected[:2] and torch.equal(torch.rand(3), expected[2])


def test_settings_that_are_dropped_are_told_once(models: Path) -> None:
    (models / "plain.py").write_text(MODULE.format(at_import=""))
    forget("plain")
    with pytest.warns(
        RuntimeWarning, match=r"plain:loud changed .*precision: highest -> medium.*; set them in the denoiser"
    ):
        measured("plain:loud")
    torch.set_default_dtype(torch.float64)
    with pytest.warns(
        RuntimeWarning, match=r"default settings of torch, not with those here \(.*float32 -> torch.float64\)"
    ):
        measured("plain:calm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured("plain:calm"), measured("plain:loud")


def test_a_model_that_changes_settings_while_it_computes_is_refused(models: Path) -> None:
    (models / "plain.py").write_text(MODULE.format(at_import=""))
    forget("plain")
    wanted = measured("plain:calm")
    error = measured("plain:rude")
    assert "while it computed (torch.set_float32_matmul_precision: highest -> medium" in error and "set them" in error
    forget()
    assert measured("plain:calm") == wanted


@pytest.mark.slow
def test_the_number_of_workers_changes_no_record(models: Path) -> None:
    (models / "plain.py").write_text(MODULE.format(at_import="torch.set_float32_matmul_precision('medium')"))
    names = ["plain:calm", "plain:loud", "plain:drawing", "gaussian"]
    code = "import sys, json; sys.path.insert(0, sys.argv[1])\nfrom kinvert import bench\n" + (
        "if __name__ == '__main__':\n"
        "    cells = [bench.Cell(m, steps=2, count=1, method='unsample') for m in sys.argv[4:]]\n"
        "    bench.run(cells, sys.argv[2], workers=int(sys.argv[3]), threads=1)\n"
    )
    (models / "go.py").write_text(code)
    results = []
    for workers in (1, 2):
        folder = models / str(workers)
        command = [sys.executable, "-W", "ignore", str(models / "go.py"), str(models), str(folder), str(workers)]
        subprocess.run([*command, *names], check=True, cwd=models)
        results.append((folder / "results.jsonl").read_text())
    assert results[0] == results[1] and results[0].count("\n") == len(names)
