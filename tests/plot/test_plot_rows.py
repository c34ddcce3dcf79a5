"""The pictures in the rows of `ki.plot`, and what cannot be drawn."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import kinvert as ki

pytest.importorskip("matplotlib")

SIGMAS = (10.0, 3.0, 1.0, 0.2)
DENOISER = ki.denoisers.Gaussian(0.2, 0.5)
X = torch.rand(3, 1, 4, 6, dtype=torch.float64, generator=torch.manual_seed(0)) * 2 - 1
FOUND = ki.invert(DENOISER, X, SIGMAS, sampler="heun")
TRIP = ki.round_trip(DENOISER, X, SIGMAS, sampler="euler")


def pictures(figure: Any) -> list[np.ndarray]:
    return [np.asarray(ax.get_images()[0].get_array()) for ax in figure.axes if ax.get_images()]


def words(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.texts]


def shades(x: torch.Tensor, limit: float) -> np.ndarray:
    """Shades from 0 to 255 for values from -limit to limit."""
    return ((x / limit).clamp(-1, 1) + 1).mul(127.5).round().numpy()


def test_images_are_drawn_in_rows() -> None:
    figure = ki.plot.images({"image": X, "again": FOUND, "trip": TRIP}, most=2)
    drawn = pictures(figure)
    wanted = [*X[:2, 0], *FOUND.restored[:2, 0], *TRIP.reconstruction[:2, 0]]  # type: ignore[index]
    assert len(drawn) == 6
    for got, want in zip(drawn, wanted, strict=True):
        np.testing.assert_array_equal(got, shades(want, 1.0))
    assert words(figure) == ["image", "again", "trip", "black -1, white 1; 2 of 3 samples"]


def test_edits_are_drawn_like_other_results() -> None:
    done = ki.edit(DENOISER, X, SIGMAS, target={}, source={})
    drawn = pictures(ki.plot.differences({"edited": done}, done.original, most=1, limit=0.5))
    np.testing.assert_array_equal(drawn[1], shades(done.image[0, 0], 1.0))
    np.testing.assert_array_equal(drawn[2], shades((done.image - X)[0, 0], 0.5))
    (latent, *_) = pictures(ki.plot.latents(done))
    np.testing.assert_array_equal(latent, shades(done.latent[0, 0] / 10, 3.0))


def test_the_colours_of_ink_are_named() -> None:
    figure = ki.plot.images(X, cmap="gray_r", limit=2)
    assert "white -2, black 2" in words(figure)
    assert figure.axes[0].get_images()[0].get_cmap().name == "gray_r"


def test_three_channels_are_colours_and_broken_values_are_pink() -> None:
    x = X.expand(3, 3, 4, 6).clone()
    x[0, 1, 2, 3] = math.nan
    drawn = pictures(ki.plot.images(x))
    assert drawn[0].shape == (4, 6, 3) and drawn[0][2, 3].tolist() == [255, 0, 255]
    np.testing.assert_array_equal(drawn[1][..., 0], shades(X[1, 0], 1.0))


def test_latents_are_in_units_of_their_noise_level() -> None:
    figure = ki.plot.latents({"found": FOUND, "trip": TRIP, "tensor": X * 7}, sigma=7.0)
    drawn = pictures(figure)
    for got, want in zip(drawn, [*FOUND.latent[:, 0] / 10, *TRIP.latent[:, 0] / 10, *X[:, 0]], strict=True):
        np.testing.assert_array_equal(got, shades(want, 3.0))
    legend = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    z = FOUND.latent / 10
    assert legend[0] == f"found: mean {z.mean():+.3f}, std {z.std(correction=0):.3f}"


def test_latents_that_are_no_images_have_their_distribution() -> None:
    z = torch.cat([torch.zeros(3000, 1), torch.full((1000, 1), 2.1)])
    figure = ki.plot.latents(z, sigma=1)
    (stairs,) = figure.axes[0].patches
    heights, edges, _ = stairs.get_data()
    assert not pictures(figure) and sum(heights * np.diff(edges)) == pytest.approx(1, abs=1e-6)
    assert heights.max() * 0.2 == pytest.approx(0.75)


def test_differences_are_signed_and_measured() -> None:
    other = X + 0.15
    figure = ki.plot.differences({"other": other, "again": FOUND}, X, most=2)
    drawn = pictures(figure)  # image, other, again, then the differences of both
    np.testing.assert_array_equal(drawn[6], shades((other - X)[0, 0], 0.2))
    assert {"rms 0.15", "s = 0.2", "difference", "image"} <= {*words(figure)}
    fixed = pictures(ki.plot.differences(other, X, limit=0.4))
    np.testing.assert_array_equal(fixed[-1], shades(torch.full((4, 6), 0.15), 0.4))


def test_of_several_channels_the_largest_difference_is_drawn() -> None:
    x = torch.zeros(1, 3, 2, 2)
    other = x.clone()
    other[0, :, 0, 0] = torch.tensor([0.1, -0.5, 0.2])
    drawn = pictures(ki.plot.differences(other, x, limit=1.0))[-1]
    np.testing.assert_array_equal(drawn, shades(torch.tensor([[-0.5, 0.0], [0.0, 0.0]]), 1.0))


@pytest.mark.parametrize(
    ("draw", "error", "said"),
    [
        (lambda: ki.plot.images(X[0]), ValueError, r"shown must be images of the shape .* got \(1, 4, 6\)"),
        (
            lambda: ki.plot.images({"a": "b"}),
            TypeError,
            r"shown\['a'\] must be a tensor, an Inversion, a RoundTrip or an Edited",
        ),  # type: ignore[dict-item]
        (lambda: ki.plot.images(replace(FOUND, restored=None)), ValueError, "use ki.invert with check=True"),
        (lambda: ki.plot.images(X.to("meta")), ValueError, "no values"),
        (lambda: ki.plot.images(X, most=0), ValueError, "most must be an int of at least 1, got 0"),
        (lambda: ki.plot.images(X, limit=-1.0), ValueError, "limit must be"),
        (lambda: ki.plot.images(X > 0), ValueError, "real numbers to draw, got torch.bool"),
        (lambda: ki.plot.latents({"a": X}), ValueError, r"shown\['a'\] is a tensor, whose noise level is not known"),
        (lambda: ki.plot.latents(FOUND, sigma=1.0), ValueError, "a result knows its own"),
        (lambda: ki.plot.differences(X[:1], X), ValueError, r"has the shape \(1, 1, 4, 6\), and the image has"),
        (lambda: ki.plot.differences({"image": X}, X), ValueError, "give it another name"),
    ],
)
def test_what_cannot_be_drawn_says_why(draw: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        draw()


def test_without_matplotlib_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import torch, kinvert as ki\n"
        "for draw in (lambda: ki.plot.images(torch.zeros(1, 1, 2, 2)), lambda: ki.plot.schedules([1.0, 0.0])):\n"
        "    try: draw()\n"
        "    except ModuleNotFoundError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["figures need matplotlib, which is not here: pip install 'kinvert[cli]'"] * 2
