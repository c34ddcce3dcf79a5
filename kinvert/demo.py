r"""The demo: unsample images that an embedded denoiser never saw, sample them back, measure, draw.

`run` computes, `Demo.table` returns the numbers, `draw` makes the picture and `save` writes all three files. The
picture needs matplotlib: `pip install 'kinvert[cli]'`.

Every sampler gets the schedule that a host would give it (`ki.schedule(..., sampler=name)`), the labels of the images
as positive conditioning, and the null label as negative.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import kinvert as ki
from kinvert import models
from kinvert.devices import check_device
from kinvert.files import write_file
from kinvert.jobs import computing_with
from kinvert.jsontext import to_json
from kinvert.plot.page import SPACE, TILE, Page
from kinvert.plot.style import GREY
from kinvert.showing.brief import brief_repr
from kinvert.showing.thumbnails import round_up

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SAMPLERS", "Demo", "Settings", "draw", "run", "save"]

SAMPLERS = ("euler", "heun", "dpm_2", "lms", "dpmpp_2m")


@dataclass(frozen=True)
class Settings:
    """The settings of a demo. `steps` is the number that was asked for; some schedules make another number of steps."""

    model: str = "mnist"
    samplers: tuple[str, ...] = SAMPLERS
    steps: int = 20
    schedule: str = "karras"
    cfg: float = 1.0
    count: int = 8
    normalize: bool = False
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Demo:
    """The outcome of a demo.

    Attributes:
        settings: the settings of the demo.
        images: held-out images in [-1, 1], shape (count, 1, H, W).
        labels: their classes, shape (count,).
        schedules, trips: by sampler, the noise levels and the measured round trip.
    """

    settings: Settings
    images: Tensor
    labels: Tensor
    schedules: dict[str, Tensor]
    trips: dict[str, ki.RoundTrip]

    __repr__ = brief_repr

    def table(self) -> list[dict[str, Any]]:
        """Return a row for each sampler; errors and moments are means over the images, `max_error` is the largest.

        `mse`, `psnr` (dB, a range of 2) and `max_error` compare the reconstruction with the image; `latent_mean` and
        `latent_std` are of `latent / sigma`, 0 and 1 for pure noise.
        """
        return [
            {
                "sampler": name,
                "steps": len(self.schedules[name]) - 1,
                "evaluations": trip.evaluations,
                "mse": float(trip.mse.mean()),
                "psnr": float(trip.psnr.mean()),
                "max_error": float(trip.max_error.max()),
                "sigma": trip.sigma,
                "latent_mean": float(trip.latent_mean.mean()),
                "latent_std": float(trip.latent_std.mean()),
            }
            for name, trip in self.trips.items()
        ]

    def report(self) -> dict[str, Any]:
        """Return table, settings and versions, ready for `kinvert.jsontext.to_json`."""
        versions = {"kinvert": ki.__version__, "torch": torch.__version__, "python": platform.python_version()}
        return {"table": self.table(), "settings": asdict(self.settings), "versions": versions}


@computing_with(1)  # the networks are so small that more threads are slower
def run(settings: Settings, progress: bool = False) -> Demo:
    """Unsample held-out images with each sampler and sample them back.

    Args:
        settings: what to do; the images are one of each class in turn.
        progress: show a bar on stderr where that is a terminal.

    Raises:
        ValueError: a name is unknown, a number cannot work, or a sampler cannot unsample.
    """
    if not settings.samplers:
        raise ValueError(f"samplers must name at least one sampler, e.g. {','.join(SAMPLERS)}")
    device = check_device(settings.device)
    denoiser = models.load(settings.model, dtype=getattr(torch, settings.dtype), device=device)
    images, labels = _pick(settings)
    levels = ki.levels.edm(denoiser.sigma_min, denoiser.sigma_max)
    schedules = {
        name: ki.schedule(settings.schedule, settings.steps, levels, sampler=ki.sampler(name))
        for name in settings.samplers
    }
    x, label = images.to(device, getattr(torch, settings.dtype)), labels.to(device)
    trips = {}
    total = sum(2 * (len(sigmas) - 1) for sigmas in schedules.values())
    with tqdm(total=total, unit="step", leave=False, disable=None if progress else True) as bar:

        def advance(_: object) -> None:
            bar.update()

        for name, sigmas in schedules.items():
            bar.set_description(name)
            trips[name] = ki.round_trip(
                denoiser, x, sigmas, sampler=name, cfg=settings.cfg, normalize=settings.normalize,
                positive={"label": label}, negative={"label": torch.full_like(label, denoiser.null_label)},
                callback=advance,
            )  # fmt: skip
    return Demo(settings, images, labels, schedules, trips)


def _pick(settings: Settings) -> tuple[Tensor, Tensor]:
    """Choose held-out images: the first of each class, then the second of each, and so on."""
    images, labels = models.held_out(settings.model)
    if not 1 <= settings.count <= len(images):
        raise ValueError(f"count must be from 1 to {len(images)}, the held-out images there are, got {settings.count}")
    turn = [int((labels[:i] == labels[i]).sum()) for i in range(len(labels))]
    order = sorted(range(len(labels)), key=turn.__getitem__)[: settings.count]
    return images[order], labels[order]


# -- files -------------------------------------------------------------------------------------------------------------
def save(demo: Demo, folder: Path) -> dict[str, Path]:
    """Write `demo-<model>.png`, `.npz` and `.json` to `folder`; a reader never sees half a file.

    The npz holds `images`, `labels`, and for each sampler `<sampler>/latent` and `<sampler>/reconstruction` (count, 1,
    H, W) and `<sampler>/sigmas`.

    Returns:
        The paths by suffix: "png", "npz", "json".
    """
    arrays = {"images": demo.images, "labels": demo.labels}
    for name, trip in demo.trips.items():
        arrays |= {
            f"{name}/latent": trip.latent,
            f"{name}/reconstruction": trip.reconstruction,
            f"{name}/sigmas": demo.schedules[name],
        }
    numpy: dict[str, Any] = {key: value.cpu().numpy() for key, value in arrays.items()}
    figure = draw(demo)
    contents: dict[str, Callable[[BinaryIO], Any]] = {
        "png": lambda file: figure.savefig(file, format="png", dpi=150),
        "npz": lambda file: np.savez_compressed(file, **numpy),
        "json": lambda file: file.write(to_json(demo.report()).encode()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {suffix: folder / f"demo-{demo.settings.model}.{suffix}" for suffix in contents}
    for suffix, path in paths.items():
        write_file(path, contents[suffix])
    return paths


# -- picture -----------------------------------------------------------------------------------------------------------
SHOWN = 5  # images in a row, so that they can still be seen on a page
LINE = 0.71  # inches: from one row to the next
LEFT, RIGHT, TOP, GAP = 1.4, 0.9, 0.84, 0.36  # inches: margins around, and the gap between, the three blocks of images


def draw(demo: Demo) -> Figure:
    """Draw the picture: a row for each sampler with latents, reconstructions and differences; the originals on top.

    It shows the first `SHOWN` images; its numbers are those of the table, over all images. The last column gives the
    error `s` at which the colours of its row end; one pixel in a hundred lies beyond.
    """
    shown = min(SHOWN, len(demo.images))
    block = max(shown, 4) * (TILE + SPACE) - SPACE
    first = max(LEFT, 0.3 + 0.12 * max(map(len, demo.trips)))
    page = Page(first + 3 * block + 2 * GAP + RIGHT, TOP + (1 + len(demo.trips)) * LINE + 0.25)
    lefts = [first + k * (block + GAP) for k in range(3)]
    latents = "latent" if demo.settings.normalize else "latent / sigma"
    for left, title in zip(lefts, (latents, "sampled back", "difference"), strict=True):
        page.text(left, 0.62, title, fontsize=13, weight="bold")
    page.text(0.12, 0.22, _headline(demo.settings), color=GREY)
    page.scale(lefts[0], TOP + 0.14, "gray", "-3", "3")
    page.scale(lefts[2], TOP + 0.14, "RdBu_r", "-s", "s")
    page.text(lefts[1] - 0.1, TOP + TILE / 2, "original", ha="right", fontsize=12)
    images = demo.images[:shown].double()
    page.tiles(lefts[1], TOP, images, 1.0, "gray_r")
    for i, row in enumerate(demo.table(), start=1):
        top = TOP + i * LINE + 0.15
        trip = demo.trips[row["sampler"]]
        latent, back = trip.latent[:shown].cpu().double(), trip.reconstruction[:shown].cpu().double()
        limit = round_up(float((back - images).abs().quantile(0.99)))
        page.text(0.12, top + 0.08, row["sampler"], fontsize=13, weight="bold")
        page.text(0.12, top + 0.3, f"{row['psnr']:.1f} dB", fontsize=12)
        page.text(0.12, top + 0.5, f"{row['evaluations']} evaluations", color=GREY)
        page.tiles(lefts[0], top, latent if demo.settings.normalize else latent / trip.sigma, 3.0, "gray")
        page.tiles(lefts[1], top, back, 1.0, "gray_r")
        page.tiles(lefts[2], top, back - images, limit, "RdBu_r")
        page.text(lefts[2] + shown * (TILE + SPACE) + 0.03, top + TILE / 2, f"s = {limit:g}", color=GREY)
    return page.whole


def _headline(settings: Settings) -> str:
    latents = ", latents normalized" if settings.normalize else ""
    return (
        f"{settings.model}: images that the denoiser never saw, unsampled and sampled back, "
        f"{settings.steps} steps each way ({settings.schedule}, cfg {settings.cfg:g}{latents})"
    )
