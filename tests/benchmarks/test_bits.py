"""The committed bits and detectors say what the documentation says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
REPORT = json.loads((BENCHMARKS / "results" / "bits.json").read_text())
NAMES = ("model", "sampler", "cfg", "attack", "knowledge", "method")
ROWS = {tuple(row[name] for name in NAMES): row for row in REPORT["rows"]}


def bits(*key: Any) -> list[float]:
    """The share of right bits, and the ends of its interval."""
    return ROWS[key]["bits"]


def test_everything_was_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from bits import COUNTS, SCALES, keys

    assert len(ROWS) == len(REPORT["rows"]) and set(ROWS) == {key for model in COUNTS for key in keys(model)}
    assert len(REPORT["forensics"]) == 2 * len(COUNTS) * len(SCALES)
    for row in REPORT["rows"]:
        for name in ("bits", "whole", "tpr", "auc"):
            value, low, high = row[name]
            assert 0 <= low <= high <= 1 and (low <= value <= high or name == "tpr"), row
        assert row["evaluations"] <= {"unsample": 1, "aidi": 11, "invert": 8, "invert_11": 11}[row["method"]]


def test_a_message_that_is_told_from_all_others_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from bits import summary

    right = torch.full((20, 20), 0.5, dtype=torch.float64).fill_diagonal_(1.0)
    right[0, 0] = 0.75
    found = summary(right)
    assert [found[name][0] for name in ("bits", "whole", "tpr", "auc")] == [0.9875, 0.95, 1.0, 1.0]
    assert found["tpr"] == [1.0] * 3 and found["bits"][1] < found["bits"][0] < found["bits"][2]
    assert summary(torch.full((20, 20), 0.5, dtype=torch.float64))["auc"] == [0.5] * 3


def test_who_knows_reads_more_by_an_exact_inversion() -> None:
    for cfg in (1.0, 3.0, 7.5):
        for sampler in ("euler", "dpmpp_2m"):
            run = ("digits", sampler, cfg, "none", "known")
            assert bits(*run, "invert")[1] > bits(*run, "unsample")[2]
        assert bits("mnist", "euler", cfg, "none", "known", "invert")[1] > bits(*RUN, cfg, *KNOWN, "unsample")[2]
    for cfg in (1.0, 3.0):
        assert ROWS["digits", "euler", cfg, "none", "known", "invert"]["whole"][0] == 1


RUN, KNOWN = ("mnist", "euler"), ("none", "known")


def test_who_is_blind_or_has_an_attacked_image_reads_no_more_by_it() -> None:
    """Their intervals overlap. After rounding alone they do not: an exact inversion reads more."""
    for key in ROWS:
        if key[-1] == "invert" and key[3] == "rounding alone":
            assert bits(*key)[1] > bits(*key[:-1], "unsample")[2]
        elif key[-1] == "invert" and (key[3] != "none" or key[4] == "blind"):
            assert bits(*key)[1] < bits(*key[:-1], "unsample")[2], key


def test_clipping_costs_more_than_rounding() -> None:
    for model in ("digits", "mnist"):
        shares = [
            bits(model, "euler", 3.0, attack, "known", "unsample") for attack in ("rounding alone", "clipping alone")
        ]
        assert shares[0][1] > shares[1][2]


def test_strong_guidance_takes_bits() -> None:
    for model in ("digits", "mnist"):
        for sampler in ("euler", "dpmpp_2m"):
            shares = [bits(model, sampler, cfg, "none", "blind", "unsample")[0] for cfg in (1.0, 3.0, 7.5)]
            assert shares == sorted(shares, reverse=True)
