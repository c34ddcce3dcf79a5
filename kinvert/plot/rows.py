"""Rows of pictures: images, latents with their distribution, and differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kinvert.checks import check_count, check_positive, check_values, describe, plain
from kinvert.inversion import Inversion
from kinvert.plot.curves import named
from kinvert.plot.page import Page
from kinvert.plot.style import GREY, STYLE, look, numbers
from kinvert.roundtrip import RoundTrip, unit_latent
from kinvert.showing.thumbnails import are_images, round_up

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Shown", "differences", "images", "latents"]

Shown = Tensor | Inversion | RoundTrip
"""What has images: a batch, or a result, of which it is what the sampler made of the latent."""
SIDE, SPACE, PITCH, TOP, GAP = 0.75, 0.05, 1.0, 0.12, 0.35  # inches: an image, the space beside it, a row, margins
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
    page, left = _page(rows, min(most, max(map(len, rows.values()))))
    _draw_rows(page, left, rows, most, limit, cmap)
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
    page, left = _page(pictured, min(most, max(map(len, units.values()))), below=2.2)
    _draw_rows(page, left, pictured, most, 3.0, "gray")
    _draw_distribution(page, units)
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
    for name, x in rows.items():
        if x.shape != image.shape:
            raise ValueError(f"{name!r} has the shape {tuple(x.shape)}, and the image has {tuple(image.shape)}")
    count = min(most, len(image))
    page, left = _page({"image": image} | rows, 2 * count, right=GAP + 0.75)
    fitting = 1.0 if bool(image.abs().max() <= 1) else None
    _draw_rows(page, left, {"image": image} | rows, most, fitting, cmap)
    beside = left + count * (SIDE + SPACE) + GAP
    page.text(beside, TOP + SIDE - 0.12, "difference", weight="bold")
    for k, x in enumerate(rows.values(), 1):
        error = x.double() - image.double()
        sizes = error[:most][error[:most].isfinite()].abs()
        scale = limit or round_up(float(np.quantile(sizes.numpy(), 0.99)) if len(sizes) else 0.0)
        page.tiles(beside, _top(k), _largest(error[:most]), scale, "RdBu_r", SIDE, SPACE)
        right = page.width - 0.75
        page.text(right, _top(k) + SIDE / 2 - 0.1, f"rms {float(error.square().mean().sqrt()):.2g}")
        page.text(right, _top(k) + SIDE / 2 + 0.1, f"s = {scale:g}", color=GREY)
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
    if isinstance(shown, Inversion):
        return _tensor(what, shown.latent) / shown.sigmas[0]
    if isinstance(shown, RoundTrip):
        return _tensor(what, unit_latent(shown))
    x = _tensor(what, shown)
    if sigma is None:
        raise ValueError(f"{what} is a tensor, whose noise level is not known: give sigma, or sigma=1 for units of it")
    return x / check_positive("sigma", sigma)


def _tensor(what: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{what} must be a tensor, an Inversion or a RoundTrip, got {describe(x)}")
    check_values(what, x, "they are drawn")
    if x.is_complex() or x.dtype == torch.bool or not x.numel():
        raise ValueError(f"{what} must have real numbers to draw, got {x.dtype} of shape {tuple(x.shape)}")
    return plain(x).detach().to("cpu", torch.float64)


def _largest(x: Tensor) -> Tensor:
    """Return of each pixel the channel with the largest size, with its sign: shape (batch, 1, H, W)."""
    return x.gather(1, x.abs().argmax(1, keepdim=True))


def _page(rows: Mapping[str, Tensor], across: int, right: float = 0.0, below: float = 0.0) -> tuple[Page, float]:
    """Make a page for rows of so many images, and return where the first image of a row stands."""
    left = TOP + 0.09 * max(map(len, rows), default=0) + (0.1 if any(rows) else 0.0)
    width = left + across * (SIDE + SPACE) + right + TOP
    return Page(max(width, 4.5), TOP + PITCH * len(rows) + below), left


def _top(row: int) -> float:
    return TOP + row * PITCH


def _draw_rows(page: Page, left: float, rows: Mapping[str, Tensor], most: int, limit: float | None, cmap: str) -> None:
    """Draw a row of images for each name, with a line below that says what is shown, once for equal rows."""
    notes = []
    for k, (name, x) in enumerate(rows.items()):
        page.text(TOP, _top(k) + SIDE / 2, name, weight="bold")
        note = page.tiles(left, _top(k), x[:most], limit, cmap, SIDE, SPACE)
        notes.append(note if len(x) <= most else f"{note}; {most} of {len(x)} samples")
    for k, note in enumerate(notes):
        if note not in notes[k + 1 : k + 2]:
            page.text(left, _top(k) + SIDE + 0.1, note, color=GREY, fontsize=7)


def _draw_distribution(page: Page, units: Mapping[str, Tensor]) -> None:
    """Draw the density of each latent at the foot of the page."""
    from matplotlib import rc_context

    from kinvert.plot.axes import density, normal_curve

    with rc_context(STYLE):
        ax = page.axes(0.6, page.height - 2.1, 3.2, 1.6)
        handles = []
        for name, number in numbers(units).items():
            values = units[name].flatten()
            moments = f"mean {values.mean():+.3f}, std {values.std(correction=0):.3f}"
            counts, _ = np.histogram(values.clamp(EDGES[0], EDGES[-1]).numpy(), EDGES)
            handles.append(density(ax, counts, EDGES, look(number), f"{name}: {moments}" if name else moments))
        normal_curve(ax, EDGES[0], EDGES[-1])
        ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.0))
