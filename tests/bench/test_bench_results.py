"""Files of results: written, read, merged, compared, and refused if they are damaged."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import SMALL, cells, measured, rewrite

from kinvert import bench
from kinvert.bench import Cell, report
from kinvert.bench.results import merge
from kinvert.files import write_file
from kinvert.jsontext import canonical_json


def test_infinite_numbers_survive_a_result_file(tmp_path: Path) -> None:
    text = canonical_json({"a": [math.inf, -math.inf, math.nan, 1.0], "b": {"c": math.inf}})
    assert text == '{"a":["inf","-inf","nan",1.0],"b":{"c":"inf"}}'
    record = measured(count=3) | {"metrics": {"psnr": [math.inf, -math.inf, 1.0], "ssim": [math.nan] * 3}}
    write_file(tmp_path / f"{record['key']}.json", canonical_json(record).encode())
    (read,) = bench.load(tmp_path)
    assert read["metrics"]["psnr"] == [math.inf, -math.inf, 1.0] and math.isnan(read["metrics"]["ssim"][0])


def as_text(change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda path: path.write_text(change(path.read_text()))


def edited(change: Callable[[dict[str, Any]], object], seal: bool = True) -> Callable[[Path], object]:
    return lambda path: rewrite(path, change, seal)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": as_text(lambda text: text[: len(text) // 2]),
    "no JSON": lambda path: path.write_bytes(b"\xff"),
    "a list": lambda path: path.write_text("[]"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "another cell": edited(lambda record: record["cell"].update(steps=9)),
    "another key": edited(lambda record: record.update(key="0" * 16)),
    "another cell and its key": edited(lambda record: record.update(measured(steps=9))),
    "no metrics": edited(lambda record: record.pop("metrics")),
    "no settings": edited(lambda record: record["cell"].clear()),
    "edited versions": edited(lambda record: record["versions"].update(torch="0.1"), seal=False),
    "an edited number": edited(lambda record: record["metrics"]["mse"].__setitem__(0, 1e-9), seal=False),
    "NaN": as_text(lambda text: re.sub(r'"mse":\[[^,]*', '"mse":[NaN', text)),
    "nan": as_text(lambda text: re.sub(r'"mse":\[[^,]*', '"mse":["nan"', text)),
    "fewer numbers": edited(lambda record: record["metrics"]["mse"].pop()),
    "fewer evaluations": edited(lambda record: record["sampling_evaluations"].pop()),
    "half a curve": edited(lambda record: record["trajectory"]["error"].pop()),
    "half a histogram": edited(lambda record: record["latent"]["histogram"]["counts"].pop()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_set_aside_and_its_cell_computed_again(damage: str, tmp_path: Path) -> None:
    two = cells(steps=[3, 4])
    first = bench.run(two, tmp_path)
    path, other = (tmp_path / f"{record['key']}.json" for record in first)
    whole, before = path.read_bytes(), other.stat().st_mtime_ns
    DAMAGE[damage](path)
    for read in (lambda: bench.load(tmp_path), lambda: report.write([tmp_path], tmp_path / "report")):
        with pytest.raises(ValueError, match=f"{path} is no result of its cell, .*`kinvert bench`.* computes it again"):
            read()
    with pytest.warns(RuntimeWarning, match=rf"(?s)1 damaged result is set aside, and computed again.*{path}\.damaged"):
        assert bench.run(two, tmp_path) == first
    assert path.read_bytes() == whole and other.stat().st_mtime_ns == before
    assert path.with_name(path.name + ".damaged").exists()
    assert bench.run(two, tmp_path) == first  # without a warning


def test_a_damaged_record_of_another_grid_is_set_aside(tmp_path: Path) -> None:
    (old,), new = bench.run(cells(steps=3), tmp_path), cells(steps=4)
    (tmp_path / f"{old['key']}.json").write_text("{")
    with pytest.warns(RuntimeWarning, match="the command that measured them computes them again"):
        assert len(bench.run(new, tmp_path)) == 1
    assert len(bench.load(tmp_path / "results.jsonl")) == 1


@pytest.mark.parametrize("damage", ["gone", "cut short", "other bytes"])
def test_damaged_arrays_are_measured_again(damage: str, tmp_path: Path) -> None:
    cell = [Cell("digits", steps=2, count=2, dtype="float32")]
    (record,) = bench.run(cell, tmp_path)
    path = tmp_path / f"{record['key']}.safetensors"
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[:-100] + (b"" if damage == "cut short" else bytes(100)))
        with pytest.raises(ValueError, match=rf"the images of .*\.json are damaged: {path.name} has .* were written"):
            report.write([tmp_path], tmp_path / "report")
    with pytest.warns(RuntimeWarning, match=rf"computed again.*\n.*{path.name} (is gone|has)"):
        assert bench.run(cell, tmp_path) == [record]
    assert path.read_bytes() == whole


def test_records_without_checksums_are_read(tmp_path: Path) -> None:
    """As kinvert 0.1.0 wrote them."""
    (record,) = bench.run([Cell("digits", steps=2, count=2, dtype="float32")], tmp_path)
    path = tmp_path / f"{record['key']}.json"
    rewrite(path, lambda record: [record.pop(name) for name in ("data", "sha256")], seal=False)
    (old,) = bench.run([Cell("digits", steps=2, count=2, dtype="float32")], tmp_path)
    assert old == {name: value for name, value in record.items() if name not in ("data", "sha256")}
    path.with_suffix(".safetensors").write_bytes(path.with_suffix(".safetensors").read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match=r"safetensors is damaged or cut off"):
        assert bench.run([Cell("digits", steps=2, count=2, dtype="float32")], tmp_path) == [record]


def test_load_returns_what_was_measured(tmp_path: Path) -> None:
    found = bench.run(cells(method=["invert", "extract_noise"], sampler=["euler", "euler_ancestral"]), tmp_path)
    assert [record["key"] for record in found] == sorted(record["key"] for record in found)
    assert bench.load(tmp_path) == bench.load(tmp_path / "results.jsonl") == found
    assert bench.load(tmp_path, tmp_path / "results.jsonl") == found
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert lines == [(tmp_path / f"{record['key']}.json").read_text().strip() for record in found]


def test_merging_is_copying_files(tmp_path: Path) -> None:
    a, b = cells(steps=[2, 3]), cells(steps=[3, 4])
    bench.run(a, tmp_path / "a")
    bench.run(b, tmp_path / "b")
    assert len(bench.load(tmp_path / "a", tmp_path / "b")) == 3
    for path in (tmp_path / "b").glob("*.json"):
        path.rename(tmp_path / "a" / path.name)
    assert bench.load(tmp_path / "a") == bench.run([*a, *b], tmp_path / "c")


def test_damaged_and_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there are no results at .*nowhere.*run `kinvert bench"):
        bench.load(tmp_path / "nowhere")
    (tmp_path / "results.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"line 1 of .*results\.jsonl is no result"):
        bench.load(tmp_path / "results.jsonl")


def test_compare(tmp_path: Path) -> None:
    bench.run(cells(steps=[2, 3, 4]), tmp_path / "a")
    bench.run(cells(steps=[2, 3]), tmp_path / "b")
    found = bench.compare(tmp_path / "a", tmp_path / "b")
    assert (found.equal, found.only_b, found.differences, found.versions) == (2, [], [], {})
    assert [cell["steps"] for cell in found.only_a] == [4] and not found.same
    key = Cell(**SMALL | {"steps": 3}).key
    path = tmp_path / "b" / f"{key}.json"

    def change(record: dict[str, Any]) -> None:
        record["metrics"]["mse"][0] *= 1.001
        record["versions"]["torch"] = "0.1"

    rewrite(path, change)
    found = bench.compare(tmp_path / "a", tmp_path / "b")
    (difference,) = found.differences
    assert (difference.what, difference.cell["steps"], found.equal) == ("mse", 3, 1)
    assert difference.b > difference.a and found.versions == {"torch": (torch.__version__, f"0.1, {torch.__version__}")}
    assert bench.compare(tmp_path / "a", tmp_path / "b", rtol=0.01).differences == []
    with pytest.raises(ValueError, match=r"different results for one cell.*kinvert bench compare"):
        bench.load(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="rtol must be"):
        bench.compare(tmp_path / "a", tmp_path / "b", rtol=-1.0)


def test_nothing_is_merged_if_a_record_turns_out_to_be_damaged(tmp_path: Path) -> None:
    (record,) = bench.run(cells(), tmp_path)
    (tmp_path / "results.jsonl").unlink()
    assert merge(tmp_path, [record["key"]]) and (tmp_path / "results.jsonl").exists()
    (tmp_path / "results.jsonl").unlink()
    (tmp_path / f"{record['key']}.json").write_text("{")
    with pytest.warns(RuntimeWarning, match="1 damaged result is set aside"):
        assert not merge(tmp_path, [record["key"]])
    assert not (tmp_path / "results.jsonl").exists()
