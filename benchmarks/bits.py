"""Read the bits that the signs of a latent carry, from the image, and tell generated images by their round trip.

    python benchmarks/bits.py             # writes results/bits.json, the rows that are missing
    python benchmarks/bits.py --figure    # draws docs/assets/bits.png from the results

**Bits.** Noise of sigma 80 (seed 0) is sampled by `euler` or `dpmpp_2m` in 20 steps of the Karras schedule down to
0.02, in float32, the labels 0 to 9 in turn: 32 images of `digits`, 16 of `mnist`. The signs of the noise are the
message. It is read from the image by `unsample`, by `invert` with at most 8 evaluations a step on the way up, and by
the published `aidi` (11 a step at most), which knows `euler` alone; `invert_11` is `invert` with the limit of `aidi`.
Whoever reads knows the sampler, the steps, the label and cfg ("known"), or nothing ("blind"): then without a label, at
cfg 1, in 30 steps, by `dpmpp_2m` what `euler` made and the other way round. At cfg 3, images of `euler` are attacked
before they are read. What would take long on `mnist` is left out.

A row has the share of bits that are right ("bits"); the share of images with every bit right ("whole"); the share of
images that their own message tells, where 1 % of the messages of the other images may exceed the threshold ("tpr", at
FPR 1 %); and the chance that an image fits its own message better than another one ("auc"). The second and third number
are the ends of a 95 % interval, of a bootstrap over images: 500 resamples, the same ones for all rows of a model.

**Forensics.** Images of the model, 40 of `digits` and 20 of `mnist` at each cfg by `euler`, and as many held-out ones
to which the noise of the lowest level is added, all rounded to 8 bits, go up by `unsample` and down again at cfg 1,
with or without their labels. The score of an image is minus its rms error; a row has the AUC of generated
against held-out, and the median errors of both. The images of both kinds are resampled by themselves.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kinvert as ki
from kinvert import attacks, models
from kinvert.files import write_file
from kinvert.inversion.baselines import aidi
from kinvert.metrics import auc, bit_accuracy, tpr_at_fpr
from kinvert.tensors import rms

RESULTS = Path(__file__).parent / "results" / "bits.json"
FIGURE = Path(__file__).parent.parent / "docs" / "assets" / "bits.png"
COUNTS, FORENSIC = {"digits": 32, "mnist": 16}, {"digits": 40, "mnist": 20}
SCALES, SAMPLERS, METHODS = (1.0, 3.0, 7.5), ("euler", "dpmpp_2m"), ("unsample", "invert", "aidi")
STEPS, BLIND_STEPS, FPR, RESAMPLES = 20, 30, 0.01, 500
LIMITS = {"invert": 8, "invert_11": 11}  # evaluations a step on the way up
ATTACKS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "rounding alone": lambda x: ((x + 1) * 127.5).round() / 127.5 - 1,
    "clipping alone": lambda x: x.clamp(-1, 1),
    "8 bits": attacks.quantize,
    "noise 0.1": lambda x: attacks.gaussian_noise(x, 0.1),
    "blur 0.5": lambda x: attacks.blur(x, 0.5),
    "JPEG 75": lambda x: attacks.jpeg(x, 75),
    "crop 90 %": lambda x: attacks.crop_and_resize(x, 0.9),
}
Key = tuple[str, str, float, str, str, str]  # model, sampler, cfg, attack, knowledge, method


def keys(model: str) -> Iterator[Key]:
    """Return what is measured on a model; what would take long on `mnist` is left out."""
    small = model == "digits"
    for cfg in SCALES:
        yield from ((model, "euler", cfg, "none", "known", method) for method in METHODS[: 2 + small])
        yield from ((model, "euler", cfg, "none", "blind", method) for method in METHODS[: 1 + small])
    yield from ((model, "euler", 7.5, "none", "known", "invert_11") for _ in range(small))
    for attack in list(ATTACKS)[1:]:
        yield from ((model, "euler", 3.0, attack, "known", method) for method in METHODS[: 1 + small])
        yield model, "euler", 3.0, attack, "blind", "unsample"
    for cfg in SCALES:
        yield from ((model, "dpmpp_2m", cfg, "none", "known", method) for method in METHODS[: 1 + small])
        yield model, "dpmpp_2m", cfg, "none", "blind", "unsample"


def schedule(steps: int) -> Tensor:
    """Return the noise levels."""
    return ki.schedules.karras(steps + 1, 0.02, 80.0)[:-1]


def conditioning(denoiser: Any, labels: Tensor | None, cfg: float, count: int) -> dict[str, Any]:
    """Return the arguments of guidance, None for no label."""
    null = torch.full((count,), denoiser.null_label)
    if labels is None:
        return {"positive": {"label": null}}
    given: dict[str, Any] = {"cfg": cfg, "positive": {"label": labels}}
    return given | ({"negative": {"label": null}} if cfg != 1 else {})


def generated(model: str, sampler: str, cfg: float, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return latents and their images."""
    denoiser, shape = models.load(model), models.held_out(model)[0].shape[1:]
    noise = 80 * torch.randn(len(labels), *shape, generator=torch.Generator().manual_seed(0))
    given = conditioning(denoiser, labels, cfg, len(labels))
    return noise, ki.sample(denoiser, noise, schedule(STEPS), sampler=sampler, **given)


def read(method: str, denoiser: Any, x: Tensor, sampler: str, steps: int, given: dict[str, Any]) -> dict[str, Any]:
    """Return the latents of images, and what they cost."""
    sigmas = schedule(steps)
    if method == "unsample":
        latent = ki.unsample(denoiser, x, sigmas, sampler=sampler, sigma_offset=0.0, **given)
        return {"latent": latent, "evaluations": 1.0}
    if method == "aidi":
        found = aidi(denoiser, x, sigmas, **given)
    else:
        limit = (LIMITS[method] + 1) * steps + 4  # with the run that checks, and the comparison of the rows
        found = ki.invert(denoiser, x, sigmas, sampler=sampler, max_evals=limit, **given)
    spent = found.evaluations - found.checking - (0 if found.row_checks is None else found.row_checks)
    cost = round(float(spent.double().median()) / steps, 2)
    return {"latent": found.latent, "evaluations": cost, "converged": int(found.converged.sum())}


def measure(key: Key) -> dict[str, Any]:
    """Measure one row."""
    model, sampler, cfg, attack, knowledge, method = key
    labels = torch.arange(COUNTS[model]) % 10
    latent, x = generated(model, sampler, cfg, labels)
    steps, given = STEPS, conditioning(models.load(model), labels, cfg, len(x))
    if knowledge == "blind":
        steps, given = BLIND_STEPS, conditioning(models.load(model), None, 1.0, len(x))
        sampler = SAMPLERS[1 - SAMPLERS.index(sampler)]
    found = read(method, models.load(model), ATTACKS[attack](x), sampler, steps, given)
    recovered = found.pop("latent")
    right = torch.stack([bit_accuracy(recovered, bits.expand_as(recovered)) for bits in latent.split(1)], 1)
    names = ("model", "sampler", "cfg", "attack", "knowledge", "method")
    return dict(zip(names, key, strict=True)) | {"images": len(x)} | found | summary(right)


def summary(right: Tensor) -> dict[str, Any]:
    """Return the numbers of a row and their intervals, from what image i has of message j at place (i, j)."""

    def numbers(chosen: Tensor) -> list[float]:
        square = right[chosen][:, chosen]
        own, others = square.diagonal(), square[chosen[:, None] != chosen]
        whole = float((own == 1).double().mean())
        return [float(own.mean()), whole, tpr_at_fpr(own, others, FPR), auc(own, others)]

    drawn = torch.tensor([numbers(chosen) for chosen in resamples(len(right))])
    return dict(zip(("bits", "whole", "tpr", "auc"), bounded(numbers(torch.arange(len(right))), drawn), strict=True))


def resamples(count: int) -> Tensor:
    """Return the numbers of the images in each resample."""
    return torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(1))


def bounded(values: list[float], drawn: Tensor) -> list[list[float]]:
    """Return each value with the ends of its interval."""
    low, high = drawn.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).tolist()
    return [[round(part, 4) for part in parts] for parts in zip(values, low, high, strict=True)]


def forensics(model: str, cfg: float, known: bool) -> dict[str, Any]:
    """Measure how well the round trip tells generated from held-out images."""
    denoiser, count = models.load(model), FORENSIC[model]
    real, labels = (part[:: 40 // count] for part in models.held_out(model))
    made = generated(model, "euler", cfg, labels)[1]
    scores = []
    for x in (made, attacks.gaussian_noise(real, 0.02)):
        image = attacks.quantize(x)
        given = conditioning(denoiser, labels if known else None, 1.0, count)
        latent = ki.unsample(denoiser, image, schedule(STEPS), sampler="euler", sigma_offset=0.0, **given)
        scores.append(-rms(ki.sample(denoiser, latent, schedule(STEPS), sampler="euler", **given) - image))
    a, b = resamples(count), resamples(2 * count)[:, count:] % count  # images of both kinds are drawn by themselves
    drawn = torch.tensor([[auc(scores[0][i], scores[1][j])] for i, j in zip(a, b, strict=True)])
    errors = [float(f"{-float(score.median()):.3g}") for score in scores]
    key = {"model": model, "cfg": cfg, "label": known, "images": 2 * count}
    return key | {"errors": errors, "auc": bounded([auc(*scores)], drawn)[0]}


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw the shares of right bits: over cfg, and after attacks, a row of panels for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    panels = figure.subplots(2, 3, sharey=True, width_ratios=(1, 1, 2.1))
    for line, model in zip(panels, COUNTS, strict=True):
        here = [row for row in rows if row["model"] == model]
        for axis, sampler in zip(line, SAMPLERS, strict=False):
            chosen = [row for row in here if (row["sampler"], row["attack"]) == (sampler, "none")]
            panel(axis, chosen, "cfg", [f"cfg {cfg:g}" for cfg in SCALES], SCALES, "-")
            axis.set_title(f"{model}, {sampler}", fontsize=9)
        chosen = [row for row in here if (row["sampler"], row["cfg"]) == ("euler", 3)]
        panel(line[2], chosen, "attack", [name.replace(" ", "\n", 1) for name in ATTACKS], tuple(ATTACKS), "")
        line[2].set_title(f"{model}, euler at cfg 3, attacked", fontsize=9)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=6, fontsize=8)
    figure.supylabel("share of bits that are right; 0.5 is chance", fontsize=9)
    figure.savefig(FIGURE, dpi=90)


def panel(axis: Any, rows: list[dict[str, Any]], key: str, names: list[str], places: Sequence[Any], line: str) -> None:
    """Draw a curve, or points, for each method and each reader."""
    for number, (method, knowledge) in enumerate(itertools.product(METHODS, ("known", "blind"))):
        found = {row[key]: row["bits"] for row in rows if (row["method"], row["knowledge"]) == (method, knowledge)}
        values = [(k, *found[place]) for k, place in enumerate(places) if place in found]
        if values:
            at, middle, low, high = (torch.tensor(part) for part in zip(*values, strict=True))
            colour = {"unsample": "#767676", "invert": "#0072B2", "aidi": "#D55E00"}[method]
            style = f"o{line}" if knowledge == "known" else f"s{line and ':'}"
            looks: dict[str, Any] = {
                "color": colour,
                "markersize": 4,
                "markerfacecolor": colour if "o" in style else "white",
            }
            bars = torch.stack([middle - low, high - middle]).clamp(min=0)
            axis.errorbar(at + 0.09 * (number - 1.5), middle, bars, fmt=style, label=f"{method}, {knowledge}", **looks)
    axis.set_xticks(range(len(places)), names, fontsize=8)
    axis.axhline(0.5, color="#767676", linewidth=0.8)
    axis.grid(alpha=0.3)


def main() -> None:
    """Measure the rows that are missing, or draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(COUNTS), help=" ".join(COUNTS))
    parser.add_argument("--figure", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": [], "forensics": []}
    if args.figure:
        draw(report["rows"])
        return
    report["versions"] = {"kinvert": ki.__version__, "torch": torch.__version__, "python": platform.python_version()}

    def save(part: str, row: dict[str, Any]) -> None:
        report[part].append(row)
        write_file(RESULTS, (json.dumps(report, indent=1) + "\n").encode())
        print(time.strftime("%H:%M:%S"), f"{time.process_time():.0f}", json.dumps(row), flush=True)

    wanted = [key for model in args.models for key in keys(model)]
    done = {tuple(row.values())[:6] for row in report["rows"]}
    traced = {tuple(row.values())[:3] for row in report["forensics"]}
    for one in ((model, cfg, known) for model in args.models for cfg in SCALES for known in (True, False)):
        if one not in traced:
            save("forensics", forensics(*one))
    for key in sorted(wanted, key=lambda key: (key[0] != "digits", key[5] == "invert")):  # what is quick first
        if key not in done:
            save("rows", measure(key))


if __name__ == "__main__":
    main()
