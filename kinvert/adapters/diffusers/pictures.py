"""Images of a folder, as the models of diffusers take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["IMAGES", "image_files", "open_image", "save_image"]

IMAGES = (".png", ".jpg", ".jpeg", ".webp")


def image_files(source: Path) -> list[Path]:
    """Return an image, or the images of a folder and of the folders in it, sorted by name.

    Raises:
        ValueError: there are none.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ValueError(f"there is no file or folder {str(source)!r}")
    found = [path for path in sorted(source.rglob("*")) if path.is_file() and path.suffix.lower() in IMAGES]
    if not found:
        raise ValueError(f"there are no images in {str(source)!r}; it takes {', '.join(IMAGES)}")
    return found


def open_image(path: Path) -> Any:
    """Return an image as PIL has it, in RGB, turned as its camera says.

    Raises:
        ValueError: a file that cannot be read, or one of more than 8 bits a channel.
        ModuleNotFoundError: Pillow is missing.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading images needs Pillow, which is not here: pip install 'kinvert[cli]'"
        ) from error
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its mode is {image.mode}; convert it to 8 bits a channel")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def save_image(image: Any, path: Path) -> None:
    """Write a PIL image; the ending of the name says how.

    Raises:
        ValueError: an unknown ending, a folder that does not exist, a video.
    """
    if isinstance(image, list):
        raise ValueError("the model makes videos, which the command line does not write; use Python")
    try:
        image.save(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot write {str(path)!r}: {error}") from error
