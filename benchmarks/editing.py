"""Change the class of the held-out digits, measure whether the edits took and what stayed, and draw the figures.

    python benchmarks/editing.py             # writes results/editing.json, then the figures
    python benchmarks/editing.py --figures   # docs/assets/editing*.png alone

All 40 held-out images of `mnist`, each to the class five further on (3 to 8, 4 to 9), in float32, 20 steps of the
Karras schedule without the step to 0. Euler's method, or `euler_ancestral` for "extract_noise"; no guidance on the way
up. A row has the number of edits that the classifier of `kinvert.models.classifier` reads as the new class, and medians
of MSE and SSIM to the image before the edit.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kinvert as ki
from kinvert import models
from kinvert.editing import edit_metrics
from kinvert.files import write_file
from kinvert.models import classifier
from kinvert.plot.page import Page
from kinvert.plot.style import GREY

RESULTS = Path(__file__).parent / "results" / "editing.json"
ASSETS = Path(__file__).parent.parent / "docs" / "assets"
ENDS, SCALES = (0, 4, 8, 10, 12), (1.0, 2.0, 3.0)
END, SCALE = 8, 3.0  # of the figures

IMAGES, LABELS = models.held_out("mnist")
DENOISER = models.load("mnist")
SIGMAS = ki.schedule("karras", 20, ki.levels.edm(DENOISER.sigma_min, DENOISER.sigma_max))[:-1]


def edits(images: Tensor, labels: Tensor, method: str, end: int, scales: tuple[float, ...]) -> list[ki.Edited]:
    """Return the edits of images to the class five further on, one for each scale of guidance."""
    run: dict[str, Any] = {
        "sampler": "euler_ancestral" if method == "extract_noise" else "euler",
        "method": method,
        "end_at_step": end,
        "source": {"label": labels},
        "target": {"label": (labels + 5) % 10},
        "negative": {"label": torch.full_like(labels, DENOISER.null_label)},
    }
    if method in ("extract_noise", "noise"):
        run["noise"] = ki.noise.white(0)
    return [ki.edit(DENOISER, images, SIGMAS, cfg=cfg, **run) for cfg in scales]


def measure() -> None:
    """Write the results."""
    judge, rows = classifier.load("mnist"), []
    for method in ("invert", "unsample", "extract_noise", "noise"):
        for end in ENDS:
            for cfg, done in zip(SCALES, edits(IMAGES, LABELS, method, end, SCALES), strict=True):
                found = edit_metrics(done.image, IMAGES, (LABELS + 5) % 10, judge)
                row = {
                    "method": method,
                    "end_at_step": end,
                    "sigma": round(done.sigmas[0], 3),
                    "cfg": cfg,
                    "count": len(IMAGES),
                    "took": int(found["edit_took"].sum()),
                    "mse": round(float(found["edit_mse"].median()), 3),
                    "ssim": round(float(found["edit_ssim"].median()), 3),
                    "evaluations": done.evaluations,
                    "converged": None if done.inversion is None else int(done.inversion.converged.sum()),
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
    versions = {"kinvert": ki.__version__, "torch": torch.__version__, "python": platform.python_version()}
    write_file(RESULTS, (json.dumps({"rows": rows, "versions": versions}, indent=1) + "\n").encode())


def some(label: int, count: int) -> Tensor:
    """Return the places of the first held-out images of a class."""
    return (label == LABELS).nonzero().flatten()[:count]


def draw_edits() -> None:
    """Draw threes that become eights, and fours that become nines, beside the same from fresh noise."""
    index = torch.cat([some(3, 4), some(4, 4)])
    rows = [IMAGES[index]]
    for method in ("invert", "noise"):
        rows += [done.image for done in edits(IMAGES[index], LABELS[index], method, END, (SCALE,))]
    words = [("images", ""), ("ki.edit", "exact inversion"), ("SDEdit", "fresh noise")]
    page = Page(7.02, 2.75)
    page.text(1.55, 0.2, "3 becomes 8", weight="bold")
    page.text(4.3, 0.2, "4 becomes 9", weight="bold")
    for k, (images, (name, how)) in enumerate(zip(rows, words, strict=True)):
        top = 0.4 + 0.78 * k
        page.text(0.1, top + (0.32 if not how else 0.22), name, fontsize=12, weight="bold")
        page.text(0.1, top + 0.45, how, color=GREY)
        page.tiles(1.55, top, images[:4], 1.0, side=0.62)
        page.tiles(4.3, top, images[4:], 1.0, side=0.62)
    save(page, "editing.png")


def draw_dials() -> None:
    """Draw one image edited with every `end_at_step` and cfg, by exact inversion and from fresh noise."""
    index = some(3, 1)
    ends = (0, 4, 6, 8, 9, 10, 11, 12)
    page = Page(6.9, 3.62)
    page.text(0.1, 0.42, "the image")
    page.tiles(0.1, 0.6, IMAGES[index], 1.0, side=0.62)
    for column, end in enumerate(ends):
        left = 1.85 + 0.62 * column
        page.text(left + 0.28, 0.18, f"{end}", ha="center")
        page.text(left + 0.28, 0.4, f"σ {float(SIGMAS[end]):.2g}", ha="center", color=GREY)
        for row, (method, scales) in enumerate([("invert", SCALES), ("noise", (SCALE,))]):
            for k, done in enumerate(edits(IMAGES[index], LABELS[index], method, end, scales)):
                page.tiles(left, 0.6 + 0.72 * (k + 3 * row) + 0.2 * row, done.image, 1.0, side=0.56)
    page.text(1.75, 0.18, "end_at_step", ha="right", weight="bold")
    for k, cfg in enumerate(SCALES):
        page.text(1.75, 0.88 + 0.72 * k, f"cfg {cfg:g}", ha="right", weight="bold")
    page.text(1.75, 3.14, f"SDEdit, cfg {SCALE:g}", ha="right", weight="bold")
    save(page, "editing-dials.png")


def draw_walk() -> None:
    """Draw the walk between two latents along the sphere and along a line, and the same images faded."""
    index = torch.stack([some(3, 1)[0], some(8, 1)[0]])
    pair, labels, count = IMAGES[index], LABELS[index], 9
    found = ki.invert(DENOISER, pair, SIGMAS, positive={"label": labels})
    a, b = found.latent.split(1)
    t = torch.linspace(0, 1, count)
    first, second = (z.expand(count, -1, -1, -1) for z in (a, b))
    label = torch.where(t < 0.5, labels[0], labels[1])
    walk = ki.sample(DENOISER, ki.slerp(first, second, t), SIGMAS, positive={"label": label})
    share = t.reshape(-1, 1, 1, 1)
    faded = torch.lerp(pair[:1], pair[1:], share)
    page = Page(6.9, 1.9)
    for column, value in enumerate(t.tolist()):
        page.text(1.5 + 0.59 * column + 0.27, 0.18, f"{value:.3g}", ha="center", color=GREY)
    for top, name, images in ((0.36, "slerp", walk), (1.06, "pixels", faded)):
        page.text(0.1, top + 0.27, name, fontsize=12, weight="bold")
        page.tiles(1.5, top, images, 1.0, side=0.54)
    save(page, "editing-walk.png")


def draw_mask() -> None:
    """Draw edits of the left half alone, the noises of a stochastic sampler, and the images before."""
    index = torch.cat([some(3, 4), some(4, 4)])
    images, labels = IMAGES[index], LABELS[index]
    mask = torch.zeros(28, 28)
    mask[:, :14] = 1
    masked = ki.edit(
        DENOISER, images, SIGMAS, source={"label": labels}, target={"label": (labels + 5) % 10}, cfg=SCALE,
        negative={"label": torch.full_like(labels, DENOISER.null_label)}, end_at_step=4, mask=mask,
    ).image  # fmt: skip
    (noises,) = edits(images, labels, "extract_noise", END, (2.0,))
    page = Page(7.02, 2.55)
    rows = [("images", "", images), ("mask", "left half", masked), ("extract_noise", "", noises.image)]
    for k, (name, how, row) in enumerate(rows):
        top = 0.15 + 0.78 * k
        page.text(0.1, top + (0.32 if not how else 0.22), name, fontsize=12, weight="bold")
        page.text(0.1, top + 0.45, how, color=GREY)
        page.tiles(1.55, top, row[:4], 1.0, side=0.62)
        page.tiles(4.3, top, row[4:], 1.0, side=0.62)
    save(page, "editing-mask.png")


def save(page: Page, name: str) -> None:
    """Write a figure to the assets of the documentation."""
    page.whole.savefig(ASSETS / name, dpi=130)


def main() -> None:
    """Measure, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", action="store_true")
    torch.set_num_threads(1)
    if not parser.parse_args().figures:
        measure()
    for draw in (draw_edits, draw_dials, draw_walk, draw_mask):
        draw()


if __name__ == "__main__":
    main()
