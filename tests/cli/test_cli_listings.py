"""The commands that list: samplers, schedules, plans."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
from commandline import fails, python, succeeds

import kinvert as ki
from kinvert import analysis
from kinvert.forms import Form
from kinvert.rules import SamplerEntry, StepBuilder


def test_samplers_table_is_whole() -> None:
    text = succeeds("samplers")
    assert "…" not in text and "Tableau" not in text
    for name in ki.SAMPLERS:
        assert any(line.split()[:1] == [name] for line in text.splitlines()), name
    for meaning in analysis.INVERTIBILITY.values():
        assert meaning in text


def test_samplers_json() -> None:
    rows = {row["name"]: row for row in json.loads(succeeds("samplers", "--json"))}
    assert list(rows) == list(ki.SAMPLERS)
    assert rows["heun"]["plan"]["evaluations_per_step"] == 2 and rows["heun"]["options"]["s_tmax"] is None
    assert rows["dpmpp_2m"]["plan"]["multistep"] and rows["dpmpp_2m"]["plan"]["invertibility"] == "two-point"
    assert rows["euler_ancestral"]["plan"]["stochastic"] and not rows["euler_ancestral"]["plan"]["unsamples"]
    assert rows["midpoint"]["options"] == {"tableau": "midpoint"}


def test_samplers_without_a_plan_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wanderer(ki.Rule):
        """It goes where it likes."""

        name: ClassVar[str] = "wanderer"
        ode_order: ClassVar[int] = 1

        def step(self, s: StepBuilder) -> Form:
            raise ValueError("no plan")

    monkeypatch.setitem(ki.SAMPLERS, "wanderer", SamplerEntry("wanderer", Wanderer))
    row = next(line for line in succeeds("samplers").splitlines() if "wanderer" in line)
    assert row.split() == ["wanderer", "1", "no", "plan"]
    listed = {"name": "wanderer", "plan": None, "options": {}, "summary": "It goes where it likes."}
    assert json.loads(succeeds("samplers", "--json"))[-1] == listed


@pytest.mark.parametrize("model", ["sd15", "sdxl", "svd", "edm", "sd3", "flux"])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_schedules_of_every_model(model: str, steps: int) -> None:
    rows = json.loads(succeeds("schedules", "--steps", str(steps), "--model", model, "--json"))
    assert [row["name"] for row in rows] == list(ki.SCHEDULES)
    assert all(row["summary"] for row in rows)
    text = succeeds("schedules", "--steps", str(steps), "--model", model)
    assert "…" not in text and all(name in text for name in ki.SCHEDULES)


def test_schedules_json_has_the_noise_levels() -> None:
    rows = {row["name"]: row for row in json.loads(succeeds("schedules", "--json"))}
    expected = ki.schedule("karras", 10, ki.levels.stable_diffusion()).tolist()
    assert rows["karras"]["sigmas"] == expected
    assert rows["karras"]["needs"] == "bounds" and rows["karras"]["options"] == {"rho": 7.0}


def test_schedules_refuse() -> None:
    assert "steps must be at least 1, got 0" in fails("schedules", "--steps", "0")
    said = fails("schedules", "--steps", "100000000")
    assert "got 100000000; the levels alone would take 0.8 GB" in said


def test_plan_prints_the_plan() -> None:
    sigmas = ki.schedule("karras", 3, ki.levels.stable_diffusion())
    args = ["plan", "euler", "--steps", "3"]
    assert succeeds(*args) == f"{ki.compile_plan('euler', sigmas)}\n"
    assert "sigma 0.0001 ->" in succeeds(*args, "--rising")
    assert "s_churn=2" in succeeds(*args, "--option", "s_churn=2")
    assert "solver_type='heun'" in succeeds("plan", "dpmpp_2m_sde", "--option", "solver_type=heun")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["eulr"], "did you mean 'euler'?"),
        (["euler", "--option", "s_chrn=1"], "did you mean 's_churn'?"),
        (["euler", "--option", "s_churn"], "--option must be KEY=VALUE"),
        (["euler", "--model", "flux"], "flux has flow times"),
        (["euler", "--steps", "10001"], "--steps must be at most 10000 for a plan that is read, got 10001"),
        (["dpmpp_2m_sde", "--rising"], "negative variance"),
        ([], "Missing argument 'SAMPLER'"),
    ],
)
def test_plan_refuses(args: list[str], message: str) -> None:
    assert message in fails("plan", *args)


def test_listings_start_without_matplotlib() -> None:
    code = """
import sys
from kinvert.cli import main
for args in (["--help"], ["samplers"], ["schedules"], ["plan", "euler"]):
    main(args, standalone_mode=False)
    assert not {"matplotlib", "PIL"} & set(sys.modules), args
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
