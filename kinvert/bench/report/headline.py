"""Say in three sentences what a report shows: who has the lowest error, who is best at a small cost, what failed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from kinvert.bench.report.rows import Row, better, contest, plain
from kinvert.bench.report.tables import text, with_interval
from kinvert.bench.results import Record

__all__ = ["BUDGETS", "headline", "summary"]

BUDGETS = (20, 40)  # evaluations, up and down together
Contest = tuple[str, str]


def headline(found: Sequence[Row], records: Sequence[Record]) -> list[str]:
    """Return three sentences: the lowest error, the best at 20 and at 40 evaluations, and what failed.

    Errors are the medians of the NMSE of the round trip.

    Args:
        found: all rows, from `rows`.
        records: what they were made of, with the failures.
    """
    least, cheap, cheaper = (_by_question(_leaders(found, limit)) for limit in (math.inf, *reversed(BUDGETS)))
    few, more = BUDGETS
    return [
        f"Lowest error {least}.",
        f"Best with at most {few} evaluations, up and down together, {cheaper}; with at most {more}, {cheap}.",
        _failed(records),
    ]


def summary(found: Sequence[Row]) -> list[list[str]]:
    """Return a table: for each model and question the row with the lowest error, at any cost and within `BUDGETS`.

    The first line has the titles. "Not told apart from 3" counts the rows whose difference from the best has an
    interval that includes 0, or that have too few samples for one.
    """
    limits = (math.inf, *BUDGETS)
    leading = [_leaders(found, limit) for limit in limits]
    titles = ["at any cost", *(f"with at most {limit} evaluations" for limit in BUDGETS)]
    lines = [["model", "question", *titles]]
    for key in dict.fromkeys(map(contest, _round_trips(found))):
        cells = [
            _details(leaders[key], found, limit) if key in leaders else "–"
            for leaders, limit in zip(leading, limits, strict=True)
        ]
        lines.append([*key, *cells])
    return lines


def _round_trips(found: Sequence[Row]) -> list[Row]:
    """Leave out the questions that go beyond a round trip, which are compared at equal evaluations."""
    return [row for row in found if row.settings["question"] in ("reconstruction", "recovery")]


def _allowed(found: Sequence[Row], limit: float) -> list[Row]:
    known = [row for row in _round_trips(found) if not math.isnan(row.values.get("nmse_db", math.nan))]
    return [row for row in known if row.values["evaluations"] <= limit]


def _leaders(found: Sequence[Row], limit: float) -> dict[Contest, Row]:
    """Return the row with the lowest error within a number of evaluations, by model and question."""
    leading: dict[Contest, Row] = {}
    for row in _allowed(found, limit):
        best = leading.setdefault(contest(row), row)
        if row.values["nmse_db"] < best.values["nmse_db"]:
            leading[contest(row)] = row
    return leading


def _by_question(leading: dict[Contest, Row]) -> str:
    """Return who leads, by question and method."""
    found: dict[str, dict[str, list[str]]] = {}
    for (model, question), row in leading.items():
        words = f"{model} ({text(row.values['nmse_db'], '.0f')} dB)"
        found.setdefault(question, {}).setdefault(row.settings["method"], []).append(words)
    clauses = [
        f"in {question}: {', '.join(f'{method} for {_listed(words)}' for method, words in methods.items())}"
        for question, methods in found.items()
    ]
    return "; ".join(clauses) or "of none"


def _details(row: Row, found: Sequence[Row], limit: float) -> str:
    """Return the method and the settings in which rows differ, the error, its cost, and how many are as good."""
    shown = {"method": "{}", "sampler": "{}", "schedule": "{}", "steps": "{} steps", "cfg": "cfg {}", "dtype": "{}"}
    varied = [name for name in shown if len({other.settings[name] for other in found}) > 1] or ["method"]
    settings = ", ".join(shown[name].format(plain(row.settings[name])) for name in varied)
    number, ends = with_interval(row, "nmse_db")
    error = f"{number} dB" + (f" ({ends[0]} to {ends[1]})" if ends else "")
    others = [other for other in _allowed(found, limit) if other is not row and contest(other) == contest(row)]
    tied = sum(not better(row, other, "nmse_db") for other in others)
    cost = f"{text(row.values['evaluations'], '.0f')} evaluations"
    return f"{settings}: {error}, {cost}" + (f"; not told apart from {tied}" if tied else "")


def _failed(records: Sequence[Record]) -> str:
    """Return what could not be measured and what did not converge, by method."""
    failed = [record for record in records if record["error"] is not None]
    stalled = [record for record in records if record["converged"] and not all(record["converged"])]
    if not failed and not stalled:
        return "Nothing failed: every cell was measured, and every sample whose inversion was checked came back."
    words = []
    if failed:
        words.append(f"{_count(len(failed), 'cell')} could not be measured ({_methods(failed)})")
    if stalled:
        samples = sum(record["converged"].count(False) for record in stalled)
        cells = _count(len(stalled), "cell")
        words.append(
            f"{_count(samples, 'sample')} did not come back to within the tolerance, in {cells} ({_methods(stalled)})"
        )
    return f"Failed: of {_count(len(records), 'cell')}, {'; '.join(words)}."


def _methods(records: Iterable[Record]) -> str:
    counts = Counter(record["cell"]["method"] for record in records)
    return ", ".join(f"{method} {number}" for method, number in sorted(counts.items(), key=lambda c: (-c[1], c[0])))


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
