"""`kill -9` at random moments: a benchmark and a folder of latents are resumed, and come out equal to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each attempt is a fork")
HERE = Path(__file__).parent


def torture(job: str, repeats: int, workers: int = 1, pair: str = "alone", seed: int = 0) -> dict[str, Any]:
    search = os.pathsep.join([str(HERE), str(HERE.parent)])
    found = subprocess.run(
        [sys.executable, str(HERE / "killing.py"), *map(str, (job, repeats, workers, pair, seed))],
        env=os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    counts: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    print(job, workers, pair, counts)
    assert counts["wrong"] == [] and counts["repeats"] == repeats
    return counts


@pytest.mark.parametrize("job", ["bench", "invert"])
def test_killed_and_resumed_it_is_equal_to_the_byte(job: str) -> None:
    torture(job, 2)


def test_two_processes_on_one_folder() -> None:
    """One of them is killed, again and again; the other one is not disturbed."""
    torture("bench", 1, pair="pair", seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["bench", "invert"])
@pytest.mark.parametrize(("repeats", "workers", "pair"), [(50, 1, "alone"), (50, 1, "pair"), (5, 2, "alone")])
def test_many_times(job: str, repeats: int, workers: int, pair: str) -> None:
    counts = torture(job, repeats, workers, pair, seed=2)
    assert counts["kills"] > repeats / 2
