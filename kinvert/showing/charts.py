"""A small curve as SVG, on a logarithmic axis, that a notebook shows without matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kinvert.showing.html import Html, text

__all__ = ["curve"]

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 120, 58, 20, 10  # pixels
COLOUR, LIMIT = "#2a8fd0", "#d55e00"  # both can be seen on white and on black
DOTS = 60  # values that get a dot that tells its number


def curve(values: Sequence[float], labels: Sequence[str], limit: float | None = None, x_label: str = "step") -> Html:
    """Draw values over their place, on a logarithmic axis.

    Args:
        values: one for each place; those that are not positive and finite leave a gap.
        labels: what the dot of each value says, beside its number.
        limit: a value to mark by a dashed line, if it is positive.
        x_label: what a place is.

    Returns:
        The SVG; a sentence if no value can be drawn.
    """
    known = [value for value in values if 0 < value < math.inf]
    if not known:
        return Html(f"<p><small>{text('there is no positive number to draw')}</small></p>")
    marked = [limit] if limit is not None and 0 < limit < math.inf else []
    low, high = math.floor(math.log10(min(known + marked))), math.ceil(math.log10(max(known + marked)))
    high = max(high, low + 1)

    def place(i: int, value: float) -> tuple[float, float]:
        across = i / max(1, len(values) - 1)
        up = (math.log10(value) - low) / (high - low)
        return LEFT + 6 + across * (WIDTH - LEFT - 14), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP)

    parts = [f"<svg width='{WIDTH}' height='{HEIGHT}' viewBox='0 0 {WIDTH} {HEIGHT}' role='img'>"]
    for power, height in ((low, HEIGHT - BOTTOM), (high, TOP)):
        parts.append(_line(height, "currentColor", "opacity='.3'"))
        parts.append(_words(LEFT - 4, height + 4, f"1e{power}", "end"))
    parts += [_words(LEFT + 6, HEIGHT - 5, f"{x_label} 0"), _words(WIDTH - 8, HEIGHT - 5, f"{len(values) - 1}", "end")]
    if marked:
        parts.append(_line(place(0, marked[0])[1], LIMIT, "stroke-dasharray='4 3'"))
    for run in _runs(values):
        points = " ".join("{:.1f},{:.1f}".format(*place(i, values[i])) for i in run)
        parts.append(f"<polyline points='{points}' fill='none' stroke='{COLOUR}' stroke-width='1.5'/>")
    for i, value in enumerate(values if len(values) <= DOTS else ()):
        if 0 < value < math.inf:
            x, y = place(i, value)
            told = text(f"{labels[i]}: {value:.3g}")
            parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.5' fill='{COLOUR}'><title>{told}</title></circle>")
    return Html("".join([*parts, "</svg>"]))


def _runs(values: Sequence[float]) -> list[list[int]]:
    """Return the places of values that can be drawn, in runs without a gap."""
    runs: list[list[int]] = [[]]
    for i, value in enumerate(values):
        if 0 < value < math.inf:
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _line(height: float, colour: str, more: str) -> str:
    """Return a line across the chart."""
    return f"<line x1='{LEFT}' y1='{height:.1f}' x2='{WIDTH - 4}' y2='{height:.1f}' stroke='{colour}' {more}/>"


def _words(x: float, y: float, words: str, anchor: str = "start") -> str:
    style = f"text-anchor='{anchor}' font-size='11' fill='currentColor'"
    return f"<text x='{x:.1f}' y='{y:.1f}' {style}>{text(words)}</text>"
