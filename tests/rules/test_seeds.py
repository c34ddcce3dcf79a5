"""SEEDS: the noise of its stages."""

from __future__ import annotations

from itertools import pairwise

import pytest

import kinvert as ki


def test_seeds_noise_is_one_path() -> None:
    """On data of a single point with no noise to start from, the noise of the stages is that of the SDE itself."""
    levels = [10.0, 4.0, 1.0]
    for name in ("seeds_2", "seeds_3"):
        for step, (a, b) in zip(ki.compile_plan(name, levels).steps, pairwise(levels), strict=True):
            variance = sum(c**2 for symbol, c in step.x if symbol.kind == "noise")
            assert variance == pytest.approx(b**2 * (1 - (b / a) ** 2), rel=1e-12)
            assert sum(c for symbol, c in step.x if symbol.kind != "noise") == pytest.approx(1.0, rel=1e-12)
            assert [noise.sigma_to for noise in step.noises][-1] == b
            assert all(n.sigma_to == m.sigma_from for n, m in pairwise(step.noises))
