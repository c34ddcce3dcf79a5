"""Images to latents and back: what the pipeline itself decodes, and the inverse of it."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from pipelines import CALLS, EVENTS, build, latents_of, noise_for

from kinvert.adapters.diffusers.images import decode, encode

IMAGES = [family for family in CALLS if family != "stable_audio"]
PIPELINES = [family for family in IMAGES if family != "ddpm"]


def size_of(family: str) -> dict[str, Any]:
    """What `decode` has to be told: packed latents do not say the size of the image."""
    return {"height": 16, "width": 16} if family == "flux" else {}


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
@pytest.mark.parametrize("family", PIPELINES)
def test_decode_gives_what_the_pipeline_gives(family: str, output_type: str) -> None:
    pipe = build(family)
    call = {"latents": noise_for(family), "num_inference_steps": 2, **CALLS[family]}
    out = pipe(output_type=output_type, **call)
    wanted = out.frames if hasattr(out, "frames") else out.images
    found = decode(pipe, latents_of(pipe, family, 2), output_type=output_type, **size_of(family))
    assert type(found) is type(wanted)
    if output_type == "pil":
        wanted, found = (np.stack([np.asarray(image) for image in np.ravel(images)]) for images in (wanted, found))
        assert np.abs(wanted.astype(int) - found.astype(int)).max() <= 1  # halves are rounded in another way
    else:
        assert wanted.shape == found.shape
        assert float(abs(wanted - found).max()) < 1e-6


class Halving(torch.nn.Module):
    """A VAE that keeps every second pixel; and repeats it."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32

    def encode(self, pixels: torch.Tensor) -> Any:
        return types.SimpleNamespace(latent=pixels[..., ::2, ::2])

    def decode(self, z: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (z.repeat_interleave(2, -1).repeat_interleave(2, -2),)


def with_vae(vae: Any, packed: bool = False) -> Any:
    pipe = types.SimpleNamespace(vae=vae, device=torch.device("cpu"), dtype=torch.float32, vae_scale_factor=2)
    if packed:
        pipe._pack_latents = lambda latents, batch_size, num_channels_latents, height, width: None
    return pipe


def picture(height: int = 8, width: int = 12, batch: int = 2) -> torch.Tensor:
    """Blocks of 2 x 2 equal pixels, which `Halving` loses nothing of."""
    cells = torch.rand(batch, 3, height // 2, width // 2, generator=torch.Generator().manual_seed(0))
    return cells.repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("config", "mean", "scale"),
    [
        ({}, [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),
        ({"scaling_factor": 0.5}, [0.0] * 3, [0.5] * 3),
        ({"scaling_factor": 1.5, "shift_factor": 0.06, "latents_mean": None}, [0.06] * 3, [1.5] * 3),
        (
            {"scaling_factor": 0.5, "latents_mean": [0.1, 0.2, 0.3], "latents_std": [1.0, 2.0, 4.0]},
            [0.1, 0.2, 0.3], [0.5, 0.25, 0.125],
        ),
    ],
)  # fmt: skip
def test_latents_are_scaled_as_the_vae_says_and_back(
    config: dict[str, Any], mean: list[float], scale: list[float], packed: bool
) -> None:
    pipe, image = with_vae(Halving(**config), packed), picture()
    found = encode(pipe, image)
    m, s = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (mean, scale))
    wanted = ((2 * image - 1)[..., ::2, ::2] - m) * s
    if packed:
        assert found.shape == (2, 2 * 3, 12)
        assert torch.allclose(found[0, 0], wanted[0, :, :2, :2].flatten())
        assert torch.allclose(found[1, 1], wanted[1, :, :2, 2:4].flatten())
    else:
        assert torch.allclose(found, wanted)
    size = {"height": 8, "width": 12} if packed else {}
    assert torch.allclose(decode(pipe, found, output_type="pt", **size), image, atol=1e-6)


@pytest.mark.parametrize("family", IMAGES)
def test_an_image_of_any_kind_has_the_same_latents(family: str) -> None:
    pipe = build(family)
    pictures = decode(pipe, noise_for(family), output_type="pil", **size_of(family))
    frames = pictures[0] if family == "wan" else pictures
    array = np.stack([np.asarray(frame) for frame in frames])
    array = array[None] if family == "wan" else array
    tensor = torch.from_numpy(array).movedim(-1, -3)
    found = encode(pipe, frames)
    assert found.shape[1:] == EVENTS[family]
    for other in (array, tensor, array / 255, tensor / 255, tensor[0] / 255):
        assert torch.allclose(encode(pipe, other), found, atol=1e-5)
    if family != "wan":
        assert torch.equal(encode(pipe, frames[0]), found)


def test_a_photo_is_resized_on_demand() -> None:
    from PIL import Image

    pipe = build("sd15")
    photo = Image.new("RGBA", (30, 17), (255, 0, 0, 255))
    assert encode(pipe, photo, height=16, width=24).shape == (1, 4, 8, 12)
    with pytest.raises(ValueError, match=r"multiples of 2, got \(17, 30\); .* height=16, width=30"):
        encode(pipe, photo)


def test_a_vae_that_overflows_in_half_precision_computes_in_float32() -> None:
    vae = Halving(force_upcast=True)
    vae.dtype = torch.float16
    pipe = with_vae(vae)
    seen: list[torch.dtype] = []

    def moved(dtype: torch.dtype) -> None:
        seen.append(dtype)
        vae.dtype = dtype

    vae.to = moved  # type: ignore[method-assign]
    assert encode(pipe, picture(16, 16)).dtype == torch.float32
    assert seen == [torch.float32, torch.float16]


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (2 * picture() - 1, ValueError, r"from 0 to 1, got -.*use \(image \+ 1\) / 2"),
        (255 * picture(), ValueError, "image / 255 for floats from 0 to 255"),
        (picture().long(), TypeError, "got torch.int64"),
        (picture() * torch.nan, ValueError, "NaN"),
        (picture()[0, 0], ValueError, r"shape \(batch, 3, H, W\), .*got \(8, 12\)"),
        ("photo.png", TypeError, "a PIL image, a list of them, an array or a tensor, got 'photo.png'"),
        ([picture()], TypeError, "a PIL image, a list"),
        (picture(10, 12), ValueError, r"multiples of 4, got \(10, 12\)"),
    ],
)
def test_images_that_cannot_be_encoded_are_refused(image: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encode(with_vae(Halving(), packed=True), image)


def test_what_cannot_be_encoded_or_decoded_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="height and width resize PIL images"):
        encode(build("sd15"), picture(), height=8)
    with pytest.raises(ValueError, match="a multiple of 4 frames and one more, got 6"):
        encode(build("wan"), torch.rand(1, 6, 3, 32, 32))
    with pytest.raises(ValueError, match="unknown output_type 'latent'"):
        decode(build("sd15"), noise_for("sd15"), output_type="latent")
    with pytest.raises(TypeError, match="latents must be a floating point tensor"):
        decode(build("sd15"), noise_for("sd15").long())
    with pytest.raises(ValueError, match="the decoded image has 768 NaN"):
        decode(build("sd15"), noise_for("sd15") * torch.nan)
    with pytest.raises(ValueError, match="packs its latents, so they do not say the size"):
        decode(build("flux"), noise_for("flux"))
    with pytest.raises(ValueError, match=r"\(batch, 32, 4 C\) for an image of 16 x 32, got \(1, 16, 16\)"):
        decode(build("flux"), noise_for("flux"), height=16, width=32)


def test_pipelines_with_latents_of_their_own_are_refused() -> None:
    pipe = with_vae(Halving())
    pipe._pack_latents = lambda latents, patch_size: None
    with pytest.raises(ValueError, match="packs its latents in its own way"):
        encode(pipe, picture())
    pipe = with_vae(Halving(latents_mean=[0.0], latents_std=[1.0], shift_factor=0.5))
    with pytest.raises(ValueError, match="a shift_factor, 0.5"):
        encode(pipe, picture())
    pipe.vae.bn = torch.nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="statistics inside the VAE"):
        decode(pipe, picture())
