"""Small pictures of tensors: which channels are shown and in which scale, and a PNG without a picture library."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kinvert.showing.html import Html, paragraph, strip

__all__ = ["Pictures", "are_images", "pictures", "png", "round_up", "thumbnails"]

MOST = 8  # pictures in a row
SIDE = 64  # pixels of a thumbnail's longer side
BROKEN = (255, 0, 255)  # the colour of values that are not finite


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images of a batch as pixels.

    Attributes:
        pixels: uint8, shape (count, H, W, 3), or (count, H, W, 1) for shades of grey.
        limit: the values from -limit to limit go from black to white.
        notes: what of the tensor is shown: channels, pixels and samples that are left out, values that are not finite.
    """

    pixels: np.ndarray
    limit: float
    notes: tuple[str, ...]

    def note(self, cmap: str = "gray") -> str:
        """Return the scale and the notes as a line; `cmap` is what matplotlib draws shades of grey with."""
        grey, a, b = self.pixels.shape[-1] == 1, f"{-self.limit:g}", f"{self.limit:g}"
        if grey and cmap not in ("gray", "gray_r"):
            scale = f"colours from {a} to {b}"
        else:
            scale = f"white {a}, black {b}" if grey and cmap == "gray_r" else f"black {a}, white {b}"
        return "; ".join((scale, *self.notes))


def are_images(x: Tensor) -> bool:
    """Tell whether a batch has the shape of images, (batch, channels, H, W), and at least one of 2 x 2 pixels."""
    return x.ndim == 4 and min(x.shape) > 0 and min(x.shape[2:]) > 1


def pictures(x: Tensor, limit: float | None = None, *, most: int = MOST, side: int | None = None) -> Pictures:
    """Turn the first images of a batch into pixels.

    One channel is shown in shades of grey, three as red, green and blue. Of two channels the mean is shown, of more
    than three the first three as colours; the note says so.

    Args:
        x: shape (batch, channels, H, W), see `are_images`.
        limit: the value of white; None takes the 99th percentile of the sizes: 1 if it is from 0.1 to 1.25, as it is of
            images in [-1, 1] and of what nearly is one, else rounded up.
        most: images to show.
        side: pixels of the longer side; of larger images every k-th pixel is shown. None keeps all.
    """
    shown, notes = x.detach()[:most], []
    channels, longest = shown.shape[1], max(shown.shape[2:])
    if channels == 2:
        shown = shown.to(torch.float32).mean(1, keepdim=True)
        notes.append("the mean of 2 channels")
    elif channels > 3:
        shown = shown[:, :3]
        notes.append(f"the first 3 of {channels} channels as colours")
    if side is not None and longest > side:
        every = math.ceil(longest / side)
        shown = shown[..., ::every, ::every]
        notes.append(f"1 of {every} pixels a side")
    values = shown.to("cpu", torch.float64).numpy()  # the one read of the device
    finite = np.isfinite(values)
    if limit is None:
        limit = _limit(np.abs(values[finite]))
    if len(x) > most:
        notes.append(f"{most} of {len(x)} samples")
    with np.errstate(invalid="ignore"):
        scaled = np.clip(np.where(finite, values, 0.0) / limit, -1.0, 1.0)
    pixels = np.round((scaled + 1.0) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    if not finite.all():
        pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3)).copy()
        pixels[~finite.all(1)] = BROKEN
        notes.append("values that are not finite in pink")
    return Pictures(pixels, limit, tuple(notes))


def _limit(sizes: np.ndarray) -> float:
    if not sizes.size:
        return 1.0
    most = float(np.quantile(sizes, 0.99))
    return 1.0 if 0.1 < most <= 1.25 else round_up(most)


def round_up(value: float) -> float:
    """Return the next of 1, 2, 5 or 10 times a power of ten, for a scale that can be read; 1 if there is none."""
    if not 0 < value < math.inf:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((step * power for step in (1, 2, 5) if value <= step * power), 10 * power)


def png(pixels: np.ndarray) -> bytes:
    """Write pixels, uint8 of shape (H, W, 1) or (H, W, 3), as a PNG file."""
    height, width, channels = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # the first byte of a row says that it is not filtered
    rows[:, 1:] = pixels.reshape(height, -1)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def thumbnails(title: str, x: Tensor | None, limit: float | None = None, labels: list[str] | None = None) -> Html:
    """Return a row of thumbnails with its title; a line that says why for what has no pictures.

    Args:
        title: what the pictures are.
        x: the batch, or None if there is none.
        limit: as in `pictures`.
        labels: a line below each picture, one for each sample of the batch; None numbers them.
    """
    if x is None:
        return paragraph(title, "there is none")
    if not are_images(x):
        return paragraph(title, f"no pictures: the shape {tuple(x.shape)} is not (batch, channels, height, width)")
    drawn = pictures(x, limit, side=SIDE)
    sources = ["data:image/png;base64," + base64.b64encode(png(one)).decode() for one in drawn.pixels]
    named = (labels or [str(i) for i in range(len(x))])[: len(sources)]
    return Html(paragraph(title, drawn.note()) + strip(sources, named))
