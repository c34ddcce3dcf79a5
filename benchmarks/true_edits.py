"""Edit the skin tone of held-out pictures, and compare each edit with the real picture in the new tone.

    python benchmarks/true_edits.py   # writes results/true_edits.json and docs/assets/editing-truth.png

The embedded model `emoji`, float32, 12 steps of the Karras schedule without the step to 0. Twelve people and hands that
training never saw have two or three edits "go up with tone a, come down with tone b" each. The 30 ordered pairs (a, b)
are dealt to them in a seeded order, each pair once. There is no guidance on the way up. Edits are clamped to [-1, 1].
The error of an edit is its rms difference to the real picture. A mean has a 95% bootstrap interval over the twelve.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kinvert as ki
from kinvert import models
from kinvert.bench.report.intervals import resampled
from kinvert.files import write_file
from kinvert.models.emoji import TONES
from kinvert.plot.page import Page
from kinvert.plot.style import GREY

RESULTS = Path(__file__).parent / "results" / "true_edits.json"
FIGURE = Path(__file__).parent.parent / "docs" / "assets" / "editing-truth.png"
RUNS: tuple[tuple[str, str, int, tuple[float, ...]], ...] = (  # method, sampler, end_at_step, scales of guidance
    ("unsample", "euler", 0, (1.0,)),
    ("unsample", "heun", 0, (1.0, 1.5, 2.0)),
    ("unsample", "heun", 2, (1.0,)),
    ("unsample", "heun", 4, (1.0,)),
    ("noise", "heun", 4, (1.0,)),
    ("noise", "heun", 6, (1.0, 2.0)),
    ("noise", "heun", 7, (1.0,)),
    ("invert", "euler", 0, (1.0, 1.5, 2.0)),
    ("invert", "heun", 0, (1.0,)),
)
PICTURES = models.variants("emoji")  # (bases, tones, 3, 32, 32)
DENOISER = models.load("emoji")
SIGMAS = ki.schedule("karras", 12, ki.levels.edm(DENOISER.sigma_min, DENOISER.sigma_max))[:-1]


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    """Return base, old tone and new tone of every edit, int64 of shape (30,)."""
    tones = PICTURES.shape[1]
    both = torch.tensor([(a, b) for a in range(tones) for b in range(tones) if a != b])
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(0))
    return torch.arange(len(both)) % len(PICTURES), *both[order].unbind(1)


def summary(errors: Tensor, untouched: Tensor, base: Tensor) -> dict[str, Any]:
    """Return means over the edits with intervals over the bases, and the errors themselves."""
    of = [("base", int(b), 0) for b in base]

    def mean(values: Tensor) -> dict[str, Any]:
        drawn = np.quantile(resampled(values.tolist(), of, share=True), (0.025, 0.975))
        return {"mean": round(float(values.mean()), 4), "interval": [round(float(end), 4) for end in drawn]}

    far = untouched > untouched.median()
    return {
        "rms": mean(errors),
        "rms_less_no_edit": mean(errors - untouched),
        "closer": mean((errors < untouched).double()),
        "closer_far": round(float((errors < untouched)[far].double().mean()), 4),
        "closer_near": round(float((errors < untouched)[~far].double().mean()), 4),
        "errors": [round(error, 4) for error in errors.tolist()],
    }


def measure() -> dict[str, Tensor]:
    """Write the results; return the pictures by name."""
    base, old, new = pairs()
    source, truth = PICTURES[base, old], PICTURES[base, new]
    untouched = ki.metrics.mse(source, truth).sqrt()
    rows: list[dict[str, Any]] = [{"method": "no edit", **summary(untouched, untouched, base)}]
    made = {"picture": source, "truth": truth}
    negative = {"label": torch.full_like(new, DENOISER.null_label)}
    for method, sampler, end, scales in RUNS:
        down: dict[str, Any] = {"sampler": sampler, "negative": negative}
        done = ki.edit(
            DENOISER, source, SIGMAS, method=method, end_at_step=end, source={"label": old}, target={"label": new},
            max_evals=600 if method == "invert" else None, **down,
            noise=ki.noise.white(0) if method == "noise" else None,
        )  # fmt: skip
        for cfg in scales:
            image = done.image
            if cfg != 1:
                image = ki.sample(DENOISER, done.latent, done.sigmas, cfg=cfg, positive={"label": new}, **down)
            image = image.clamp(-1, 1)
            row = {
                "method": method,
                "sampler": sampler,
                "sigma": round(done.sigmas[0], 3),
                "cfg": cfg,
                "evaluations": done.evaluations,
                "converged": None if done.inversion is None else int(done.inversion.converged.sum()),
                **summary(ki.metrics.mse(image, truth).sqrt(), untouched, base),
            }
            rows.append(row)
            made[f"{method} {sampler} {end} {cfg:g}"] = image
            print({key: value for key, value in row.items() if key != "errors"}, flush=True)
        write(rows, base, old, new)
    return made


def write(rows: list[dict[str, Any]], base: Tensor, old: Tensor, new: Tensor) -> None:
    """Write rows, pairs and versions."""
    versions = {"kinvert": ki.__version__, "torch": torch.__version__, "python": platform.python_version()}
    edits = torch.stack((base, old, new), 1).tolist()
    found = {"rows": rows, "edits": edits, "tones": TONES, "steps": len(SIGMAS) - 1, "versions": versions}
    write_file(RESULTS, (json.dumps(found) + "\n").encode())


def draw(made: dict[str, Tensor], shown: tuple[int, ...]) -> None:
    """Draw some pictures, the truth, and what three methods made."""
    rows = (
        ("picture", "the old tone", "picture"),
        ("truth", "the new tone", "truth"),
        ("invert", "euler", "invert euler 0 1"),
        ("unsample", "heun", "unsample heun 0 1"),
        ("noise", "heun, σ 1.7", "noise heun 6 1"),
    )
    page = Page(1.3 + 0.67 * len(shown) + 0.05, 0.1 + 0.7 * len(rows))
    for k, (name, how, key) in enumerate(rows):
        top = 0.1 + 0.7 * k
        page.text(0.1, top + 0.22, name, fontsize=12, weight="bold")
        page.text(0.1, top + 0.43, how, color=GREY)
        page.tiles(1.3, top, made[key][list(shown)], 1.0, side=0.62)
    page.whole.savefig(FIGURE, dpi=130)


def main() -> None:
    """Measure, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    draw(measure(), tuple(range(12)))


if __name__ == "__main__":
    main()
