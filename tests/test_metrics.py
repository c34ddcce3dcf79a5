"""Metrics against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kinvert import metrics

A = torch.tensor([[[0.0, 1.0], [1.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
B = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)


def test_by_hand() -> None:
    assert metrics.mse(A, B).tolist() == [1.0, 0.0]
    assert metrics.max_error(A, B).tolist() == [2.0, 0.0]
    assert metrics.psnr(A, B).tolist() == [pytest.approx(10 * math.log10(4)), math.inf]
    assert metrics.psnr(A, B, data_range=1.0)[0] == 0.0
    assert metrics.nmse(A, B).tolist() == [pytest.approx(10 * math.log10(4 / 2)), -math.inf]


@given(scale=st.floats(0.1, 10), shift=st.floats(-3, 3))
def test_scale_and_shift(scale: float, shift: float) -> None:
    torch.testing.assert_close(metrics.mse(scale * A + shift, scale * B + shift), scale**2 * metrics.mse(A, B))
    torch.testing.assert_close(metrics.nmse(scale * A, scale * B)[0], metrics.nmse(A, B)[0])
    torch.testing.assert_close(metrics.psnr(scale * A, scale * B, 2 * scale)[0], metrics.psnr(A, B)[0])


def test_half_precision_is_compared_in_float32() -> None:
    assert metrics.mse(A.half(), B.half()).dtype == torch.float32
    assert metrics.mse(A, B.half()).dtype == torch.float32


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 2, 2\) and original \(2, 2, 2\)"):
        metrics.mse(A[:1], B)
    with pytest.raises(ValueError, match="data_range must be positive, got 0"):
        metrics.psnr(A, B, data_range=0)
