"""Models in flow time, and entry points with options, as problems of the benchmark."""

from __future__ import annotations

import math

import pytest
import torch
from flowmodels import IN_FLOW, LEVELS, X

import kinvert as ki
from kinvert import bench
from kinvert.bench.measurement import problem_of, setup_of
from kinvert.bench.problems import find_problem, is_built_in


def problem(count: int, seed: int, dtype: torch.dtype, size: str = "1", name: str = "") -> bench.Problem:
    """Images of a Gaussian, by a network in flow time."""
    assert name in ("", "a b&c")
    return bench.Problem(IN_FLOW, float(size) * X[:count].to(dtype), LEVELS)


HERE = f"{__name__}:problem"


@pytest.mark.parametrize("method", ["unsample", "invert"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_a_cell_of_a_flow_model_is_a_round_trip_in_flow_time(method: str, sampler: str) -> None:
    cell = bench.Cell(HERE, method=method, sampler=sampler, schedule="simple", steps=6, count=2)
    record, _ = bench.measurement.measure(cell)
    assert record["error"] is None
    levels = [t for t in ki.schedule("simple", 7, LEVELS).tolist() if t > 0]
    times = ki.levels.FlowTimes(levels)
    options = {"sigma_offset": 0.0} if method == "unsample" else {}
    trip = ki.round_trip(IN_FLOW, X[:2].double(), times, method=method, sampler=sampler, **options)  # type: ignore[arg-type]
    if method == "unsample":
        assert record["metrics"]["mse"] == pytest.approx(trip.mse.tolist(), rel=1e-9)
    else:
        assert max(record["metrics"]["max_error"]) < 1e-7
    assert (
        ki.denoisers.Guidance(
            setup_of(cell, problem_of(HERE, 2, 0, "float64")).denoiser, 1.0, {}, None, False
        ).coordinates
        == "flow"
    )


def test_an_entry_point_takes_options() -> None:
    made = find_problem(f"{HERE}?size=0.5&name=a%20b%26c")(2, 0, torch.float64)
    torch.testing.assert_close(made.images, 0.5 * X[:2].double())
    assert not is_built_in(f"{HERE}?size=0.5")
    assert math.isclose(float(find_problem(HERE)(1, 0, torch.float64).images.sum()), float(X[:1].sum()))
    assert bench.Cell(f"{HERE}?size=2").key != bench.Cell(HERE).key
