"""The loops by hand that the benchmark of overhead compares with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from problems import noise_like
from runs import IN_FEW_PASSES, KARRAS, gaussian

import kinvert as ki


@pytest.mark.parametrize("ends_at_zero", [True, False])
def test_best_case_equals_run(ends_at_zero: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the benchmark compares with does the same work."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from best_case import BEST_CASES, best_case

    assert list(BEST_CASES) == IN_FEW_PASSES
    for name in IN_FEW_PASSES:
        rule = ki.sampler(name, eta=0.0) if name == "dpmpp_2s_ancestral" else name
        plan = ki.compile_plan(rule, KARRAS if ends_at_zero else KARRAS[:-1])
        x, noise = 10 * noise_like((2, 6)), noise_like((2, 6), seed=1)
        with torch.no_grad():
            want = ki.run(plan, gaussian, x, lambda a, b, noise=noise: noise)
            torch.testing.assert_close(best_case(plan, gaussian, x, noise)(), want, rtol=1e-12, atol=1e-12)
