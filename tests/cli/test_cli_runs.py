"""The commands that compute and write files: the demo, and a folder inverted."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from commandline import SMALL, fails, succeeds
from digits import write_digits
from matplotlib.image import imread

import kinvert as ki
from kinvert.cli import main


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    (out / "stdout").write_text(succeeds(*SMALL, "--out", out, "--json"))
    return out


def test_demo_writes_its_files_and_nothing_else(small: Path) -> None:
    names = {"demo-digits.png", "demo-digits.npz", "demo-digits.json", "digit-digits-0.png", "stdout"}
    assert {path.name for path in small.iterdir()} == names
    height, width, channels = imread(small / "demo-digits.png").shape
    assert channels in (3, 4) and height > 300 and width > 600


def test_demo_json_is_what_it_prints(small: Path) -> None:
    report = json.loads((small / "stdout").read_text())
    assert report == json.loads((small / "demo-digits.json").read_text())
    assert report["settings"]["steps"] == 4 and report["settings"]["samplers"] == ["euler", "dpmpp_2m"]
    assert report["versions"]["kinvert"] == ki.__version__
    rows = [(row["sampler"], row["method"]) for row in report["table"]]
    assert rows == [("euler", "unsample"), ("dpmpp_2m", "unsample"), ("euler", "invert")]
    assert [row["evaluations"] for row in report["table"][:2]] == [8, 8]


def test_demo_figures_follow_from_its_arrays(small: Path) -> None:
    with np.load(small / "demo-digits.npz") as arrays:
        images = arrays["images"].astype(np.float64)
        assert images.shape == (3, 1, 8, 8) and arrays["labels"].tolist() == [0, 1, 2]
        for row in json.loads((small / "demo-digits.json").read_text())["table"]:
            name = row["method"] if row["method"] == "invert" else row["sampler"]
            error = arrays[f"{name}/reconstruction"].astype(np.float64) - images
            mse = (error**2).mean((1, 2, 3))
            assert row["mse"] == pytest.approx(mse.mean(), rel=1e-5)
            assert row["psnr"] == pytest.approx((10 * np.log10(4 / mse)).mean(), rel=1e-5)
            assert row["max_error"] == pytest.approx(np.abs(error).max(), rel=1e-5)
            sigmas = arrays[f"{name}/sigmas"]
            assert len(sigmas) == row["steps"] + 1 and sigmas[0] == row["sigma"]
            latent = arrays[f"{name}/latent"].reshape(3, -1) / row["sigma"]
            assert row["latent_mean"] == pytest.approx(latent.mean(), abs=1e-6)
            assert row["latent_std"] == pytest.approx(latent.std(1, ddof=1).mean(), rel=1e-5)


def test_demo_is_reproducible_and_overwrites(tmp_path: Path) -> None:
    first = succeeds(*SMALL, "--out", tmp_path, "--json")
    assert succeeds(*SMALL, "--out", tmp_path, "--json") == first


def test_demo_prints_a_whole_table(tmp_path: Path) -> None:
    out = tmp_path / "a" / "new folder"
    text = succeeds(*SMALL, "--out", out)
    assert "dpmpp_2m" in text and "max error" in text and "…" not in text
    assert str(out / "demo-digits.png") in text
    assert "invert (euler)" in text and "black is the larger value" in text
    *_, last = text.strip().splitlines()
    program, *command = shlex.split(last.removeprefix("next: "))
    assert "--invert adds" not in text
    assert program == "kinvert" and "wrote" in succeeds(*command, "--steps", "4")
    assert (out / "edited-digits-5.png").is_file()


def test_demo_options_arrive(tmp_path: Path) -> None:
    options = ["--schedule", "exponential", "--cfg", "2", "--normalize", "--dtype", "float64"]
    report = json.loads(succeeds(*SMALL, *options, "--out", tmp_path, "--json"))
    expected = {"schedule": "exponential", "cfg": 2.0, "normalize": True, "dtype": "float64", "device": "cpu"}
    assert expected.items() <= report["settings"].items()
    assert report["table"][0]["latent_std"] == pytest.approx(1.0, abs=0.2)
    with np.load(tmp_path / "demo-digits.npz") as arrays:
        assert arrays["euler/latent"].dtype == np.float64
        assert arrays["euler/latent"].std(ddof=1) == pytest.approx(1.0)


def test_demo_runs_samplers_that_need_a_pair(tmp_path: Path) -> None:
    args = ["demo", "--model", "digits", "--steps", "3", "--count", "1", "--samplers", "euler_cfg_pp", "--no-invert"]
    report = json.loads(succeeds(*args, "--out", tmp_path, "--json"))
    assert report["table"][0]["sampler"] == "euler_cfg_pp"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--samplers", "eulr"], "unknown sampler 'eulr'; did you mean 'euler'?"),
        (["--samplers", "euler_ancestral"], "euler_ancestral cannot unsample: its step from sigma 0.0001"),
        (["--samplers", "dpmpp_2m_sde"], "negative variance"),
        (["--samplers", ","], "samplers must name at least one"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--steps", "many"], "'many' is not a valid integer"),
        (["--schedule", "karas"], "did you mean 'karras'?"),
        (["--count", "0"], "count must be from 1 to 40"),
        (["--count", "41"], "count must be from 1 to 40"),
        (["--cfg", "nan"], "cfg"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--model", "imagenet"], "'imagenet' is not one of 'digits', 'mnist', 'emoji'"),
    ],
)
def test_demo_refuses(args: list[str], message: str, tmp_path: Path) -> None:
    assert message in fails(*SMALL, "--out", tmp_path, *args)
    assert not list(tmp_path.iterdir())


def test_demo_refuses_a_folder_that_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert "Not a directory" in fails(*SMALL, "--out", file / "below")
    assert "is a file" in fails(*SMALL, "--out", file)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_digits(tmp_path / "images")


def test_invert_passes_its_options_on(source: Path, tmp_path: Path) -> None:
    args = ["invert", source, "--out", tmp_path / "out", "--model", "digits", "--steps", 3, "--method", "invert"]
    args += ["--sampler", "o_belm", "--shard-size", 2, "--positive", "label=3", "--max-evals", 500]
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    assert "5 latents" in result.output and "manifest.jsonl" in result.output
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    expected = {"model": "digits", "sampler": "o_belm", "positive": {"label": 3}, "max_evals": 500, "dtype": "float32"}
    assert expected.items() <= settings.items()
    assert all(
        row["converged"] for row in map(json.loads, (tmp_path / "out" / "manifest.jsonl").read_text().splitlines())
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "mnits"], "did you mean 'mnist'?"),
        (["--method", "inverse"], "did you mean 'invert'?"),
        (["--option", "eta"], "--option must be KEY=VALUE"),
        (["--positive", "label"], "--positive must be KEY=VALUE"),
        (["--sampler", "heun", "--option", "s_chrun=1"], "did you mean 's_churn'?"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--cfg", "nan"], "cfg must be finite, got nan"),
        (
            ["--positive", "label=abc", "--model", "digits"],
            "the model does not take positive label='abc': ValueError: label",
        ),
        (["--negative", "lable=1", "--model", "digits"], "the model does not take negative lable=1: TypeError:"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--positive", "label=null"], "positive must have a finite number or a string for 'label', got None"),
        (
            ["--method", "aidi", "--max-evals", "30"],
            "max_evals is for picard and invert, which iterate, got method 'aidi'",
        ),
    ],
)
def test_invert_refuses(args: list[str], message: str, source: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["invert", str(source), "--out", str(tmp_path / "out"), *args])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_invert_says_where_it_cannot_write(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(main, ["invert", str(source), "--out", str(tmp_path / "file"), "--model", "digits"])
    assert result.exit_code == 2 and "cannot write to" in result.stderr and "choose another folder" in result.stderr
