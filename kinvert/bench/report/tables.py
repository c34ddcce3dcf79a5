"""Turn records into rows, and rows into Markdown and LaTeX.

A row is one combination of settings. The samples of all its seeds are pooled, and every number is their median, except
for shares of samples. A median with a NaN among its values is NaN.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kinvert.bench.results import Record
from kinvert.showing.thumbnails import round_up

__all__ = [
    "COLUMNS",
    "SETTINGS",
    "Column",
    "Row",
    "column",
    "evaluations",
    "latex",
    "markdown",
    "median",
    "plain",
    "round_up",
    "rows",
    "sampler_name",
    "settings",
    "text",
]

SETTINGS = ("model", "question", "method", "sampler", "schedule", "steps", "cfg", "dtype")
"""The settings that tell rows apart; "sampler" includes its options, "dtype" a device that is not the CPU."""


@dataclass(frozen=True)
class Column:
    """A number of a row: its title, its format specification, and whether the smallest or the largest is best."""

    title: str
    spec: str
    best: Callable[[Iterable[float]], float] | None = None


COLUMNS = {
    "evaluations": Column("evaluations", ".0f"),
    "nmse_db": Column("NMSE (dB)", ".1f", min),
    "psnr": Column("PSNR (dB)", ".1f", max),
    "ssim": Column("SSIM", ".3f", max),
    "max_error": Column("max error", ".1e", min),
    "distance_to_ode": Column("to ODE", ".1e", min),
    "latent_std": Column("latent std", ".3f"),
    "latent_ks": Column("latent KS", ".3f", min),
    "edit_took": Column("edits took", ".0%", max),
    "edit_ssim": Column("edited SSIM", ".3f", max),
    "converged": Column("converged", ".0%"),
    "samples": Column("samples", ".0f"),
}


@dataclass(frozen=True)
class Row:
    """One combination of settings.

    Attributes:
        settings: values of `SETTINGS`.
        values: medians of the metrics by name (`edit_took` is a share of samples), `evaluations` (up and down
            together), `samples` and, if the method makes a claim, `converged` (a share too).
    """

    settings: dict[str, Any]
    values: dict[str, float]


def rows(records: Iterable[Record]) -> list[Row]:
    """Pool records that differ in seed and count alone, and leave out those that failed.

    Returns:
        Rows by model and question, the best reconstruction (lowest NMSE) first.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record["error"] is None:
            groups.setdefault(tuple(settings(record).values()), []).append(record)
    found = [Row(settings(group[0]), _values(group)) for group in groups.values()]

    def place(row: Row) -> tuple[Any, ...]:
        error = row.values.get("nmse_db", math.inf)
        return row.settings["model"], row.settings["question"], math.isnan(error), error, str(row.settings)

    return sorted(found, key=place)


def settings(record: Record) -> dict[str, Any]:
    """Return the values of `SETTINGS` of a record."""
    cell = record["cell"]
    dtype = f"{cell['dtype']} on {cell['device']}" if "device" in cell else cell["dtype"]
    return {name: cell[name] for name in SETTINGS} | {"sampler": sampler_name(cell), "dtype": dtype}


def sampler_name(cell: dict[str, Any]) -> str:
    """Return the sampler with its options, e.g. `bdia (gamma=0.5)`."""
    options = ", ".join(f"{key}={value}" for key, value in cell["options"].items())
    return f"{cell['sampler']} ({options})" if options else str(cell["sampler"])


def median(values: Sequence[float]) -> float:
    """Compute the median; NaN if a value is NaN or there are no values."""
    return math.nan if not values or any(math.isnan(v) for v in values) else float(statistics.median(values))


def evaluations(record: Record) -> list[float]:
    """Return the denoiser evaluations per sample, up and down together."""
    up, down = record["inversion_evaluations"], record["sampling_evaluations"]
    return [a + b for a, b in zip(up, down, strict=True)]


def markdown(found: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """Return a Markdown table, headed by what all rows have in common; the best of each model and question are bold.

    Args:
        found: from `rows`.
        columns: names of `COLUMNS` or of metrics; by default those of `COLUMNS` that some row has.

    Raises:
        ValueError: no rows.
    """
    common, head, body = _cells(found, columns, _markdown_text, "**{}**".format)
    rules = ["---" if name in SETTINGS else "---:" for name in head]
    lines = [list(head.values()), rules, *body]
    return f"{_markdown_text(common)}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def latex(found: Sequence[Row], columns: Sequence[str] | None = None, label: str = "tab:reversibility") -> str:
    r"""Return a LaTeX table for the package `booktabs`, whose caption has what all rows have in common.

    Args:
        found: from `rows`.
        columns: names of `COLUMNS` or of metrics; by default those of `COLUMNS` that some row has.
        label: the name for `\ref`.

    Raises:
        ValueError: no rows.
    """
    common, head, body = _cells(found, columns, _latex_text, r"\textbf{{{}}}".format)
    kinds = "".join("l" if name in SETTINGS else "r" for name in head)
    lines = [r"\begin{table}", r"  \centering", rf"  \caption{{{_latex_text(common)}}}", rf"  \label{{{label}}}"]
    lines += [rf"  \begin{{tabular}}{{{kinds}}}", r"    \toprule", f"    {_latex_line(head.values())}", r"    \midrule"]
    lines += [f"    {_latex_line(line)}" for line in body]
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""])


def text(value: float | None, spec: str) -> str:
    """Return a number as it is shown: an en dash if it is None, a proper minus sign and infinity."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "nan")
    return format(value, spec).replace("-", "−") if not spec.endswith("e") else _scientific(value, spec)


def plain(value: Any) -> str:
    """Return a setting as text, floats without zeros at the end."""
    return f"{value:g}" if isinstance(value, float) else str(value)


# -- parts -------------------------------------------------------------------------------------------------------------
def _values(group: Sequence[Record]) -> dict[str, float]:
    def pooled(lists: Iterable[Sequence[float] | None]) -> list[float]:
        return [value for values in lists for value in values or ()]

    names = dict.fromkeys(name for record in group for name in record["metrics"])
    found = {name: median(pooled(record["metrics"].get(name) for record in group)) for name in names}
    if "edit_took" in names:
        found["edit_took"] = statistics.fmean(pooled(record["metrics"].get("edit_took") for record in group))
    spent = pooled(evaluations(record) for record in group)
    converged = pooled(record["converged"] for record in group)
    found |= {"evaluations": median(spent), "samples": float(len(spent))}
    return found | ({"converged": sum(converged) / len(converged)} if converged else {})


def _cells(
    found: Sequence[Row], columns: Sequence[str] | None, clean: Callable[[str], str], bold: Callable[[str], str]
) -> tuple[str, dict[str, str], list[list[str]]]:
    """Return what all rows have in common, the titles by name, and the cells of the table."""
    if not found:
        raise ValueError("there are no rows to tabulate; did every cell fail?")
    numbers = [n for n in COLUMNS if any(n in row.values for row in found)] if columns is None else list(columns)
    varied = [n for n in SETTINGS if len({row.settings[n] for row in found}) > 1] or ["sampler"]
    common = ", ".join(_setting(n, found[0].settings[n]) for n in SETTINGS if n not in varied)
    best = _best(found, numbers)

    def cell(row: Row, name: str) -> str:
        if name in SETTINGS:
            return clean(plain(row.settings[name]))
        shown = clean(text(row.values.get(name), column(name).spec))
        return bold(shown) if row.values.get(name) == best.get((*_contest(row), name), math.nan) else shown

    head = {name: clean(name if name in SETTINGS else column(name).title) for name in (*varied, *numbers)}
    return f"Medians over the samples; {common}.", head, [[cell(row, name) for name in head] for row in found]


def column(name: str) -> Column:
    """Return how to show a metric, which `COLUMNS` need not have."""
    return COLUMNS.get(name, Column(name.replace("_", " "), ".3g"))


def _contest(row: Row) -> tuple[Any, Any]:
    return row.settings["model"], row.settings["question"]


def _best(found: Sequence[Row], numbers: Sequence[str]) -> dict[tuple[Any, ...], float]:
    """Return the best value by model, question and column, if the values differ."""
    best = {}
    for contest in dict.fromkeys(map(_contest, found)):
        for name in numbers:
            values = [row.values[name] for row in found if _contest(row) == contest and name in row.values]
            values = [value for value in values if not math.isnan(value)]
            choose = column(name).best
            if choose is not None and len(set(values)) > 1:
                best[*contest, name] = choose(values)
    return best


def _setting(name: str, value: Any) -> str:
    return {"steps": f"{value} steps", "cfg": f"cfg {plain(value)}"}.get(name, str(value))


def _scientific(value: float, spec: str) -> str:
    mantissa, _, exponent = format(value, spec).replace("-", "−").partition("e")
    return f"{mantissa}e{exponent.replace('+', '').replace('−0', '−').lstrip('0') or '0'}"


def _markdown_text(words: str) -> str:
    for character in "\\|*_`<>[]":
        words = words.replace(character, f"\\{character}")
    return words.replace("\n", " ")


LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "−": "$-$", "∞": r"$\infty$", "–": "--", "\n": " ",
}  # fmt: skip


def _latex_text(words: str) -> str:
    return "".join(LATEX.get(character, character) for character in words)


def _latex_line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"
