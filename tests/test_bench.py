"""The benchmark: what a cell measures, and that results do not depend on who computed them, or how often he was killed."""

from __future__ import annotations

import itertools
import json
import math
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from kinvert.inversion.choice import choose
from safetensors.torch import load_file

import kinvert as ki
from kinvert import bench
from kinvert.bench import METHODS, PROBLEMS, Cell, Grid, report, store
from kinvert.bench.problems import make_problem
from kinvert.bench.questions import job_of
from kinvert.cli import main
from kinvert.files import write_file
from kinvert.rules import Rule, StepBuilder, register
from kinvert.tensors import rms

SMALL = {"model": "gaussian", "steps": 3, "count": 2}


def cells(**lists: Any) -> list[Cell]:
    return list(Grid(**SMALL | lists))


def measured(**settings: Any) -> dict[str, Any]:
    return bench.measure(Cell(**SMALL | settings))[0]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's own, `own`, that worker processes can import."""
    path = tmp_path / "modules" / "own.py"
    path.parent.mkdir()
    monkeypatch.syspath_prepend(path.parent)
    yield path
    sys.modules.pop("own", None)


# -- cells and grids ---------------------------------------------------------------------------------------------------
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
    with pytest.raises(ValueError) as error:
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
    assert {cell.model for cell in grid} == set(PROBLEMS)
    assert {cell.method for cell in grid} == set(METHODS) or name == "quick"


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'quick'"):
        bench.preset("quik")


# -- problems ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_problems(name: str, dtype: torch.dtype) -> None:
    problem = make_problem(name, 3, 0, dtype)
    again, other = make_problem(name, 3, 0, dtype), make_problem(name, 3, 1, dtype)
    assert torch.equal(problem.images, again.images) and not torch.equal(problem.images, other.images)
    sigma = torch.full((3,), 2.0, dtype=dtype)
    for conditioning in (problem.positive, problem.negative or {}):
        assert problem.denoiser(problem.images, sigma, **conditioning).dtype == dtype


def test_labels_choose_the_denoiser() -> None:
    problem = make_problem("mixture", 4, 0, torch.float64)
    x, sigma = torch.randn(4, 16, dtype=torch.float64), torch.full((4,), 2.0, dtype=torch.float64)
    every = [problem.denoiser(x, sigma, label=torch.full((4,), k)) for k in range(3)]
    mixed = problem.denoiser(x, sigma, label=torch.tensor([0, 1, 2, 0]))
    assert torch.equal(mixed, torch.stack([every[0][0], every[1][1], every[2][2], every[0][3]]))
    assert torch.equal(problem.denoiser(x, sigma), every[2])
    assert problem.positive["label"].tolist() == [0, 1, 0, 1] and problem.negative["label"].tolist() == [2] * 4


def test_problems_of_ones_own_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    good = make_problem("gaussian", 2, 0, torch.float64)
    monkeypatch.setitem(PROBLEMS, "own", lambda count, seed, dtype: "nothing")
    with pytest.raises(TypeError, match=r"must return a kinvert\.bench\.Problem, got str"):
        make_problem("own", 2, 0, torch.float64)
    monkeypatch.setitem(PROBLEMS, "own", lambda count, seed, dtype: good)
    with pytest.raises(ValueError, match=r"must return 3 images of torch\.float64, got shape \(2, 16\)"):
        make_problem("own", 3, 0, torch.float64)


# -- what is measured --------------------------------------------------------------------------------------------------
def test_reconstruction_is_the_round_trip() -> None:
    record = measured(sampler="heun", steps=5)
    problem = make_problem("gaussian", 2, 0, torch.float64)
    sigmas = ki.schedules.karras(6, 0.03, 15.0)[:-1]
    trip = ki.round_trip(problem.denoiser, problem.images, sigmas, sampler="heun", sigma_offset=0.0)
    assert record["metrics"]["mse"] == trip.mse.tolist()
    assert record["metrics"]["psnr"] == trip.psnr.tolist()
    assert record["metrics"]["latent_std"] == pytest.approx(trip.latent_std.tolist())
    assert record["inversion_evaluations"] == record["sampling_evaluations"] == [10, 10]
    assert record["converged"] is None and record["error"] is None
    assert record["key"] == Cell(**SMALL | {"sampler": "heun", "steps": 5}).key


def test_the_latent_of_a_gaussian_is_known() -> None:
    """The distance to the ODE's latent, from the closed formula of the ODE's solution."""
    record = measured(sampler="heun", steps=40, dtype="float32")
    problem = make_problem("gaussian", 2, 0, torch.float32)
    job = job_of(Cell(**SMALL | {"sampler": "heun", "steps": 40, "dtype": "float32"}), problem)
    latent = METHODS["unsample"](job, problem.images)
    exact = problem.denoiser.ode(problem.images.double(), job.sigmas[-1], job.sigmas[0])
    assert record["metrics"]["distance_to_ode"] == pytest.approx((rms(latent - exact) / 15.0).tolist(), rel=1e-6)


def test_the_parts_of_the_distance() -> None:
    for method in ("unsample", "invert", "ddim_noisy"):
        m = {k: np.array(v) for k, v in measured(method=method, dtype="float32", steps=8)["metrics"].items()}
        assert (m["distance_to_ode"] <= m["discretisation"] + m["solver"] + m["round_off"] + 1e-12).all()
        assert (m["round_off"] > 0).all() and (m["round_off"] < 1e-4).all()
        assert (m["solver"] < 1e-8).all() == (method == "invert")
    wide = measured(method="unsample", steps=8)["metrics"]
    assert wide["round_off"] == [0.0, 0.0]
    assert wide["discretisation"] == pytest.approx(m["discretisation"].tolist(), rel=1e-3)


def test_recovery_compares_latents() -> None:
    record = measured(question="recovery", steps=5)
    problem = make_problem("gaussian", 2, 0, torch.float64)
    sigmas = ki.schedules.karras(6, 0.03, 15.0)[:-1]
    latent = 15.0 * torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image = ki.sample(problem.denoiser, latent, sigmas)
    back = ki.unsample(problem.denoiser, image, sigmas, sigma_offset=0.0)
    m = record["metrics"]
    assert m["mse"] == pytest.approx(((back - latent) / 15).square().mean(1).tolist())
    assert "psnr" not in m and "discretisation" not in m
    exact = problem.denoiser.ode(latent, sigmas[0].item(), sigmas[-1].item())
    assert m["distance_to_ode"] == pytest.approx(rms(image - exact).tolist(), rel=1e-6)


def test_the_usual_inverse_scheduler() -> None:
    """It hands the network the variance-preserving latent of level b with the time of a: `w x_b` in these coordinates.

    On N(0, s^2) that is `x_a = x_b (1 + (a - b) w a / (s^2 + a^2))`, `w = sqrt((1 + a^2) / (1 + b^2))`.
    """
    problem = make_problem("gaussian", 2, 0, torch.float64)
    job = job_of(Cell(**SMALL), problem)
    x = problem.images
    for b, a in itertools.pairwise(job.sigmas[::-1]):
        x = x * (1 + (a - b) * math.hypot(1, a) / math.hypot(1, b) * a / (problem.denoiser.std**2 + a**2))
    torch.testing.assert_close(METHODS["ddim_noisy"](job, problem.images).latent, x)


def test_equal_cost_is_counted_per_sample_and_pairs_count_once() -> None:
    guided = measured(model="mixture", cfg=3.0)
    assert guided["inversion_evaluations"] == guided["sampling_evaluations"] == [3, 3]
    inverted = measured(method="invert")
    assert inverted["sampling_evaluations"] == [3, 3] and inverted["converged"] == [True, True]
    assert min(inverted["inversion_evaluations"]) > 6
    assert measured(method="extract_noise", sampler="euler_ancestral")["inversion_evaluations"] == [3, 3]
    assert measured(method="easyinv")["inversion_evaluations"] == [3, 3]  # its own check is left out
    assert measured(method="rf_solver", sampler="rf_solver")["inversion_evaluations"] == [6, 6]
    assert measured(sampler="euler_cfg_pp", model="mixture")["sampling_evaluations"] == [3, 3]


def test_trajectory_goes_from_the_error_at_the_image_to_none_at_the_latent() -> None:
    record = measured(steps=6)
    sigma, error = (record["trajectory"][key] for key in ("sigma", "error"))
    assert sigma == list(job_of(Cell(**SMALL | {"steps": 6}), make_problem("gaussian", 2, 0, torch.float64)).sigmas)
    rmses = [math.sqrt(mse) for mse in record["metrics"]["mse"]]
    assert error[0] == 0.0 and error[-1] == pytest.approx(sorted(rmses)[0])
    back = measured(steps=6, question="recovery")["trajectory"]["error"]
    assert back[-1] == 0.0 and back[0] > back[-2] > 0
    assert measured(method="reversible", sampler="edict")["trajectory"] is None  # it is evaluated beside its state


def test_residuals_of_stepwise_solvers() -> None:
    record = measured(method="picard", steps=6)
    assert len(record["residuals"]["sigma"]) == len(record["residuals"]["error"]) == 6
    assert max(record["residuals"]["error"]) < 1e-8
    assert measured()["residuals"] is None


def test_auxiliary_state_is_kept_or_not() -> None:
    worst = {
        (question, method): max(
            measured(question=question, method=method, sampler="o_belm", steps=12)["metrics"]["mse"]
        )
        for question in ("reconstruction", "recovery")
        for method in ("reversible", "reversible_alone")
    }
    assert worst["reconstruction", "reversible"] < 1e-24 and worst["recovery", "reversible"] < 1e-24
    assert worst["reconstruction", "reversible_alone"] > 1e-6 and worst["recovery", "reversible_alone"] > 1e-6


def test_noise_extraction_reproduces_and_recovers_nothing() -> None:
    for method in ("extract_noise", "extract_noise_chain"):
        record = measured(method=method, sampler="euler_ancestral")
        assert max(record["metrics"]["max_error"]) < 1e-12 and "distance_to_ode" not in record["metrics"]
        refused = measured(method=method, sampler="euler_ancestral", question="recovery")
        assert "recovers none" in refused["error"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "extract_noise"}, "euler draws no noise"),
        ({"method": "reversible"}, "euler carries no auxiliary state"),
        ({"sampler": "euler_ancestral"}, "euler_ancestral cannot unsample"),
        ({"sampler": "euler_ancestral", "method": "invert"}, "cannot invert euler_ancestral"),
        ({"cfg": 2.0}, "negative= is missing"),
        ({"model": "digits", "count": 41}, "count must be at most 40"),
    ],
)
def test_what_cannot_be_is_recorded_in_the_words_of_the_library(settings: dict[str, Any], message: str) -> None:
    record = measured(**settings)
    assert message in record["error"]
    assert record["metrics"] == {} and record["inversion_evaluations"] is None


def test_distribution_of_the_latent_and_arrays_of_images() -> None:
    record, arrays = bench.measure(Cell("digits", steps=3, count=6, dtype="float32"))
    assert {name: value.shape for name, value in arrays.items()} == dict.fromkeys(
        ("image", "latent", "restored"), (4, 1, 8, 8)
    )
    histogram, spectrum = record["latent"]["histogram"], record["latent"]["spectrum"]
    assert sum(histogram["counts"]) == 6 * 64 and len(histogram["edges"]) == len(histogram["counts"]) + 1
    assert len(spectrum["frequency"]) == len(spectrum["power"]) == 4
    assert "ssim" in record["metrics"] and "patch_correlation" in record["metrics"]
    assert bench.measure(Cell(**SMALL))[1] == {} and measured()["latent"]["spectrum"] is None


@pytest.mark.parametrize(
    "settings", [{"method": "invert"}, {"method": "extract_noise", "sampler": "euler_ancestral"}], ids=str
)
def test_latents_of_the_networks_are_edited(settings: dict[str, Any]) -> None:
    """With the noises that belong to them; the measure is that of `change_class` itself."""
    settings = {"model": "digits", "steps": 5, "count": 3, "dtype": "float64"} | settings
    found = measured(**settings)["metrics"]
    assert {"edit_took", "edit_probability", "edit_mse", "edit_ssim"} <= found.keys()
    assert not any(name.startswith("edit") for name in measured(question="recovery", **settings)["metrics"])
    if settings["method"] == "invert":
        cell = Cell(**settings)
        problem = make_problem("digits", 3, 0, torch.float64)
        job, label = job_of(cell, problem), problem.positive["label"]
        latent = ki.invert(problem.denoiser, problem.images, job.sigmas, positive={"label": label}).latent
        edited = ki.sample(problem.denoiser, latent, job.sigmas, positive={"label": (label + 1) % 10})
        expected = (edited - problem.images).square().flatten(1).mean(1)
        torch.testing.assert_close(torch.tensor(found["edit_mse"], dtype=torch.float64), expected, rtol=1e-6, atol=1e-9)


def test_every_method_and_model_gives_a_record_that_is_json() -> None:
    for cell in cells(method=list(METHODS), sampler=["euler", "leapfrog", "euler_ancestral"], question=["recovery"]):
        record, _ = bench.measure(cell)
        assert json.loads(store.dumps(record))["key"] == cell.key
        assert record.keys() == measured().keys()


def test_a_cell_depends_on_nothing_but_itself() -> None:
    """Neither on the cells before it nor on the state of torch's generator, which it leaves alone."""
    cell = Cell("mixture", sampler="euler_ancestral", method="ddim_clean", steps=3, count=2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = store.dumps(bench.measure(cell)[0])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    measured(model="mixture", method="invert")
    assert store.dumps(bench.measure(cell)[0]) == first


# -- files -------------------------------------------------------------------------------------------------------------
def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    text = store.dumps({"a": [math.inf, -math.inf, math.nan, 1.0], "b": {"c": math.inf}})
    assert text == '{"a":["inf","-inf","nan",1.0],"b":{"c":"inf"}}'
    record = {
        "key": store.content_key({}),
        "cell": {},
        "metrics": {"psnr": [math.inf, -math.inf, 1.0], "ssim": [math.nan]},
    }
    write_file(tmp_path / f"{record['key']}.json", store.dumps(record).encode())
    (read,) = bench.load(tmp_path)
    assert read["metrics"]["psnr"] == [math.inf, -math.inf, 1.0] and math.isnan(read["metrics"]["ssim"][0])


@pytest.mark.parametrize("place", ["file", "cell", "key", "metrics"])
def test_a_record_is_that_of_its_cell(place: str, tmp_path: Path) -> None:
    """A file under the name of another cell, an edited record and one cut short are not taken as a result."""
    two = cells(steps=[3, 4])
    records = {record["cell"]["steps"]: record for record in bench.run(two, tmp_path)}
    record = dict(records[4])
    if place == "cell":
        record["cell"] = record["cell"] | {"steps": 5}
    elif place == "key":
        record["key"] = records[3]["key"]
    elif place == "metrics":
        del record["metrics"]
    where = tmp_path / f"{records[3 if place == 'file' else 4]['key']}.json"
    where.write_text(store.dumps(record))
    for read in (lambda: bench.run(two, tmp_path), lambda: report.write([tmp_path], tmp_path / "report")):
        with pytest.raises(ValueError, match=rf"{where}.*delete it, and the same `kinvert bench` computes it again"):
            read()
    where.unlink()
    assert {record["cell"]["steps"] for record in bench.run(two, tmp_path)} == {3, 4}


def test_load_returns_what_was_measured(tmp_path: Path) -> None:
    found = bench.run(cells(method=["invert", "extract_noise"], sampler=["euler", "euler_ancestral"]), tmp_path)
    assert [record["key"] for record in found] == sorted(record["key"] for record in found)
    assert bench.load(tmp_path) == bench.load(tmp_path / "results.jsonl") == found
    assert bench.load(tmp_path, tmp_path / "results.jsonl") == found
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert lines == [(tmp_path / f"{record['key']}.json").read_text().strip() for record in found]


def test_merging_is_copying_files(tmp_path: Path) -> None:
    a, b = cells(steps=[2, 3]), cells(steps=[3, 4])
    bench.run(a, tmp_path / "a")
    bench.run(b, tmp_path / "b")
    assert len(bench.load(tmp_path / "a", tmp_path / "b")) == 3
    for path in (tmp_path / "b").glob("*.json"):
        path.rename(tmp_path / "a" / path.name)
    assert bench.load(tmp_path / "a") == bench.run([*a, *b], tmp_path / "c")


def test_damaged_and_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there are no results at .*nowhere.*run `kinvert bench"):
        bench.load(tmp_path / "nowhere")
    (record,) = bench.run(cells(), tmp_path)
    path = tmp_path / f"{record['key']}.json"
    for content in (b"", b"{", b"[]", b'{"key": 1, "cell": {}}', b"\xff"):
        path.write_bytes(content)
        for attempt in (lambda: bench.load(tmp_path), lambda: bench.run(cells(), tmp_path)):
            with pytest.raises(ValueError, match=rf"{path} is not a result.*delete it.*rm {path}"):
                attempt()
    (tmp_path / "results.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"results\.jsonl is not a result"):
        bench.load(tmp_path / "results.jsonl")


def test_half_a_file_is_never_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "file", b"half")
    assert not list(tmp_path.iterdir())


def test_compare(tmp_path: Path) -> None:
    bench.run(cells(steps=[2, 3, 4]), tmp_path / "a")
    bench.run(cells(steps=[2, 3]), tmp_path / "b")
    found = bench.compare(tmp_path / "a", tmp_path / "b")
    assert (found.equal, found.only_b, found.differences, found.versions) == (2, [], [], {})
    assert [cell["steps"] for cell in found.only_a] == [4] and not found.same
    key = Cell(**SMALL | {"steps": 3}).key
    path = tmp_path / "b" / f"{key}.json"
    record = json.loads(path.read_text())
    record["metrics"]["mse"][0] *= 1.001
    record["versions"]["torch"] = "0.1"
    path.write_text(json.dumps(record))
    found = bench.compare(tmp_path / "a", tmp_path / "b")
    (difference,) = found.differences
    assert (difference.what, difference.cell["steps"], found.equal) == ("mse", 3, 1)
    assert difference.b > difference.a and found.versions == {"torch": (torch.__version__, f"0.1, {torch.__version__}")}
    assert bench.compare(tmp_path / "a", tmp_path / "b", rtol=0.01).differences == []
    with pytest.raises(ValueError, match=r"different results for one cell.*kinvert bench compare"):
        bench.load(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="rtol must be"):
        bench.compare(tmp_path / "a", tmp_path / "b", rtol=-1.0)


# -- processes ---------------------------------------------------------------------------------------------------------
DEADLY = """
import os, signal
from dataclasses import replace
from pathlib import Path
from kinvert.bench.problems import PROBLEMS

ALIVE = Path(__file__).parent / "alive"

def deadly(count, seed, dtype):
    if seed == 2 and not ALIVE.exists():
        ALIVE.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(PROBLEMS["gaussian"](count, seed, dtype), exact=False)
"""


def test_results_do_not_depend_on_workers_or_on_being_killed(tmp_path: Path, module: Path) -> None:
    """The point of it all: one process, and two of which one is killed and the run resumed, leave equal files."""
    module.write_text(DEADLY)
    grid = cells(model="own:deadly", seed=[0, 1, 2, 3], steps=3, method=["unsample", "invert"], dtype=["float32"])
    with pytest.raises(bench.UnfinishedError, match=r"(?s)of 8 are not done; the same command.*exit codes .*-9"):
        bench.run(grid, tmp_path / "two", workers=2, threads=1)
    done = sorted(path.name for path in (tmp_path / "two").glob("*.json"))
    assert 0 < len(done) < 8 and not (tmp_path / "two" / "results.jsonl").exists()
    times = {name: (tmp_path / "two" / name).stat().st_mtime_ns for name in done}
    bench.run(grid, tmp_path / "two", workers=2, threads=1)
    assert times == {name: (tmp_path / "two" / name).stat().st_mtime_ns for name in done}
    bench.run(grid, tmp_path / "one", threads=1)
    one, two = ((tmp_path / name / "results.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two and one.count(b"\n") == 8
    assert bench.compare(tmp_path / "one", tmp_path / "two").same


def test_workers_stop_when_nobody_waits_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = types.SimpleNamespace(is_alive=lambda: False)
    monkeypatch.setattr("multiprocessing.parent_process", lambda: gone)
    assert bench.run(cells(), tmp_path) == [] and not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert len(bench.run(cells(), tmp_path)) == 1


def test_a_finished_cell_is_never_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench.run(cells(steps=[2, 3]), tmp_path)
    monkeypatch.setattr("kinvert.bench.runner.measure", None)
    assert bench.run(cells(steps=[2, 3]), tmp_path) == first


def test_a_cell_that_breaks_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: Any, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(METHODS, "broken", broken)
    grid = cells(method=["broken", "unsample"])
    with pytest.raises(bench.UnfinishedError, match=r"(?s)1 of 2 are not done.*broken euler.*RuntimeError: out of mem"):
        bench.run(grid, tmp_path)
    assert [record["cell"]["method"] for record in bench.load(tmp_path)] == ["unsample"]
    monkeypatch.setitem(METHODS, "broken", METHODS["unsample"])
    assert len(bench.run(grid, tmp_path)) == 2


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


def test_workers_and_folders_that_cannot_be(tmp_path: Path) -> None:
    for workers in (0, 1.5, True):
        with pytest.raises(ValueError, match="workers must be a positive int"):
            bench.run(cells(), tmp_path, workers=workers)  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to .*choose another folder"):
        bench.run(cells(), tmp_path / "file" / "below")


def test_threads_are_as_before(tmp_path: Path) -> None:
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
    import subprocess

    grid = tmp_path / "grid.toml"
    grid.write_text("model = 'gaussian'\nsteps = [2, 3, 4, 5]\ncount = 2\n")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *launcher, "-m", "kinvert.cli", "bench", str(grid), "--out", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True)
    bench.run(bench.read_grid(grid)[0], tmp_path / "one")
    assert (tmp_path / "one" / "results.jsonl").read_bytes() == (tmp_path / "out" / "results.jsonl").read_bytes()


# -- one's own ---------------------------------------------------------------------------------------------------------
def test_a_sampler_of_ones_own_enters_by_registration() -> None:
    try:

        @register
        @dataclass(frozen=True)
        class Own(Rule):
            name: ClassVar[str] = "own_euler"
            ode_order: ClassVar[int] = 1

            def step(self, s: StepBuilder) -> Any:
                return ki.rules.interpolate(s.x, s.denoise(s.x, s.sigma), s.sigma_next / s.sigma)

        assert measured(sampler="own_euler")["metrics"] == measured(sampler="euler")["metrics"]
        assert measured(sampler="own_euler", method="invert")["converged"] == [True, True]
    finally:
        del ki.SAMPLERS["own_euler"]


OWN = """
import torch
import kinvert as ki
from kinvert.bench import METHODS, PROBLEMS, Problem

def model(count, seed, dtype):
    images = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return Problem(ki.denoisers.Gaussian(0.0, 1.0), images, ki.levels.edm(0.1, 10.0))

PROBLEMS["registered"] = model
METHODS["forward"] = lambda job, x: x + job.sigmas[0] * torch.randn(
    x.shape, generator=torch.Generator().manual_seed(job.seed), dtype=x.dtype)
"""


def test_models_and_methods_of_ones_own_in_other_processes(tmp_path: Path, module: Path) -> None:
    module.write_text(OWN)
    grid = tmp_path / "grid.toml"
    grid.write_text(
        "imports = ['own']\nmodel = ['own:model', 'registered']\nmethod = ['forward', 'unsample']\n"
        "steps = 4\ncount = 2\n"
    )
    try:
        found, imports = bench.read_grid(grid)
        records = bench.run(found, tmp_path / "out", workers=2, imports=imports)
        assert len(records) == 4 and not any(record["error"] for record in records)
        by = {(r["cell"]["model"], r["cell"]["method"]): r for r in records}
        assert by["own:model", "unsample"]["metrics"] == by["registered", "unsample"]["metrics"]
        assert by["own:model", "forward"]["inversion_evaluations"] == [0, 0]
    finally:
        METHODS.pop("forward", None)
        PROBLEMS.pop("registered", None)


# -- the command -------------------------------------------------------------------------------------------------------
def command(*args: Any) -> Any:
    return CliRunner().invoke(main, [str(a) for a in args])


def test_commands(tmp_path: Path) -> None:
    grid, a, b = tmp_path / "grid.toml", tmp_path / "a", tmp_path / "b"
    grid.write_text("model = 'gaussian'\nsteps = [2, 3]\ncount = 2\ncfg = [1.0, 2.0]\n")
    for args in (["bench", grid, "--out", a], ["bench", "run", grid, "--out", b]):
        result = command(*args)
        assert result.exit_code == 0, result.output
        assert "4 of 4 cells" in result.output and "2 of them with an error" in result.output
    same = command("bench", "compare", a, b)
    assert same.exit_code == 0 and "4 cells are equal" in same.output
    next(b.glob("*.json")).unlink()
    differs = command("bench", "compare", a, b)
    assert differs.exit_code == 1 and f"only in {a}: gaussian" in differs.output


def test_compare_prints_the_differences(tmp_path: Path) -> None:
    for name, steps in (("a", 2), ("b", 3)):
        bench.run(cells(steps=steps), tmp_path / name)
    (a,), (b,) = ((tmp_path / name).glob("*.json") for name in "ab")
    a.write_text(b.read_text().replace('"sampling_evaluations":[3,3]', '"sampling_evaluations":[4,3]'))
    a.rename(tmp_path / "a" / b.name)
    output = command("bench", "compare", tmp_path / "a", tmp_path / "b").output
    assert "sampling_evaluations" in output and "[4, 3]" in output and "0 cells are equal" in output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bench", "--preset", "quik"], "did you mean 'quick'?"),
        (["bench", "grid.toml", "--preset", "quick"], "choose one"),
        (["bench", "nowhere.toml"], "cannot read the grid"),
        (["bench", "--import", "no_such_module"], "cannot import 'no_such_module'"),
        (["bench", "compare", "nowhere", "here"], "there are no results at 'nowhere'"),
        (["bench", "--slurm", "sixty"], "--slurm must be KEY=VALUE"),
    ],
)
def test_commands_refuse(args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = command(*args)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_unfinished_runs_end_with_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "unsample", lambda job, x: 1 / 0)
    grid = tmp_path / "grid.toml"
    grid.write_text("model = 'gaussian'\nsteps = 2\n")
    result = command("bench", grid, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "ZeroDivisionError" in result.stderr and "Traceback" not in result.stderr


def test_images_are_kept(tmp_path: Path) -> None:
    (record,) = bench.run([Cell("digits", steps=2, count=2, dtype="float32")], tmp_path)
    arrays = load_file(tmp_path / f"{record['key']}.safetensors")
    error = (arrays["restored"] - arrays["image"]).double().square().mean((1, 2, 3))
    assert record["metrics"]["mse"] == pytest.approx(error.tolist(), rel=1e-5)


def test_a_certificate_is_not_part_of_the_way_up() -> None:
    """What a method spends on its check and its diagnostics is left out: the same count as the library's own."""
    for sampler in ("heun", "dpmpp_2m", "reversible_heun", "edict"):
        cell = Cell("gaussian", method="invert", sampler=sampler, steps=8, count=2)
        problem = make_problem(cell.model, cell.count, cell.seed, torch.float64)
        job = job_of(cell, problem)
        found = ki.invert(job.denoiser, problem.images, job.sigmas, sampler=job.sampler)
        record, _ = bench.measure(cell)
        alone = found.evaluations - found.checking - found.row_checks
        assert record["inversion_evaluations"] == alone.tolist()


def test_a_method_that_would_not_be_used_is_an_error_of_the_cell() -> None:
    for sampler, used in (("dpmpp_2m", "'auto', 'sweeps' or a Sweeps"), ("o_belm", "'auto'")):
        record, _ = bench.measure(Cell("gaussian", method="picard", sampler=sampler, steps=4, count=1))
        assert record["error"].startswith(f"method must be {used} for {sampler}, got 'picard'")
        assert record["converged"] is None and record["metrics"] == {}


@pytest.mark.parametrize("preset", ["quick", "standard", "full"])
def test_presets_ask_for_methods_that_are_used(preset: str) -> None:
    settings = {(cell.method, cell.sampler, cell.options) for cell in bench.preset(preset)}
    for method, sampler, options in settings:
        if method in ("picard", "invert"):
            plan = ki.compile_plan(ki.sampler(sampler, **dict(options)), (10.0, 5.0, 2.0, 1.0, 0.5))
            choose("auto" if method == "invert" else method, plan)


def test_what_a_baseline_claims_is_for_its_own_sampler() -> None:
    for sampler, claim in (("euler", [True, True]), ("heun", None)):
        record, _ = bench.measure(Cell("mixture", method="aidi_anderson", sampler=sampler, steps=40, count=2))
        assert record["converged"] == claim, sampler


# -- the committed effects ---------------------------------------------------------------------------------------------
def effect(name: str) -> list[dict[str, Any]]:
    path = Path(__file__).parent.parent / "benchmarks" / "results" / f"effects-{name}.json"
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
