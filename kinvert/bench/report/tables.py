"""Write rows as Markdown and LaTeX.

In both, a number has its interval beside it, and the best of a column is bold only if the interval of its difference
from every other row of its model and question excludes 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kinvert.bench.report.intervals import LEVEL, RESAMPLES, holds
from kinvert.bench.report.rows import (
    COLUMNS,
    SETTINGS,
    Column,
    Row,
    as_columns,
    column,
    contest,
    evaluations,
    leaders,
    median,
    plain,
    rows,
    sampler_name,
    settings,
    top,
)
from kinvert.showing.thumbnails import round_up

__all__ = [
    "COLUMNS",
    "SETTINGS",
    "Column",
    "Row",
    "column",
    "evaluations",
    "fits",
    "fitting_columns",
    "fitting_rows",
    "latex",
    "latex_line",
    "latex_number",
    "latex_text",
    "markdown",
    "markdown_text",
    "median",
    "note",
    "plain",
    "round_up",
    "rows",
    "sampler_name",
    "settings",
    "text",
    "with_interval",
]


WIDTH = 80  # characters of a line of \footnotesize in the class `article` with 10 points: 345 of them, 4.25 each
LINES = 40  # rows of a table on a page
GAP = 1.5  # characters between two columns
SUBSCRIPT = 0.7  # width of a small character


def markdown(found: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """Return a Markdown table, headed by what all rows have in common and by what intervals and bold numbers mean.

    Args:
        found: from `rows`.
        columns: names of `COLUMNS` or of metrics; by default those of `COLUMNS` that some row has.

    Raises:
        ValueError: no rows; a column that no row has.
    """
    table = _Table.of(found, _checked(found, columns))

    def cell(row: Row, name: str) -> str:
        if name in SETTINGS:
            return markdown_text(plain(row.settings[name]))
        number, ends = with_interval(row, name)
        shown = f"**{number}**" if table.is_leading(row, name) else number
        return f"{shown} \\[{ends[0]}, {ends[1]}\\]" if ends else shown

    names = [*table.varied, *table.numbers]
    head = [markdown_text(name if name in SETTINGS else column(name).title) for name in names]
    rules = ["---" if name in SETTINGS else "---:" for name in names]
    lines = [head, rules, *([cell(row, name) for name in names] for row in found)]
    words = markdown_text(f"{table.common} {note(found)}")
    return f"{words}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def latex(found: Sequence[Row], columns: Sequence[str] | None = None, label: str = "tab:reversibility") -> str:
    r"""Return a LaTeX table for the package `booktabs` that fits a page of the class `article`.

    Rows stand under their model and question. The interval of a number is its subscript and superscript; the caption
    says so, and what all rows have in common.

    Args:
        found: from `rows`.
        columns: names of `COLUMNS` or of metrics; by default those of `COLUMNS` that some row has and that fit.
        label: the name for `\ref`.

    Raises:
        ValueError: no rows; a column that no row has; rows or columns that do not fit, with the numbers.
    """
    numbers = _checked(found, columns)
    if columns is None:
        numbers = fitting_columns(found, numbers)
    width, lines = _width(found, numbers), _lines(found)
    if width > WIDTH:
        raise ValueError(
            f"a line must have at most {WIDTH} characters, got {width:.0f}; give fewer columns, or choose rows"
        )
    if lines > LINES:
        raise ValueError(f"a page holds {LINES} lines, got {lines}; give fewer rows, e.g. `top(rows, 5)`")
    table = _Table.of(found, numbers)
    names = [name for name in table.varied if name not in ("model", "question")] + numbers
    head = [latex_text(name if name in SETTINGS else column(name).title) for name in names]
    kinds = "".join("l" if name in SETTINGS else "r" for name in names)
    caption = latex_text(f"{table.common} {note(found, 'Sub- and superscripts')}")
    body = [
        *(r"\begin{table}", r"  \centering", r"  \footnotesize", r"  \setlength{\tabcolsep}{3pt}"),
        *(rf"  \caption{{{caption}}}", rf"  \label{{{label}}}"),
        *(rf"  \begin{{tabular}}{{{kinds}}}", r"    \toprule", f"    {latex_line(head)}"),
    ]
    above = [name for name in ("model", "question") if name in table.varied]
    for key in dict.fromkeys(map(contest, found)):
        body.append(r"    \midrule")
        rows_here = [row for row in found if contest(row) == key]
        if above:
            words = latex_text(", ".join(plain(rows_here[0].settings[name]) for name in above))
            body.append(rf"    \multicolumn{{{len(names)}}}{{l}}{{\emph{{{words}}}}} \\")
        body += [f"    {latex_line(_latex_cell(table, row, name) for name in names)}" for row in rows_here]
    return "\n".join([*body, r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""])


def fits(found: Sequence[Row], columns: Sequence[str]) -> bool:
    """Tell whether a LaTeX table of these rows and columns fits a page."""
    return _width(found, columns) <= WIDTH and _lines(found) <= LINES


def fitting_columns(found: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Return the first of the columns that fit a line of a page, with the settings before them; at least one."""
    kept = list(columns)
    while len(kept) > 1 and _width(found, kept) > WIDTH:
        kept.pop()
    return kept


def fitting_rows(found: Sequence[Row]) -> list[Row]:
    """Return the best rows of each model and question, as many of each as fit a page; at least one of each."""
    for count in range(len(found), 1, -1):
        kept = top(found, count)
        if _lines(kept) <= LINES:
            return kept
    return top(found, 1)


def note(found: Sequence[Row], ends: str = "Brackets") -> str:
    """Return what the intervals and the bold numbers of a table mean, and what its fewest samples allow."""
    fewest = min(len(set(one.units)) for row in found for one in row.samples.values())
    words = (
        f"{ends}: {LEVEL:.0%} intervals, from {RESAMPLES} paired bootstrap samples over images and seeds (shares: "
        "Wilson). Bold: the best, if the interval of its difference from every other row excludes 0."
    )
    if holds(fewest) < LEVEL:
        words += (
            f" Of {fewest} independent samples no interval holds the median in more than {holds(fewest):.0%} of cases."
        )
    return words


def with_interval(row: Row, name: str) -> tuple[str, tuple[str, str] | None]:
    """Return a number as it is shown, and the ends of its interval, if it has one that does not look the same."""
    spec, ends = column(name).spec, row.intervals.get(name)
    number = text(row.values.get(name), spec)
    shown = None if ends is None else (text(ends[0], spec), text(ends[1], spec))
    return number, None if shown == (number, number) else shown


def text(value: float | None, spec: str) -> str:
    """Return a number as it is shown: an en dash if it is None, a proper minus sign and infinity."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "nan")
    return format(value, spec).replace("-", "−") if not spec.endswith("e") else _scientific(value, spec)


# -- parts -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Table:
    """What a table shows: the settings in which rows differ, the numbers, words about the rest, and who leads."""

    varied: list[str]
    numbers: list[str]
    common: str
    leading: dict[str, list[Row]]

    @classmethod
    def of(cls, found: Sequence[Row], numbers: Sequence[str]) -> _Table:
        varied = [n for n in SETTINGS if len({row.settings[n] for row in found}) > 1] or ["sampler"]
        common = ", ".join(_setting(n, found[0].settings[n]) for n in SETTINGS if n not in varied)
        leading = {name: list(leaders(found, name).values()) for name in numbers}
        return cls(varied, list(numbers), f"Medians over the samples; {common}.", leading)

    def is_leading(self, row: Row, name: str) -> bool:
        return any(row is other for other in self.leading[name])


def _checked(found: Sequence[Row], columns: Sequence[str] | None) -> list[str]:
    """Return the columns to show; raise ValueError if there are no rows."""
    if not found:
        raise ValueError("there are no rows to tabulate; did every cell fail?")
    return as_columns(found, columns)


def _lines(found: Sequence[Row]) -> int:
    return len(found) + len(set(map(contest, found)))


def _width(found: Sequence[Row], numbers: Sequence[str]) -> float:
    """Estimate the widest line of a LaTeX table, in characters."""
    varied = [n for n in SETTINGS[2:] if len({row.settings[n] for row in found}) > 1] or ["sampler"]
    widths: list[float] = [max(len(name), *(len(plain(row.settings[name])) for row in found)) for name in varied]
    for name in numbers:
        shown = [with_interval(row, name) for row in found]
        cells = [len(number) + SUBSCRIPT * max(map(len, ends or ("",))) for number, ends in shown]
        widths.append(max(len(column(name).title), *cells))
    return sum(widths) + GAP * (len(widths) - 1)


def _latex_cell(table: _Table, row: Row, name: str) -> str:
    if name in SETTINGS:
        return latex_text(plain(row.settings[name]))
    return latex_number(*with_interval(row, name), table.is_leading(row, name))


def latex_number(number: str, ends: tuple[str, str] | None, is_bold: bool) -> str:
    """Return a number and its interval, as `with_interval` has them, for LaTeX."""
    if number == "–":
        return "--"
    shown = rf"\mathbf{{{_math(number)}}}" if is_bold else _math(number)
    return f"${shown}_{{{_math(ends[0])}}}^{{{_math(ends[1])}}}$" if ends else f"${shown}$"


def _math(number: str) -> str:
    """Return a number that `text` wrote, for the mathematical mode of LaTeX."""
    if number == "nan":
        return r"\mathrm{nan}"
    mantissa, e, exponent = number.replace("−", "-").replace("∞", r"\infty").replace("%", r"\%").partition("e")
    return rf"{mantissa}\mathrm{{e}}{{{exponent}}}" if e else mantissa


def _setting(name: str, value: Any) -> str:
    return {"steps": f"{value} steps", "cfg": f"cfg {plain(value)}"}.get(name, str(value))


def _scientific(value: float, spec: str) -> str:
    mantissa, _, exponent = format(value, spec).replace("-", "−").partition("e")
    return f"{mantissa}e{exponent.replace('+', '').replace('−0', '−').lstrip('0') or '0'}"


def markdown_text(words: str) -> str:
    """Return words with Markdown's signs escaped."""
    for character in "\\|*_`<>[]":
        words = words.replace(character, f"\\{character}")
    return words.replace("\n", " ")


LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "−": "$-$", "∞": r"$\infty$", "–": "--", "\n": " ",
}  # fmt: skip


def latex_text(words: str) -> str:
    """Return words with LaTeX's signs escaped."""
    return "".join(LATEX.get(character, character) for character in words)


def latex_line(cells: Iterable[str]) -> str:
    """Return a line of a LaTeX table."""
    return " & ".join(cells) + r" \\"
