"""The metrics of bits and of edits, against closed formulas."""

from __future__ import annotations

import math

import pytest
import torch

from kinvert.bench.answers import bit_metrics, fewest_bits, true_edit


@pytest.mark.parametrize("count", [1, 16, 64, 300])
@pytest.mark.parametrize("chance", [1e-6, 0.01, 0.5])
def test_the_threshold_of_a_message_is_the_tail_of_the_binomial(count: int, chance: float) -> None:
    fewest = fewest_bits(count, chance)
    tail = sum(math.comb(count, k) for k in range(fewest, count + 1)) / 2**count
    assert tail <= chance < tail + math.comb(count, fewest - 1) / 2**count


def test_a_message_is_detected_from_the_threshold_on() -> None:
    fewest, truth = fewest_bits(64), torch.ones(3, 64)
    read = truth.clone()
    for row, wrong in enumerate((0, 64 - fewest, 65 - fewest)):
        read[row, :wrong] = -1
    found = bit_metrics(read, truth)
    assert found["bits"].tolist() == [1.0, fewest / 64, (fewest - 1) / 64]
    assert found["detected"].tolist() == [1.0, 1.0, 0.0] and found["message"].tolist() == [1.0, 0.0, 0.0]


def test_16_bits_are_too_few_to_tell_a_message() -> None:
    assert fewest_bits(16) == 17 and bit_metrics(torch.ones(1, 16), torch.ones(1, 16))["detected"].tolist() == [0.0]


def test_an_edit_is_measured_by_its_distance_to_the_truth() -> None:
    image, truth = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    found = true_edit(torch.tensor([0.9, -1.0])[:, None, None, None].expand(2, 1, 2, 2), image, truth)
    assert found["edit_error"].tolist() == pytest.approx([0.1, 2.0])
    assert found["edit_gain_db"].tolist() == pytest.approx([20.0, -20 * math.log10(2)])
    assert found["edit_closer"].tolist() == [1.0, 0.0]
