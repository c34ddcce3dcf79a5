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
    errors = {row["line"]: row for row in claim("parameters", measure="error")}
    assert errors["o_belm"]["high"] < 1e-5


def test_orders_are_those_of_the_page() -> None:
    for line, order in {"ddim_clean": 1, "edict": 1, "bdia": 2, "bdia, gamma 0.5": 1, "o_belm": 2}.items():
        assert one("orders", line=line)["value"] == pytest.approx(order, abs=0.05)


def test_guidance_is_hard_for_the_fixed_point_and_not_for_invert() -> None:
    ddim, fixed, exact = (one("guidance", cfg=7.5, line=line) for line in ("ddim_noisy", "aidi", "invert"))
    assert ddim["low"] > one("guidance", cfg=1.0, line="ddim_noisy")["high"]
    assert fixed["low"] > 1000 * one("guidance", cfg=1.0, line="aidi")["high"]
    assert exact["exact"] == exact["images"]


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
