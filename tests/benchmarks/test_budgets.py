"""The committed errors at small budgets say what the documentation says."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

REPORT = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "budgets.json").read_text())
ALLOWED = 8e-6  # what the default tolerance allows: smaller errors are not compared
SAME = 1.03  # the rounded networks answer differently in batches of other sizes
Key = tuple[Any, ...]


def panels() -> dict[Key, list[dict[str, Any]]]:
    """Return the rows of each panel, those of `invert` by their budgets."""
    found: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for row in REPORT["rows"]:
        found[tuple(row[name] for name in ("network", "output", "steps", "cfg", "sampler"))].append(row)
    return found


def test_no_cell_is_there_twice_and_none_costs_more_than_its_budget() -> None:
    for rows in panels().values():
        assert len({(row["method"], row["budget"]) for row in rows}) == len(rows)
        for row in rows:
            assert row["budget"] is None or row.get("most_evaluations", row["evaluations"]) <= row["budget"], row


def test_more_evaluations_never_give_a_worse_latent_and_unsample_is_a_candidate() -> None:
    """The plain run is the first attempt, or for `euler` among those that 13 runs are enough for."""
    for rows in panels().values():
        mine = sorted((row["budget"], row) for row in rows if row["method"] == "invert" and row["budget"])
        for which in ("median_error", "worst_error"):
            plain = [max(row[which], ALLOWED) for row in rows if row["method"] == "unsample"]
            errors = [max(row[which], ALLOWED) for _, row in mine]
            assert all(after <= SAME * before for before, after in itertools.pairwise(errors)), rows[0]
            candidates = [error for (budget, _), error in zip(mine, errors, strict=True) if budget > 12]
            candidates = candidates if rows[0]["sampler"] == "euler" else errors
            assert all(error <= SAME * plain[0] for error in candidates), rows[0]


def test_one_evaluation_a_step_beats_every_published_inversion_without_guidance() -> None:
    for key, rows in panels().items():
        if key[1:2] + key[3:] == ("float32", 1.0, "euler"):
            errors = {row["method"]: row["worst_error"] for row in rows if row["budget"] == 1}
            if "invert" in errors:
                assert all(error > 3 * errors["invert"] for name, error in errors.items() if name != "invert"), key


def test_the_table_of_costs_is_complete() -> None:
    names = ("sampler", "dtype", "lowest_sigma", "tolerance", "cfg")
    rows = {tuple(row[name] for name in names): row for row in REPORT["cost"]}
    loose, middle, fine = (rows["euler", "float32", 0.02, tol, 1.0]["evaluations"] for tol in (1e-2, 1e-3, 1e-5))
    assert loose < middle < fine
    assert len(rows) == 10 and all(row["samples"] == 8 for row in rows.values())
