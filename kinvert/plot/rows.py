"""Rows of pictures: images, latents with their distribution, and differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kinvert.checks import check_count, check_positive, check_values, describe, plain
from kinvert.edits import Edited
from kinvert.inversion import Inversion
from kinvert.plot.curves import named
from kinvert.plot.page import Page
from kinvert.plot.style import GREY, STYLE, looks_of
from kinvert.roundtrip import RoundTrip, unit_latent
from kinvert.showing.thumbnails import are_images, round_up

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Shown", "differences", "images", "latents"]

Shown = Tensor | Inversion | RoundTrip | Edited
"""What has images: a batch, or a result, of which it is what the sampler made of the latent."""
SIDE, SPACE, LINE, TOP, GAP = 0.75, 0.05, 0.22, 0.12, 0.35  # inches: an image, space beside and below, margins
EDGES = np.linspace(-5.0, 5.0, 51)  # of the histogram of latents


def images(
    shown: Shown | Mapping[str, Shown], *, most: int = 8, limit: float | None = None, cmap: str = "gray"
) -> Figure:
    """Draw images in rows, with a line that says what black and white are.

    Args:
        shown: a batch of images, (batch, channels, H, W), or a result, or several by name, a row for each.
        most: images of a batch to draw.
        limit: the colours go from -limit to limit; None takes 1 for values in [-1, 1], else what their size asks for,
            for each row by itself.
        cmap: matplotlib's colours for images of one channel; "gray_r" draws large values black, like ink. Three
            channels are drawn as red, green and blue; of other numbers the line says which are shown.

    Raises:
        TypeError: something that has no images.
        ValueError: another shape; an `Inversion` that was not checked, so that it has no image.
        ModuleNotFoundError: matplotlib is missing.
    """
    most, limit = check_count("most", most), None if limit is None else check_positive("limit", limit)
    rows = {name: _images("shown", name, one) for name, one in named(shown, "shown").items()}
    page = _Rows(rows, min(most, max(map(len, rows.values()))))
    page.draw(rows, most, limit, cmap)
    return page.whole


def latents(shown: Shown | Mapping[str, Shown], *, sigma: float | None = None, most: int = 8) -> Figure:
    """Draw latents in units of their noise level, and below them the distribution of their values.

    A latent that looks like noise has the density of the dashed line, a standard normal; values beyond 5 count as 5.
    The legend has mean and standard deviation of all values. Latents that are no images have the distribution alone.

    Args:
        shown: a result, or several by name. A tensor must come with `sigma`.
        sigma: the noise level of tensors, by which they are divided.
        most: latents of a batch to draw.

    Raises:
        TypeError: something that has no latent.
        ValueError: a tensor without `sigma`, or `sigma` without a tensor.
        ModuleNotFoundError: matplotlib is missing.
    """
    found, most = named(shown, "shown"), check_count("most", most)
    if sigma is not None and not any(isinstance(one, Tensor) for one in found.values()):
        raise ValueError("sigma is for latents that are tensors, and a result knows its own; leave it out")
    units = {name: _unit_latent(name, one, sigma) for name, one in found.items()}
    pictured = {name: x for name, x in units.items() if are_images(x)}
    room = 2.3 + 0.16 * len(units)
    page = _Rows(pictured, min(most, max(map(len, units.values()))), below=room)
    page.draw(pictured, most, 3.0, "gray")
    _draw_distribution(page, page.height - room, units)
    return page.whole


def differences(
    shown: Shown | Mapping[str, Shown], image: Tensor, *, most: int = 5, limit: float | None = None, cmap: str = "gray"
) -> Figure:
    """Draw results beside their difference from an image, with the rms error of the whole batch.

    Red is where a result is larger than the image, blue where it is smaller. The colours of each row end at the error
    `s` beside it, beyond which one value in a hundred lies. Of several channels the largest difference of a pixel is
    shown.

    Args:
        shown: what to compare with the image: a batch, a result, or several by name.
        image: the images, (batch, channels, H, W).
        most: images of a batch to draw.
        limit: `s` for all rows; None fits it to each row.
        cmap: as in `images`.

    Raises:
        TypeError: something that has no images.
        ValueError: another shape than that of the image; as in `images`.
        ModuleNotFoundError: matplotlib is missing.
    """
    most, limit = check_count("most", most), None if limit is None else check_positive("limit", limit)
    image = _images("image", "", image)
    rows = {name or "sampled back": _images("shown", name, one) for name, one in named(shown, "shown").items()}
    if "image" in rows:
        raise ValueError("shown['image'] has the name of the row of the image; give it another name")
    for name, x in rows.items():
        if x.shape != image.shape:
            raise ValueError(f"{name!r} has the shape {tuple(x.shape)}, and the image has {tuple(image.shape)}")
    count = min(most, len(image))
    every = {"image": image} | rows
    page = _Rows(every, 2 * count, right=GAP + 0.8)
    page.draw(every, most, None, cmap)
    beside = page.left + count * (SIDE + SPACE) + GAP
    page.text(beside, page.top(1) - 0.12, "difference", weight="bold")
    for k, x in enumerate(rows.values(), 1):
        error = x.double() - image.double()
        sizes = error[:most][error[:most].isfinite()].abs()
        scale = limit or round_up(float(np.quantile(sizes.numpy(), 0.99)) if len(sizes) else 0.0)
        page.tiles(beside, page.top(k), _largest(error[:most]), scale, "RdBu_r", SIDE, SPACE)
        right, middle = page.width - 0.85, page.top(k) + page.tall / 2
        page.text(right, middle - 0.09, f"rms {float(error.square().mean().sqrt()):.2g}", fontsize=8)
        page.text(right, middle + 0.09, f"s = {scale:g}", color=GREY, fontsize=8)
    return page.whole


# -- parts -------------------------------------------------------------------------------------------------------------
def _images(argument: str, name: str, shown: object) -> Tensor:
    """Return the images of a batch or of a result, on the CPU."""
    what = f"{argument}[{name!r}]" if name else argument
    if isinstance(shown, Inversion):
        if shown.restored is None:
            raise ValueError(f"{what} has no image, since it was not sampled again; use ki.invert with check=True")
        shown = shown.restored
    elif isinstance(shown, RoundTrip):
        shown = shown.reconstruction
    elif isinstance(shown, Edited):
        shown = shown.image
    x = _tensor(what, shown)
    if not are_images(x):
        raise ValueError(
            f"{what} must be images of the shape (batch, channels, height, width), got {tuple(x.shape)}; one image is "
            "x[None], and ki.plot.latents draws the distribution of any shape"
        )
    return x


def _unit_latent(name: str, shown: object, sigma: float | None) -> Tensor:
    """Return a latent in units of its noise level, on the CPU."""
    what = f"shown[{name!r}]" if name else "shown"
    if isinstance(shown, Inversion | Edited):
        return _tensor(what, shown.latent) / shown.sigmas[0]
    if isinstance(shown, RoundTrip):
        return _tensor(what, unit_latent(shown))
    x = _tensor(what, shown)
    if sigma is None:
        raise ValueError(f"{what} is a tensor, whose noise level is not known: give sigma, or sigma=1 for units of it")
    return x / check_positive("sigma", sigma)


def _tensor(what: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{what} must be a tensor, an Inversion, a RoundTrip or an Edited, got {describe(x)}")
    check_values(what, x, "they are drawn")
    if x.is_complex() or x.dtype == torch.bool or not x.numel():
        raise ValueError(f"{what} must have real numbers to draw, got {x.dtype} of shape {tuple(x.shape)}")
    return plain(x).detach().to("cpu", torch.float64)


def _largest(x: Tensor) -> Tensor:
    """Return of each pixel the channel with the largest size, with its sign: shape (batch, 1, H, W)."""
    return x.gather(1, x.abs().argmax(1, keepdim=True))


class _Rows(Page):
    """A page of rows of images, with a name before each row.

    Args:
        rows: the images by name.
        across: the most images in a row.
        right, below: room beside and below the rows.
    """

    def __init__(self, rows: Mapping[str, Tensor], across: int, right: float = 0.0, below: float = 0.0) -> None:
        self.left = TOP + 0.095 * max(map(len, rows), default=0) + (0.1 if any(rows) else 0.0)
        self.tall = max((SIDE * x.shape[2] / max(x.shape[2:]) for x in rows.values()), default=0.0)
        width = self.left + across * (SIDE + SPACE) + right + TOP
        super().__init__(max(width, 4.5), 2 * TOP + (self.tall + LINE) * len(rows) + below)

    def top(self, row: int) -> float:
        """Return where a row begins."""
        return TOP + row * (self.tall + LINE)

    def draw(self, rows: Mapping[str, Tensor], most: int, limit: float | None, cmap: str) -> None:
        """Draw the rows, and below them a line that says what is shown, once for neighbours that have the same."""
        notes = []
        for k, (name, x) in enumerate(rows.items()):
            self.text(TOP, self.top(k) + self.tall / 2, name, weight="bold")
            note = self.tiles(self.left, self.top(k), x[:most], limit, cmap, SIDE, SPACE)
            notes.append(note if len(x) <= most else f"{note}; {most} of {len(x)} samples")
        for k, note in enumerate(notes):
            if note not in notes[k + 1 : k + 2]:
                self.text(self.left, self.top(k) + self.tall + 0.1, note, color=GREY, fontsize=7)


def _draw_distribution(page: Page, top: float, units: Mapping[str, Tensor]) -> None:
    """Draw the density of each latent on axes of the width of the page."""
    from matplotlib import rc_context

    from kinvert.plot.axes import density, normal_curve

    with rc_context(STYLE):
        ax = page.axes(0.6, top + 0.1, page.width - 0.75, 1.6)
        handles = []
        for name, looks in looks_of(units).items():
            values = units[name].flatten()
            moments = f"mean {values.mean():+.3f}, std {values.std(correction=0):.3f}"
            counts, _ = np.histogram(values.clamp(EDGES[0], EDGES[-1]).numpy(), EDGES)
            handles.append(density(ax, counts, EDGES, looks, f"{name}: {moments}" if name else moments))
        normal_curve(ax, EDGES[0], EDGES[-1])
        ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(-0.02, -0.24))
