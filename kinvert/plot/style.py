"""The looks of all figures: sizes, colours, and which curve has which colour. No matplotlib."""

from __future__ import annotations

import math
import zlib
from collections.abc import Container, Iterable
from itertools import chain, count
from typing import Any

__all__ = [
    "COLOURS",
    "COLUMN",
    "GREY",
    "HIGHEST",
    "INK",
    "LOWEST",
    "MARKERS",
    "METHOD_COLOURS",
    "OTHER_COLOURS",
    "PAGE",
    "PALE",
    "STYLE",
    "bounded",
    "free",
    "look",
    "looks_of",
    "method_colours",
    "preferred",
]

COLUMN, PAGE = 3.35, 6.9  # inches: the width of one column of a paper, and of two
# Okabe and Ito's colours, which stay apart for every kind of colour blindness. Their yellow is too light for lines: two
# of Tol's colours and a grey stand in for it and add to them. Markers and dashes tell the curves apart without colour.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#999933", "#888888",
)  # fmt: skip
MARKERS, DASHES = "osD^vPX<>*", ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
INK, GREY, PALE = "#1a1a1a", "#767676", "#e4e4e4"
LOWEST, HIGHEST = 1e-17, 1e2  # errors outside of this range are drawn at its ends
STYLE: Any = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.title_fontsize": 7, "legend.frameon": False, "legend.handlelength": 2.6,
    "legend.columnspacing": 1.2, "legend.labelspacing": 0.25, "font.family": "DejaVu Sans",
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.axisbelow": True,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.minor.width": 0.4, "ytick.minor.width": 0.4,
    "xtick.minor.size": 1.5, "ytick.minor.size": 1.5, "axes.grid": True, "grid.color": PALE, "grid.linewidth": 0.5,
    "lines.linewidth": 1.2, "lines.markersize": 3.5, "lines.markeredgewidth": 0.0,
    "savefig.facecolor": "white", "figure.facecolor": "white", "svg.hashsalt": "kinvert", "svg.fonttype": "path",
}  # fmt: skip
# The colour of each method, here and on the page of a report. Relatives have shades of one colour.
METHOD_COLOURS = {
    "unsample": "#D55E00",
    "ddim_clean": "#E69F00",
    "ddim_noisy": "#A6761D",
    "picard": "#CC79A7",
    "invert": "#0072B2",
    "invert_10": "#2E8BC4",
    "invert_6": "#56B4E9",
    "invert_3": "#8CCBF0",
    "invert_1": "#B5DDF5",
    "reversible": "#009E73",
    "reversible_alone": "#7FCBB2",
    "extract_noise": "#882255",
    "extract_noise_chain": "#C08AA5",
    "aidi": "#999933",
    "aidi_anderson": "#666600",
    "renoise": "#332288",
    "gnri": "#DDAA33",
    "easyinv": "#7B68C4",
    "rf_inversion": "#117733",
    "rf_solver": "#44AA99",
    "fireflow": "#CC3311",
    "uni_inv": "#661100",
    "forward_first": "#AA4499",
    "dpm_solver_1": "#5D4037",
    "dpm_solver_2": "#A1887F",
    "direct_inversion": "#EE7799",
}
OTHER_COLOURS = ("#000000", "#767676", "#B8860B", "#4B0082")
"""For methods of your own, in the order of their names."""

# Samplers that are drawn often have numbers of their own; any other name has one by its letters.
SAMPLERS = ("euler", "heun", "dpm_2", "lms", "dpmpp_2m", "ddim", "uni_pc", "deis", "res_2s", "edict")


def bounded(value: float) -> float:
    """Return the value, moved into the range that is drawn; NaN stays."""
    return value if math.isnan(value) else min(max(value, LOWEST), HIGHEST)


def preferred(name: str) -> int:
    """Return the number of a name, from 0 to 9: the same in every figure. `look` makes its looks of it."""
    if METHOD_COLOURS.get(name) in COLOURS:
        return COLOURS.index(METHOD_COLOURS[name])
    return SAMPLERS.index(name) if name in SAMPLERS else zlib.crc32(name.encode()) % len(COLOURS)


def looks_of(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the arguments of `plot` for each name: a method has its colour, and methods choose first.

    Any other name has the looks of its preferred number, or of the next one that no name before it has.
    """
    chosen = list(names)
    found: dict[str, int] = {}
    for name in sorted(chosen, key=lambda name: name not in METHOD_COLOURS):
        found[name] = free(preferred(name), set(found.values()))
    own = {name: {"color": METHOD_COLOURS[name]} for name in chosen if name in METHOD_COLOURS}
    return {name: look(found[name]) | own.get(name, {}) for name in chosen}


def method_colours(methods: Iterable[str]) -> dict[str, str]:
    """Return the colour of each method; those that kinvert does not know get `OTHER_COLOURS` in turn."""
    names = sorted(set(methods))
    others = [name for name in names if name not in METHOD_COLOURS]
    own = {name: OTHER_COLOURS[k % len(OTHER_COLOURS)] for k, name in enumerate(others)}
    return {name: METHOD_COLOURS.get(name) or own[name] for name in names}


def free(first: int, taken: Container[int | None]) -> int:
    """Return the first number from `first` on, in a circle of ten, that is not taken; from 10 on if all ten are."""
    circle = [(first + k) % len(COLOURS) for k in range(len(COLOURS))]
    return next(k for k in chain(circle, count(len(COLOURS))) if k not in taken)


def look(number: int) -> dict[str, Any]:
    """Return the arguments of `plot` for a curve of that number: colour, marker and dashes."""
    marker = MARKERS[number % 10]
    size = 4.5 if marker == "*" else 3.5
    return {"color": COLOURS[number % 10], "marker": marker, "linestyle": DASHES[number % 4], "markersize": size}
