"""Small rules for tensors."""

from __future__ import annotations

import pytest
import torch

from kinvert.tensors import is_half, per_sample, rms, wide_dtype


def test_dtypes_to_compute_in() -> None:
    assert [wide_dtype(t) for t in (torch.float64, torch.float32)] == [torch.float64, torch.float32]
    assert [wide_dtype(t) for t in (torch.bfloat16, torch.float16)] == [torch.float32] * 2
    assert [is_half(t) for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)] == [False] * 2 + [
        True
    ] * 2


def test_one_value_per_sample_multiplies_x() -> None:
    x = torch.ones(2, 3, 4)
    assert (per_sample(torch.tensor([1.0, 2.0]), x) * x).sum((1, 2)).tolist() == [12.0, 24.0]
    assert per_sample(torch.ones(2), torch.ones(2)).shape == (2,)


def test_rms_of_each_sample_and_of_a_region() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert rms(x).tolist() == pytest.approx([12.5**0.5, 2**0.5])
    assert rms(x, torch.tensor([[1.0, 0.0], [0.0, 0.0]])).tolist() == [3.0, 0.0]


def test_rms_of_half_precision_does_not_overflow() -> None:
    size = rms(torch.full((1, 4), 60000.0, dtype=torch.float16))
    assert size.dtype == torch.float32 and size.item() == pytest.approx(60000, rel=1e-3)
