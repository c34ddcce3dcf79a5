"""`kinvert edit`: the images are those of `ki.edit`, the originals stay, and what cannot work is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from commandline import fails, run, succeeds
from digits import PIXELS, write_digits
from PIL import Image

import kinvert as ki
from kinvert import models
from kinvert.bench.problems import make_problem
from kinvert.cli import editing, main
from kinvert.stops import Stopped

EDIT = ("--from", "label=3", "--to", "label=8", "--model", "digits", "--steps", "5")
NONE = {"label": torch.tensor([models.load("digits").null_label])}


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path)).astype(int)


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    path = tmp_path / "digit.png"
    Image.fromarray(PIXELS[3]).save(path)
    return path


def wanted(*paths: Path, **given: Any) -> np.ndarray:
    """The same edits by `ki.edit`, as pixels."""
    x = torch.stack([ki.pictures.read(path) for path in paths])
    levels = make_problem("digits", 1, 0, torch.float32).levels
    sigmas = [sigma for sigma in ki.schedule("karras", 6, levels).tolist() if sigma > 0]
    label = {"source": {"label": torch.tensor([3])}, "target": {"label": torch.tensor([8])}}
    image = ki.edit(models.load("digits"), x, sigmas, **(label | given)).image
    found: np.ndarray = ((image[:, 0].double() + 1) * 127.5).round().clamp(0, 255).numpy().astype(int)
    return found


def test_an_edit_is_that_of_the_library(digit: Path, tmp_path: Path) -> None:
    out = tmp_path / "eight.png"
    said = succeeds("edit", digit, *EDIT, "--out", out)
    assert f"wrote {out}" in said and "changed by" in said and "converged" not in said
    assert np.abs(pixels(out) - wanted(digit)[0]).max() <= 1
    assert np.abs(pixels(out) - PIXELS[3]).max() > 30


def test_options_arrive(digit: Path, tmp_path: Path) -> None:
    out = tmp_path / "eight.png"
    args = ["--cfg", "2", "--end-at-step", "2", "--sampler", "dpmpp_2s_ancestral", "--option", "eta=0"]
    succeeds("edit", digit, *EDIT, *args, "--method", "unsample", "--out", out)
    same = {"cfg": 2.0, "end_at_step": 2, "sampler": ki.sampler("dpmpp_2s_ancestral", eta=0), "method": "unsample"}
    assert np.abs(pixels(out) - wanted(digit, negative=NONE, **same)[0]).max() <= 1
    succeeds("edit", digit, *EDIT, *args, "--negative", "label=0", "--method", "unsample", "--out", out)
    other = wanted(digit, negative={"label": torch.tensor([0])}, **same)
    assert np.abs(pixels(out) - other[0]).max() <= 1


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_what_is_not_exact_is_told(digit: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    said = succeeds("edit", digit, *EDIT, "--sampler", "heun", "--max-evals", "30", "--out", out)
    assert "1 of 1 latents had not converged" in said


def test_noise_needs_no_source_and_each_image_has_its_seed(
    digit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(PIXELS[3]).save(folder / name)
    monkeypatch.setattr(editing, "BATCH", 2)
    args = ["--to", "label=8", "--model", "digits", "--steps", "5", "--method", "noise", "--seed", "7"]
    said = succeeds("edit", folder, *args, "--out", tmp_path / "out")
    assert "3 edited images are in" in said
    same = wanted(digit, digit, digit, method="noise", noise=ki.noise.white([7, 8, 9]), source=None)
    found = np.stack([pixels(tmp_path / "out" / f"{name}.png") for name in "abc"])
    assert np.abs(found - same).max() <= 1 and np.abs(found[0] - found[1]).max() > 5


def test_a_folder_keeps_its_names_and_its_images(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "in")
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    succeeds("edit", folder, *EDIT, "--method", "unsample", "--out", tmp_path / "out")
    names = [path.relative_to(folder).as_posix() for path in before if path.suffix.lower() == ".png"]
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in tmp_path.glob("out/**/*.*")) == sorted(names)
    assert before == {path: path.read_bytes() for path in folder.rglob("*.*")}


def test_a_mask_keeps_what_is_black(digit: Path, tmp_path: Path) -> None:
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, :4] = 200
    Image.fromarray(mask).save(tmp_path / "mask.png")
    out = tmp_path / "eight.png"
    succeeds("edit", digit, *EDIT, "--mask", tmp_path / "mask.png", "--out", out)
    assert np.array_equal(pixels(out)[:, 4:], PIXELS[3][:, 4:].astype(int))
    assert np.abs(pixels(out)[:, :4] - PIXELS[3][:, :4]).max() > 20
    np.save(tmp_path / "mask.npy", (mask > 0).astype(np.float32))
    succeeds("edit", digit, *EDIT, "--mask", tmp_path / "mask.npy", "--out", tmp_path / "again.png")
    assert np.array_equal(pixels(tmp_path / "again.png"), pixels(out))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--to", "label=8"], "--method invert needs --from"),
        (["--from", "label=3", "--to", "label=80"], "does not take --to label=80"),
        (["--from", "3", "--to", "label=8"], "--from must be KEY=VALUE, e.g. label=3, got '3'"),
        (["--from", "label=3", "--to", "label=8", "--out", "{digit}"], "would replace"),
        (["--from", "label=3", "--to", "label=8", "--model", "models/sd15"], "kinvert sample LATENT --prompt"),
        (["--from", "label=3", "--to", "label=8", "--sampler", "eluer"], "euler"),
        (["--from", "label=3", "--to", "label=8", "--method", "extract_noise"], "euler draws no noise"),
        (["--from", "label=3", "--to", "label=8", "--method", "noise", "--max-evals", "9"], "max_evals"),
        (["--from", "label=3", "--to", "label=8", "--mask", "{digit}.txt"], "cannot read"),
        (["--from", "label=3", "--to", "label=8", "--model", "mnist"], "the model takes (1, 28, 28)"),
    ],
)
def test_refuses(args: list[str], message: str, digit: Path, tmp_path: Path) -> None:
    before = digit.read_bytes()
    model = [] if "--model" in args else ["--model", "digits"]
    given = ["edit", str(digit), "--out", str(tmp_path / "x.png"), "--steps", "3", *model, *args]
    assert message in fails(*(arg.replace("{digit}", str(digit)) for arg in given))
    assert digit.read_bytes() == before and not (tmp_path / "x.png").exists()


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_ink_on_paper_is_told(digit: Path, tmp_path: Path) -> None:
    Image.fromarray(255 - PIXELS[3]).save(digit)
    result = run("edit", digit, *EDIT, "--method", "unsample", "--out", tmp_path / "x.png")
    assert result.exit_code == 0 and "is mostly light" in result.stderr
    assert "it/s" not in result.stderr, "no bars where there is no terminal"


def test_a_stop_says_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_digits(tmp_path / "in")
    monkeypatch.setattr(editing, "BATCH", 2)
    real, calls = ki.edit, []

    def edit(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise Stopped
        return real(*args, **kwargs)

    monkeypatch.setattr(ki, "edit", edit)
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["edit", str(folder), *EDIT, "--method", "unsample", "--out", str(out)])
    assert result.exit_code == 130
    assert f"2 of 5 edited images are in {out}" in result.stderr
    assert len(list(out.rglob("*.[pP][nN][gG]"))) == 2
