"""Measure what publications on inversion claim, on the embedded models, with intervals over images.

    python benchmarks/published_claims.py                     # all: results/claims-NAME.json, and the figures
    python benchmarks/published_claims.py guidance renoise    # some of them, and the figures
    python benchmarks/published_claims.py --figures           # docs/assets/claims-NAME.png alone

Images are held-out ones with their labels, of `digits` (12; 6 for `parameters`, `iterations` and `latents`) and `mnist`
(6; 12 for `correlation`), or images that the model made from known noise (`latents`). Levels are a Karras schedule from
80 to 0.02, states float64. Errors are root mean squares of the image, in units of its values from -1 to 1. A row has
the median over the images and the ends of its 95 % interval (a percentile bootstrap over images,
`kinvert.bench.report.intervals`). `orders` is measured on the exact denoiser of a Gaussian mixture, because it compares
with the ODE. docs/published-claims.md has the sentences that are compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from claims_figures import FIGURES_OF, draw
from torch import Tensor

import kinvert as ki
from kinvert import metrics, models
from kinvert.bench import Cell
from kinvert.bench.measurement import measure, versions
from kinvert.bench.report.intervals import interval
from kinvert.checks import unknown
from kinvert.denoisers import guide
from kinvert.editing import self_interpolation
from kinvert.files import write_file
from kinvert.inversion.baselines import BASELINES
from kinvert.inversion.baselines.common import ddim_up
from kinvert.tensors import rms

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
COUNTS = {"digits": 12, "mnist": 6}
SOLVERS = ("ddim_noisy", "aidi", "dpm_solver_1", "invert")


@dataclass(frozen=True, eq=False)
class Model:
    """An embedded model and held-out images with their labels."""

    name: str
    denoiser: Any
    images: Tensor
    labels: Tensor

    @classmethod
    def load(cls, name: str, count: int | None = None, dtype: torch.dtype = torch.float64) -> Model:
        images, labels = models.held_out(name)
        pick = torch.linspace(0, len(images) - 1, count or COUNTS[name]).long()
        return cls(name, models.load(name, dtype=dtype), images[pick].to(dtype), labels[pick])

    def given(self, cfg: float = 1.0) -> dict[str, Any]:
        null = torch.full_like(self.labels, self.denoiser.null_label)
        return {"cfg": cfg, "positive": {"label": self.labels}, "negative": {"label": null}}


def levels(steps: int) -> Tensor:
    return ki.schedules.karras(steps + 1, 0.02, 80.0)[:-1]


def row(values: Tensor | list[float], **settings: Any) -> Row:
    """Return a row: settings, the median over the images, and its interval."""
    numbers = [float(value) for value in values]
    ends = interval(numbers, [("image", k, 0) for k in range(len(numbers))])
    low, high = ends if ends is not None else (math.nan, math.nan)
    middle = float(torch.tensor(numbers, dtype=torch.float64).quantile(0.5))
    return settings | {"images": len(numbers)} | {"value": short(middle), "low": short(low), "high": short(high)}


def short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def inverted(method: str, model: Model, sigmas: Tensor, cfg: float, **options: Any) -> Any:
    """Invert the images of a model by a published method, or by `invert`."""
    run: Callable[..., Any] = ki.invert if method == "invert" else BASELINES[method]
    return run(model.denoiser, model.images, sigmas, **model.given(cfg), **options)


def reversible() -> Iterator[Row]:
    """Round trips of DDIM and of the samplers that are reversible, with the pair of states."""
    samplers = {"edict": {}, "bdia": {}, "bdia, gamma 0.5": {"gamma": 0.5}, "o_belm": {}}
    for dtype, steps in itertools.product((torch.float64, torch.float32), (10, 20, 50, 100)):
        model, sigmas = Model.load("digits", dtype=dtype), levels(steps)
        cell = {"dtype": str(dtype).removeprefix("torch."), "steps": steps}
        found = inverted("ddim_clean", model, sigmas, 1.0)
        yield row(found.round_trip_error, line="ddim_clean", **cell)
        for line, options in samplers.items():
            rule = ki.sampler(line.partition(",")[0], **options)
            found = ki.invert(model.denoiser, model.images, sigmas, sampler=rule, **model.given())
            growth = max(ki.analysis.amplification(ki.compile_plan(rule, sigmas)))
            yield row(found.round_trip_error, line=line, **cell, amplification=short(growth))


def parameters() -> Iterator[Row]:
    """The same in 200 steps and float32, over the parameter of each sampler; and the spread of the latent, / sigma."""
    model, sigmas = Model.load("digits", 6, torch.float32), levels(200)
    settings = [("edict", "p", value) for value in (0.9, 0.93, 0.97)]
    settings += [("bdia", "gamma", value) for value in (0.5, 0.9, 0.96, 1.0)]
    for name, option, value in [*settings, ("o_belm", "", None)]:
        rule = ki.sampler(name, **({option: value} if option else {}))
        found = ki.invert(model.denoiser, model.images, sigmas, sampler=rule, **model.given())
        line = f"{name}, {option} {value:g}" if option else name
        growth = max(ki.analysis.amplification(ki.compile_plan(rule, sigmas)))
        yield row(found.round_trip_error, line=line, measure="error", amplification=short(growth))
        yield row(found.latent.flatten(1).std(1) / 80, line=line, measure="latent")


def orders() -> Iterator[Row]:
    """The order of each sampler: by how much the distance to the ODE falls from 80 to 160 steps."""
    samplers = {"ddim_clean": "euler", "edict": "edict", "bdia": "bdia", "bdia, gamma 0.5": "bdia", "o_belm": "o_belm"}
    for line, sampler in samplers.items():
        options = (("gamma", 0.5),) if "0.5" in line else ()
        errors = []
        for steps in (80, 160):
            cell = Cell("mixture", "recovery", "unsample", sampler, options=options, steps=steps, count=16)
            errors.append(torch.tensor(measure(cell)[0]["metrics"]["distance_to_ode"], dtype=torch.float64))
        yield row((errors[0] / errors[1]).log2(), line=line)


def guidance() -> Iterator[Row]:
    """The error of the round trip over cfg, in 20 steps, and how many images came back to 1e-6."""
    model = Model.load("digits")
    for cfg, method in itertools.product((1.0, 2.0, 3.0, 7.5), SOLVERS):
        if cfg > {"dpm_solver_1": 2.0, "invert": 3.0}.get(method, 7.5):
            continue  # dear, and measured by published_inversions.py and exact_inversion.py
        yield trip(inverted(method, model, levels(20), cfg), cfg=cfg, line=method)


def few_steps() -> Iterator[Row]:
    """The error of the round trip over the number of steps, without guidance."""
    model = Model.load("digits")
    for steps, method in itertools.product((5, 10, 20), SOLVERS):
        yield trip(inverted(method, model, levels(steps), 1.0), steps=steps, line=method)


def trip(found: Any, **settings: Any) -> Row:
    error = found.round_trip_error
    per_step = float(found.evaluations.double().median()) / (len(found.sigmas) - 1)
    return row(error, **settings, exact=int((error <= 1e-6).sum()), evaluations=short(per_step))


def iterations() -> Iterator[Row]:
    """The error of the round trip over the number of iterations a step, in 20 steps."""
    model = Model.load("digits", 6)
    for cfg, k in itertools.product((1.0, 7.5), (1, 2, 4, 10)):
        for method in ("aidi", "renoise", "dpm_solver_1"):
            if k > 1 or method != "renoise":
                yield trip(inverted(method, model, levels(20), cfg, iterations=k), cfg=cfg, iterations=k, line=method)


def distances() -> Iterator[Row]:
    """How far apart successive fixed-point iterates are, in parts of the noise level, the mean over 20 steps.

    The share is that of all steps and images in which the distance grew from the 5th to the 10th iteration.
    """
    model, sigmas = Model.load("digits"), levels(20)
    for cfg in (1.0, 3.0, 7.5):
        moved = torch.stack([torch.stack(list(moves)) for moves in iterated(model, sigmas, cfg, 10)])
        grew = float((moved[:, 9] > moved[:, 4]).double().mean())
        for k in range(moved.shape[1]):
            yield row(moved[:, k].mean(0), cfg=cfg, iteration=k + 1, line=f"cfg {cfg:g}", grew=short(grew))


def iterated(model: Model, sigmas: Tensor, cfg: float, count: int) -> Iterator[list[Tensor]]:
    """Go up as ReNoise does; return for each step how far each iteration moved each image's state."""
    x, guided = model.images, guide(model.denoiser, **model.given(cfg), batch=len(model.images))
    for low, high in itertools.pairwise(sigmas.flip(0).tolist()):
        states, moves = [ddim_up(guided, x, low, high)], []
        for _ in range(count):
            plan = ki.compile_plan("euler", (high, low))
            states.append(states[-1] + x - ki.run(plan, guided, states[-1]))
            moves.append(rms(states[-1] - states[-2]) / high)
        x = (states[-1] + states[-2]) / 2
        yield moves


BUDGETS = ((50, 50, 0), (75, 25, 0), (80, 20, 0), (90, 10, 0), (25, 25, 2), (20, 20, 3), (10, 10, 8))


def renoise() -> Iterator[Row]:
    """PSNR of round trips of 100 evaluations in all, split as in the publication, and what it gains on 50 and 50."""
    for name in COUNTS:
        model, first = Model.load(name), None
        for up, down, k in BUDGETS:
            method, options = ("renoise", {"iterations": k}) if k else ("ddim_noisy", {})
            latent = inverted(method, model, levels(up), 1.0, **options).latent
            back = ki.sample(model.denoiser, latent, levels(down), sampler="euler", **model.given())
            psnr = 10 * (4 / metrics.mse(back, model.images)).log10()
            first = psnr if first is None else first
            gain = row(psnr - first)
            cell = {
                "model": name,
                "line": f"{up}, {down}, {k}",
                "gain": [gain[end] for end in ("value", "low", "high")],
            }
            yield row(psnr, **cell)


def correlation() -> Iterator[Row]:
    """Correlation of neighbouring values of a latent, its spread where the image is plain, and the round trip."""
    model, sigmas = Model.load("mnist", 12), levels(50)
    noise = torch.randn(model.images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Plain: no pixel of the 5 x 5 around it is brighter than black by more than a hundredth of the range.
    plain = torch.nn.functional.max_pool2d(model.images, 5, 1, 2) < -0.98
    found = {"ddim_noisy": ("ddim_noisy", {}), "uni_inv": ("uni_inv", {})}
    found |= {f"forward_first, {k}": ("forward_first", {"forward": k, "noise": noise}) for k in (1, 2, 5, 10)}
    results = {"noise": (80 * noise, None)}
    for line, (method, options) in found.items():
        one = inverted(method, model, sigmas, 1.0, **options)
        results[line] = one.latent, one.round_trip_error
    for line, (latent, error) in results.items():
        z = latent / 80
        spreads = [float(z[k][plain[k]].std() / z[k][~plain[k]].std()) for k in range(len(z))]
        yield row(metrics.patch_correlation(z), line=line, measure="correlation")
        yield row(spreads, line=line, measure="spread")
        if error is not None:
            yield row(error, line=line, measure="error")


def latents() -> Iterator[Row]:
    """Images of known noise: the error of the image, that of the latent, and the largest on a walk between the two."""
    model, sigmas = Model.load("digits", 6), levels(20)
    noise = torch.randn(model.images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    true = 80 * noise
    for cfg in (1.0, 7.5):
        options = model.given(cfg)
        made = replace(model, images=ki.sample(model.denoiser, true, sigmas, **options))
        for method in ("ddim_noisy", "aidi", "renoise", "invert"):
            found = inverted(method, made, sigmas, cfg)
            walk = self_interpolation(model.denoiser, true, found.latent, sigmas, points=5, **options)
            cell = {"cfg": cfg, "line": method}
            yield row(found.round_trip_error, **cell, measure="image")
            yield row(rms(found.latent - true) / rms(true), **cell, measure="latent")
            yield row(walk.max(0).values.sqrt(), **cell, measure="walk")


CLAIMS: dict[str, Callable[[], Iterator[Row]]] = {
    one.__name__: one
    for one in (
        reversible,
        parameters,
        orders,
        guidance,
        few_steps,
        iterations,
        distances,
        renoise,
        correlation,
        latents,
    )
}


@torch.no_grad()
def main() -> None:
    """Measure what is named, or all, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CLAIMS))
    parser.add_argument("--figures", action="store_true", help="draw only")
    args = parser.parse_args()
    for name in args.names:
        if name not in CLAIMS:
            parser.error(unknown("NAME", name, CLAIMS))
    torch.set_num_threads(1)
    for name in args.names or CLAIMS:
        if not args.figures:
            rows = []
            for one in CLAIMS[name]():
                rows.append(one)
                print(name, json.dumps(one), flush=True)
            report = {"command": f"python benchmarks/published_claims.py {name}", "versions": versions(), "rows": None}
            lines = ",\n".join("  " + json.dumps(one) for one in rows)
            text = json.dumps(report, indent=1).replace('"rows": null', f'"rows": [\n{lines}\n ]')
            write_file(RESULTS / f"claims-{name}.json", (text + "\n").encode())
    for name in FIGURES_OF:
        draw(name)


if __name__ == "__main__":
    main()
