"""The old names of the benchmark still answer, with a warning that says the new one."""

from __future__ import annotations

import importlib

import pytest

from kinvert import bench

MOVED = {
    ("kinvert.bench", "Job"): ("kinvert.bench.methods", "Setup"),
    ("kinvert.bench", "invert_folder"): ("kinvert.folder", "invert_folder"),
    ("kinvert.bench.methods", "Job"): ("kinvert.bench.methods", "Setup"),
    ("kinvert.bench.methods", "Found"): ("kinvert.bench.methods", "MethodResult"),
    ("kinvert.bench.editing", "edit"): ("kinvert.editing", "edit"),
    ("kinvert.bench.comparison", "Difference"): ("kinvert.bench.results", "Difference"),
    ("kinvert.bench.tables", "rows"): ("kinvert.bench.report.tables", "rows"),
    ("kinvert.bench.figures", "draw"): ("kinvert.bench.report.figures", "draw"),
}


@pytest.mark.parametrize(("old", "new"), MOVED.items(), ids=[".".join(old) for old in MOVED])
def test_old_names_answer_with_a_warning(old: tuple[str, str], new: tuple[str, str]) -> None:
    module = importlib.import_module(old[0])
    with pytest.warns(DeprecationWarning, match=rf"{old[0]}\S* is now {new[0]}") as caught:
        found = getattr(module, old[1])
    assert found is getattr(importlib.import_module(new[0]), new[1])
    ours = [warning for warning in caught if "kinvert" in str(warning.message)]  # old matplotlib gives its own
    assert [warning.filename for warning in ours] == [__file__]  # the line that uses the old name


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match=r"module 'kinvert\.bench' has no attribute 'jobs'"):
        _ = bench.jobs
