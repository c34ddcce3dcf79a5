"""Compare inversions at equal evaluations: a line for each method, a column for each question, sorted by cost.

The cost of a method is what it spends on the way up, in denoiser evaluations for each step of the sampler, rounded. A
*budget* is a limit on it. A number is bold if it is the best among all methods that the budget of its line allows, told
apart from each of them as in the leaderboard. There is a table for each scale of guidance, and under it one that says
who is best at each budget. A question that was asked of one method alone has a table of settings instead.

Some methods keep more than a latent (`KEPT`). They return images from what they keep, so they are listed, but compared
with no other method.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from kinvert.bench.questions import QUESTIONS
from kinvert.bench.report.rows import SETTINGS, Row, better, column, contest, plain
from kinvert.bench.report.tables import latex_line, latex_number, latex_text, markdown_text, note, with_interval

__all__ = ["BUDGETS", "Number", "Sheet", "as_html", "as_latex", "as_markdown", "overview"]

BUDGETS = (1, 2, 4, 8, 20, math.inf)
"""Limits on the evaluations of a step, on the way up."""
KEPT = {
    "reversible": "second state",
    "extract_noise": "noises",
    "extract_noise_chain": "noises",
    "direct_inversion": "offsets",
}
"""What methods keep beside the latent."""
COST = "up_per_step"
HELD = ("schedule", "steps", "dtype")
Line = tuple[str, str]


@dataclass(frozen=True)
class Number:
    """A number as it is shown, with the ends of its interval, bold or not, and words that follow it."""

    text: str
    ends: tuple[str, str] | None = None
    is_bold: bool = False
    words: str = ""


Entries = tuple[str | Number, ...]


@dataclass(frozen=True)
class Sheet:
    """A table: what it is about, the titles of its columns, and its lines; the first `texts` columns are text."""

    about: str
    titles: tuple[str, ...]
    lines: tuple[Entries, ...]
    texts: int


@dataclass(frozen=True)
class _Column:
    """The rows that one column shows, by method and sampler."""

    model: str
    question: str
    measure: str
    rows: dict[Line, Row]

    def among(self, limit: float) -> list[Row]:
        """Return the rows within a budget that have the number and keep a latent alone, the best one first."""
        best = column(self.measure).best
        known = [
            row
            for row in self.rows.values()
            if _value(row, self.measure) is not None and _cost(row) <= limit and _line(row)[0] not in KEPT
        ]
        return sorted(known, key=lambda row: row.values[self.measure], reverse=best is max)

    def is_told_apart(self, row: Row, limit: float) -> bool:
        """Tell whether a row is better than every other one within a budget."""
        others = [other for other in self.among(limit) if other is not row]
        return (
            column(self.measure).best is not None
            and _line(row)[0] not in KEPT
            and bool(others)
            and all(better(row, other, self.measure) for other in others)
        )


def overview(found: Sequence[Row]) -> list[Sheet]:
    """Return the tables of a report that asked for more than round trips; none for other reports.

    Args:
        found: all rows, from `rows`.
    """
    if not any(row.settings["question"] not in ("reconstruction", "recovery") for row in found):
        return []
    lines = Counter(contest(row) for row in {(contest(row), _line(row)): row for row in found}.values())
    compared = [row for row in found if lines[contest(row)] > 1]
    sheets = []
    for cfg in sorted({row.settings["cfg"] for row in compared}):
        columns = _columns([row for row in compared if row.settings["cfg"] == cfg])
        about = f"cfg {plain(cfg)}; {_held(columns)}"
        sheets += [_methods(about, columns), _winners(about, columns)]
    return sheets + [_settings(key, found) for key in sorted(lines) if lines[key] == 1]


def _line(row: Row) -> Line:
    return row.settings["method"], row.settings["sampler"]


def _value(row: Row, name: str) -> float | None:
    value = row.values.get(name)
    return None if value is None or math.isnan(value) else value


def _cost(row: Row) -> int:
    return round(row.values[COST])


def _columns(found: Sequence[Row]) -> list[_Column]:
    """Return the columns, in the order of `QUESTIONS`, each at the settings that the most lines have."""
    order = {name: place for place, name in enumerate(QUESTIONS)}
    keys = sorted({contest(row) for row in found}, key=lambda key: (order.get(key[1], len(order)), key))
    columns = []
    for model, question in keys:
        groups: dict[tuple[str, ...], dict[Line, Row]] = {}
        for row in found:
            if contest(row) == (model, question):
                groups.setdefault(tuple(plain(row.settings[name]) for name in HELD), {})[_line(row)] = row
        rows = max((groups[key] for key in sorted(groups)), key=len)
        measures = QUESTIONS[question].measures if question in QUESTIONS else ()
        for measure in measures:
            if any(_value(row, measure) is not None for row in rows.values()):
                columns.append(_Column(model, question, measure, rows))
    return columns


def _held(columns: Sequence[_Column]) -> str:
    """Return the settings of each model."""
    words: dict[str, None] = {}
    for one in columns:
        settings = next(iter(one.rows.values())).settings
        words[f"{one.model}: {settings['steps']} steps, {settings['schedule']}, {settings['dtype']}"] = None
    return "; ".join(words)


def _methods(about: str, columns: Sequence[_Column]) -> Sheet:
    costs: dict[Line, float] = {}
    for one in columns:
        for line, row in one.rows.items():
            costs[line] = max(costs.get(line, 0.0), row.values[COST])
    models = {one.model for one in columns}
    titles = ("at most", "method", "sampler", "kept too", "spent", *(_title(one, len(models) > 1) for one in columns))
    lines: list[Entries] = []
    for method, sampler in sorted(costs, key=lambda line: (costs[line], line)):
        cost, numbers = costs[method, sampler], []
        limit = next(budget for budget in BUDGETS if round(cost) <= budget)
        for one in columns:
            here = one.rows.get((method, sampler))
            numbers.append(Number("–") if here is None else _number(one, here, one.is_told_apart(here, limit)))
        lines.append((_budget(limit), method, sampler, KEPT.get(method, ""), f"{cost:.3g}", *numbers))
    return Sheet(f"Methods; {about}", titles, tuple(lines), 5)


def _winners(about: str, columns: Sequence[_Column]) -> Sheet:
    lines: list[Entries] = []
    for one in (one for one in columns if column(one.measure).best):
        numbers: dict[int, Number] = {}  # by how many methods a budget allows: it allows what a smaller one does
        for known in (one.among(limit) for limit in BUDGETS):
            if len(known) not in numbers:
                numbers[len(known)] = _winner(one, known) if known else Number("–")
        lines.append((_title(one, with_model=True), *(numbers[len(one.among(limit))] for limit in BUDGETS)))
    return Sheet(f"The best at each budget; {about}", ("", *map(_budget, BUDGETS)), tuple(lines), 1)


def _winner(one: _Column, known: Sequence[Row]) -> Number:
    """Return the number of the first row, its method, and how many others are not told apart from it."""
    tied = sum(not better(known[0], other, one.measure) for other in known[1:])
    method, sampler = _line(known[0])
    words = method + (f", {sampler}" if len({line[1] for line in one.rows}) > 1 else "")
    return _number(one, known[0], words=words + (f"; not told apart from {tied}" if tied else ""))


def _settings(key: tuple[str, str], found: Sequence[Row]) -> Sheet:
    """Return the table of a question that was asked of one method."""
    rows = [row for row in found if contest(row) == key]
    measures = QUESTIONS[key[1]].measures if key[1] in QUESTIONS else ("nmse_db",)
    varied = [name for name in SETTINGS if len({row.settings[name] for row in rows}) > 1] or ["method"]
    common = ", ".join(plain(rows[0].settings[name]) for name in ("method", "sampler") if name not in varied)
    rows.sort(key=lambda row: [(isinstance(v := row.settings[name], str), v) for name in varied])
    lines: list[Entries] = [
        (*(plain(row.settings[n]) for n in varied), *(Number(*with_interval(row, m)) for m in measures)) for row in rows
    ]
    titles = (*varied, *(column(name).title for name in measures))
    return Sheet(f"{_words(key[1])}; {key[0]}, {common}", titles, tuple(lines), len(varied))


def _number(one: _Column, row: Row, is_bold: bool = False, words: str = "") -> Number:
    text, ends = with_interval(row, one.measure)
    return Number(text, ends, is_bold, words)


def _title(one: _Column, with_model: bool) -> str:
    return f"{f'{one.model}: ' if with_model else ''}{_words(one.question)}, {column(one.measure).title}"


def _words(question: str) -> str:
    return question.replace("_", " ")


def _budget(limit: float) -> str:
    return "any" if limit == math.inf else f"{limit:g}"


# -- writing -----------------------------------------------------------------------------------------------------------
def about_numbers(found: Sequence[Row]) -> str:
    """Return what the columns, intervals and bold numbers mean."""
    return (
        "Evaluations of the denoiser for each step of the sampler, on the way up: what a method spent, and the budget "
        f"that it fits. {note(found)} Here only rows within the budget of the line are compared, and only methods "
        "whose result is a latent alone. What others keep too is named."
    )


def as_markdown(sheets: Sequence[Sheet], found: Sequence[Row]) -> str:
    """Return the tables as Markdown."""

    def cell(value: str | Number) -> str:
        if isinstance(value, str):
            return markdown_text(value)
        number = f"**{value.text}**" if value.is_bold else value.text
        ends = f" \\[{value.ends[0]}, {value.ends[1]}\\]" if value.ends else ""
        return f"{number}{ends}" + (f" {markdown_text(value.words)}" if value.words else "")

    parts = [markdown_text(about_numbers(found))]
    for sheet in sheets:
        rules = ["---"] * sheet.texts + ["---:"] * (len(sheet.titles) - sheet.texts)
        lines = [[markdown_text(title) for title in sheet.titles], rules, *([*map(cell, line)] for line in sheet.lines)]
        parts.append(f"{markdown_text(sheet.about)}.\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def as_latex(sheets: Sequence[Sheet], found: Sequence[Row]) -> str:
    r"""Return the tables for the packages `booktabs` and `graphicx`, each scaled to the width of the text."""

    def cell(value: str | Number) -> str:
        if isinstance(value, str):
            return latex_text(value)
        return latex_number(value.text, value.ends, value.is_bold) + (
            f" {latex_text(value.words)}" if value.words else ""
        )

    parts = []
    for place, sheet in enumerate(sheets):
        caption = latex_text(f"{sheet.about}. {about_numbers(found) if place == 0 else ''}".strip())
        kinds = "l" * sheet.texts + "r" * (len(sheet.titles) - sheet.texts)
        parts += [
            *(
                r"\begin{table*}",
                r"  \centering",
                rf"  \caption{{{caption}}}",
                rf"  \label{{tab:inversion-{place + 1}}}",
            ),
            *(r"  \resizebox{\textwidth}{!}{%", rf"  \begin{{tabular}}{{{kinds}}}", r"    \toprule"),
            *(f"    {latex_line(map(latex_text, sheet.titles))}", r"    \midrule"),
            *(f"    {latex_line(map(cell, line))}" for line in sheet.lines),
            *(r"    \bottomrule", r"  \end{tabular}}", r"\end{table*}", ""),
        ]
    return "\n".join(parts)


def as_html(sheets: Sequence[Sheet], found: Sequence[Row]) -> str:
    """Return the tables as a section of the page; empty if there are none."""
    if not sheets:
        return ""

    def cell(value: str | Number) -> str:
        if isinstance(value, str):
            return f"<td>{escape(value)}</td>"
        number = f"<b>{escape(value.text)}</b>" if value.is_bold else escape(value.text)
        more = f"{escape(value.ends[0])} to {escape(value.ends[1])}" if value.ends else ""
        small = "".join(f"<small>{words}</small>" for words in (more, escape(value.words)) if words)
        return f'<td class="number">{number}{small}</td>'

    parts = [f"<p>{escape(about_numbers(found))}</p>"]
    for sheet in sheets:
        head = "".join(f'<th scope="col">{escape(title)}</th>' for title in sheet.titles)
        body = "\n".join("<tr>" + "".join(map(cell, line)) + "</tr>" for line in sheet.lines)
        parts.append(
            f'<h3>{escape(sheet.about)}</h3><div class="scroll" tabindex="0" role="region" '
            f'aria-label="{escape(sheet.about)}"><table class="plain narrow"><thead><tr>{head}</tr></thead>'
            f"<tbody>\n{body}\n</tbody></table></div>"
        )
    return '<section id="overview">\n<h2>At equal evaluations</h2>\n' + "\n".join(parts) + "\n</section>"
