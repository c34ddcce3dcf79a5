r"""The demo: take images that an embedded denoiser never saw to noise, sample them back, edit them, measure, draw.

`run` computes, `Demo.table` returns the numbers, `draw` makes the picture and `save` writes all files. The picture
needs matplotlib: `pip install 'kinvert[cli]'`.

Every sampler gets the schedule that a host would give it (`ki.schedule(..., sampler=name)`), the labels of the images
as positive conditioning, and the null label as negative. One more row is exact: `EXACT`, inverted. Every latent is also
sampled as another class: the digit five further on, or the skin tone three further on.
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
from kinvert.models import classifier
from kinvert.pictures import write
from kinvert.plot.page import SPACE, TILE, Page
from kinvert.plot.style import GREY
from kinvert.showing.brief import brief_repr
from kinvert.showing.thumbnails import round_up

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EDIT_CFG", "EXACT", "SAMPLERS", "Demo", "Settings", "draw", "run", "save"]

SAMPLERS = ("euler", "heun", "dpm_2", "dpmpp_2m")
EXACT = "euler"
"""The sampler of the row "invert"."""
EDIT_CFG = 2.0
"""Guidance towards the new class."""


@dataclass(frozen=True)
class Settings:
    """The settings of a demo. `steps` is the number that was asked for; some schedules make another number of steps.

    `invert` is whether to invert exactly too; None does so without guidance, with which it may take minutes.
    """

    model: str = "mnist"
    samplers: tuple[str, ...] = SAMPLERS
    steps: int = 20
    schedule: str = "karras"
    cfg: float = 1.0
    count: int = 8
    normalize: bool = False
    invert: bool | None = None
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Demo:
    """The outcome of a demo.

    Attributes:
        settings: the settings of the demo.
        images: held-out images in [-1, 1], shape (count, channels, H, W).
        labels: their classes, shape (count,).
        targets: the classes of the edits, shape (count,).
        schedules, trips: by sampler, the noise levels and the measured round trip; "invert" is that of `EXACT`.
        edited: the same latents sampled as `targets`, in the shape of `images` each.
        truth: the real pictures in the classes of the edits, in the shape of `images`; None for digits, of which there
            are none.
    """

    settings: Settings
    images: Tensor
    labels: Tensor
    targets: Tensor
    schedules: dict[str, Tensor]
    trips: dict[str, ki.RoundTrip]
    edited: dict[str, Tensor]
    truth: Tensor | None = None

    __repr__ = brief_repr

    @property
    def example(self) -> int:
        """The place of an image to edit by oneself: a three, if there is one."""
        return [*self.labels.tolist(), 3].index(3) % len(self.labels)

    def table(self) -> list[dict[str, Any]]:
        """Return a row for each trip; errors and moments are means over the images, `max_error` is the largest.

        `method` is "unsample" or "invert"; `evaluations` are those of the round trip. `mse`, `psnr` (dB, a range of 2)
        and `max_error` compare the reconstruction with the image; `latent_mean` and `latent_std` are of `latent /
        sigma`, 0 and 1 for pure noise. `edits_took` is the number of edited images that the classifier of
        `kinvert.models.classifier` reads as the new class. If there is a `truth`, it is the number of those that have a
        smaller mean squared error to the truth than the picture before the edit.
        """
        return [
            {
                "sampler": EXACT if name == "invert" else name,
                "method": "invert" if name == "invert" else "unsample",
                "steps": len(self.schedules[name]) - 1,
                "evaluations": trip.evaluations,
                "mse": float(trip.mse.mean()),
                "psnr": float(trip.psnr.mean()),
                "max_error": float(trip.max_error.max()),
                "sigma": trip.sigma,
                "latent_mean": float(trip.latent_mean.mean()),
                "latent_std": float(trip.latent_std.mean()),
                "edits_took": int(self._took(self.edited[name].cpu().double()).sum()),
            }
            for name, trip in self.trips.items()
        ]

    def _took(self, edited: Tensor) -> Tensor:
        """Tell which edits took, bool of shape (count,)."""
        if self.truth is None:
            return classifier.load(self.settings.model, dtype=torch.float64)(edited).argmax(1) == self.targets
        truth = self.truth.double()
        return ki.metrics.mse(edited.clamp(-1, 1), truth) < ki.metrics.mse(self.images.double(), truth)

    def report(self) -> dict[str, Any]:
        """Return table, settings and versions, ready for `kinvert.jsontext.to_json`."""
        versions = {"kinvert": ki.__version__, "torch": torch.__version__, "python": platform.python_version()}
        return {"table": self.table(), "settings": asdict(self.settings), "versions": versions}


@computing_with(1)  # the networks are so small that more threads are slower
def run(settings: Settings, progress: bool = False) -> Demo:
    """Take held-out images to noise with each sampler, sample them back, and sample them as another class.

    Args:
        settings: what to do; the images are one of each class in turn, and the next person or hand each time.
        progress: show a bar on stderr where that is a terminal.

    Raises:
        ValueError: a name is unknown, a number cannot work, or a sampler cannot unsample.
    """
    if not settings.samplers:
        raise ValueError(f"samplers must name at least one sampler, e.g. {','.join(SAMPLERS)}")
    device = check_device(settings.device)
    denoiser = models.load(settings.model, dtype=getattr(torch, settings.dtype), device=device)
    images, labels, targets, truth = _pick(settings)
    levels = ki.levels.edm(denoiser.sigma_min, denoiser.sigma_max)
    schedules = {
        name: ki.schedule(settings.schedule, settings.steps, levels, sampler=ki.sampler(name))
        for name in settings.samplers
    }
    exact = settings.cfg == 1 if settings.invert is None else settings.invert
    if exact and settings.steps > 1:
        schedules["invert"] = ki.schedule(settings.schedule, settings.steps, levels, sampler=ki.sampler(EXACT))[:-1]
    x, label = images.to(device, getattr(torch, settings.dtype)), labels.to(device)
    null = {"label": torch.full_like(label, denoiser.null_label)}
    demo = Demo(settings, images, labels, targets, schedules, {}, {}, truth)
    total = sum((2 if name == "invert" else 3) * (len(sigmas) - 1) for name, sigmas in schedules.items())
    with tqdm(total=total, unit="step", leave=False, disable=None if progress else True) as bar:
        shared: dict[str, Any] = {"negative": null, "callback": lambda _: bar.update()}
        for name, sigmas in schedules.items():
            bar.set_description(name)
            shared["sampler"] = EXACT if name == "invert" else name
            normalize = settings.normalize and name != "invert"
            demo.trips[name] = trip = ki.round_trip(
                denoiser, x, sigmas, method="invert" if name == "invert" else "unsample", normalize=normalize,
                cfg=settings.cfg, positive={"label": label}, **shared,
            )  # fmt: skip
            latent = trip.latent * trip.sigma if normalize else trip.latent
            target = {"label": demo.targets.to(device)}
            demo.edited[name] = ki.sample(denoiser, latent, sigmas, cfg=EDIT_CFG, positive=target, **shared)
    return demo


def _pick(settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Choose held-out images: the first of each class, then the second of each, and so on.

    Returns:
        The images, their classes, the classes of the edits, and the true answers to these if there are any.
    """
    images, labels = models.held_out(settings.model)
    if not 1 <= settings.count <= len(images):
        raise ValueError(f"count must be from 1 to {len(images)}, the held-out images there are, got {settings.count}")
    classes = int(labels.max()) + 1
    if settings.model in classifier.NAMES:
        turn = [int((labels[:i] == labels[i]).sum()) for i in range(len(labels))]
        order = sorted(range(len(labels)), key=turn.__getitem__)[: settings.count]
        return images[order], labels[order], (labels[order] + classes // 2) % classes, None
    shown = models.variants(settings.model)  # (people and hands, classes, ...)
    k = torch.arange(settings.count, device="cpu")
    which, label = k % len(shown), (k + k // len(shown)) % classes
    target = (label + classes // 2) % classes
    return shown[which, label], label, target, shown[which, target]


# -- files -------------------------------------------------------------------------------------------------------------
def save(demo: Demo, folder: Path) -> dict[str, Path]:
    """Write `demo-<model>.png`, `.npz` and `.json`, and an image to edit, to `folder`, each whole or not at all.

    The npz holds `images`, `labels`, `targets`, `truth` if there is one, and for each trip `<name>/latent`,
    `<name>/reconstruction` and `<name>/edited` (count, channels, H, W) and `<name>/sigmas`. The image to edit is
    `images[demo.example]`, as `kinvert edit` reads it: `digit-<model>-<class>.png`, or `picture-...` in colour.

    Returns:
        The paths: "png", "npz", "json", "example".
    """
    arrays = {"images": demo.images, "labels": demo.labels, "targets": demo.targets}
    if demo.truth is not None:
        arrays["truth"] = demo.truth
    for name, trip in demo.trips.items():
        arrays |= {
            f"{name}/latent": trip.latent,
            f"{name}/reconstruction": trip.reconstruction,
            f"{name}/edited": demo.edited[name],
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
    kind = "digit" if demo.truth is None else "picture"
    paths["example"] = folder / f"{kind}-{demo.settings.model}-{int(demo.labels[demo.example])}.png"
    write(demo.images[demo.example], paths["example"])
    return paths


# -- picture -----------------------------------------------------------------------------------------------------------
SHOWN = 4  # images in a row, so that they can still be seen on a page
LINE = 0.71  # inches: from one row to the next
LEFT, TOP, GAP = 1.4, 0.84, 0.36  # inches: margins around, and the gap between, the blocks of images


def draw(demo: Demo) -> Figure:
    """Draw the picture: a row for each trip with latents, reconstructions, differences and edits; the originals on top.

    It shows the first `SHOWN` images; its numbers are those of the table, over all images. Below its title the third
    block has the error `s` at which the colours of each row end; one pixel in a hundred lies beyond. Pictures in colour
    have the true answers to the edits on top, and differences in which grey is 0.
    """
    shown = min(SHOWN, len(demo.images))
    block = max(shown, 4) * (TILE + SPACE) - SPACE
    first = max(LEFT, 0.3 + 0.12 * max(map(len, demo.trips)))
    page = Page(first + 4 * block + 3 * GAP + 0.12, TOP + (1 + len(demo.trips)) * LINE + 0.25)
    lefts = [first + k * (block + GAP) for k in range(4)]
    latents = "latent" if demo.settings.normalize else "latent / sigma"
    classes = ", ".join(str(int(label)) for label in demo.targets[:shown])
    for left, title in zip(lefts, (latents, "sampled back", "difference", f"edited: {classes}"), strict=True):
        page.text(left, 0.62, title, fontsize=13, weight="bold")
    page.text(0.12, 0.22, _headline(demo.settings), color=GREY)
    if demo.truth is None:
        page.scale(lefts[0], TOP + 0.14, "gray_r", "-3", "3")
        page.scale(lefts[2], TOP + 0.14, "RdBu_r", "-s", "s")
        page.scale(lefts[3], TOP + 0.14, "gray_r", "-1", "1, ink")
    else:
        page.text(lefts[0], TOP + TILE / 2, "from -3 to 3, grey is 0", color=GREY)
        page.text(lefts[2], TOP + TILE / 2, "from -s to s, grey is 0", color=GREY)
        page.text(lefts[3] - 0.1, TOP + TILE / 2, "truth", ha="right", fontsize=12)
        page.tiles(lefts[3], TOP, demo.truth[:shown], 1.0)
    page.text(lefts[1] - 0.1, TOP + TILE / 2, "original", ha="right", fontsize=12)
    images = demo.images[:shown].double()
    page.tiles(lefts[1], TOP, images, 1.0)
    for i, (row, (name, trip)) in enumerate(zip(demo.table(), demo.trips.items(), strict=True), start=1):
        top = TOP + i * LINE + 0.15
        latent, back = trip.latent[:shown].cpu().double(), trip.reconstruction[:shown].cpu().double()
        limit = round_up(float((back - images).abs().quantile(0.99)))
        page.text(0.12, top + 0.08, name, fontsize=13, weight="bold")
        page.text(0.12, top + 0.3, f"{row['psnr']:.1f} dB", fontsize=12)
        page.text(0.12, top + 0.5, f"{row['evaluations']} evaluations", color=GREY)
        normalized = demo.settings.normalize and name != "invert"
        page.tiles(lefts[0], top, latent if normalized else latent / trip.sigma, 3.0)
        page.tiles(lefts[1], top, back, 1.0)
        page.tiles(lefts[2], top, back - images, limit, "RdBu_r")
        page.text(lefts[2] + block, top + TILE + 0.075, f"s = {limit:.2g}", color=GREY, ha="right", fontsize=8)
        page.tiles(lefts[3], top, demo.edited[name][:shown].cpu(), 1.0)
    return page.whole


def _headline(settings: Settings) -> str:
    latents = ", latents normalized" if settings.normalize else ""
    return (
        f"{settings.model}: images that the denoiser never saw, to noise and back in {settings.steps} steps each way "
        f"({settings.schedule}, cfg {settings.cfg:g}{latents}), and edited"
    )
