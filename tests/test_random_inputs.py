"""Random schedules, grids, files and command lines: an answer that keeps its promise, or a sentence; no traceback.

`make fuzz` runs these tests for as long as you like, with other seeds.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from commandline import run
from hypothesis import given
from hypothesis import strategies as st
from inverting import MIXTURE
from randomruns import few, rules

import kinvert as ki
from kinvert import bench
from kinvert.bench.grid import Cell
from kinvert.cli import main

LEVELS = {
    "sd15": ki.levels.stable_diffusion(),
    "edm": ki.levels.edm(),
    "narrow edm": ki.levels.edm(0.01, 50.0),
    "sd3": ki.levels.flow(3.0),
    "flux": ki.levels.flux(),
}
ODD = st.one_of(
    st.sampled_from(
        [0, 1, -1, 2, 10**30, 0.0, -0.0, 1e300, math.inf, -math.inf, math.nan, True, None, "", "nan", [], {}]
    ),
    st.integers(-5, 60),
    st.floats(-2, 60),
    st.text(max_size=8),
)


def is_a_sentence(text: str) -> bool:
    """Words that say something, with no traceback and no default of Python's."""
    return len(text.split()) >= 3 and "Traceback" not in text and "object at 0x" not in text


# -- schedules ---------------------------------------------------------------------------------------------------------
@few(60)
@given(st.data())
def test_any_schedule_falls_or_says_why_not(data: st.DataObject) -> None:
    name, levels = data.draw(st.sampled_from(list(ki.SCHEDULES))), LEVELS[data.draw(st.sampled_from(list(LEVELS)))]
    steps = data.draw(st.one_of(st.integers(1, 40), ODD))
    known = list(ki.SCHEDULES[name].options)
    options = {key: data.draw(ODD) for key in data.draw(st.sets(st.sampled_from([*known, "rho", "mu"]), max_size=2))}
    try:
        sigmas = ki.schedule(name, steps, levels, **options)
    except (ValueError, TypeError) as error:
        assert is_a_sentence(str(error))
        return
    values = sigmas.double().tolist()
    assert sigmas.dtype == torch.float64 and all(map(math.isfinite, values))
    pairs, law = (
        list(itertools.pairwise(values)),
        name == "laplace",
    )  # as many levels as steps, and it may repeat bounds
    assert all(a >= b if law else a > b for a, b in pairs) and values[-1] >= 0 and len(values) >= 2 - law
    assert len(values) <= (2 * steps if name == "ddim_uniform" else steps) + 2  # it strides, and rounds its stride down
    again = ki.schedule(name, steps, levels, **options)
    assert torch.equal(torch.as_tensor(again), torch.as_tensor(sigmas))


@few(40)
@given(st.sampled_from(list(LEVELS)), st.floats(1e-3, 0.999), st.floats(1e-3, 0.999))
def test_levels_are_monotone_and_inverse(name: str, p: float, q: float) -> None:
    levels = LEVELS[name]
    low, high = sorted((levels.percent_to_sigma(1 - p), levels.percent_to_sigma(1 - q)))
    assert levels.sigma_min * (1 - 1e-9) <= low <= high <= levels.sigma_max * (1 + 1e-9)
    t = [float(levels.timestep(torch.tensor(s, dtype=torch.float64), quantize=False)) for s in (low, high)]
    assert t[0] <= t[1]
    if getattr(levels, "shift", 1.0) == 1.0:  # else the network is told the shifted time
        assert float(levels.sigma(torch.tensor(t[1], dtype=torch.float64))) == pytest.approx(high, rel=1e-6)


# -- grids -------------------------------------------------------------------------------------------------------------
GOOD: dict[str, Any] = {
    "model": ["gaussian", "mixture"],
    "question": ["reconstruction", "recovery"],
    "method": ["unsample", "invert"],
    "sampler": ["euler", "heun", {"name": "bdia", "gamma": 0.5}],
    "schedule": ["karras", "exponential"],
    "steps": [3, 20],
    "cfg": [1.0, 2.5],
    "dtype": ["float64", "float32"],
    "seed": [0, 5],
    "count": [1, 8],
    "device": ["cpu"],
}


def toml(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps("" if value is None else value)


@st.composite
def grids(draw: st.DrawFn) -> str:
    """A grid file: good values, odd values, odd keys, or no TOML at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.text(max_size=60))
    nested = st.recursive(
        ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    )
    table: dict[str, Any] = {}
    for key in draw(
        st.lists(st.sampled_from([*GOOD, "models", "imports", "grid", "options"]), max_size=5, unique=True)
    ):
        good = st.sampled_from(GOOD[key]) if key in GOOD else nested
        table[key] = draw(st.one_of(good, good, st.lists(good, max_size=3), nested))
    lines = [f"{key} = {toml(value)}" for key, value in table.items()]
    return "\n".join(
        [draw(st.sampled_from(["", "", "[[grid]]", "[grid]"])), 'model = "gaussian"' * ("model" not in table), *lines]
    )


@few(60)
@given(grids())
def test_any_grid_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "random-grid.toml"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        cells, _ = bench.read_grid(path)
    except (ValueError, TypeError) as error:
        assert str(path) in str(error) and is_a_sentence(str(error))
        result = run("bench", path, "--out", path.with_suffix(""))
        assert result.exit_code == 2 and "Traceback" not in result.stderr and "Error" in result.stderr
        return
    assert all(isinstance(cell, Cell) for cell in cells) and len(set(cells)) == len(cells)


# -- files -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A file of each kind that `ki.load` reads."""
    folder = tmp_path_factory.mktemp("saved")
    sigmas = ki.schedules.karras(3, 0.1, 5.0)[:-1]
    image = MIXTURE.sample(2, torch.Generator().manual_seed(0))
    ki.invert(MIXTURE, image, sigmas).save(folder / "inversion")
    ki.round_trip(MIXTURE, image, sigmas).save(folder / "trip")
    ki.compile_plan("dpmpp_2m", sigmas).save(folder / "plan")
    ki.Schedule(sigmas, "karras").save(folder / "schedule")
    return sorted(folder.iterdir())


@few(60)
@given(st.data())
def test_a_damaged_file_is_named(saved: list[Path], data: st.DataObject) -> None:
    place = data.draw(st.sampled_from(saved))
    content = bytearray(place.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(content), 3000) - 1))
        match data.draw(st.sampled_from(["change", "cut", "insert", "swap"])):
            case "change":
                content[at] = data.draw(st.integers(0, 255))
            case "cut":
                del content[at : at + data.draw(st.integers(1, 400))]
            case "insert":
                content[at:at] = data.draw(st.binary(max_size=9))
            case "swap":
                content[at : at + 8] = bytes(reversed(content[at : at + 8]))
        content = content or bytearray(b" ")
    path = place.parent.parent / "damaged"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # entries of a newer version
        try:
            found: Any = ki.load(path)
        except ValueError as error:
            assert "damaged" in str(error) and is_a_sentence(str(error))  # the name of the file
        else:
            assert type(found).__name__ in ("Inversion", "RoundTrip", "Plan", "Schedule")
    shown = run("show", path)
    assert shown.exit_code in (0, 2) and isinstance(shown.exception, (SystemExit, type(None))), shown.exception


@few(30)
@given(rules(), st.data())
def test_any_plan_comes_back_equal(
    tmp_path_factory: pytest.TempPathFactory, rule: ki.Rule, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "random-plan"
    levels = sorted(data.draw(st.sets(st.floats(0.1, 50.0), min_size=2, max_size=6)), reverse=True)
    try:
        plan = ki.compile_plan(rule, levels)
    except ValueError as error:
        assert is_a_sentence(str(error))
        return
    plan.save(path)
    again: Any = ki.load(path, sampler=None if rule.name in ki.SAMPLERS else rule)
    assert again == plan and again.rule == plan.rule and hash(again) == hash(plan)
    assert all(a.x == b.x and a.memory == b.memory for a, b in zip(again.steps, plan.steps, strict=True))


# -- command lines -----------------------------------------------------------------------------------------------------
WORDS = st.one_of(
    st.sampled_from(
        [*list(ki.SAMPLERS)[:8], *ki.SCHEDULES, "sd15", "flux", "edm", "5", "0", "-3", "1e9", "x=1", "eta=0.5"]
    ),
    st.text(max_size=6),
)
QUICK = {"samplers", "schedules", "plan", "show"}  # the others work for long if they are given what they need


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with some of its options, and values that may fit."""
    name = draw(st.sampled_from(sorted(main.commands)))
    command, line = main.commands[name], [name]
    if isinstance(command, click.Group):
        name = draw(st.sampled_from(sorted(command.commands)))
        command, line = command.commands[name], [*line, name]
    for parameter in draw(st.lists(st.sampled_from(command.params), max_size=4)):
        if isinstance(parameter, click.Option):
            line.append(draw(st.sampled_from(parameter.opts)))
        if not getattr(parameter, "is_flag", False):
            line.append(draw(WORDS))
    if name not in QUICK:
        line.append(draw(st.sampled_from(["--no-such-option", "--steps=banana", "--workers=-1x", "--count=1.5.2"])))
    return line


@few(60)
@given(command_lines())
def test_any_command_line_ends_with_an_answer_or_a_sentence(line: list[str]) -> None:
    if any("\0" in word for word in line):
        return
    result = run(*line)
    assert result.exit_code in (0, 2), (line, result.output)
    assert result.exception is None or isinstance(result.exception, SystemExit), (line, result.exception)
    if result.exit_code == 2:
        assert "Error" in result.stderr and "Traceback" not in result.output and result.stdout == "", line
