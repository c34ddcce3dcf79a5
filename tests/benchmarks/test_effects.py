"""The committed effects have the orders and shapes that theory predicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import kinvert as ki


def effect(name: str) -> list[dict[str, Any]]:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / f"effects-{name}.json"
    report = json.loads(path.read_text())
    assert report["command"] == f"python benchmarks/effects.py {name}" and report["shows"]
    return report["rows"]


def test_orders_are_those_of_theory() -> None:
    last = {row["sampler"]: row["order"] for row in effect("order") if row["steps"] == 160}
    for sampler in ("euler", "heun", "bdia", "o_belm", "leapfrog", "edict"):
        assert last[sampler] == pytest.approx(ki.sampler(sampler).ode_order, abs=0.15), sampler
    assert last["bdia (gamma=0.5)"] == pytest.approx(ki.rules.BDIA(gamma=0.5).ode_order, abs=0.15)
    rows = {(row["sampler"], row["steps"]): row for row in effect("edict")}
    for sampler in ("edict", "edict (alternate=True)"):
        assert rows[sampler, 1280]["order"] == pytest.approx(1.0, abs=0.05)
        ratio = rows[sampler, 1280]["distance_to_ode"] / rows["euler", 1280]["distance_to_ode"]
        assert ratio == pytest.approx(1.25, abs=0.1)


def test_effects_have_their_shapes() -> None:
    for steps in (20, 50):
        rows = [row for row in effect("low_sigma") if row["steps"] == steps]
        assert sum(row["defect"] for row in rows if row["sigma"] < 2) > 0.9 * sum(row["defect"] for row in rows)
    by = {(row["method"], row["steps"]): row["max_error"] for row in effect("fixed_point")}
    assert by["fixed point, 50 iterations", 5] > 1e-2 and by["fixed point, 50 iterations", 50] < 1e-7
    assert max(by["damped by 1/2, 200 iterations", n] for n in (5, 10, 20, 50)) < 1e-7
    by = {(row["method"], row["cfg"]): row for row in effect("cfg")}
    assert by["unsample", 7.5]["nmse_db"] > by["unsample", 3.0]["nmse_db"] > by["unsample", 1.0]["nmse_db"]
    assert by["fixed point, 50 iterations", 7.5]["converged"] < by["fixed point, 50 iterations", 1.0]["converged"]
    by = {(row["sampler"], row["method"], row["dtype"]): row["max_error"] for row in effect("precision")}
    assert by["o_belm", "reversible", "float64"] < 1e-12
    assert 1e-6 < by["o_belm", "reversible", "float32"] < 1e-4
    assert by["euler", "unsample", "float64"] == pytest.approx(by["euler", "unsample", "float32"], rel=1e-3)
    by = {(row["gamma"], row["dtype"]): row["max_error"] for row in effect("gamma")}
    assert by[1.0, "float64"] < 1e-12 and by[0.5, "float64"] > 1e-5 and by[0.5, "float32"] > 1.0
    for row in effect("auxiliary"):
        limit = 1e-12 if not row["options"] else 0.1  # gamma 0.5 amplifies rounding
        assert row["method"] == "reversible_alone" or row["max_error"] < limit
        assert row["method"] == "reversible" or row["steps"] > 10 or row["max_error"] > 1e-4
