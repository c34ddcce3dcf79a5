"""The density at a latent is `ki.log_prob`'s, and the committed searches say what the documentation says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import kinvert as ki

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_density_at_the_latent_of_an_image_is_that_of_log_prob(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from preimages import log_density, problem

    denoiser, latent, x, sigmas, given = problem("digits", 1, 3.0, 10)
    expected = ki.log_prob(denoiser, x, sigmas, sampler="euler", **given).log_prob
    found = log_density(denoiser, latent, sigmas, given)
    torch.testing.assert_close(torch.tensor([found], dtype=torch.float64), expected, rtol=1e-9, atol=1e-7)


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
