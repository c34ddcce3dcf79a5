"""Draw docs/assets/claims-NAME.png from results/claims-NAME.json, for `published_claims.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kinvert.plot.axes import error_axis
from kinvert.plot.style import GREY, PAGE, STYLE, looks_of

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent.parent / "docs" / "assets"
Row = dict[str, Any]
SDXL = {"50, 50, 0": 26.023, "75, 25, 0": 25.466, "80, 20, 0": 25.045, "90, 10, 0": 20.249}
SDXL |= {"25, 25, 2": 29.569, "20, 20, 3": 29.884, "10, 10, 8": 28.156}
"""PSNR in Garibi et al. (2024), Table 1, by steps up, steps down and renoising iterations."""


def rows_of(name: str, **where: Any) -> list[Row]:
    """Return the rows of a claim whose settings are these."""
    rows: list[Row] = json.loads((RESULTS / f"claims-{name}.json").read_text())["rows"]
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def curves(ax: Axes, rows: Iterable[Row], x: str, looks: dict[str, dict[str, Any]]) -> None:
    """Draw a curve with its band for each line of rows."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row["line"], []).append(row)
    for name, line in lines.items():
        at = [row[x] for row in line]
        value, low, high = ([math.nan if row[k] is None else row[k] for row in line] for k in ("value", "low", "high"))
        ax.plot(at, value, label=name, **looks[name])
        ax.fill_between(at, low, high, color=looks[name]["color"], alpha=0.15, linewidth=0)


def log_steps(ax: Axes, at: Iterable[int | float], label: str) -> None:
    """Label a logarithmic x-axis at the values that were measured."""
    ax.set(xscale="log", xlabel=label)
    ax.set_xticks(list(at), [f"{value:g}" for value in at])
    ax.minorticks_off()


def legend(figure: Figure, ax: Axes) -> None:
    """Put the legend below the panels."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))


def page(count: int, height: float = 2.5, **shared: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure of the width of a page, with panels in a row."""
    figure = Figure(figsize=(PAGE, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, **shared)[0])


def reversible() -> Figure:
    figure, axes = page(2, sharey=True)
    looks = looks_of(dict.fromkeys(row["line"] for row in rows_of("reversible")))
    for ax, dtype in zip(axes, ("float64", "float32"), strict=True):
        curves(ax, rows_of("reversible", dtype=dtype), "steps", looks)
        log_steps(ax, (10, 20, 50, 100), "steps")
        ax.set_title(dtype)
        error_axis(ax, "rms error of the image" if dtype == "float64" else "")
    legend(figure, axes[0])
    return figure


def guidance() -> Figure:
    figure, axes = page(2, sharey=True)
    looks = looks_of(dict.fromkeys(row["line"] for row in rows_of("guidance")))
    curves(axes[0], rows_of("guidance"), "cfg", looks)
    curves(axes[1], rows_of("few_steps"), "steps", looks)
    axes[0].set(xlabel="cfg", title="20 steps")
    axes[1].set_title("without guidance")
    log_steps(axes[1], (5, 10, 20), "steps")
    error_axis(axes[0], "rms error of the image")
    error_axis(axes[1], "")
    legend(figure, axes[0])
    return figure


def iterations() -> Figure:
    figure, axes = page(3, 2.4)
    looks = looks_of(dict.fromkeys(row["line"] for row in rows_of("iterations")))
    for ax, cfg in zip(axes, (1.0, 7.5), strict=False):
        curves(ax, rows_of("iterations", cfg=cfg), "iterations", looks)
        log_steps(ax, (1, 2, 4, 10), "iterations a step")
        ax.set_title(f"cfg {cfg:g}")
        error_axis(ax, "rms error of the image" if cfg == 1 else "")
    ax, rows = axes[2], rows_of("distances")
    curves(ax, rows, "iteration", looks_of(dict.fromkeys(row["line"] for row in rows)))
    ax.set(title="the fixed point moves by", xlabel="iteration")
    error_axis(ax, "rms / sigma")
    ax.legend()
    legend(figure, axes[0])
    return figure


def renoise() -> Figure:
    figure, axes = page(1, 2.6)
    ax, places = axes[0], {line: k for k, line in enumerate(SDXL)}
    looks = looks_of(["digits", "mnist"])
    for k, model in enumerate(("digits", "mnist")):
        rows = rows_of("renoise", model=model)
        at = [places[row["line"]] + 0.12 * (2 * k - 1) for row in rows]
        value = [row["value"] for row in rows]
        bars = [[row["value"] - row["low"] for row in rows], [row["high"] - row["value"] for row in rows]]
        ax.errorbar(at, value, bars, capsize=2, **(looks[model] | {"linestyle": ""}), label=model)
    ax.plot(list(places.values()), list(SDXL.values()), "_", color=GREY, ms=22, mew=1.5, label="published, SDXL")
    names = [f"{up} up, {down} down\n{k} renoising" for up, down, k in (line.split(", ") for line in places)]
    ax.set_xticks(list(places.values()), names)
    ax.set(ylabel="PSNR, dB")
    ax.legend(loc="upper left")
    return figure


def correlation() -> Figure:
    figure, axes = page(3, 2.2)
    titles = {
        "correlation": "correlation of neighbours",
        "spread": "spread where plain / elsewhere",
        "error": "rms error",
    }
    for ax, (measure, title) in zip(axes, titles.items(), strict=True):
        rows = {row["line"]: row for row in rows_of("correlation", measure=measure)}
        line = [rows["ddim_noisy"], *(row for name, row in rows.items() if name.startswith("forward_first"))]
        points = [row | {"line": "forward_first", "x": at} for row, at in zip(line, range(len(line)), strict=True)]
        curves(ax, points, "x", looks_of(["forward_first"]))
        if "noise" in rows:
            level = rows["noise"]["value"]
            ax.axhline(level, color=GREY, linestyle="--", linewidth=1)
            ax.annotate("noise", (0, level), va="top" if level > 0.5 else "bottom", color=GREY, fontsize=7)
        ax.set_xticks(range(len(line)), ["0", *(row["line"].partition(", ")[2] for row in line[1:])])
        ax.set(title=title, xlabel="steps replaced, of 50")
    return figure


def latents() -> Figure:
    figure, axes = page(2, 2.4, sharey=True)
    names = {"image": "the image", "latent": "the latent", "walk": "on the walk"}
    for ax, cfg in zip(axes, (1.0, 7.5), strict=True):
        rows = rows_of("latents", cfg=cfg)
        looks = looks_of(dict.fromkeys(row["line"] for row in rows))
        for k, (line, look) in enumerate(looks.items()):
            own = [row for row in rows if row["line"] == line]
            at = [place + 0.12 * (k - 1.5) for place in range(3)]
            value = [row["value"] for row in own]
            bars = [[row["value"] - row["low"] for row in own], [row["high"] - row["value"] for row in own]]
            ax.errorbar(at, value, bars, **(look | {"marker": "o", "linestyle": "", "capsize": 2}), label=line)
        ax.set_xticks(range(3), names.values())
        ax.set_title(f"cfg {cfg:g}")
        error_axis(ax, "rms error" if cfg == 1 else "")
    legend(figure, axes[0])
    return figure


FIGURES_OF: dict[str, Callable[[], Figure]] = {
    one.__name__: one for one in (reversible, guidance, iterations, renoise, correlation, latents)
}


def draw(name: str) -> None:
    """Draw a figure into the documentation."""
    with rc_context(STYLE):
        FIGURES_OF[name]().savefig(FIGURES / f"claims-{name}.png", dpi=130)
