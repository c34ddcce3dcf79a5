"""Panels of comparable records, the looks of their curves, and what is fitted to them."""

from __future__ import annotations

import math

import pytest
import torch
from benchrecords import record

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'kinvert[cli]'")

from kinvert.bench.report import plots
from kinvert.plot.style import METHOD_COLOURS, OTHER_COLOURS, method_colours


def test_order_is_fitted_between_round_off_and_one_half() -> None:
    steps = [5, 10, 20, 40, 80, 160]
    errors = [3.0, *(0.1 * (10 / n) ** 3 for n in steps[1:4]), 1e-14, 1e-14]
    assert plots.order(steps, errors, "float64") == pytest.approx(3)
    assert math.isnan(plots.order(steps[:3], errors[:3], "float64"))
    assert math.isnan(plots.order(steps[:4], errors[:4], "float16"))
    # Only the first errors that fall: a floor above round-off is not fitted, and what stands on one has no slope.
    floor = [0.1, 0.025, 0.025 / 4, 0.006, 0.007, 0.005]
    assert plots.order(steps[:4], floor[:4], "float64") == plots.order(steps, floor, "float64")
    assert math.isnan(plots.order(steps, [1e-9, 1.1e-9, 0.9e-9, 1.2e-9, 1e-9, 1e-9], "float64"))
    assert math.isnan(plots.order(steps, [math.nan] * 4 + [1e-3, 1e-4], "float64"))


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
    # Ten curves of one method: one colour and ten markers.
    styles = [looks.style(key) for key in panel.curves]
    assert {style["color"] for style in styles} == {METHOD_COLOURS["unsample"]}
    assert len({style["marker"] for style in styles}) == 10


def test_a_curve_looks_the_same_in_every_panel() -> None:
    shared = [record(model=m, sampler="euler", method="invert") for m in ("a", "b", "c")]
    own = [record(model=m, sampler=f"of_{m}_{k}") for m in ("a", "b", "c") for k in range(9)]
    found = plots.panels(shared + own)
    looks = plots.Looks.of(found)
    style = looks.style(("invert", "euler"))
    assert (style["color"], style["marker"]) == (METHOD_COLOURS["invert"], plots.MARKERS[0])
    for panel in found:
        assert len({looks.style(key)["marker"] for key in panel.curves}) == 10


def test_every_method_of_kinvert_has_a_colour_of_its_own() -> None:
    from kinvert.bench import METHODS

    known = {name for name in METHODS if name in METHOD_COLOURS}
    assert {"unsample", "ddim_clean", "ddim_noisy", "picard", "invert", "reversible", "extract_noise"} <= known
    assert len(set(METHOD_COLOURS.values())) == len(METHOD_COLOURS)
    own = method_colours(["mine", "unsample", "another"])
    assert own["unsample"] == METHOD_COLOURS["unsample"]
    assert [own["another"], own["mine"]] == list(OTHER_COLOURS[:2]) and not set(OTHER_COLOURS) & set(
        METHOD_COLOURS.values()
    )


def test_front() -> None:
    assert plots.front([(3, 0.5), (1, 1.0), (2, 1.0), (2, 0.7), (4, 0.5), (5, 0.1)]) == [
        (1, 1.0), (2, 0.7), (3, 0.5), (5, 0.1),
    ]  # fmt: skip


def test_round_off_is_half_of_what_torch_calls_eps() -> None:
    assert {name: torch.finfo(getattr(torch, name)).eps / 2 for name in plots.EPS} == plots.EPS
