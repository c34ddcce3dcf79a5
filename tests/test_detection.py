"""Bits that are read from a latent, and detectors: exact small cases, and laws."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from kinvert.metrics import auc, bit_accuracy, tpr_at_fpr

SCORES = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12)


# -- bits --------------------------------------------------------------------------------------------------------------
def test_bits_are_counted_by_hand() -> None:
    truth = torch.tensor([[1.0, -2.0, 3.0, -4.0]]).expand(4, 4)
    latent = torch.tensor([[9.0, -1e-9, 0.1, -1.0], [-1, 2, -3, 4], [1, 2, 0, math.nan], [math.inf, -math.inf, -1, 1]])
    assert bit_accuracy(latent, truth).tolist() == [1.0, 0.0, 0.5, 0.5]


def test_the_bits_of_a_message_are_signs_of_any_shape_scale_and_dtype() -> None:
    z = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        right = bit_accuracy((80 * z).to(dtype).requires_grad_(), z.sign())
        assert right.tolist() == [1.0] * 3 and right.dtype == torch.float64


@given(st.integers(0, 2**32 - 1))
def test_turning_the_message_turns_its_share(seed: int) -> None:
    a, b = torch.randn(2, 3, 17, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(bit_accuracy(a, b) + bit_accuracy(a, -b), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(bit_accuracy(a, b), bit_accuracy(b, a))


@pytest.mark.parametrize(
    ("latent", "truth", "message"),
    [
        (torch.ones(1, 3), torch.ones(3, 1), r"latent has shape \(1, 3\) and truth \(3, 1\); they must be equal"),
        (torch.ones(3), torch.ones(3), r"must be equal, \(batch, \*event\)"),
        (torch.ones(0, 3), torch.ones(0, 3), "not empty"),
        (torch.ones(1, 3), torch.tensor([[1.0, 0.0, 0.0]]), "truth has 2 zeros, whose sign is no bit; give -1 or 1"),
        (torch.ones(1, 2), torch.tensor([[1.0, math.nan]]), "truth has 1 NaN"),
        (torch.ones(1, 2), torch.ones(1, 2, dtype=torch.int64), "truth must be a floating point tensor"),
        ([[1.0]], torch.ones(1, 1), "latent must be a floating point tensor"),
        (torch.ones(1, 1, device="meta"), torch.ones(1, 1), "latent has a shape but no values"),
    ],
)
def test_what_is_no_message_is_refused(latent: torch.Tensor, truth: torch.Tensor, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        bit_accuracy(latent, truth)


# -- detectors ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("positive", "negative", "want"),
    [
        ([2.0, 3.0], [0.0, 1.0], 1.0),
        ([0.0], [1.0, 2.0], 0.0),
        ([1.0, 1.0], [1.0], 0.5),
        ([1.0, 3.0], [1.0, 2.0], 5 / 8),  # of 1: half and none, of 3: both
        ([math.inf], [math.inf, -math.inf], 0.75),
    ],
)
def test_auc_by_hand(positive: list[float], negative: list[float], want: float) -> None:
    assert auc(positive, negative) == want


def test_scores_may_be_any_real_tensor() -> None:
    square = torch.tensor([[2, 0], [0, 1]])
    wide = square.double().requires_grad_().diagonal()
    assert not wide.is_contiguous()  # torch warns of these once
    for p in (wide, square.diagonal(), square.diagonal().bfloat16(), [2, 1]):
        assert auc(p, square.diagonal()) == 0.5 and tpr_at_fpr(p, square.diagonal(), 0.5) == 0.5


@given(SCORES, SCORES)
def test_auc_is_the_share_of_pairs_and_that_of_another_library(positive: list[float], negative: list[float]) -> None:
    pairs = [Fraction((p > n) + (p >= n), 2) for p in positive for n in negative]
    assert auc(positive, torch.tensor(negative)) == pytest.approx(float(sum(pairs) / len(pairs)), abs=1e-15)
    statistic = float(mannwhitneyu(positive, negative).statistic)  # U: pairs, of which equal ones count as half
    assert auc(positive, negative) == pytest.approx(statistic / len(positive) / len(negative), abs=1e-12)


@given(SCORES, SCORES)
def test_the_roles_of_both_kinds_are_symmetric(positive: list[float], negative: list[float]) -> None:
    assert auc(positive, negative) + auc(negative, positive) == pytest.approx(1.0)
    assert auc([-p for p in positive], [-n for n in negative]) == pytest.approx(auc(negative, positive))


@pytest.mark.parametrize(
    ("fpr", "want"),
    [(0.0, 0.25), (0.25, 0.5), (0.49, 0.5), (0.5, 0.75), (0.75, 0.75), (0.9, 0.75)],
)
def test_tpr_by_hand(fpr: float, want: float) -> None:
    """The scores 3, and then 2, equal a negative: only what is above the threshold is detected."""
    assert tpr_at_fpr([1.0, 2.5, 3.0, 4.0], [1.0, 1.0, 2.5, 3.0], fpr) == want


def test_a_share_that_is_a_whole_number_of_negatives_is_not_lost_by_rounding() -> None:
    assert 0.29 * 100 < 29
    assert tpr_at_fpr([70.5], range(100), 0.29) == 1.0  # 71 to 99 are 29
    assert tpr_at_fpr([70.0], range(100), 0.29) == 0.0


@given(SCORES, SCORES, st.integers(0, 11))
def test_tpr_is_the_best_of_all_thresholds(positive: list[float], negative: list[float], allowed: int) -> None:
    fpr = min(allowed, len(negative) - 1) / len(negative)
    thresholds = [-math.inf, *positive, *negative]
    rates = [[sum(s > t for s in scores) / len(scores) for scores in (positive, negative)] for t in thresholds]
    assert tpr_at_fpr(positive, negative, fpr) == max(true for true, false in rates if false <= fpr)


def test_more_false_positives_never_detect_less() -> None:
    positive, negative = torch.randn(2, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = [tpr_at_fpr(positive + 1, negative, k / 100) for k in range(100)]
    assert found == sorted(found) and found[0] < found[5] < found[-1]


@pytest.mark.parametrize(
    ("positive", "negative", "fpr", "message"),
    [
        ([1.0], [0.0] * 99, 0.01, r"fpr must be 0 or at least 1/99, .*got 0.01; give at least 100"),
        ([1.0], [0.0], 1.0, "fpr must be finite and below 1"),
        ([1.0], [0.0], -0.1, "fpr must be"),
        ([], [0.0], 0.0, "positive must be scores of shape"),
        ([1.0], torch.zeros(2, 2), 0.0, r"negative must be scores .*got shape \(2, 2\)"),
        ([1.0], [math.nan], 0.0, "negative has 1 NaN"),
        ([1j], [0.0], 0.0, "positive must be real scores"),
        ([1.0], torch.ones(3, device="meta"), 0.0, "negative has a shape but no values"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    positive: list[float], negative: list[float], fpr: float, message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tpr_at_fpr(positive, negative, fpr)
    if "fpr" not in message:
        with pytest.raises((TypeError, ValueError), match=message):
            auc(positive, negative)
