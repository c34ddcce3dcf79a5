"""Bits per value of held-out images under the embedded models, with the right label and with each wrong one.

    python benchmarks/density.py digits:40 mnist:20    # writes results/density.json, and docs/assets/density.png

The images, MODEL:COUNT of those that were held out, are spread evenly over their intervals (`ki.dequantize`, seed 0):
1/8 wide for the 17 values of digits, 2/255 for the 256 of mnist. `ki.log_prob` of the ODE, Heun's method in 20 steps of
the Karras schedule, 0.02 to 80, float32, once for each of the ten labels and once without: the trace is summed for
digits and estimated with 8 random vectors for mnist. For the first four digits a second table has the density of
samplers, and that of the ODE, for 10 to 80 steps. Models that are there are measured again.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kinvert as ki
from kinvert import models
from kinvert.files import write_file

RESULTS = Path(__file__).parent / "results" / "density.json"
FIGURE = Path(__file__).parent.parent / "docs" / "assets" / "density.png"
BINS = {"digits": 2 / 16, "mnist": 2 / 255}


def by_label(name: str, count: int) -> dict[str, Any]:
    """Return bits per value of images, one row for each label and one without, and which label is right."""
    images, labels = models.held_out(name)
    pick = torch.linspace(0, len(images) - 1, count).long()
    x, right = ki.dequantize(images[pick], BINS[name]), labels[pick]
    net, sigmas, rows = models.load(name), ki.schedules.karras(20, 0.02, 80.0)[:-1], []
    largest = 0.0
    for label in range(net.null_label + 1):
        found = ki.log_prob(net, x, sigmas, of="ode", positive={"label": torch.full_like(right, label)})
        rows.append([round(value, 4) for value in found.bits_per_dim(BINS[name]).tolist()])
        largest = max(largest, float((found.std_error / found.values).max()) / np.log(2))
        print(name, label, f"mean {np.mean(rows[-1]):.3f}", flush=True)
    return {"right": right.tolist(), "bits": rows, "error": round(largest, 4)}


def by_steps(name: str, count: int = 4) -> list[dict[str, Any]]:
    """Return bits per value under samplers and under the ODE, for several numbers of steps."""
    images, labels = models.held_out(name)
    x, rows = ki.dequantize(images[:count], BINS[name]).double(), []
    net, given = models.load(name, dtype=torch.float64), {"positive": {"label": labels[:count]}}
    for of in ("sampler", "ode"):
        for sampler in ("euler", "heun", "dpmpp_2m"):
            for steps in (10, 20, 40, 80):
                sigmas = ki.schedules.karras(steps + 1, 0.02, 80.0)[:-1]
                bits = ki.log_prob(net, x, sigmas, sampler=sampler, of=of, **given).bits_per_dim(BINS[name])
                rows.append(
                    {"of": of, "sampler": sampler, "steps": steps, "bits": [round(b, 4) for b in bits.tolist()]}
                )
                print(rows[-1], flush=True)
    return rows


def summary(found: dict[str, Any]) -> dict[str, float]:
    """Return the means by label right, without and wrong, and how often the right one has the fewest bits."""
    bits, right = np.array(found["bits"]), np.array(found["right"])
    labels, columns = bits[:-1], np.arange(bits.shape[1])
    own = labels[right, columns]
    return {
        "right": float(own.mean()),
        "none": float(bits[-1].mean()),
        "wrong": float((labels.sum(0) - own).mean() / (len(labels) - 1)),
        "lowest": int((labels.argmin(0) == right).sum()),
        "images": len(right),
    }


def draw(report: dict[str, Any]) -> None:
    """Draw the bits of each image with its right label, without one, and with the wrong ones."""
    import matplotlib.pyplot as plt

    names = [name for name in BINS if name in report]
    axes = plt.subplots(1, len(names), figsize=(5.2 * len(names), 3.6), squeeze=False)[1][0]
    for axis, name in zip(axes, names, strict=True):
        bits, right = np.array(report[name]["bits"]), np.array(report[name]["right"])
        order = np.argsort(bits[right, np.arange(len(right))])
        for place, i in enumerate(order):
            wrong = np.delete(bits[:-1, i], right[i])
            axis.plot([place] * len(wrong), wrong, "_", color="0.7", label="a wrong label" if place == 0 else None)
            axis.plot(place, bits[-1, i], "x", color="C0", ms=4, label="no label" if place == 0 else None)
            axis.plot(place, bits[right[i], i], "o", color="C1", ms=4, label="the right label" if place == 0 else None)
        axis.set(title=f"{name}, {len(right)} held-out images", xlabel="image, sorted", ylabel="bits per value")
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(frameon=False)
    plt.tight_layout()
    plt.savefig(FIGURE, dpi=110)


def main() -> None:
    """Measure, print the means, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="*", default=["digits:40", "mnist:20"], help="MODEL:IMAGES")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    report["versions"] = {"kinvert": ki.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for count in args.counts:
        name, _, images = count.partition(":")
        report[name] = by_label(name, int(images))
        if name == "digits":
            report["steps"] = by_steps(name)
        write_file(RESULTS, (json.dumps(report) + "\n").encode())
        print(name, summary(report[name]), flush=True)
    draw(report)


if __name__ == "__main__":
    main()
