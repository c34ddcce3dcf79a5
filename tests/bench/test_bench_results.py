"""Files of results: written, read, merged, compared, and refused if they are damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from cells import SMALL, cells

from kinvert import bench
from kinvert.bench import Cell, report
from kinvert.files import write_file
from kinvert.jsontext import canonical_json, content_key


def test_infinite_numbers_survive_a_result_file(tmp_path: Path) -> None:
    text = canonical_json({"a": [math.inf, -math.inf, math.nan, 1.0], "b": {"c": math.inf}})
    assert text == '{"a":["inf","-inf","nan",1.0],"b":{"c":"inf"}}'
    record = {
        "key": content_key({}),
        "cell": {},
        "metrics": {"psnr": [math.inf, -math.inf, 1.0], "ssim": [math.nan]},
    }
    write_file(tmp_path / f"{record['key']}.json", canonical_json(record).encode())
    (read,) = bench.load(tmp_path)
    assert read["metrics"]["psnr"] == [math.inf, -math.inf, 1.0] and math.isnan(read["metrics"]["ssim"][0])


@pytest.mark.parametrize("place", ["file", "cell", "key", "metrics"])
def test_record_of_another_cell_is_refused(place: str, tmp_path: Path) -> None:
    """A file under the name of another cell, an edited record and one cut short are not taken as a result."""
    two = cells(steps=[3, 4])
    records = {record["cell"]["steps"]: record for record in bench.run(two, tmp_path)}
    record = dict(records[4])
    if place == "cell":
        record["cell"] = record["cell"] | {"steps": 5}
    elif place == "key":
        record["key"] = records[3]["key"]
    elif place == "metrics":
        del record["metrics"]
    where = tmp_path / f"{records[3 if place == 'file' else 4]['key']}.json"
    where.write_text(canonical_json(record))
    for read in (lambda: bench.run(two, tmp_path), lambda: report.write([tmp_path], tmp_path / "report")):
        with pytest.raises(ValueError, match=rf"{where}.*delete it, and the same `kinvert bench` computes it again"):
            read()
    where.unlink()
    assert {record["cell"]["steps"] for record in bench.run(two, tmp_path)} == {3, 4}


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
    (record,) = bench.run(cells(), tmp_path)
    path = tmp_path / f"{record['key']}.json"
    for content in (b"", b"{", b"[]", b'{"key": 1, "cell": {}}', b"\xff"):
        path.write_bytes(content)
        for attempt in (lambda: bench.load(tmp_path), lambda: bench.run(cells(), tmp_path)):
            with pytest.raises(ValueError, match=rf"{path} is not a result.*delete it.*rm {path}"):
                attempt()
    (tmp_path / "results.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"results\.jsonl is not a result"):
        bench.load(tmp_path / "results.jsonl")


def test_compare(tmp_path: Path) -> None:
    bench.run(cells(steps=[2, 3, 4]), tmp_path / "a")
    bench.run(cells(steps=[2, 3]), tmp_path / "b")
    found = bench.compare(tmp_path / "a", tmp_path / "b")
    assert (found.equal, found.only_b, found.differences, found.versions) == (2, [], [], {})
    assert [cell["steps"] for cell in found.only_a] == [4] and not found.same
    key = Cell(**SMALL | {"steps": 3}).key
    path = tmp_path / "b" / f"{key}.json"
    record = json.loads(path.read_text())
    record["metrics"]["mse"][0] *= 1.001
    record["versions"]["torch"] = "0.1"
    path.write_text(json.dumps(record))
    found = bench.compare(tmp_path / "a", tmp_path / "b")
    (difference,) = found.differences
    assert (difference.what, difference.cell["steps"], found.equal) == ("mse", 3, 1)
    assert difference.b > difference.a and found.versions == {"torch": (torch.__version__, f"0.1, {torch.__version__}")}
    assert bench.compare(tmp_path / "a", tmp_path / "b", rtol=0.01).differences == []
    with pytest.raises(ValueError, match=r"different results for one cell.*kinvert bench compare"):
        bench.load(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="rtol must be"):
        bench.compare(tmp_path / "a", tmp_path / "b", rtol=-1.0)
