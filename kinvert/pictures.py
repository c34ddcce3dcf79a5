"""Images and latents in files: read as tensors, and written.

| Ending | |
| --- | --- |
| `.png`, `.jpg`, `.jpeg`, `.webp` | an image of 8 bits a channel: (channels, height, width), 0 to 255 become -1 to 1 |
| `.npy`, `.npz` | an array of NumPy; an archive must hold one |
| `.pt` | a tensor of torch, read by `torch.load(weights_only=True)` |
| `.safetensors` | one tensor |
| `.latent` | a latent of ComfyUI, as its VAE made it: shape (batch, channels, height, width) |

A `.latent` is in the unit of the VAE. A network of Stable Diffusion takes `0.18215` times that, other models have other
factors, and only the model knows which. Images need Pillow: `pip install 'kinvert[cli]'`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from kinvert.checks import check_dense, check_values, describe
from kinvert.files import make_folder, write_file
from kinvert.telling import warn_user

__all__ = ["IMAGES", "TENSORS", "image_files", "open_image", "pillow", "read", "save_image", "write"]

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of images."""
TENSORS = (".safetensors", ".npy", ".npz", ".pt", ".latent")
"""Endings of files of tensors."""
MODES = {1: "L", 3: "RGB"}
OLD_LATENTS = 0.18215  # what ComfyUI divides a latent by that has no mark of its version
MARK, SAMPLES = "latent_format_version_0", "latent_tensor"
_SETTINGS: dict[str, dict[str, Any]] = {".jpg": {"quality": 95}, ".jpeg": {"quality": 95}, ".webp": {"lossless": True}}


def image_files(source: Path | str, endings: Sequence[str] = IMAGES) -> list[Path]:
    """Return an image, or the images of a folder and of the folders in it, sorted by name.

    Args:
        source: a file or a folder.
        endings: of the names of the files that count.

    Raises:
        ValueError: there are none.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ValueError(f"there is no file or folder {str(source)!r}")
    named = [path for path in sorted(source.rglob("*")) if path.suffix.lower() in endings]
    found = [path for path in named if path.is_file() or not path.exists()]  # a link to nowhere cannot be read
    if not found:
        what = "images" if tuple(endings) == IMAGES else "images or latents"
        raise ValueError(f"there are no {what} in {str(source)!r}; it takes {', '.join(endings)}")
    return found


# -- reading -----------------------------------------------------------------------------------------------------------
def read(path: Path | str, *, channels: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Read an image or a file of one tensor; the ending of the name says which.

    Args:
        path: the file; see the module.
        channels: of an image: 1 makes it grey, 3 RGB; None takes what it has. Not for tensors.
        dtype: of the result; None is float32 for an image, and what the file has for a tensor.

    Returns:
        Shape (channels, height, width) with values from -1 to 1 for an image; the tensor of another file.

    Raises:
        ValueError: a file that cannot be read, with its name; an unknown ending; not exactly one tensor in it.
        ModuleNotFoundError: Pillow is missing.

    Warns:
        RuntimeWarning: transparency, further frames or colours that are left out.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (*IMAGES, *TENSORS):
        raise ValueError(f"cannot read {path}: its ending must be one of {', '.join((*IMAGES, *TENSORS))}")
    if ending in IMAGES:
        return _pixels(path, channels).to(dtype or torch.float32)
    try:
        found = _tensor(path)
        found = found.to(dtype or found.dtype)
        check_values("the tensor", found, "it is to be read")
        check_dense("the tensor", found)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever the readers raise
        raise ValueError(f"cannot read {path}: {str(error) or type(error).__name__}") from error
    return found.detach()


def open_image(path: Path | str, mode: str | None = "RGB") -> Any:
    """Return an image as PIL has it, turned as its camera says.

    Args:
        path: the file.
        mode: of PIL, "RGB" or "L" (grey); None takes the one that fits the image.

    Raises:
        ValueError: a file that cannot be read, or one of more than 8 bits a channel.
        ModuleNotFoundError: Pillow is missing.

    Warns:
        RuntimeWarning: transparency, further frames or colours that are left out.
    """
    from_pillow = pillow()
    from PIL import ImageOps

    try:
        with from_pillow.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its mode is {image.mode}; convert it to 8 bits a channel")
            turned, frames = ImageOps.exif_transpose(image), getattr(image, "n_frames", 1)
            lost = ["the other frames"] if frames > 1 else []
            lost += ["its transparency"] if _is_transparent(turned) else []
            given = "L" if turned.mode in ("1", "L", "LA") else "RGB"
            colours = turned.convert(given)
    except Exception as error:  # whatever the reader of a format raises
        raise ValueError(f"cannot read {path}: {str(error) or type(error).__name__}") from error
    result = colours.convert(mode or given)
    if result.mode == "L" and given == "RGB" and not np.array_equal(np.array(result.convert("RGB")), np.array(colours)):
        lost += ["its colours"]
    if lost:
        more = f" It has {frames} frames, of which the first is taken." if frames > 1 else ""
        warn_user(f"{path}: {' and '.join(lost)} are left out.{more}".replace("transparency are", "transparency is"))
    return result


def _is_transparent(image: Any) -> bool:
    if not (image.mode.endswith("A") or "transparency" in image.info):
        return False
    return bool(image.convert("RGBA").getextrema()[3][0] < 255)


def _pixels(path: Path, channels: int | None) -> Tensor:
    """Return an image, shape (channels, height, width), float64."""
    if channels is not None and channels not in MODES:
        raise ValueError(f"channels must be 1 (grey), 3 (RGB) or None, got {channels!r}")
    pixels = np.array(open_image(path, None if channels is None else MODES[channels]), dtype=np.float64)
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).movedim(-1, 0) / 127.5 - 1.0


def _tensor(path: Path) -> Tensor:
    """Return the floating point tensor of a file."""
    found: Any
    if path.suffix.lower() in (".safetensors", ".latent"):
        tensors = load_file(path)
        found = _of_comfyui(tensors) if SAMPLES in tensors else _only(tensors)
    elif path.suffix.lower() == ".pt":
        found = torch.load(path, map_location="cpu", weights_only=True)
    else:
        loaded = np.load(path, allow_pickle=False)
        found = torch.from_numpy(loaded if isinstance(loaded, np.ndarray) else _only(loaded))
    if not isinstance(found, Tensor) or not found.is_floating_point():
        got = getattr(found, "dtype", type(found).__name__)
        raise TypeError(f"it must hold a floating point tensor, it has {got}")
    return found


def _of_comfyui(tensors: dict[str, Tensor]) -> Tensor:
    """Return the latent of ComfyUI; one without the mark of its version was saved multiplied by 0.18215."""
    samples = tensors[SAMPLES].float()
    return samples if MARK in tensors else samples / OLD_LATENTS


def _only(named: Any) -> Any:
    names = list(named)
    if len(names) != 1:
        raise ValueError(f"it must hold one tensor, it has {', '.join(names) or 'none'}")
    return named[names[0]]


# -- writing -----------------------------------------------------------------------------------------------------------
def write(x: Tensor, path: Path | str) -> None:
    """Write a tensor as an image or as a file of one tensor; the ending of the name says which.

    Args:
        x: an image of shape (1 or 3, height, width) or (1, 1 or 3, height, width), values from -1 to 1; what is outside
            is clipped. Any tensor for `.npy`, `.npz`, `.pt` and `.safetensors`; one of shape (batch, channels, ...), in
            the unit of the VAE, for `.latent`.
        path: the file to create or replace; its folder is made. JPEG loses details.

    Raises:
        TypeError: x is no floating point tensor.
        ValueError: a shape that does not fit, values that are not finite, an unknown ending, a file that cannot be
            written.
        ModuleNotFoundError: Pillow is missing.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating point tensor, got {describe(x)}")
    if ending not in (*IMAGES, *TENSORS):
        raise ValueError(f"cannot write {str(path)!r}: its ending must be one of {', '.join((*IMAGES, *TENSORS))}")
    x = x.detach().cpu().contiguous()
    if ending in IMAGES:
        save_image(_picture(x, path), path)
        return
    _put(path, _bytes_of(x, path))


def save_image(image: Any, path: Path | str) -> None:
    """Write a PIL image, whole or not at all; the ending of the name says how.

    Raises:
        ValueError: an unknown ending, a file that cannot be written, a video.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if isinstance(image, list):
        raise ValueError("the model makes videos, which the command line does not write; use Python")
    form = pillow().registered_extensions().get(ending)
    if form is None:
        raise ValueError(f"cannot write {str(path)!r}: the ending must be that of an image, e.g. {', '.join(IMAGES)}")
    _put(path, lambda file: image.save(file, format=form, **_SETTINGS.get(ending, {})))


def _picture(x: Tensor, path: Path) -> Any:
    """Return a tensor as a PIL image."""
    shown = x[0] if x.ndim == 4 and len(x) == 1 else x
    if shown.ndim != 3 or shown.shape[0] not in MODES:
        raise ValueError(
            f"cannot write {str(path)!r}: an image has the shape (1 or 3, height, width), got {tuple(x.shape)}; write "
            "latents as .safetensors"
        )
    if not bool(torch.isfinite(shown).all()):
        raise ValueError(f"cannot write {str(path)!r}: it has NaN or infinite values")
    levels = ((shown.double() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    pixels = levels.movedim(0, -1).numpy()
    return pillow().fromarray(pixels[..., 0] if shown.shape[0] == 1 else pixels)


def _bytes_of(x: Tensor, path: Path) -> bytes | Callable[[BinaryIO], Any]:
    ending = path.suffix.lower()
    if ending == ".safetensors":
        return save({"tensor": x})
    if ending == ".latent":
        if x.ndim < 3:
            raise ValueError(f"a latent of ComfyUI has the shape (batch, channels, ...), got {tuple(x.shape)}")
        return save({SAMPLES: x, MARK: torch.empty(0, device="cpu")})
    if ending == ".pt":
        return lambda file: torch.save(x.clone(), file)
    if x.dtype == torch.bfloat16:
        raise ValueError(f"cannot write {str(path)!r}: NumPy has no bfloat16; use .safetensors, or x.float()")
    array, buffer = x.numpy(), io.BytesIO()
    if ending == ".npz":
        np.savez(buffer, tensor=array)
    else:
        np.save(buffer, array)
    return buffer.getvalue()


def _put(path: Path, content: bytes | Callable[[BinaryIO], Any]) -> None:
    try:
        make_folder(path.parent)
        write_file(path, content)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot write {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error


def pillow() -> Any:
    """Return the module `PIL.Image`.

    Raises:
        ModuleNotFoundError: Pillow is missing, with the fix.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading and writing images needs Pillow, which is not here: pip install 'kinvert[cli]'"
        ) from error
    return Image
