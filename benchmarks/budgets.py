"""Measure the error of inversions against their cost: `invert` at several limits, published inversions and `unsample`.

    python benchmarks/budgets.py                        # writes results/budgets.json, the cells that are missing
    python benchmarks/budgets.py --steps 20 --cfg 1 3   # some of them
    python benchmarks/budgets.py --cost                 # the cost of the default limit, to the same file
    python benchmarks/budgets.py --figure               # draws docs/assets/budgets.png from the results

Held-out images of the embedded models (8 of `digits`, 2 of `mnist`) with their labels, Karras schedule from sigma 80 to
0.02, float32, and the same with the network's output rounded to bfloat16. A budget is a number of evaluations of the
step on the way up; one of `heun` is two calls of the denoiser. The run down that checks the latent comes on top, for
every method: `max_evals` of `invert` is (budget + 1) runs and the 4 evaluations that compare the rows. A row gives the
median and the worst rms error of the round trip and the median of the evaluations on the way up; those of `invert` also
the most evaluations of a sample, and how many converged to 1e-5.

The published inversions are those that end in the same sampler: `ddim_clean` (the plain run of `euler`), `ddim_noisy`,
`easyinv`, `aidi`, `aidi_anderson`, `renoise` and `dpm_solver_1` for `euler`, `dpm_solver_2` for `dpmpp_2m`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kinvert as ki
from kinvert import models
from kinvert.denoisers import Denoiser, guide
from kinvert.files import write_file
from kinvert.inversion.baselines import BASELINES
from kinvert.inversion.plain import Recorded, rising

RESULTS = Path(__file__).parent / "results" / "budgets.json"
FIGURE = Path(__file__).parent.parent / "docs" / "assets" / "budgets.png"
COUNTS = {"digits": 8, "mnist": 2}
OUTPUTS, SAMPLERS = ("float32", "bfloat16"), ("euler", "heun", "dpmpp_2m")
BUDGETS = (1, 2, 3, 4, 6, 10, 20)
ROWS = 4  # evaluations that compare the rows of the batch
ITERATIVE = {"aidi": 2, "aidi_anderson": 2, "dpm_solver_1": 2, "renoise": 3}  # and their least budget
COSTS: tuple[tuple[str, str, float, float | None, float, int], ...] = (
    ("euler", "float32", 0.002, None, 1.0, 20),
    ("heun", "float32", 0.002, None, 1.0, 20),
    ("euler", "float32", 0.02, 1e-2, 1.0, 20),
    ("euler", "float32", 0.02, 1e-3, 1.0, 20),
    ("euler", "float32", 0.02, 1e-5, 1.0, 20),
    ("dpmpp_2m", "float32", 0.02, None, 1.0, 20),
    ("dpmpp_2m", "float32", 0.002, None, 1.0, 20),
    ("dpmpp_2m", "float64", 0.02, None, 1.0, 20),
    ("dpmpp_2m", "float64", 0.002, None, 1.0, 20),
    ("euler", "float32", 0.02, None, 7.5, 50),
)
"""Sampler, dtype, lowest sigma, tolerance, cfg and steps of the table of costs."""


@dataclass(frozen=True)
class Cell:
    """What is measured: a method with so many evaluations a step, None for no limit."""

    network: str
    output: str
    steps: int
    cfg: float
    sampler: str
    method: str
    budget: int | None


def cells(network: str, output: str, steps: int, cfg: float) -> Iterator[Cell]:
    """Return the cells of a panel of the figure."""
    for sampler in SAMPLERS:
        here = (network, output, steps, cfg, sampler)
        yield Cell(*here, "unsample", 1)
        for budget in (*BUDGETS, None):
            yield Cell(*here, "invert", budget)
        if sampler == "euler":
            for name in ("ddim_noisy", "easyinv"):
                yield Cell(*here, name, 1)
            for name, least in ITERATIVE.items():
                for budget in (budget for budget in BUDGETS if budget >= least):
                    yield Cell(*here, name, budget)
        if sampler == "dpmpp_2m":
            for budget in (budget for budget in BUDGETS if budget >= 6):
                yield Cell(*here, "dpm_solver_2", budget)


def problem(name: str, output: str, cfg: float, dtype: torch.dtype) -> tuple[Denoiser, Tensor, dict[str, Any]]:
    """Return the denoiser, the images, and the guidance."""
    model, (x, labels) = models.load(name, dtype=dtype), (part[: COUNTS[name]] for part in models.held_out(name))

    def denoiser(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        out: Tensor = model(x, sigma, label=label)
        return out.bfloat16().to(out.dtype) if output == "bfloat16" else out

    given: dict[str, Any] = {"cfg": cfg, "positive": {"label": labels}}
    if cfg != 1:
        given["negative"] = {"label": torch.full_like(labels, model.null_label)}
    return denoiser, x.to(dtype), given


def find(cell: Cell, denoiser: Denoiser, x: Tensor, sigmas: Tensor, given: dict[str, Any]) -> ki.Inversion:
    """Invert the images by the method of the cell."""
    plan, budget = ki.compile_plan(cell.sampler, sigmas), cell.budget
    if cell.method == "invert" or budget is None:
        limit = None if budget is None else (budget + 1) * plan.evaluations + ROWS
        return ki.invert(denoiser, x, sigmas, sampler=cell.sampler, max_evals=limit, **given)
    options = {"iterations": budget - 1} if cell.method in ITERATIVE else {}
    if cell.method == "dpm_solver_2":
        options = {"substeps": budget // 4, "iterations": budget - 2 * (budget // 4 + 1)}
    return BASELINES[cell.method](denoiser, x, sigmas, **given, **options)


def plain(cell: Cell, denoiser: Denoiser, x: Tensor, sigmas: Tensor, given: dict[str, Any]) -> Tensor:
    """Return what comes back after a plain run up and down."""
    plan = ki.compile_plan(cell.sampler, sigmas)
    up = rising(plan)
    if up is None:
        raise ValueError(f"{cell.sampler} does not run upwards")
    guidance = guide(denoiser, given["cfg"], given["positive"], given.get("negative"), batch=len(x))
    return Recorded.of(up, plan, guidance, x).restored


def measure(cell: Cell) -> dict[str, Any]:
    """Measure one cell."""
    denoiser, x, given = problem(cell.network, cell.output, cell.cfg, torch.float32)
    sigmas = ki.schedules.karras(cell.steps + 1, 0.02, 80.0)[:-1]
    if cell.method == "unsample":
        error = (plain(cell, denoiser, x, sigmas, given) - x).square().flatten(1).mean(1).sqrt()
        return asdict(cell) | summary(error, torch.ones(len(x)))
    found = find(cell, denoiser, x, sigmas, given)
    runs = ki.compile_plan(cell.sampler, sigmas).evaluations
    row = asdict(cell) | summary(found.round_trip_error, upwards(found) / runs)
    return row | certified(found, runs) if cell.method == "invert" else row


def certified(found: ki.Inversion, unit: int) -> dict[str, Any]:
    """Return what only `invert` tells: how many samples converged, and the most that one took, in such units."""
    return {"most_evaluations": round(float(upwards(found).max()) / unit, 2), "converged": int(found.converged.sum())}


def upwards(found: ki.Inversion) -> Tensor:
    """Return the evaluations of each sample without the run that checks and the comparison of the rows."""
    asked = 0 if found.row_checks is None else found.row_checks
    return (found.evaluations - found.checking - asked).double()


def summary(error: Tensor, spent: Tensor) -> dict[str, Any]:
    """Return the numbers of a row."""
    return {
        "samples": len(error),
        "median_error": float(f"{float(error.median()):.3g}"),
        "worst_error": float(f"{float(error.max()):.3g}"),
        "evaluations": round(float(spent.median()), 2),
    }


def cost(sampler: str, dtype: str, lowest: float, tol: float | None, cfg: float, steps: int) -> dict[str, Any]:
    """Measure what the default limit takes on `digits`, in calls of the denoiser a step."""
    denoiser, x, given = problem("digits", "exact", cfg, getattr(torch, dtype))
    sigmas = ki.schedules.karras(steps + 1, lowest, 80.0)[:-1]
    found = ki.invert(denoiser, x, sigmas, sampler=sampler, tol=tol, **given)
    key = {"sampler": sampler, "dtype": dtype, "lowest_sigma": lowest, "tolerance": tol, "cfg": cfg, "steps": steps}
    return key | summary(found.round_trip_error, upwards(found) / steps) | certified(found, steps)


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw the figure, for 20 steps in float32: a row of panels for each network and sampler, a panel for each cfg."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["output"] == "float32" and row["steps"] == 20]
    lines = list(itertools.product(dict.fromkeys(row["network"] for row in rows), SAMPLERS))
    scales = sorted({row["cfg"] for row in rows})
    figure = Figure(figsize=(1.0 + 3.6 * len(scales), 2.6 * len(lines)), layout="constrained")
    panels = figure.subplots(len(lines), len(scales), squeeze=False)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for (i, line), (j, cfg) in itertools.product(enumerate(lines), enumerate(scales)):
        axis = panels[i, j]
        here = [row for row in rows if (row["network"], row["sampler"], row["cfg"]) == (*line, cfg)]
        if not here:
            axis.remove()
            continue
        axis.set(xscale="log", yscale="log", xlim=(0.9, 22))
        for number, method in enumerate(methods):
            points = [row for row in here if row["method"] == method and row["budget"] is not None]
            points.sort(key=lambda row: row["budget"])
            style = {"color": "black" if method == "invert" else f"C{number}", "marker": "o", "markersize": 3}
            style["linewidth"] = 1.8 if method == "invert" else 0.9
            at = [row["budget"] for row in points]
            if not points:
                continue
            axis.plot(at, [row["median_error"] for row in points], **style, label=method)
            axis.plot(at, [row["worst_error"] for row in points], **style, linestyle=":")
        axis.set(xticks=BUDGETS, xticklabels=map(str, BUDGETS))
        axis.set_title(f"{line[0]}, {line[1]}, cfg {cfg:g}", fontsize=9)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    found = [axis.get_legend_handles_labels() for axis in figure.axes]
    known = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    figure.legend(list(known.values()), list(known), loc="outside upper center", ncols=5, fontsize=9)
    figure.supxlabel("evaluations a step on the way up")
    figure.supylabel("rms error of the round trip: median (solid), worst (dotted)")
    figure.savefig(FIGURE, dpi=80)


def main() -> None:
    """Measure the cells that are missing, or draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=list(COUNTS), choices=list(COUNTS))
    parser.add_argument("--output", nargs="+", default=list(OUTPUTS), choices=OUTPUTS)
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 50])
    parser.add_argument("--cfg", nargs="+", type=float, default=[1.0, 3.0, 7.5])
    parser.add_argument("--sampler", nargs="+", default=list(SAMPLERS), choices=SAMPLERS)
    parser.add_argument("--method", nargs="+", help="all of them by default")
    parser.add_argument("--cost", action="store_true", help="measure the table of costs")
    parser.add_argument("--figure", action="store_true", help="draw docs/assets/budgets.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": [], "cost": []}
    if args.figure:
        draw(report["rows"])
        return
    versions = {"kinvert": ki.__version__, "torch": torch.__version__, "python": platform.python_version()}
    report["versions"] = versions

    def save(part: str, row: dict[str, Any]) -> None:
        report[part].append(row)
        write_file(RESULTS, (json.dumps(report, indent=1) + "\n").encode())
        print(time.strftime("%H:%M:%S"), json.dumps(row), flush=True)

    if args.cost:
        done = [tuple(row.values())[:6] for row in report["cost"]]
        for one in COSTS:
            if one not in done:
                save("cost", cost(*one))
        return
    names = list(Cell.__dataclass_fields__)
    found = {Cell(**{name: row[name] for name in names}) for row in report["rows"]}
    for panel in itertools.product(args.network, args.output, args.steps, args.cfg):
        for cell in cells(*panel):
            wanted = cell.sampler in args.sampler and (args.method is None or cell.method in args.method)
            if wanted and cell not in found:
                save("rows", measure(cell))


if __name__ == "__main__":
    main()
