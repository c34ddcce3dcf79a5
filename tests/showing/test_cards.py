"""What results show: one short line, and a card whose pictures and numbers are those of the result."""

from __future__ import annotations

import base64
import io
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kinvert as ki
from kinvert import bench
from kinvert.bench.results import Records
from kinvert.showing.charts import curve
from kinvert.showing.html import card
from kinvert.showing.registry import Registry
from kinvert.showing.thumbnails import pictures, png, round_up, thumbnails

SIGMAS = (10.0, 3.0, 1.0, 0.2)
DENOISER = ki.denoisers.Gaussian(0.2, 0.5)
X = torch.rand(3, 1, 4, 4, dtype=torch.float64, generator=torch.manual_seed(0)) * 2 - 1
FOUND = ki.invert(DENOISER, X, SIGMAS, sampler="heun")
NOISES = ki.extract_noise(DENOISER, X, SIGMAS)
TRIP = ki.round_trip(DENOISER, X, SIGMAS, sampler="euler")
EDITED = ki.edit(DENOISER, X, SIGMAS, method="noise", target={}, noise=ki.noise.white(0))
PLAN = ki.compile_plan("heun", SIGMAS)
LEVELS = ki.levels.stable_diffusion()
SCHEDULE = ki.Schedule(ki.schedule("karras", 20, LEVELS, rho=5.0), "karras", LEVELS, {"rho": 5.0})
FLOW = ki.Schedule(ki.schedule("simple", 4, ki.levels.flow(3.0)))
RESULTS = {
    "inversion": FOUND,
    "extracted": NOISES,
    "trip": TRIP,
    "edited": EDITED,
    "plan": PLAN,
    "levels": LEVELS,
    "schedule": SCHEDULE,
    "flow": FLOW,
    "samplers": ki.SAMPLERS,
    "schedules": ki.SCHEDULES,
    "methods": bench.METHODS,
}

each = pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)


def decoded(html: str) -> list[np.ndarray]:
    """The pixels of the pictures of a card."""
    image = pytest.importorskip("PIL.Image")
    found = re.findall(r"base64,([^']+)'", html)
    return [np.asarray(image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


@each
def test_a_repr_is_short(result: Any) -> None:
    assert len(repr(result)) < 400 and "tensor(" not in repr(result)


@each
def test_a_card_is_well_formed_and_needs_no_network(result: Any) -> None:
    html = result._repr_html_()
    ET.fromstring(html)
    assert not re.search(r"https?://|<script|src='(?!data:)", html)


def test_the_line_of_an_inversion_is_its_verdict() -> None:
    assert repr(FOUND) == (
        "Inversion(heun, float64 (3, 1, 4, 4), 3 steps, sigma 10 to 0.2, 3 of 3 converged, "
        f"worst round-trip error {float(FOUND.round_trip_error.max()):.2g})"
    )
    assert "2 of 3 converged" in repr(replace(FOUND, converged=torch.tensor([True, False, True])))
    unchecked = ki.invert(DENOISER, X, SIGMAS, sampler="heun", check=False)
    assert repr(unchecked).endswith("sigma 10 to 0.2, not checked)")


def test_results_of_files_show_themselves_alike(tmp_path: Path) -> None:
    for name, result in (("a.safetensors", NOISES), ("b.safetensors", TRIP), ("c.safetensors", SCHEDULE)):
        result.save(tmp_path / name)
        again = ki.load(tmp_path / name)
        assert repr(again) == repr(result) and again._repr_html_() == result._repr_html_()


def test_the_pictures_of_a_card_are_those_of_the_result() -> None:
    drawn = decoded(FOUND._repr_html_())
    assert FOUND.restored is not None
    wanted = [*(FOUND.latent[:, 0] / 10 / 3), *FOUND.restored[:, 0]]
    assert len(drawn) == 6
    for got, want in zip(drawn, wanted, strict=True):
        np.testing.assert_array_equal(got, ((want.clamp(-1, 1) + 1) * 127.5).round().numpy())


def test_the_card_of_an_edit_has_the_images_before_and_after() -> None:
    drawn = decoded(EDITED._repr_html_())
    wanted = [*X[:, 0], *EDITED.image[:, 0] / pictures(EDITED.image).limit]
    for got, want in zip(drawn, wanted, strict=True):
        np.testing.assert_array_equal(got, ((want.clamp(-1, 1) + 1) * 127.5).round().numpy())
    rms = ki.metrics.mse(EDITED.image, X).sqrt()
    assert f"changed {float(rms[1]):.2g}" in EDITED._repr_html_()


def test_schedules_say_what_they_were_made_of() -> None:
    assert repr(SCHEDULE) == f"Schedule(karras, 20 steps, sigma 14.61 to 0, rho=5, {LEVELS!r})"
    assert repr(FLOW) == "Schedule(4 steps, flow time 1 to 0)"
    assert repr(ki.Schedule(torch.ones(3, device="meta"))) == "Schedule(float32 (3,) on meta)"


def test_records_of_the_benchmark_are_a_table(tmp_path: Path) -> None:
    grid = bench.Grid("gaussian", sampler=["euler", "heun"], steps=[3, 5], count=2)
    records = bench.run(grid, tmp_path)
    assert isinstance(bench.load(tmp_path), Records) and records == list(records)
    assert repr(records).startswith(
        "Records(4 records; model gaussian; method unsample; sampler euler, heun; steps 3, 5)"
    )
    html = records._repr_html_()
    ET.fromstring(html)
    values = [record["metrics"]["nmse_db"] for record in records]
    assert all(f"<td>{np.median(value):.1f}</td>" in html for value in values)
    failed = Records([records[0] | {"error": "ValueError: <b>"}])
    assert "1 records; 1 failed" in repr(failed) and "&lt;b&gt;" in failed._repr_html_()


def test_damaged_results_are_named_and_no_error() -> None:
    broken = object.__new__(ki.Inversion)
    assert "Inversion that cannot be shown" in repr(broken)
    assert "not shown whole" in broken._repr_html_()


def test_what_stands_in_a_card_is_escaped() -> None:
    assert "<b>" not in card("x", "<b>").removeprefix("<div class='kinvert'>").split("</style><b>x</b>")[1]


def test_registries_are_dictionaries() -> None:
    table = Registry({"a": 1}, what="things", place="ki.THINGS")
    assert table == {"a": 1} and {**table} == {"a": 1}
    assert repr(table) == "ki.THINGS, 1 things: a" and "<td>a</td>" in table._repr_html_()
    assert ki.SAMPLERS._repr_html_().count("<tr>") == len(ki.SAMPLERS) + 1


def test_pictures_say_what_they_leave_out() -> None:
    assert pictures(torch.zeros(2, 4, 4, 4)).note() == "black -1, white 1; the first 3 of 4 channels as colours"
    assert pictures(torch.zeros(2, 2, 4, 4)).notes == ("the mean of 2 channels",)
    assert pictures(torch.zeros(9, 1, 4, 4)).notes == ("8 of 9 samples",)
    assert pictures(torch.full((1, 1, 2, 2), 3.0)).limit == 5.0
    assert pictures(torch.full((1, 1, 2, 2), 1.1)).limit == 1.0
    broken = pictures(torch.full((1, 1, 2, 2), math.inf))
    assert (broken.pixels == (255, 0, 255)).all() and broken.notes == ("values that are not finite in pink",)
    assert "no pictures: the shape (3, 2)" in thumbnails("points", torch.zeros(3, 2))


def test_a_png_is_what_a_reader_of_pictures_reads() -> None:
    image = pytest.importorskip("PIL.Image")
    for channels in (1, 3):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
        got = np.asarray(image.open(io.BytesIO(png(pixels)))).reshape(pixels.shape)
        np.testing.assert_array_equal(got, pixels)


def test_a_curve_has_its_values_and_gaps() -> None:
    svg = ET.fromstring(curve([1.0, 0.0, 10.0, 100.0], ["a", "b", "c", "d"], limit=10.0))
    assert [title.text for title in svg.iter("title")] == ["a: 1", "c: 10", "d: 100"]
    heights = [float(dot.attrib["cy"]) for dot in svg.iter("circle")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert len(list(svg.iter("polyline"))) == 2
    assert "no positive number" in curve([0.0, math.nan], ["a", "b"])


@pytest.mark.parametrize(("value", "scale"), [(0.3, 0.5), (1.0, 1.0), (7.0, 10.0), (0.0, 1.0), (math.inf, 1.0)])
def test_scales_can_be_read(value: float, scale: float) -> None:
    assert round_up(value) == pytest.approx(scale)
