"""Look for several latents of one generated image, under guidance, and measure whether `invert` finds the true one.

    python benchmarks/preimages.py digits:32 mnist:8    # writes results/preimages.json
    python benchmarks/preimages.py --axes               # the same file: by cfg and by steps, digits:4
    python benchmarks/preimages.py --figure             # docs/assets/preimages.png, of the results that are there

Noise of sigma 80 (seed 0) is sampled by Euler's method in 20 steps of the Karras schedule down to 0.02, in float64, the
labels 0 to 9 in turn, at cfg 7.5 or `--cfg`. For each image a row has the distance from its true latent to that of
`ki.invert`, in parts of the true one's norm, and what `ki.inversion.preimages` finds from the true one with its default
options. Rows that are there are skipped.

`--axes` makes each image at cfg 1, 3 and 7.5 in 10, 20 and 50 steps, and looks from the true latent with four starts a
step for a digit and two for `mnist`, instead of eight. Where it finds several latents of a digit, a row also has the
log density of the sampler at each, `log N(z; 0, sigma^2) - log |det|` of its derivative there, in nats, as
`ki.log_prob` computes it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

import kinvert as ki
from kinvert import models
from kinvert.density import latent_log_prob
from kinvert.files import write_file

RESULTS = Path(__file__).parent / "results" / "preimages.json"
FIGURE = Path(__file__).parent.parent / "docs" / "assets" / "preimages.png"
STEPS, MOST = 20, 64
AXES = {"cfg": (1.0, 3.0, 7.5), "steps": (10, 20, 50)}
COUNTS = {"rows": ["digits:32", "mnist:8"], "axes": ["digits:4"]}
STARTS = {"digits": 4, "mnist": 2}  # of a step, by cfg and steps


def problem(
    name: str, i: int, cfg: float, steps: int = STEPS
) -> tuple[Any, torch.Tensor, torch.Tensor, Any, dict[str, Any]]:
    """Return the denoiser, the latent and the image number i, the schedule and the conditioning."""
    denoiser = models.load(name, dtype=torch.float64)
    shape = models.held_out(name)[0].shape[1:]
    noise = torch.randn(MOST, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latent, label = 80 * noise[i : i + 1], torch.tensor([i % 10])
    sigmas = ki.schedules.karras(steps + 1, 0.02, 80.0)[:-1]
    given = {"cfg": cfg, "positive": {"label": label}, "negative": {"label": torch.tensor([denoiser.null_label])}}
    return denoiser, latent, ki.sample(denoiser, latent, sigmas, sampler="euler", **given), sigmas, given


def row(name: str, i: int, cfg: float, steps: int, part: str) -> dict[str, Any]:
    """Measure one image."""
    denoiser, latent, x, sigmas, given = problem(name, i, cfg, steps)
    starts = STARTS[name] if part == "axes" else 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = ki.invert(denoiser, x, sigmas, **given)
        others = ki.inversion.preimages(denoiser, x, sigmas, latent=latent, starts=starts, **given)
    measured = {
        "model": name,
        "image": i,
        "cfg": cfg,
        "steps": steps,
        "invert": {
            "converged": bool(found.converged.all()),
            "distance": _short(float((found.latent - latent).norm() / latent.norm())),
            "evaluations": int(found.evaluations),
        },
        "latents": len(others.inversions),
        "distances": [_short(value) for value in others.distances[0].tolist()],
        "norms": [_short(value) for value in others.norms.tolist()],
        "errors": [_short(float(one.round_trip_error)) for one in others.inversions],
        "evaluations": others.evaluations,
    }
    if part == "axes" and name == "digits" and len(others.inversions) > 1:
        values = [latent_log_prob(denoiser, one.latent, sigmas, sampler="euler", **given) for one in others.inversions]
        measured["log_densities"] = [round(float(value), 2) for value in values]
    return measured


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def draw(name: str, i: int, cfg: float) -> None:
    """Draw the latents of an image, what the network makes of them on the way, and where they end."""
    import matplotlib.pyplot as plt

    denoiser, latent, x, sigmas, given = problem(name, i, cfg)
    found = ki.inversion.preimages(denoiser, x, sigmas, latent=latent, **given)
    levels = (0, 6, 9, 11, 12, 13, 14, 20)
    axes = plt.subplots(len(found.inversions), len(levels), figsize=(1.35 * len(levels), 1.6 * len(found.inversions)))[
        1
    ]
    for line, one in zip(axes.reshape(-1, len(levels)), found.inversions, strict=True):
        distance = float((one.latent - latent).norm() / latent.norm())
        for axis, level in zip(line, levels, strict=True):
            state = one.latent
            if level:
                state = ki.sample(denoiser, one.latent, sigmas[: level + 1], sampler="euler", **given)
            axis.imshow(state[0, 0] / max(1.0, float(sigmas[level])), cmap="gray", vmin=-1.5, vmax=1.5)
            axis.set(xticks=[], yticks=[], title=f"sigma {float(sigmas[level]):.3g}")
        line[0].set_ylabel(f"{distance:.0%} apart")
    plt.tight_layout()
    plt.savefig(FIGURE, dpi=110)


def main() -> None:
    """Measure the images that are missing, or draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="*", help="MODEL:IMAGES or MODEL:FIRST-LAST")
    parser.add_argument("--cfg", type=float, default=7.5)
    parser.add_argument("--axes", action="store_true")
    parser.add_argument("--figure", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.figure:
        best = max(report["rows"], key=lambda row: row["latents"])
        draw(best["model"], best["image"], best["cfg"])
        return
    report["versions"] = {"kinvert": ki.__version__, "torch": torch.__version__, "python": platform.python_version()}
    part = "axes" if args.axes else "rows"
    rows = report.setdefault(part, [])
    done = {tuple(row[key] for key in ("model", "image", "cfg", "steps")) for row in rows}
    cells = list(itertools.product(*AXES.values())) if args.axes else [(args.cfg, STEPS)]
    images = [each for count in args.counts or COUNTS[part] for each in numbered(count)]
    for (cfg, steps), (name, i) in itertools.product(sorted(cells, key=lambda cell: cell[1]), images):
        if (name, i, cfg, steps) not in done:
            rows.append(row(name, i, cfg, steps, part))
            print(json.dumps(rows[-1]), flush=True)
            write_file(RESULTS, (json.dumps(report, indent=1) + "\n").encode())


def numbered(count: str) -> list[tuple[str, int]]:
    """Return the model and the number of each image that MODEL:IMAGES or MODEL:FIRST-LAST asks for."""
    name, _, images = count.partition(":")
    first, _, last = images.rpartition("-")
    return [(name, i) for i in range(int(first or 0), int(last) + bool(first))]


if __name__ == "__main__":
    main()
