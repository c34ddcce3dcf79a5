"""The command line on a pipeline in a directory: a small one with random weights."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import fails, run, succeeds
from PIL import Image
from writers import killed_while_it_writes

pytest.importorskip("diffusers")
sys.path.append(str(Path(__file__).parents[1] / "adapters" / "diffusers"))

from pipelines import build

import kinvert as ki
import kinvert.adapters.diffusers as kd
from kinvert.bench import Cell, load
from kinvert.cli import pipelines, sampling
from kinvert.cli.latents import LatentFile
from kinvert.cli.pipelines import is_directory

CAT = ["--prompt", "a cat", "--guidance-scale", "3", "--steps", "4"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "small"
    build("sd15").save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    random = np.random.default_rng(0)
    for name in ("a.png", "more/b.png"):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / name)
    return folder


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB")).astype(float)


def test_unsample_and_sample_are_the_verbs_on_the_pipeline(directory: Path, photos: Path, tmp_path: Path) -> None:
    latent, again, edited = tmp_path / "new" / "l.safetensors", tmp_path / "again.png", tmp_path / "edited.png"
    photo = photos / "a.png"
    args = ["--model", directory, *CAT, "--sampler", "dpmpp_2m", "--out", latent]
    assert f"next: kinvert sample {latent}" in succeeds("unsample", photo, *args)
    file = LatentFile.load(latent)
    pipe = build("sd15")
    denoiser = kd.denoiser(pipe, prompt="a cat", guidance_scale=3.0, height=16, width=16, num_inference_steps=4)
    encoded = kd.encode(pipe, Image.open(photo))
    want = ki.unsample(denoiser, encoded, denoiser.sigmas, sampler="dpmpp_2m")
    torch.testing.assert_close(file.latent, want, rtol=0, atol=0.02)  # the first step upwards amplifies rounding
    assert file.record.call == {"prompt": "a cat", "guidance_scale": 3.0, "height": 16, "width": 16}
    assert file.record.sampler == "dpmpp_2m" and file.record.size == (16, 16)
    assert file.record.sigmas == tuple(denoiser.sigmas.tolist()) and file.record.coordinates == "ve"

    succeeds("sample", latent, "--out", again)
    back = ki.sample(denoiser, file.latent, denoiser.sigmas, sampler="dpmpp_2m")
    assert np.abs(pixels(again) - np.array(kd.decode(pipe, back)[0]).astype(float)).max() <= 2
    succeeds("sample", latent, "--prompt", "cat", "--out", edited)
    assert not np.array_equal(pixels(again), pixels(edited))


def test_invert_of_a_folder_goes_on_and_its_latents_go_back(directory: Path, photos: Path, tmp_path: Path) -> None:
    args = ["invert", photos, "--model", directory, *CAT, "--sampler", "bdia", "--tol", "1e-3", "--out", tmp_path]
    text = succeeds(*args)
    assert "2 latents are in" in text and "a.png" in text and "CONVERGED" in text
    place = tmp_path / "more" / "b.png.safetensors"
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [row["latent"] for row in rows] == ["a.png.safetensors", "more/b.png.safetensors"]
    assert all(row["converged"] for row in rows)
    before = place.stat().st_mtime_ns
    assert "2 latents are in" in succeeds(*args)  # nothing is done again
    assert place.stat().st_mtime_ns == before
    assert "was made with steps 4, and now it is 5" in fails(*args, "--steps", "5")
    assert LatentFile.load(place).memory  # of a reversible sampler, without which it is another image
    succeeds("sample", place, "--out", tmp_path / "b.png")
    pipe = build("sd15")
    want = np.array(kd.decode(pipe, kd.encode(pipe, Image.open(photos / "more" / "b.png")))[0]).astype(float)
    assert np.abs(pixels(tmp_path / "b.png") - want).max() <= 1
    assert "2 images are in" in succeeds("sample", tmp_path, "--out", tmp_path / "images")
    assert np.array_equal(pixels(tmp_path / "images" / "more" / "b.png"), pixels(tmp_path / "b.png"))
    succeeds("sample", tmp_path, "--prompt", "cat", "--out", tmp_path / "edited")
    assert not np.array_equal(pixels(tmp_path / "edited" / "a.png"), pixels(tmp_path / "images" / "a.png"))
    assert "is one file, and there are 2 images" in fails("sample", tmp_path, "--out", tmp_path / "all.png")
    said = succeeds("show", tmp_path)
    assert "latents of a pipeline" in said and "2 of 2 converged" in said and "prompt 'a cat'" in said
    assert "for pipelines" not in said and "--cfg is for other models" in fails(
        "sample", tmp_path, "--cfg", "2", *args[-2:]
    )


@pytest.mark.parametrize("damage", ["cut short", "other bytes"])
def test_damaged_latents_and_photos(damage: str, directory: Path, photos: Path, tmp_path: Path) -> None:
    """A latent that is damaged is computed again, and kept aside; a photo that cannot be read costs itself."""
    source, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, source)
    args = ["invert", source, "--model", directory, *CAT, "--method", "unsample", "--out", out]
    succeeds(*args)
    place = out / "a.png.safetensors"
    whole = place.read_bytes()
    place.write_bytes(whole[:-10] if damage == "cut short" else whole[:-1] + bytes([whole[-1] ^ 1]))
    killed_while_it_writes(out / "more" / "b.png.safetensors")
    (source / "c.png").write_bytes(b"nonsense")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = run(*args)
    assert (
        result.exit_code == 1
        and "1 of 3 images are not done" in result.stderr
        and "c.png: cannot read" in result.stderr
    )
    assert "1 damaged result is set aside, and computed again" in result.stderr
    assert place.read_bytes() == whole and place.with_name(place.name + ".damaged").exists()
    assert not list(out.rglob(".*"))


def test_a_photo_that_is_gone_since_costs_itself(directory: Path, photos: Path, tmp_path: Path) -> None:
    source = tmp_path / "photos"
    shutil.copytree(photos, source)
    args = ["invert", source, "--model", directory, *CAT, "--method", "unsample", "--out", tmp_path / "out"]
    succeeds(*args)
    (source / "a.png").unlink()
    (source / "a.png").symlink_to(source / "gone.png")
    result = run(*args)
    assert result.exit_code == 1 and "1 of 2 images are not done" in result.stderr
    assert "a.png: [Errno 2] No such file" in result.stderr
    assert len((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()) == 1


def test_a_full_disk_ends_a_folder_of_photos(
    directory: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []

    def full_at_last(file: int) -> None:
        synced.append(file)
        if len(synced) > 3:  # the folder, and the first latent with its folder
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_at_last)
    args = ["invert", photos, "--model", directory, *CAT, "--method", "unsample", "--out", tmp_path / "out"]
    result = run(*args)
    assert result.exit_code == 1
    assert "no room is left on the disk: 1 of 2 latents are kept in" in " ".join(result.stderr.split())


def test_a_flow_model_and_a_schedule_of_kinvert(photos: Path, tmp_path: Path) -> None:
    build("sd3").save_pretrained(tmp_path / "sd3")
    latent, out = tmp_path / "l.safetensors", tmp_path / "again.png"
    args = ["--model", tmp_path / "sd3", "--prompt", "a cat", "--steps", "3", "--schedule", "simple"]
    succeeds("invert", photos / "a.png", *args, "--sampler", "o_belm", "--tol", "1e-3", "--out", latent)
    file = LatentFile.load(latent)
    assert file.record.coordinates == "flow" and file.record.sigmas[0] == 1.0 and file.record.result["converged"]
    succeeds("sample", latent, "--out", out)
    pipe = build("sd3")
    want = np.array(kd.decode(pipe, kd.encode(pipe, Image.open(photos / "a.png")))[0]).astype(float)
    assert np.abs(pixels(out) - want).max() <= 2
    other = tmp_path / "ve"
    build("sd15").save_pretrained(other)
    assert "the latent belongs to" in fails("sample", latent, "--model", other, "--out", out)


def test_a_latent_whose_last_level_is_high_comes_back(directory: Path, photos: Path, tmp_path: Path) -> None:
    """The pipeline's latents are the state by sqrt(1 + sigma^2)."""
    latent, out = tmp_path / "l.safetensors", tmp_path / "again.png"
    args = ["--model", directory, *CAT, "--schedule", "simple", "--sampler", "bdia", "--tol", "1e-3", "--out", latent]
    succeeds("invert", photos / "a.png", *args)
    record = LatentFile.load(latent).record
    assert record.result["converged"] and record.sigmas[-1] > 0.5
    succeeds("sample", latent, "--out", out)
    pipe = build("sd15")
    want = np.array(kd.decode(pipe, kd.encode(pipe, Image.open(photos / "a.png")))[0]).astype(float)
    assert np.abs(pixels(out) - want).max() <= 1


def test_bench_measures_a_pipeline(directory: Path, photos: Path, tmp_path: Path) -> None:
    args = ["bench", "--model", directory, "--images", photos, "--prompt", "a cat", "--guidance-scale", "2.5"]
    args += ["--steps", "2,3", "--methods", "unsample", "--samplers", "euler", "--count", "2", "--out", tmp_path]
    assert "2 of 2 cells" in succeeds(*args)
    records = load(tmp_path)
    assert [record["error"] for record in records] == [None, None]
    assert all(len(record["metrics"]["psnr"]) == 2 for record in records)
    name = records[0]["cell"]["model"]
    assert "guidance_scale=2.5" in name and "prompt=a%20cat" in name and "digest=" in name
    assert Cell(name, steps=2).model == name
    preset = ["bench", "--preset", "inversion", *args[1:9], "--where", "method=invert_1", "--where", "cfg=1"]
    said = succeeds(*preset, "--where", "question=recovery,edit", "--count", "1", "--out", tmp_path / "preset")
    assert "2 of 2 cells" in said.replace("3 of 3", "2 of 2")
    found = {record["cell"]["question"]: record for record in load(tmp_path / "preset")}
    assert found["recovery"]["error"] is None and found["recovery"]["cell"]["model"] == name
    assert "an edit is compared with the true answer" in found["edit"]["error"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "models/nowhere"], "there is no directory 'models/nowhere'"),
        (["--model", "{photos}"], "is no pipeline of diffusers: it has no model_index.json, but a.png, more"),
        (["--model", "{broken}"], "diffusers cannot load"),
        (["--model", "{model}", "--sampler", "eulr"], "did you mean 'euler'?"),
        (["--model", "{model}", "--schedule", "karas"], "did you mean 'karras'?"),
        (["--model", "{model}", "--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--model", "{model}", "--steps", "0"], "steps must be an int of at least 1, got 0"),
        (["--model", "{model}", "--height", "15"], "must have sides that are multiples of"),
        (
            ["--model", "{model}", "--prompt", "a cat", "--sampler", "euler_ancestral"],
            "euler_ancestral cannot unsample",
        ),
        (["--model", "{model}"], "the model takes a prompt; give --prompt, which may be empty"),
    ],
)
def test_unsample_refuses(args: list[str], message: str, directory: Path, photos: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text("{}")
    places = {"{model}": directory, "{photos}": photos, "{broken}": broken}
    given = [places.get(word, word) for word in args]
    assert message in fails("unsample", photos / "a.png", *given, "--out", tmp_path / "l.safetensors")
    assert not (tmp_path / "l.safetensors").exists()


def test_other_refusals(directory: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "there is no image" in fails("unsample", photos, "--model", directory, "--out", out)
    (tmp_path / "text.png").write_text("no image")
    assert "cannot read" in fails("unsample", tmp_path / "text.png", "--model", directory, "--out", out)
    assert "--cfg is for other models" in fails("invert", photos, "--model", directory, "--cfg", "2", "--out", out)
    assert "--prompt is for pipelines" in fails("invert", photos, "--model", "digits", "--prompt", "x", "--out", out)
    for flag, value in {
        "--positive": "label=1",
        "--negative": "label=1",
        "--import": "mine",
        "--shard-size": "2",
    }.items():
        said = fails("invert", photos, "--model", directory, flag, value, "--out", out)
        assert f"{flag} is for other models, and --model is a pipeline of diffusers; leave it out" in said
    assert "--model needs --images" in fails("bench", "--model", directory, "--out", out)
    assert "--count is for --model; a grid" in fails("bench", "--count", "2", "--out", out)
    assert "--steps is for --model without a grid" in fails(
        "bench", "--model", directory, "--preset", "quick", "--steps", 3
    )
    assert "count must be at most 2" in fails("bench", "--model", directory, "--images", photos, "--out", out)
    (tmp_path / "empty").mkdir()
    assert "there are no images in" in fails("invert", tmp_path / "empty", "--model", directory, "--out", out)
    latent = tmp_path / "other.safetensors"
    latent.write_bytes(b"nothing")
    assert "cannot read" in fails("sample", latent, "--out", tmp_path / "x.png")
    from safetensors.torch import save_file

    save_file({"latents": torch.zeros(1, 4, 8, 8)}, latent)
    assert "does not say how its latent was made" in fails("sample", latent, "--out", tmp_path / "x.png")


def test_a_stop_says_how_many_latents_are_kept(
    directory: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter([pipelines.latent_of, interrupted])
    monkeypatch.setattr(pipelines, "latent_of", lambda *args: next(calls)(*args))
    args = ["--model", directory, *CAT, "--sampler", "bdia", "--tol", "1e-3", "--out", tmp_path]
    result = run("invert", photos, *args)
    assert result.exit_code == 130 and "Traceback" not in result.stderr
    said = " ".join(result.stderr.split())
    assert said.endswith(f"Stopped: 1 of 2 latents are kept in {tmp_path}; the same command goes on.")
    monkeypatch.setattr(sampling, "image_of", interrupted)
    result = run("sample", tmp_path / "a.png.safetensors", "--out", tmp_path / "x.png")
    assert result.exit_code == 130 and "Stopped: 0 images are in" in result.stderr
    assert not (tmp_path / "x.png").exists()


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_missing_extras_and_too_little_memory_are_told(
    directory: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args: list[Any] = ["unsample", photos / "a.png", "--model", directory, "--out", tmp_path / "l.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr("kinvert.adapters.diffusers.directory.open_pipeline", out_of_memory)
        result = run(*args)
    assert result.exit_code == 1 and "CUDA out of memory. Use --dtype float16" in " ".join(result.stderr.split())
    for name in [name for name in sys.modules if name.startswith("kinvert.adapters.diffusers.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("directory", "host"):
        monkeypatch.delattr(kd, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install 'kinvert[diffusers]'" in fails(*args)


def out_of_memory(*_: Any, **__: Any) -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")


def test_what_is_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd15").mkdir()
    assert is_directory("sd15") and is_directory("models/sdxl") and is_directory(str(tmp_path))
    assert not is_directory("digits") and not is_directory("my_model:problem")
