"""Cells, their keys, and grids of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cells import SMALL, cells

import kinvert as ki
from kinvert import bench
from kinvert.bench import METHODS, PROBLEMS, Cell
from kinvert.bench.questions import QUESTIONS
from kinvert.inversion.baselines import BASELINES
from kinvert.inversion.routes import choose


def test_key_is_a_hash_of_the_settings() -> None:
    cell = Cell(**SMALL)
    settings = json.dumps(cell.settings, sort_keys=True, separators=(",", ":"))
    assert settings == (
        '{"cfg":1.0,"count":2,"dtype":"float64","method":"unsample","model":"gaussian","options":{},'
        '"question":"reconstruction","sampler":"euler","schedule":"karras","seed":0,"steps":3}'
    )
    assert cell.key == "198411778cb7cb8c"
    assert len({replace(cell, **{name: value}).key for name, value in VARIATIONS.items()} | {cell.key}) == 12


VARIATIONS = {
    "model": "mixture", "question": "recovery", "method": "invert", "sampler": "heun", "options": (("s_churn", 1.0),),
    "schedule": "exponential", "steps": 4, "cfg": 2.0, "dtype": "float32", "seed": 1, "count": 3,
}  # fmt: skip


def test_equal_samplers_have_equal_keys() -> None:
    assert Cell(**SMALL, cfg=1) == Cell(**SMALL, cfg=1.0)
    assert Cell(**SMALL, sampler="bdia", options=(("gamma", 1),)) == Cell(**SMALL, sampler="bdia")
    half = Cell(**SMALL, sampler="bdia", options=(("gamma", 0.5),))
    assert half.rule == ki.rules.BDIA(gamma=0.5) and half.settings["options"] == {"gamma": 0.5}


def test_grid_is_the_product_of_its_lists() -> None:
    grid = cells(sampler=["euler", {"name": "bdia", "gamma": 0.5}], steps=[2, 3], cfg=1.0)
    assert [(c.sampler, dict(c.options), c.steps) for c in grid] == [
        ("euler", {}, 2), ("euler", {}, 3), ("bdia", {"gamma": 0.5}, 2), ("bdia", {"gamma": 0.5}, 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "gausian"}, "did you mean 'gaussian'?"),
        ({"question": "recover"}, "did you mean 'recovery'?"),
        ({"method": "unsampel"}, "did you mean 'unsample'?"),
        ({"sampler": "eulr"}, "did you mean 'euler'?"),
        ({"schedule": "karas"}, "did you mean 'karras'?"),
        ({"dtype": "float46"}, "did you mean 'float64'?"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seed": 2**70}, "seed must be at most 4611686018427387904, got 1180591620717411303424"),
        (
            {"model": "digits", "count": 1_000_000},
            "count must be at most 40, the images there are of digits, got 1000000",
        ),
        ({"count": 1_000_000}, "count must be at most 100000, got 1000000"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"model": ["gaussian"]}, "unknown model ['gaussian']"),
        ({"method": ["unsample"]}, "unknown method ['unsample']"),
        ({"schedule": ["karras"]}, "'karras'"),
        ({"sampler": {"name": "euler"}}, "'euler'"),
        ({"steps": 2.5}, "steps must be an int, got 2.5"),
        ({"count": True}, "count must be an int, got True"),
        ({"cfg": "7"}, "cfg must be a number, got '7'"),
        ({"sampler": "bdia", "options": (("gama", 0.5),)}, "did you mean 'gamma'?"),
        ({"sampler": "bdia", "options": (("gamma", 2.0),)}, "gamma must be a number from 0.01 to 1"),
    ],
)
def test_cells_refuse(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        Cell(**SMALL | settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = [", "is not TOML"),
        ("steps = 3", "a grid needs the key 'model'"),
        ("model = 'gaussian'\nsampler_name = 'euler'", "did you mean 'sampler'?"),
        ("model = 'gaussian'\noptions = {gamma = 1}", "an option belongs to its sampler"),
        ("model = 'gaussian'\nsteps = []", "steps is an empty list"),
        ("model = 'gaussian'\nsampler = [{gamma = 0.5}]", "sampler must be a name or a table"),
        ("model = [['gaussian']]", "unknown model ['gaussian']"),
        ("model = 'gaussian'\nmethod = [['unsample']]", "unknown method ['unsample']"),
        ("model = 'gaussian'\nsampler = [{name = 'bdia', gamma = [0.5]}]", "gamma must be a float, got [0.5]"),
        ("grid = [1, 2]", "a grid must be a table of settings, e.g. model = 'gaussian', got 1"),
        ("grid = 3", "unknown key of a grid 'grid'"),
        ("model = " + 5000 * "[" + 5000 * "]", "is nested too deeply for a grid"),
        (
            f"model = 'gaussian'\nseed = {list(range(2000))}\nsteps = {list(range(1, 1001))}",
            "got 2,000,000, which would",
        ),
        ("steps = 3\n[[grid]]\nmodel = 'gaussian'", "'steps' stands outside of the blocks"),
        ("imports = 'own'\nmodel = 'gaussian'", "imports must be a list"),
        ("imports = ['no_such_module']\nmodel = 'gaussian'", "cannot import 'no_such_module': ModuleNotFoundError"),
        (
            "model = 'no_such_module:f'",
            "model 'no_such_module:f': there is no module 'no_such_module'; is its folder on PYTHONPATH",
        ),
        ("model = 'kinvert.bench.no_such:f'", "the package 'kinvert.bench' has no module 'no_such'"),
        ("model = 'kinvert:unsampel'", "has no function 'unsampel'; did you mean 'unsample'?"),
        ("model = 'kinvert:__version__'", "is not a function"),
    ],
)
def test_grid_files_refuse(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    with pytest.raises((ValueError, TypeError)) as error:
        bench.read_grid(path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_grid_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the grid .*none\.toml.*No such file"):
        bench.read_grid(tmp_path / "none.toml")


def test_blocks_of_a_grid_file_and_no_cell_twice(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text("[[grid]]\nmodel='gaussian'\nsteps=[2, 3]\n[[grid]]\nmodel='gaussian'\nsteps=[3, 4]\n")
    found, imports = bench.read_grid(path)
    assert [cell.steps for cell in found] == [2, 3, 4] and imports == ()


@pytest.mark.parametrize("name", ["quick", "standard", pytest.param("full", marks=pytest.mark.slow)])
def test_presets(name: str) -> None:
    grid = bench.preset(name)
    assert {cell.question for cell in grid} == {"reconstruction", "recovery"}
    assert {cell.model for cell in grid} == set(PROBLEMS) - {"emoji"}  # its edits have a benchmark of their own
    methods = {cell.method for cell in (*grid, *bench.preset("budgets"), *bench.preset("inversion"))}
    assert methods == set(METHODS) or name == "quick"


def test_the_preset_of_inversions_has_every_question_and_every_method() -> None:
    grid = bench.preset("inversion")
    assert {cell.question for cell in grid} == set(QUESTIONS)
    limits = {"invert_3", "invert_6", "invert_10"}
    left_out = {"ddim_clean", *limits}  # the first is `unsample` for Euler's method
    assert {cell.method for cell in grid} == set(METHODS) - left_out
    assert set(BASELINES) - left_out <= {cell.method for cell in grid}
    edits = {cell.model for cell in grid if cell.question == "edit"}
    assert edits == {"emoji"} and {cell.model for cell in grid} == {"digits", "emoji"}
    assert all(cell.count >= 6 for cell in grid)  # fewer have no interval


def test_what_are_no_cells_is_refused() -> None:
    with pytest.raises(TypeError, match=r"cells must be a Grid or a list of Cells, got 3; for a file use read_grid"):
        bench.run(3, "nowhere")  # type: ignore[arg-type]


def test_a_grid_of_too_many_cells_is_refused_before_the_first() -> None:
    grid = bench.Grid("gaussian", seed=list(range(10**5)), steps=list(range(1, 10**4)))
    with pytest.raises(ValueError, match=r"at most 100,000 cells, got 999,900,000, which would take 11,573 days"):
        next(iter(grid))


def test_the_device_is_a_setting_only_if_it_is_not_the_cpu() -> None:
    on = Cell(**SMALL, device="meta")
    assert on.settings == {**Cell(**SMALL).settings, "device": "meta"} and on.key != Cell(**SMALL).key
    assert str(on) == f"{Cell(**SMALL)} on meta"
    assert [cell.device for cell in cells(device=["cpu", "meta"])] == ["cpu", "meta"]


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'quick'"):
        bench.preset("quik")


@pytest.mark.parametrize("preset", ["quick", "budgets", "inversion", "standard", "full"])
def test_presets_ask_for_methods_that_are_used(preset: str) -> None:
    settings = {(cell.method, cell.sampler, cell.options) for cell in bench.preset(preset)}
    for method, sampler, options in settings:
        if method in ("picard", "invert"):
            plan = ki.compile_plan(ki.sampler(sampler, **dict(options)), (10.0, 5.0, 2.0, 1.0, 0.5))
            choose("auto" if method == "invert" else method, plan)
