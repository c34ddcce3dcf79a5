"""The command line, from outside: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from matplotlib.image import imread

import kinvert as ki
from kinvert import analysis, demo
from kinvert.cli import main
from kinvert.forms import Form
from kinvert.rules import SamplerEntry, StepBuilder

SMALL = ["demo", "--model", "digits", "--steps", "4", "--count", "3", "--samplers", "euler,dpmpp_2m"]


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def succeeds(*args: str | Path) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*args: str | Path) -> str:
    """The message of a refusal: status 2, no traceback, nothing on stdout."""
    result = run(*args)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    (out / "stdout").write_text(succeeds(*SMALL, "--out", out, "--json"))
    return out


def test_help_explains_every_command_and_option() -> None:
    text = succeeds("--help")
    for name, command in main.commands.items():
        assert name in text
        assert command.help
        for param in command.params:
            if param.param_type_name == "option":
                assert getattr(param, "help", None), f"{name} {param.name}"
    assert "..." not in text.split("Commands:")[1]


def test_version() -> None:
    assert succeeds("--version").strip() == f"kinvert, version {ki.__version__}"


# -- demo --------------------------------------------------------------------------------------------------------------
def test_demo_writes_three_files_and_nothing_else(small: Path) -> None:
    names = {"demo-digits.png", "demo-digits.npz", "demo-digits.json", "stdout"}
    assert {path.name for path in small.iterdir()} == names
    height, width, channels = imread(small / "demo-digits.png").shape
    assert channels in (3, 4) and height > 300 and width > 600


def test_demo_json_is_what_it_prints(small: Path) -> None:
    report = json.loads((small / "stdout").read_text())
    assert report == json.loads((small / "demo-digits.json").read_text())
    assert report["settings"]["steps"] == 4 and report["settings"]["samplers"] == ["euler", "dpmpp_2m"]
    assert report["versions"]["kinvert"] == ki.__version__
    assert [row["sampler"] for row in report["table"]] == ["euler", "dpmpp_2m"]
    assert [row["evaluations"] for row in report["table"]] == [8, 8]


def test_demo_figures_follow_from_its_arrays(small: Path) -> None:
    with np.load(small / "demo-digits.npz") as arrays:
        images = arrays["images"].astype(np.float64)
        assert images.shape == (3, 1, 8, 8) and arrays["labels"].tolist() == [0, 1, 2]
        for row in json.loads((small / "demo-digits.json").read_text())["table"]:
            error = arrays[f"{row['sampler']}/reconstruction"].astype(np.float64) - images
            mse = (error**2).mean((1, 2, 3))
            assert row["mse"] == pytest.approx(mse.mean(), rel=1e-5)
            assert row["psnr"] == pytest.approx((10 * np.log10(4 / mse)).mean(), rel=1e-5)
            assert row["max_error"] == pytest.approx(np.abs(error).max(), rel=1e-5)
            sigmas = arrays[f"{row['sampler']}/sigmas"]
            assert len(sigmas) == row["steps"] + 1 and sigmas[0] == row["sigma"]
            latent = arrays[f"{row['sampler']}/latent"].reshape(3, -1) / row["sigma"]
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
    args = ["demo", "--model", "digits", "--steps", "3", "--count", "1", "--samplers", "euler_cfg_pp"]
    report = json.loads(succeeds(*args, "--out", tmp_path, "--json"))
    assert report["table"][0]["sampler"] == "euler_cfg_pp"


def test_demo_takes_one_image_of_each_class_in_turn() -> None:
    outcome = demo.run(demo.Settings("digits", ("euler",), steps=2, count=12))
    assert outcome.labels.tolist() == [*range(10), 0, 1]
    assert len({image.numpy().tobytes() for image in outcome.images}) == 12


def test_picture_of_a_perfect_copy_and_of_a_long_name() -> None:
    outcome = demo.run(demo.Settings("digits", ("euler",), steps=2, count=1))
    trip = outcome.trips["euler"]
    perfect = replace(trip, reconstruction=outcome.images, psnr=trip.psnr + torch.inf)
    name = "a_sampler_with_a_very_long_name"
    outcome = replace(outcome, trips={name: perfect}, schedules={name: outcome.schedules["euler"]})
    figure = demo.draw(outcome)
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in figure.texts}
    assert boxes[name].x1 < boxes["latent / sigma"].x0
    assert max(box.x1 for box in boxes.values()) < figure.bbox.x1
    assert json.loads(demo.to_json(outcome.report()))["table"][0]["psnr"] is None


def test_half_a_file_is_never_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "demo-digits.png"
    kept.write_text("the picture from before")
    outcome = demo.run(demo.Settings("digits", ("euler",), steps=2, count=1))

    class Broken:
        def savefig(self, file: Any, **_: Any) -> None:
            file.write(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "draw", lambda _: Broken())
    with pytest.raises(OSError, match="No space left"):
        demo.save(outcome, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    assert kept.read_text() == "the picture from before"


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
        (["--model", "imagenet"], "'imagenet' is not one of 'digits', 'mnist'"),
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


# -- listings ----------------------------------------------------------------------------------------------------------
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
        (["dpmpp_2m_sde", "--rising"], "negative variance"),
        ([], "Missing argument 'SAMPLER'"),
    ],
)
def test_plan_refuses(args: list[str], message: str) -> None:
    assert message in fails("plan", *args)


def terminal(width: int, *args: str) -> str:
    """What a command prints to a terminal of so many columns."""
    master, slave = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    with subprocess.Popen([sys.executable, "-m", "kinvert", *args], stdout=slave, env=env) as job:
        os.close(slave)
        text = b""
        with suppress(OSError):  # how Linux says that the other side has closed
            while part := os.read(master, 65536):
                text += part
    os.close(master)
    assert job.returncode == 0
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", text.decode())


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize(("command", "names"), [("samplers", ki.SAMPLERS), ("schedules", ki.SCHEDULES)])
def test_a_listing_fits_the_terminal(command: str, names: dict[str, Any], width: int) -> None:
    lines = terminal(width, command).splitlines()
    assert max(map(len, lines)) <= width
    assert [line.split()[0] for line in lines if line[:1].strip() and line.split()[0] in names] == list(names)
    if width == 80:  # a line for each, and what the columns mean
        assert len(lines) < len(names) + 30
        assert any("Left out here:" in line and "options" in line for line in lines)
    else:
        assert not any("Left out" in line for line in lines) and any("options: " in line for line in lines)


def test_a_file_gets_every_column_in_lines_of_their_own() -> None:
    lines = succeeds("samplers").splitlines()
    (line,) = [line for line in lines if line.startswith("euler ")]
    assert line.split()[:6] == ["euler", "1", "1", "-", "yes", "stepwise"] and "s_tmax=inf" in line
    assert all(line == line.rstrip() for line in lines)


def test_module_and_command_are_the_same() -> None:
    result = subprocess.run([sys.executable, "-m", "kinvert", "--help"], capture_output=True, text=True, check=True)
    assert result.stdout == succeeds("--help").replace("Usage: main", "Usage: kinvert")


@pytest.mark.parametrize("args", [["samplers"], ["--help"]])
def test_closed_stdout_ends_in_a_sentence(args: list[str]) -> None:
    command = f"{sys.executable} -m kinvert {' '.join(args)} >&-"
    result = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "Error: stdout is closed, so that nothing can be printed; use > /dev/null instead\n"


def test_a_wrong_backend_of_matplotlib_matters_to_pictures_only(tmp_path: Path) -> None:
    code = "import os; os.environ['MPLBACKEND'] = 'bogus'; from kinvert.cli import main; main({})"
    assert python(code.format("['plan', 'euler']")).returncode == 0
    result = python(code.format([*SMALL, "--out", str(tmp_path)]))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "'bogus' is not a valid value" in result.stderr and "MPLBACKEND" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("args", [["--help"], ["samplers"], ["schedules"], ["plan", "euler"]])
def test_listings_start_without_matplotlib(args: list[str]) -> None:
    code = f"""
import sys
from kinvert.cli import main
main({args}, standalone_mode=False)
assert not {{"matplotlib", "PIL"}} & set(sys.modules)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


# -- what is installed -------------------------------------------------------------------------------------------------
def python(code: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, where warnings are errors, but for the deprecations of others."""
    flags = ["-W", "error", "-W", "ignore::DeprecationWarning"]
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False)


def test_the_package_does_not_import_the_extras() -> None:
    result = python("import sys, kinvert, kinvert.analysis; print({'click', 'rich', 'matplotlib'} & set(sys.modules))")
    assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.parametrize(("missing", "args", "status"), [("click", [], 1), ("rich", [], 1), ("matplotlib", SMALL, 2)])
def test_the_command_says_which_extra_is_missing(missing: str, args: list[str], status: int) -> None:
    result = python(f"import sys; sys.modules[{missing!r}] = None; from kinvert.cli import main; main({args})")
    assert result.returncode == status
    assert "pip install 'kinvert[cli]'" in result.stderr and missing in result.stderr
    assert "Traceback" not in result.stderr


def test_output_that_is_not_utf8_can_be_printed() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from kinvert.cli import main; main(['samplers'])"],
        capture_output=True, check=False, env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert b"dpmpp_2m" in result.stdout
