"""The committed claims were measured as the page says, and its verdicts follow from their intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "published-claims.md").read_text()


def claim(name: str, **where: Any) -> list[dict[str, Any]]:
    report = json.loads((RESULTS / f"claims-{name}.json").read_text())
    assert report["command"] == f"python benchmarks/published_claims.py {name}"
    return [row for row in report["rows"] if all(row[key] == value for key, value in where.items())]


def test_the_words_of_the_page_are_the_numbers() -> None:
    """Each number of a verdict, from the row that it is about."""
    numbers = {
        "latent that is 6,700 times": one("parameters", line="edict, p 0.93", measure="latent")["value"] / 6700,
        "image to 2e-4": one("parameters", line="edict, p 0.93", measure="error")["value"] / 2e-4,
        "a latent of 1,800": one("parameters", line="bdia, gamma 0.9", measure="latent")["value"] / 1800,
        "misses by 0.14": one("reversible", line="ddim_clean", steps=10, dtype="float64")["value"] / 0.14,
        "off by 1e9": one("reversible", line="bdia, gamma 0.5", steps=100, dtype="float64")["value"] / 1.6e9,
        "leaves 7 % of the spread": one("correlation", line="ddim_noisy", measure="spread")["value"] / 0.07,
        "the spread to 58 %": one("correlation", line="forward_first, 1", measure="spread")["value"] / 0.58,
        "correlated by 0.29": one("correlation", line="ddim_noisy", measure="correlation")["value"] / 0.29,
        "noise has 0.12": one("correlation", line="noise", measure="correlation")["value"] / 0.12,
        "but 12 % of the spread": one("correlation", line="uni_inv", measure="spread")["value"] / 0.12,
        "off by 0.07 at cfg 1": one("latents", cfg=1.0, line="ddim_noisy", measure="image")["value"] / 0.07,
        "by 65 % of its size": one("latents", cfg=1.0, line="ddim_noisy", measure="latent")["value"] / 0.65,
        "in 9 % of all steps": one("distances", cfg=7.5, iteration=10)["grew"] / 0.09,
    }
    words = " ".join(PAGE.split())
    for text, ratio in numbers.items():
        assert text in words and ratio == pytest.approx(1, abs=0.13), text
    moves = [one("distances", cfg=1.0, iteration=k)["value"] for k in (1, 2, 9, 10)]
    assert moves[1] / moves[0] == pytest.approx(0.36, abs=0.01) and "by 0.36 of" in words
    assert moves[3] / moves[2] == pytest.approx(0.52, abs=0.01) and "0.52 of the ninth" in words


def one(name: str, **where: Any) -> dict[str, Any]:
    (row,) = claim(name, **where)
    return row


def test_every_claim_is_on_the_page_with_its_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from claims_figures import FIGURES_OF
    from published_claims import CLAIMS

    for name in CLAIMS:
        assert f"<!-- claims {name} -->" in PAGE, name
        for row in claim(name):
            assert row["images"] >= 6, row  # fewer have no interval of 95 % for a median
            if row["value"] is not None:
                assert row["low"] <= row["value"] <= row["high"], row
    for name in FIGURES_OF:
        assert f"assets/claims-{name}.png" in PAGE and (ROOT / "docs" / "assets" / f"claims-{name}.png").exists()


def test_reversible_samplers_return_the_image_and_gamma_does_not() -> None:
    for row in claim("reversible", dtype="float64"):
        if row["line"] == "ddim_clean":
            assert row["low"] > 0.01
        elif row["line"] != "bdia, gamma 0.5":
            assert row["high"] < 1e-11
    assert one("reversible", line="bdia, gamma 0.5", dtype="float64", steps=100)["low"] > 1
    sizes = {row["line"]: row for row in claim("parameters", measure="latent")}
    for line in ("edict, p 0.97", "bdia, gamma 0.96", "bdia, gamma 1", "o_belm"):
        assert 0.5 < sizes[line]["low"] < sizes[line]["high"] < 1.2
        assert one("parameters", line=line, measure="error")["high"] < 1e-6
    assert sizes["edict, p 0.9"]["low"] > 1e8 and sizes["edict, p 0.93"]["low"] > 1e3
    assert sizes["bdia, gamma 0.9"]["low"] > 1e3 and sizes["bdia, gamma 0.5"]["value"] is None


def test_orders_are_those_of_the_page() -> None:
    for line, order in {"ddim_clean": 1, "edict": 1, "bdia": 2, "bdia, gamma 0.5": 1, "o_belm": 2}.items():
        assert one("orders", line=line)["value"] == pytest.approx(order, abs=0.05)


def test_guidance_is_hard_for_the_fixed_point_and_not_for_invert() -> None:
    ddim, fixed = (one("guidance", cfg=7.5, line=line) for line in ("ddim_noisy", "aidi"))
    assert ddim["low"] > one("guidance", cfg=1.0, line="ddim_noisy")["high"]
    assert fixed["low"] > ddim["low"] and fixed["value"] > 1e4 * one("guidance", cfg=1.0, line="aidi")["value"]
    for row in claim("guidance", line="invert"):
        assert row["exact"] == row["images"] and row["high"] < 1e-9


def test_few_steps_and_convergence() -> None:
    for steps in (5, 10, 20):
        ddim, fixed = (one("few_steps", steps=steps, line=line) for line in ("ddim_noisy", "aidi"))
        assert fixed["high"] < ddim["low"] / 5
    first, last = (one("distances", cfg=1.0, iteration=k) for k in (1, 10))
    assert last["high"] < first["low"] / 1000 and last["grew"] == 0
    first, last = (one("distances", cfg=7.5, iteration=k) for k in (3, 10))
    assert last["value"] > first["value"] and last["grew"] > 0.05


def test_iterations_are_worth_more_than_steps() -> None:
    for model in ("digits", "mnist"):
        for line in ("25, 25, 2", "20, 20, 3", "10, 10, 8"):
            assert one("renoise", model=model, line=line)["gain"][1] > 8
        assert one("renoise", model=model, line="90, 10, 0")["gain"][2] < 0


def test_noise_first_makes_a_latent_more_like_noise_and_costs_the_image_late() -> None:
    lines = ["ddim_noisy", *(f"forward_first, {k}" for k in (1, 2, 5, 10))]
    found = {measure: [one("correlation", line=line, measure=measure) for line in lines] for measure in MEASURES}
    assert found["spread"][0]["high"] < 0.1 and found["correlation"][1]["high"] < found["correlation"][0]["low"]
    spreads = [row["value"] for row in found["spread"]]
    assert spreads == sorted(spreads) and found["spread"][1]["low"] > 0.5
    first, second, *_, last = found["error"]
    assert second["low"] < first["value"] < second["high"] and last["low"] > first["high"]


MEASURES = ("correlation", "spread", "error")


def test_a_latent_is_off_by_more_than_its_image_and_a_walk_by_no_more() -> None:
    for cfg in (1.0, 7.5):
        for line in ("ddim_noisy", "aidi", "renoise", "invert"):
            image, latent, walk = (one("latents", cfg=cfg, line=line, measure=m) for m in ("image", "latent", "walk"))
            assert latent["value"] > 5 * image["value"] and walk["value"] == image["value"]
