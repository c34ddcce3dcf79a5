"""The colour of each method: one in all figures and on the page of a report."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["METHOD_COLOURS", "OTHER_COLOURS", "method_colours"]

# Okabe and Ito's colours, which stay apart for every kind of colour blindness, and colours of Tol between them.
# Relatives have shades of one colour.
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
    "easyinv": "#7B68C4",
    "rf_inversion": "#117733",
    "rf_solver": "#44AA99",
    "fireflow": "#CC3311",
    "dpm_solver_1": "#5D4037",
    "dpm_solver_2": "#A1887F",
    "direct_inversion": "#EE7799",
}
OTHER_COLOURS = ("#000000", "#767676", "#B8860B", "#4B0082")
"""For methods of your own, in the order of their names."""


def method_colours(methods: Iterable[str]) -> dict[str, str]:
    """Return the colour of each method; those that kinvert does not know get `OTHER_COLOURS` in turn."""
    names = sorted(set(methods))
    others = [name for name in names if name not in METHOD_COLOURS]
    own = {name: OTHER_COLOURS[k % len(OTHER_COLOURS)] for k, name in enumerate(others)}
    return {name: METHOD_COLOURS.get(name) or own[name] for name in names}
