"""Reproduce the published effects of inversion one by one, each as a figure and a small file of results.

    python benchmarks/effects.py                          # all of them, some minutes on one core
    python benchmarks/effects.py order cfg --out figures   # some of them, figures to another folder

Every effect is a handful of benchmark cells on `mixture`, Gaussians in 16 dimensions with an exact denoiser (see
`kinvert.bench.problems`), noise levels from 15 to 0.03 after Karras et al. (2022), arXiv 2206.00364. It writes
`results/effects-<name>.json`, and `<out>/effects-<name>.png`, which is not kept in the repository. All errors are
medians over the samples. Cells that were measured before are read from `<out>/cells`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import kinvert as ki
from kinvert import bench
from kinvert.bench import METHODS, Cell, Grid
from kinvert.bench.measurement import setup_of, versions
from kinvert.checks import unknown
from kinvert.reference import solve_ode
from kinvert.tensors import rms

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
ALONE = " alone"
STEPS = [10, 20, 40, 80, 160]
REVERSIBLE = ["edict", "bdia", {"name": "bdia", "gamma": 0.5}, "o_belm", "leapfrog", "mccallum_foster"]

# Methods of our own, by registration.
METHODS["fixed point, 50 iterations"] = lambda setup, x: ki.invert(
    setup.denoiser, x, setup.sigmas, method=ki.inversion.Picard(max_iterations=50), **setup.guidance
)
METHODS["damped by 1/2, 200 iterations"] = lambda setup, x: ki.invert(
    setup.denoiser, x, setup.sigmas, method=ki.inversion.Damped(tau=0.5, max_iterations=200), **setup.guidance
)
METHODS["Anderson, 50 iterations"] = lambda setup, x: ki.invert(
    setup.denoiser, x, setup.sigmas, method=ki.inversion.Anderson(max_iterations=50), **setup.guidance
)


@dataclass(frozen=True)
class Effect:
    """An effect: the function that measures its rows, and its figure: `y` over `x`, one line for each of `line`."""

    measure: Callable[[Path], list[Row]]
    x: str
    y: str
    line: tuple[str, ...]
    log: str = "xy"

    @property
    def shows(self) -> str:
        return " ".join((self.measure.__doc__ or "").split())


def order(folder: Path) -> list[Row]:
    """Order slopes: the distance of a sample from the ODE's falls as steps^-order."""
    samplers = ["euler", "heun", *REVERSIBLE]
    rows = measured(folder, Grid("mixture", "recovery", "unsample", samplers, steps=STEPS), "distance_to_ode")
    return with_slopes(rows, "distance_to_ode")


def edict(folder: Path) -> list[Row]:
    """EDICT's order is 1, with about Euler's error from 40 steps on; below, alternating the two states helps."""
    samplers = ["euler", "edict", {"name": "edict", "alternate": True}, {"name": "edict", "evaluate_at": "sigma_next"}]
    grid = Grid("mixture", "recovery", "unsample", samplers, steps=[*STEPS, 320, 640, 1280], count=2)
    return with_slopes(measured(folder, grid, "distance_to_ode"), "distance_to_ode")


def low_sigma(folder: Path) -> list[Row]:
    """Error concentrates at low sigma: what one step up and down again leaves, along the ODE, in the latent's unit."""
    problem = bench.PROBLEMS["mixture"](8, 0, torch.float64)
    rows = []
    for steps in (20, 50):
        setup = setup_of(Cell("mixture", steps=steps), problem)
        rising, x = setup.sigmas[::-1], problem.images
        for low, high in itertools.pairwise(rising):
            up = ki.unsample(setup.denoiser, x, [high, low], sigma_offset=0.0, **setup.guidance)
            left = rms(ki.sample(setup.denoiser, up, [high, low], **setup.guidance) - x) / low
            rows.append({"steps": steps, "sigma": low, "defect": float(left.median())})
            x = solve_ode(setup.denoiser, x, low, high, rtol=1e-8, **setup.guidance)
    return rows


def cfg(folder: Path) -> list[Row]:
    """Guidance: the error of unsampling grows with cfg, the fixed point fails beyond some cfg, `invert` does not."""
    methods = ["unsample", "ddim_noisy", "fixed point, 50 iterations", "invert"]
    return measured(folder, Grid("mixture", "reconstruction", methods, cfg=[1.0, 1.5, 2.0, 3.0, 5.0, 7.5]), "nmse_db")


def fixed_point(folder: Path) -> list[Row]:
    """Fixed-point divergence below 20 steps: it stalls where damping and acceleration still invert exactly."""
    methods = ["unsample", *(name for name in METHODS if "iterations" in name), "invert"]
    grid = Grid("mixture", "recovery", methods, steps=[5, 10, 20, 50], count=32)
    return measured(folder, grid, "max_error", statistic=max)


def precision(folder: Path) -> list[Row]:
    """Precision floors: exact methods end at the rounding that their inverse amplifies, approximate ones far above."""
    approximate = Grid("mixture", "recovery", "unsample", ["euler", "heun"], steps=50, dtype=list(DTYPES))
    exact = Grid("mixture", "recovery", "picard", ["euler"], steps=50, dtype=list(DTYPES))
    closed = Grid("mixture", "recovery", "reversible", REVERSIBLE, steps=50, dtype=list(DTYPES))
    rows = measured(folder, [*approximate, *exact, *closed], "max_error", statistic=max)
    return [row | {"epsilon": DTYPES[row["dtype"]]} for row in rows]


def auxiliary(folder: Path) -> list[Row]:
    """Reversible samplers without the auxiliary state: errors as of an approximate method; with it, of rounding."""
    methods, questions = ["reversible", "reversible_alone"], ["reconstruction", "recovery"]
    return measured(folder, Grid("mixture", questions, methods, REVERSIBLE, steps=[10, 20, 50]), "max_error")


def gamma(folder: Path) -> list[Row]:
    """BDIA's gamma: the inverse amplifies rounding by 1/gamma a step; 0.5 costs 11 digits at 50 steps."""
    samplers = [{"name": "bdia", "gamma": g} for g in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)]
    grid = Grid("mixture", "recovery", "reversible", samplers, steps=50, dtype=["float64", "float32"])
    rows = measured(folder, grid, "max_error", statistic=max)
    return [row | {"gamma": row["options"].get("gamma", 1.0)} for row in rows]


DTYPES = {name: torch.finfo(getattr(torch, name)).eps for name in ("float64", "float32", "float16")}
EFFECTS = {
    "order": Effect(order, "steps", "distance_to_ode", ("sampler",)),
    "edict": Effect(edict, "steps", "distance_to_ode", ("sampler",)),
    "low_sigma": Effect(low_sigma, "sigma", "defect", ("steps",)),
    "cfg": Effect(cfg, "cfg", "nmse_db", ("method",), log="x"),
    "fixed_point": Effect(fixed_point, "steps", "max_error", ("method",)),
    "precision": Effect(precision, "epsilon", "max_error", ("sampler", "method")),
    "auxiliary": Effect(auxiliary, "steps", "max_error", ("sampler",)),
    "gamma": Effect(gamma, "gamma", "max_error", ("dtype",), log="y"),
}


def measured(
    folder: Path,
    cells: Iterable[Cell],
    metric: str,
    statistic: Callable[[Sequence[float]], float] = statistics.median,
) -> list[Row]:
    """Measure cells, and return a row for each in their order: settings, the metric, and what the method claims."""
    cells = list(cells)
    records = {record["key"]: record for record in bench.run(cells, folder, progress=True)}
    rows = []
    for cell in cells:
        record = records[cell.key]
        row: Row = {"sampler": label(cell), "options": dict(cell.options)}
        row |= {name: getattr(cell, name) for name in ("question", "method", "steps", "cfg", "dtype")}
        if record["error"] is not None:
            rows.append(row | {metric: None, "error": record["error"]})
            continue
        both = zip(record["inversion_evaluations"], record["sampling_evaluations"], strict=True)
        row |= {metric: statistic(record["metrics"][metric]), "evaluations": statistics.median(map(sum, both))}
        if record["converged"] is not None:
            row |= {"converged": sum(record["converged"]), "samples": cell.count}
        rows.append(row)
    return rows


def label(cell: Cell) -> str:
    """Return the sampler with its options, and a mark if its latent is kept without the auxiliary state."""
    options = ", ".join(f"{key}={value}" for key, value in cell.options)
    alone = ALONE if cell.method == "reversible_alone" else ""
    return f"{cell.sampler}{f' ({options})' if options else ''}{alone}"


def with_slopes(rows: list[Row], metric: str) -> list[Row]:
    """Add the order between each number of steps and the one before it."""
    before: dict[str, Row] = {}
    for row in rows:
        if last := before.get(row["sampler"]):
            row["order"] = math.log(last[metric] / row[metric]) / math.log(row["steps"] / last["steps"])
        before[row["sampler"]] = row
    return rows


def draw(name: str, rows: list[Row]) -> Figure:
    """Draw an effect: a panel for each question, with dashed lines for latents without their auxiliary state."""
    effect, questions = EFFECTS[name], list(dict.fromkeys(row.get("question") for row in rows))
    figure = Figure(figsize=(1.6 + 4.6 * len(questions), 4.0), layout="constrained")
    panels = figure.subplots(1, len(questions), squeeze=False, sharey=True)[0]
    for axes, question in zip(panels, questions, strict=True):
        lines: dict[str, list[Row]] = {}
        for row in rows:
            if row.get("question") == question and row[effect.y] is not None:
                lines.setdefault(", ".join(str(row[key]) for key in effect.line), []).append(row)
        colours = {text: f"C{i}" for i, text in enumerate(dict.fromkeys(text.removesuffix(ALONE) for text in lines))}
        for text, line in lines.items():
            x, y = ([row[key] for row in line] for key in (effect.x, effect.y))
            style = "--" if text.endswith(ALONE) else "-"
            axes.plot(x, y, style, color=colours[text.removesuffix(ALONE)], marker="o", ms=3, lw=1, label=text)
        axes.set(xlabel=effect.x, title=f"{name.replace('_', ' ')}: {question}" if question else name.replace("_", " "))
        axes.set_xscale("log" if "x" in effect.log else "linear")
        axes.set_yscale("log" if "y" in effect.log else "linear")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(effect.y.replace("_", " "))
    panels[-1].legend(fontsize=7, title=", ".join(effect.line), loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def main() -> None:
    """Measure, print, write and draw the effects that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EFFECTS))
    parser.add_argument("--out", type=Path, default=Path("effects"), help="folder of the figures and the cells")
    args = parser.parse_args()
    for name in args.names:
        if name not in EFFECTS:
            parser.error(unknown("NAME", name, EFFECTS))
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or EFFECTS:
        rows = EFFECTS[name].measure(args.out / "cells")
        command = f"python benchmarks/effects.py {name}"
        report = {"command": command, "shows": EFFECTS[name].shows, "versions": versions(), "rows": rows}
        text = json.dumps(report | {"rows": None}, indent=1)
        lines = ",\n".join("  " + json.dumps(row) for row in rows)
        (RESULTS / f"effects-{name}.json").write_text(text.replace('"rows": null', f'"rows": [\n{lines}\n ]') + "\n")
        draw(name, rows).savefig(args.out / f"effects-{name}.png", dpi=150)
        print(f"{name}: {EFFECTS[name].shows}", flush=True)


if __name__ == "__main__":
    main()
