"""Images and latents in files: what is written is read, and what is left out is said."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kinvert import pictures

BYTES = torch.arange(2 * 3 * 4).reshape(3, 2, 4) * 10
COLOURS = BYTES.double() / 127.5 - 1


@pytest.mark.parametrize("ending", [".png", ".PNG", ".webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_without_loss_comes_back(ending: str, channels: int, tmp_path: Path) -> None:
    path, x = tmp_path / "new" / f"a{ending}", COLOURS[:channels]
    pictures.write(x[None], path)
    again = pictures.read(path, channels=channels, dtype=torch.float64)
    torch.testing.assert_close(again, x, rtol=0, atol=1e-12)
    assert pictures.read(path).dtype == torch.float32
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_what_is_outside_is_clipped_and_bytes_are_rounded(tmp_path: Path) -> None:
    pictures.write(torch.tensor([[[-3.0, 0.0, 0.002, 1.7]]], dtype=torch.float16), tmp_path / "a.png")
    assert np.array(Image.open(tmp_path / "a.png")).tolist() == [[0, 128, 128, 255]]
    pictures.write(COLOURS, tmp_path / "a.jpg")
    assert (pictures.read(tmp_path / "a.jpg") - COLOURS).abs().mean() < 0.3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ending", [".npy", ".npz", ".pt", ".safetensors", ".latent"])
def test_tensors_come_back_exactly(ending: str, dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(2, 3)
    path = tmp_path / f"a{ending}"
    if ending in (".npy", ".npz") and dtype == torch.bfloat16:
        with pytest.raises(ValueError, match="NumPy has no bfloat16"):
            pictures.write(x, path)
        return
    pictures.write(x.requires_grad_(), path)
    again = pictures.read(path)
    assert torch.equal(again.to(dtype), x) and again.dtype == (torch.float32 if ending == ".latent" else dtype)
    assert pictures.read(path, dtype=torch.float64).dtype == torch.float64


def test_latents_of_comfyui(tmp_path: Path) -> None:
    x = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    pictures.write(x, tmp_path / "new.latent")
    assert set(load_file(tmp_path / "new.latent")) == {"latent_tensor", "latent_format_version_0"}
    save_file({"latent_tensor": 0.18215 * x}, tmp_path / "old.latent")
    torch.testing.assert_close(pictures.read(tmp_path / "old.latent"), x)
    with pytest.raises(ValueError, match=r"has the shape \(batch, channels, \.\.\.\), got \(2, 2\)"):
        pictures.write(x[0, 0], tmp_path / "bad.latent")


def test_a_camera_turns_an_image(tmp_path: Path) -> None:
    image = Image.fromarray(BYTES.movedim(0, -1).to(torch.uint8).numpy())
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "a.png", exif=exif)
    turned = pictures.read(tmp_path / "a.png", dtype=torch.float64)
    torch.testing.assert_close(turned, COLOURS.rot90(-1, (1, 2)), rtol=0, atol=1e-12)
    assert pictures.open_image(tmp_path / "a.png").size == (2, 4)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    image = Image.fromarray(BYTES.movedim(0, -1).to(torch.uint8).numpy())
    opaque = image.copy()
    opaque.putalpha(255)
    opaque.save(tmp_path / "opaque.png")
    clear = image.copy()
    clear.putalpha(7)
    clear.save(tmp_path / "clear.png")
    image.convert("P").save(tmp_path / "moving.webp", save_all=True, append_images=[image.rotate(180)], lossless=True)
    grey = image.convert("L").convert("RGB")
    grey.save(tmp_path / "grey.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pictures.read(tmp_path / "opaque.png"), COLOURS.float())
        assert pictures.read(tmp_path / "grey.png", channels=1).shape == (1, 2, 4)
        assert pictures.read(tmp_path / "opaque.png", channels=3).shape == (3, 2, 4)
    with pytest.warns(RuntimeWarning, match=r"clear\.png: its transparency is left out") as told:
        assert torch.equal(pictures.read(tmp_path / "clear.png"), COLOURS.float())
    assert Path(told[0].filename).name == "test_pictures.py"
    with pytest.warns(RuntimeWarning, match=r"moving\.webp: the other frames are left out\. It has 2 frames"):
        pictures.read(tmp_path / "moving.webp")
    with pytest.warns(RuntimeWarning, match=r"clear\.png: its transparency and its colours are left out"):
        assert pictures.read(tmp_path / "clear.png", channels=1).shape == (1, 2, 4)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    (tmp_path / "a.npy").write_text("no array")
    (tmp_path / "a.pt").write_text("no tensor")
    (tmp_path / "a.safetensors").write_text("nothing")
    np.savez(tmp_path / "two.npz", a=np.zeros(2), b=np.zeros(2))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "ints.npy", np.arange(3))
    Image.fromarray(np.zeros((2, 2), dtype=np.uint16)).save(tmp_path / "deep.png")
    for name, message in (
        ("a.png", "cannot identify"), ("a.npy", ""), ("a.pt", ""), ("a.safetensors", ""), ("nowhere.npy", "No such file"),
        ("nowhere.png", "No such file"), ("two.npz", "must hold one tensor, it has a, b"), ("object.npy", "allow_pickle"),
        ("ints.npy", "must hold a floating point tensor, it has torch.int64"), ("deep.png", "convert it to 8 bits"),
        ("a.gif", "its ending must be one of .png"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"cannot read .*{name.replace('.', '[.]')}.*{message}"):
            pictures.read(tmp_path / name)
    with pytest.raises(ValueError, match="channels must be 1"):
        pictures.read(tmp_path / "a.png", channels=2)


def test_whatever_a_reader_raises_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses an image with very many pixels by an error of its own kind."""
    pictures.write(COLOURS, tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with pytest.raises(ValueError, match=r"cannot read .*large\.png: Image size .* decompression bomb"):
        pictures.read(tmp_path / "large.png")


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    x = COLOURS.float()
    for value, name, error, message in (
        (x[:2], "a.png", ValueError, r"has the shape \(1 or 3, height, width\), got \(2, 2, 4\)"),
        (x / 0, "a.png", ValueError, "NaN or infinite"),
        (x, "a.gif", ValueError, "its ending must be one of"),
        (x.int(), "a.npy", TypeError, "x must be a floating point tensor"),
        (x, "a.png/b.png", ValueError, "cannot write"),
    ):
        with pytest.raises(error, match=message):
            pictures.write(value, tmp_path / name)
        pictures.write(x, tmp_path / "a.png")
    with pytest.raises(ValueError, match="the model makes videos"):
        pictures.save_image([Image.new("L", (1, 1))], tmp_path / "a.png")
    with pytest.raises(ValueError, match="the ending must be that of an image"):
        pictures.save_image(Image.new("L", (1, 1)), tmp_path / "a.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_images_of_folders(tmp_path: Path) -> None:
    for name in ("b/x.JPG", "a.png", "c.txt", "d.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert [path.name for path in pictures.image_files(tmp_path)] == ["a.png", "x.JPG"]
    assert pictures.image_files(tmp_path / "c.txt") == [tmp_path / "c.txt"]
    with pytest.raises(ValueError, match="there is no file or folder"):
        pictures.image_files(tmp_path / "nowhere")
    (tmp_path / "e").mkdir()
    with pytest.raises(ValueError, match=r"there are no images in .*it takes \.png"):
        pictures.image_files(tmp_path / "e")


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs Pillow.*pip install 'kinvert\[cli\]'"):
        pictures.read(tmp_path / "a.png")
    pictures.write(COLOURS, tmp_path / "a.npy")
    assert torch.equal(pictures.read(tmp_path / "a.npy"), COLOURS)
