"""Products of matrices: as exact as sums, in one piece or in blocks."""

from __future__ import annotations

import pytest
import torch
from problems import noise_like
from runs import KARRAS, PLANS, gaussian, plain_run

import kinvert as ki
from kinvert.engine.kernels import program
from kinvert.engine.products import BLOCK, blocks_for


@pytest.mark.parametrize("width", [600, BLOCK])
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("name", ["lms", "uni_pc"])
def test_products_are_as_exact_as_sums(name: str, precision: str, width: int) -> None:
    """In one piece or in several; also where the user allows low precision in products: that is for the network."""
    x = 10 * noise_like((2, width)).float()
    before = torch.get_float32_matmul_precision()
    want = plain_run(PLANS[name], gaussian, {"x": x})["x"]
    torch.set_float32_matmul_precision(precision)
    try:
        got = ki.sample(gaussian, x, KARRAS, sampler=name)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "blocks"), [(600, 1), (BLOCK, 2), (2 * BLOCK, 4)])
def test_products_with_one_result_are_computed_in_blocks(width: int, blocks: int) -> None:
    code = program(PLANS["lms"])
    assert code.side == 1 and blocks_for(code, torch.ones(2, width)) == blocks


def test_a_precision_that_torch_cannot_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to say it if it was set by names of both kinds; then products are computed in the safe way."""
    x = 10 * noise_like((2, 600)).float()
    want = plain_run(PLANS["lms"], gaussian, {"x": x})["x"]

    def refuse() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    torch.testing.assert_close(ki.sample(gaussian, x, KARRAS, sampler="lms"), want, rtol=1e-5, atol=1e-5)
