"""The committed searches say what the documentation says."""

from __future__ import annotations

import json
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_table_of_latents_is_what_was_measured() -> None:
    """No cell was measured twice, each latent is exact, and the true one, the first, is the likeliest."""
    rows = json.loads((BENCHMARKS / "results" / "preimages.json").read_text())["axes"]
    keys = [(row["model"], row["image"], row["cfg"], row["steps"]) for row in rows]
    assert len(set(keys)) == len(keys) and {row["cfg"] for row in rows} == {1.0, 3.0, 7.5}
    for row in rows:
        assert row["latents"] == len(row["norms"]) == len(row["distances"]) == len(row["errors"]) <= 4
        assert max(row["errors"]) < 1e-8 and row["norms"][0] == min(row["norms"])
        assert row["latents"] == 1 or row["log_densities"][0] == max(row["log_densities"])
        assert row["latents"] == 1 or (row["cfg"] > 1 and row["steps"] == 10)
