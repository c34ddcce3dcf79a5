"""Panels of comparable records, the looks of their curves, and what is fitted to them."""

from __future__ import annotations

import math

import pytest
from benchrecords import record

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'kinvert[cli]'")

from kinvert.bench.report import plots


def test_order_is_fitted_between_round_off_and_one_half() -> None:
    steps = [5, 10, 20, 40, 80, 160]
    errors = [3.0, *(0.1 * (10 / n) ** 3 for n in steps[1:4]), 1e-14, 1e-14]
    assert plots.order(steps, errors, "float64") == pytest.approx(3)
    assert math.isnan(plots.order(steps[:3], errors[:3], "float64"))
    assert math.isnan(plots.order(steps[:4], errors[:4], "float16"))


def test_a_panel_never_mixes_settings() -> None:
    found = [record(steps=n, cfg=w) for n in (10, 20, 40) for w in (1.0, 3.0)] + [record(steps=80, cfg=3.0)]
    found += [record(steps=n, dtype="float32") for n in (10, 20)] + [record(steps=n, model="mnist") for n in (10, 20)]
    by_steps = plots.panels(found, "steps")
    assert [(p.model, p.held) for p in by_steps] == [
        ("digits", {"schedule": "karras", "cfg": 3.0, "dtype": "float64"}),
        ("mnist", {"schedule": "karras", "cfg": 1.0, "dtype": "float64"}),
    ]
    assert [r["cell"]["steps"] for r in by_steps[0].curves["unsample", "euler"]] == [10, 20, 40, 80]
    assert [p.model for p in plots.panels(found, "cfg")] == ["digits"]  # one point makes no curve
    assert plots.title(by_steps[0], plots.Looks.of(by_steps)) == (
        "digits: reconstruction\nunsample, euler, karras, cfg 3, float64"
    )


def test_panel_keeps_the_best_curves() -> None:
    found = [record(sampler=f"s{k}", relative=10.0**-k) for k in range(12)]
    (panel,) = plots.panels(found)
    assert [sampler for _, sampler in panel.curves] == [f"s{k}" for k in range(11, 1, -1)] and panel.left_out == 2
    looks = plots.Looks.of([panel])
    assert plots.title(panel, looks).endswith("best 10 of 12")
    # Ten curves, ten colours and ten markers.
    styles = [looks.style(key) for key in panel.curves]
    assert len({style["color"] for style in styles}) == len({style["marker"] for style in styles}) == 10


def test_a_curve_looks_the_same_in_every_panel() -> None:
    shared = [record(model=m, sampler="euler") for m in ("a", "b", "c")]
    own = [record(model=m, sampler=f"of_{m}_{k}") for m in ("a", "b", "c") for k in range(9)]
    found = plots.panels(shared + own)
    looks = plots.Looks.of(found)
    assert looks.style(("unsample", "euler"))["color"] == plots.COLOURS[0]
    for panel in found:
        assert len({looks.style(key)["color"] for key in panel.curves}) == 10


def test_front() -> None:
    assert plots.front([(3, 0.5), (1, 1.0), (2, 1.0), (2, 0.7), (4, 0.5), (5, 0.1)]) == [
        (1, 1.0), (2, 0.7), (3, 0.5), (5, 0.1),
    ]  # fmt: skip
