"""`kinvert sample` and `kinvert show`: from files of latents back to images, and what files are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import fails, run, succeeds
from digits import PIXELS, write_digits
from PIL import Image
from safetensors.torch import save_file

import kinvert as ki
from kinvert import bench, models, pictures
from kinvert.cli.latents import LatentFile
from kinvert.folderback import find_shards, image_name, open_shard, sample_shards
from kinvert.records import check_kind, header_of, read_tree, write_tree

FILES = Path(__file__).parents[1] / "data" / "files"
NAMES = ("a.png", "b.PNG", "c.png", "more/a.png", "more/d.png")
LABELS = models.held_out("digits")[1]


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path)).astype(int)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_digits(folder / "in")
    args = ["--model", "digits", "--steps", "5", "--positive", "label=0", "--shard-size", "2", "--option", "gamma=0.5"]
    said = succeeds("invert", folder / "in", *args, "--sampler", "bdia", "--out", folder / "out")
    assert f"next: kinvert sample {folder / 'out'} --out images" in said
    return folder / "out"


def test_a_folder_that_was_inverted_comes_back(latents: Path, tmp_path: Path) -> None:
    assert "5 images are in" in succeeds("sample", latents, "--out", tmp_path / "images")
    found = sorted(path.relative_to(tmp_path / "images").as_posix() for path in tmp_path.rglob("*.[pP][nN][gG]"))
    assert found == sorted(NAMES)
    for i, name in enumerate(NAMES):
        assert np.abs(pixels(tmp_path / "images" / name) - PIXELS[i]).max() <= 1


def test_another_label_edits(latents: Path, tmp_path: Path) -> None:
    succeeds("sample", latents, "--positive", "label=8", "--out", tmp_path)
    shard = open_shard(find_shards(latents)[0])
    want = sample_shards(shard, positive={"label": 8})
    assert shard.memory and torch.equal(want, sample_shards(shard, positive={"label": 8}, device="cpu"))
    assert np.abs(pixels(tmp_path / "a.png") - ((want[0, 0] + 1) * 127.5).numpy().clip(0, 255)).max() <= 1
    assert np.abs(pixels(tmp_path / "a.png") - PIXELS[0]).max() > 30
    guided = sample_shards(shard, cfg=2.0, negative={"label": 10})
    assert not torch.allclose(guided, sample_shards(shard), atol=0.01)
    double = sample_shards(shard, dtype="float64")
    assert double.dtype == torch.float64 and torch.allclose(double.float(), sample_shards(shard), atol=1e-3)


def test_one_shard_and_one_latent(latents: Path, tmp_path: Path) -> None:
    *_, last = find_shards(latents)
    assert "wrote" in succeeds("sample", last, "--out", tmp_path / "d.png")
    assert np.abs(pixels(tmp_path / "d.png") - PIXELS[4]).max() <= 1
    shutil.copy(last, tmp_path / "alone.safetensors")  # it knows everything by itself
    succeeds("sample", tmp_path / "alone.safetensors", "--out", tmp_path / "images")
    assert np.abs(pixels(tmp_path / "images" / "more" / "d.png") - PIXELS[4]).max() <= 1
    assert "--out" in fails("sample", latents, "--out", tmp_path / "all.png")


def test_noises_and_samples_without_images(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    x = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pictures.write(x, tmp_path / "in" / "x.npz")
    args = ["--model", "gaussian", "--steps", "4", "--dtype", "float64", "--method", "extract_noise"]
    succeeds("invert", tmp_path / "in", *args, "--sampler", "euler_ancestral", "--out", tmp_path / "out")
    succeeds("sample", tmp_path / "out", "--out", tmp_path / "again")
    again = [pictures.read(tmp_path / "again" / f"x.npz{more}.safetensors") for more in ("", "-1")]
    torch.testing.assert_close(torch.stack(again), x, rtol=0, atol=1e-12)


def test_a_method_with_a_sampler_of_its_own_comes_back_by_it(tmp_path: Path) -> None:
    write_digits(tmp_path / "in")
    args = ["--model", "digits", "--steps", "4", "--method", "direct_inversion", "--positive", "label=0"]
    succeeds("invert", tmp_path / "in", *args, "--out", tmp_path / "out")
    succeeds("sample", tmp_path / "out", "--out", tmp_path / "images")
    assert np.abs(pixels(tmp_path / "images" / "more" / "d.png") - PIXELS[4]).max() <= 1


def test_latents_that_did_not_converge_are_counted(tmp_path: Path) -> None:
    write_digits(tmp_path / "in")
    args = ["--model", "digits", "--steps", "6", "--sampler", "heun", "--max-evals", "50"]
    succeeds("invert", tmp_path / "in", *args, "--out", tmp_path / "out")
    missed = sum(
        not row["converged"] for row in map(json.loads, (tmp_path / "out" / "manifest.jsonl").read_text().splitlines())
    )
    assert missed
    said = succeeds("sample", tmp_path / "out", "--out", tmp_path / "images")
    assert f"{missed} of 5 latents had not converged" in said


def test_a_saved_inversion_is_sampled_with_its_model(tmp_path: Path) -> None:
    x, labels = (part[:2] for part in models.held_out("digits"))
    sigmas = ki.schedules.karras(5, 0.02, 80.0)[:-1]
    found = ki.invert(models.load("digits"), x, sigmas, positive={"label": labels})
    found.save(tmp_path / "found.safetensors")
    assert "give --model" in fails("sample", tmp_path / "found.safetensors", "--out", tmp_path)
    succeeds("sample", tmp_path / "found.safetensors", "--model", "digits", "--out", tmp_path)
    assert np.abs(pixels(tmp_path / "found-1.png") - PIXELS[1]).max() <= 1
    args = ["--model", "digits", "--positive", "label=8", "--dtype", "float64", "--out", tmp_path / "edited"]
    succeeds("sample", tmp_path / "found.safetensors", *args)
    want = found.sample(models.load("digits"), positive={"label": torch.tensor([8])})
    assert (
        np.abs(pixels(tmp_path / "edited" / "found.png") - ((want[0, 0] + 1) * 127.5).numpy().clip(0, 255)).max() <= 2
    )


@pytest.mark.parametrize("version", ["0", "1.0"])
def test_latents_of_every_version_are_read(version: str, tmp_path: Path) -> None:
    place = FILES / version
    succeeds("sample", place / "latents", "--out", tmp_path)
    x = torch.linspace(-1, 1, 16, dtype=torch.float64)
    torch.testing.assert_close(pictures.read(tmp_path / "x.pt.safetensors"), x, rtol=0, atol=1e-11)
    file = LatentFile.load(place / "latent.safetensors")
    assert file.latent.flatten().tolist() == [0, 1, 2, 3] and file.memory["y"].sum() == 4 and not file.noises
    assert file.record.sigmas == (10.0, 1.0, 0.1) and file.record.size == (8, 8) and file.record.limits == (None, 50)
    assert file.record.call == {"prompt": "a cat", "guidance_scale": 2.0} and file.record.image == ("cat.png", "0123")
    assert "models/sd15, float32" in succeeds("show", place / "latent.safetensors") or version == "0"
    said = succeeds("show", place / "latents")
    assert "gaussian reversible edict karras 3 steps" in said and "1 latents of 1 files, 1 of 1 converged" in said
    assert "latents" in succeeds("show", next((place / "latents").glob("*.safetensors")))


def test_no_file_is_written_outside_of_the_folder() -> None:
    assert image_name("more/a.jpg", 2) == "more/a.jpg-2.png" and image_name("b.PNG") == "b.PNG"
    for name in ("../a.png", "/tmp/a.png", "more/../../a"):
        with pytest.raises(ValueError, match="is a place outside of --out"):
            image_name(name)


@pytest.mark.parametrize("name", ["latents", "settings", "rows", "memory"])
def test_a_shard_without_an_entry_is_named_unless_it_may_be_missing(name: str, latents: Path, tmp_path: Path) -> None:
    path = tmp_path / "0.safetensors"
    whole = find_shards(latents)[0]
    tree = read_tree(whole, check_kind(whole, header_of(whole), "shard"))
    del tree[name]
    write_tree(path, "shard", tree)
    if name == "memory":
        assert open_shard(path).memory == {}
        return
    with pytest.raises(ValueError, match=f"0.safetensors' has no entry '{name}', so that it is damaged"):
        open_shard(path)


def test_refusals(latents: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    assert "--prompt is for pipelines, and these latents are of no pipeline; use --positive" in fails(
        "sample", latents, "--prompt", "x", *out
    )
    assert "--positive is for other models" in fails(
        "sample", FILES / "1.0" / "latent.safetensors", "--positive", "label=1", *out
    )
    assert "there are no latents in" in fails("sample", tmp_path, *out)
    assert "is of the kind 'plan', which holds no latent" in fails("sample", FILES / "1.0" / "plan.json", *out)
    assert "cannot read" in fails("sample", tmp_path / "nowhere", *out)
    assert "--model digits/none is a directory" in fails("sample", latents, "--model", "digits/none", *out)
    assert "device 'abacus' cannot be used here" in fails("sample", latents, "--device", "abacus", *out)
    assert "does not take positive label=80: " in fails("sample", latents, "--positive", "label=80", *out)
    assert "does not take negative lable=8: " in fails("sample", latents, "--negative", "lable=8", *out)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert "does not say how its latent was made" in fails("sample", tmp_path / "x.safetensors", *out)
    (tmp_path / "s").mkdir()
    shutil.copy(latents / "settings.json", tmp_path / "s")
    assert "there are no finished shards in" in fails("sample", tmp_path / "s", *out)
    assert "there is no file or folder" in fails("show", tmp_path / "nowhere")
    assert "holds nothing that kinvert wrote" in fails("show", tmp_path)
    (tmp_path / "a.png").write_text("no image")
    assert "cannot read" in fails("show", tmp_path / "a.png")
    (tmp_path / "a.json").write_text("{}")
    assert "is a JSON file of another program" in fails("show", tmp_path / "a.json")
    (tmp_path / "b").write_text((tmp_path / "a.json").read_text())  # whatever its name is
    assert "is a JSON file of another program" in fails("show", tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "inversion.safetensors",
            ["inversion (file version 1.0, written by kinvert 0.1.0", "2 of 2", "BDIA()", "mask"],
        ),
        ("noises.safetensors", ["3 maps", "EulerAncestral()"]),
        ("round_trip.safetensors", ["round trip (file", "psnr"]),
        ("plan.json", ["plan (file", "DPMpp2MSDE", "step 0: sigma 10"]),
        ("schedule.safetensors", ["karras", "edm, 0.1 to 10", "10, "]),
        ("latent.safetensors", ["kinvert invert, method invert", "prompt 'a cat'", "cat.png, 8 x 8", "memory/y"]),
    ],
)
def test_show_says_what_a_file_of_kinvert_is(name: str, words: list[str]) -> None:
    said = succeeds("show", FILES / "1.0" / name)
    for word in words:
        assert word in said


def test_show_says_what_other_files_are(latents: Path, tmp_path: Path) -> None:
    x = torch.tensor([[[0.5, -0.25]]])
    for name in ("a.npy", "a.npz", "a.pt", "a.safetensors", "a.png"):
        pictures.write(x, tmp_path / name)
    for name in ("a.npy", "a.npz", "a.pt", "a.safetensors"):
        said = succeeds("show", tmp_path / name)
        assert "(1, 1, 2)" in said and "-0.25" in said and "float32" in said
    assert "PNG image, 2 x 1, mode L" in succeeds("show", tmp_path / "a.png")
    pictures.write(x[None], tmp_path / "a.latent")
    assert "latent of ComfyUI, with its format's mark" in succeeds("show", tmp_path / "a.latent")
    save_file({"latent_tensor": x}, tmp_path / "old.latent")
    assert "of the old format, multiplied by 0.18215" in succeeds("show", tmp_path / "old.latent")
    said = succeeds("show", latents / "manifest.jsonl")
    assert "digits invert bdia, gamma=0.5 karras 5 steps cfg 1 float32" in said and "positive: label=0" in said
    bench.run([bench.Cell("gaussian", steps=2, count=2)], tmp_path / "bench")
    said = succeeds("show", tmp_path / "bench")
    assert "benchmark results, 1 cells, 0 of them with an error" in said and "gaussian (1)" in said
    Image.new("RGB", (2, 2)).save(tmp_path / "m.webp", save_all=True, append_images=[Image.new("RGB", (2, 2), "red")])
    assert "2 frames, of which kinvert takes the first" in succeeds("show", tmp_path / "m.webp")


@pytest.mark.filterwarnings("always::RuntimeWarning")
def test_what_an_image_loses_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (8, 8), (255, 0, 0, 90)).save(tmp_path / "in" / "a.png")
    result = run("invert", tmp_path / "in", "--model", "digits", "--steps", "2", "--out", tmp_path / "out")
    assert result.exit_code == 0
    said = f"Warning: {tmp_path / 'in' / 'a.png'}: its transparency and its colours are left out.\n"
    assert said in result.stderr and "click" not in result.stderr and "transparency" not in result.stdout


def test_what_cannot_be_kept_is_shown_as_such(tmp_path: Path) -> None:
    def strange(x: Any, sigma: Any, prompt: Any, n: Any) -> Any:
        return ki.denoisers.Gaussian(0.0, 1.0)(x, sigma)

    x = torch.randn(1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = ki.invert(strange, x, [2.0, 1.0, 0.5], positive={"prompt": object(), "n": torch.ones(1, 9, 9)})
    found.save(tmp_path / "f.safetensors")
    said = succeeds("show", tmp_path / "f.safetensors")
    assert "prompt: an object of builtins.object" in said and "n: tensor of shape (1, 9, 9)" in said
