"""The script that puts faults into the package: which faults, where, which tests, and what it says of them."""

from __future__ import annotations

import ast
import contextlib
import json
from pathlib import Path

import mutants
import pytest
from faults import ROOT, Mutant, all_mutants, key_of, mutants_of
from testlines import Lines, digest

SOURCE = '''"""A docstring with 1 < 2."""

__all__ = ["f"]
LIMIT: int = 3


@cached(maxsize=5)
def f(x: "int | 7", *, low: float = 0.5) -> "8 + 1":
    """Return 4 + 4."""
    if x < low and not LIMIT:
        raise ValueError(f"{x + 1} is below", 9)
    x = round(x, 2)
    x += 1
    names = "a" + str(x)
    g(names, -x)
    return x ** 2 if x is None else x * 2.5
'''


def test_faults_of_a_source() -> None:
    found = {mutant.change for mutant in mutants_of("kinvert/f.py", SOURCE)}
    assert found == {
        *("3 -> (4)", "0.5 -> (1.0)", "2 -> (3)", "1 -> (2)", "2.5 -> (5.0)"),
        *("x < low -> (x <= low)", "x is None -> (x is not None)"),
        *("x < low and not LIMIT -> (x < low or not LIMIT)", "not LIMIT -> (LIMIT)", "-x -> (x)"),
        *("x ** 2 -> (x * 2)", "x * 2.5 -> (x / 2.5)", "x ** 2 if x is None else x * 2.5 -> (x * 2.5 if x is None else x ** 2)"),
        *("g(names, -x) -> (g(-x, names))", "round(x, 2) -> (round(2, x))"),
        *("g(names, -x) -> pass", "x = round(x, 2) -> pass", "x += 1 -> pass"),
        *('raise ValueError(f"{x + 1} is below", 9) -> pass', "return x ** 2 if x is None else x * 2.5 -> return None"),
    }  # fmt: skip


def test_faults_change_one_place_and_keep_the_rest() -> None:
    for mutant in mutants_of("kinvert/f.py", SOURCE):
        raw = SOURCE.encode()
        text = (raw[: mutant.start] + mutant.new.encode() + raw[mutant.end :]).decode()
        ast.parse(text)
        assert ast.unparse(ast.parse(text)) != ast.unparse(ast.parse(SOURCE)), mutant
        assert SOURCE.splitlines()[mutant.line - 1].strip() == mutant.text


def test_every_file_of_the_package_has_faults_that_compile() -> None:
    everything = all_mutants()
    assert len({mutant.key for mutant in everything}) == len(everything) > 10_000
    for mutant in sorted(everything, key=lambda mutant: mutant.rank(1))[:100]:
        raw = (ROOT / mutant.file).read_bytes()
        compile(raw[: mutant.start] + mutant.new.encode() + raw[mutant.end :], mutant.file, "exec")


def test_the_choice_does_not_move_with_edits_elsewhere() -> None:
    def chosen(source: str) -> list[str]:
        return [m.key for m in sorted(mutants_of("kinvert/f.py", source), key=lambda m: m.rank(0))]

    assert chosen("\n\n" + SOURCE) == chosen(SOURCE)
    assert sorted(chosen(SOURCE)) != chosen(SOURCE)


@pytest.mark.parametrize(
    ("file", "first"),
    [
        ("kinvert/plan.py", "tests/test_plan.py"),
        ("kinvert/engine/kernels.py", "tests/engine/test_kernels.py"),
        ("kinvert/bench/problems.py", "tests/bench/test_problems.py"),
        ("kinvert/bench/methods.py", "tests/bench/test_bench_methods.py"),
        ("kinvert/cli/doctor.py", "tests/cli/test_doctor.py"),
    ],
)
def test_the_nearest_tests_come_first(file: str, first: str) -> None:
    chosen = mutants.tests_for(file)
    assert chosen[0] == first and "tests/test_laws.py" in chosen and len(set(chosen)) == len(chosen)


def test_files_that_alone_name_a_function_are_near() -> None:
    lines = (ROOT / "kinvert" / "plan.py").read_text().splitlines()
    line = 2 + next(i for i, text in enumerate(lines) if text.startswith("def plan_size"))
    near = mutants.tests_for("kinvert/plan.py", line)
    assert set(near[:3]) == {"tests/test_plan.py", "tests/test_caches.py", "tests/test_mutants.py"}


PACKAGE = """
LIMIT = 3
OTHER = 4

def f(x, low=1):
    y = max(
        x,
        low,
    )
    if y > LIMIT:
        return low
    return y
"""


def recorded(root: Path) -> Path:
    """A package, a file of tests, and the record of three tests of it."""
    for name, text in (("kinvert/a.py", PACKAGE), ("tests/test_a.py", "")):
        (root / name).parent.mkdir()
        (root / name).write_text(text)
    lines = {"y = max(": "7", "x,": "1", "if y > LIMIT:": "7", "return low": "4", "return y": "3"}
    tests = [["tests/test_a.py::one", 0.5], ["tests/test_a.py::two[1]", 0.1], ["tests/test_a.py::two[2]", 0.2]]
    record = {"digest": digest(root / "tests/test_a.py"), "tests": tests, "lines": {"kinvert/a.py": lines}}
    (root / "kept").mkdir()
    (root / "kept" / "tests+test_a.py.json").write_text(json.dumps(record))
    return root / "kept"


def test_the_tests_of_a_line_are_those_that_execute_its_statement(tmp_path: Path) -> None:
    lines = Lines(tmp_path, recorded(tmp_path))

    def names(text: str) -> list[str]:
        line = 1 + [text in line for line in PACKAGE.splitlines()].index(True)
        return [test.partition("::")[2] for test in lines.tests_of("kinvert/a.py", line)]

    every = ["one", "two[1]", "two[2]"]
    assert names("low,") == names("if y") == every and names("return low") == ["two[2]"]
    assert names("def f") == every  # the default is used in the body
    assert names("LIMIT =") == every and names("OTHER =") == []
    assert lines.tests_of("kinvert/a.py", 1) == []
    (tmp_path / "tests" / "test_a.py").write_text("# another file")
    assert Lines(tmp_path, tmp_path / "kept").tests_of("kinvert/a.py", 6) == []


def test_the_first_tests_are_the_quickest_of_each_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = object.__new__(mutants.Judge)
    judge.limit, judge.base, judge.lines = 240.0, tmp_path, Lines(tmp_path, recorded(tmp_path))
    monkeypatch.setattr(mutants, "QUICK", 2.4)  # for each file a quarter of it
    (quick, _), (rest, _), (near, last) = judge.rounds(Mutant("kinvert/a.py", 6, "", "", 0, 0, 0, ""))
    assert [test[17:] for test in quick] == ["two[1]", "one"] and [test[17:] for test in rest] == ["two[2]"]
    assert near == ["tests/test_a.py"] and last == 60.0
    *_, (near, last) = judge.rounds(Mutant("kinvert/a.py", 3, "", "", 0, 0, 0, ""))
    assert near and last == 240.0  # nothing was recorded


@pytest.mark.slow
def test_tests_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("coverage")
    monkeypatch.setattr(mutants, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(mutants, "_texts", lambda root: {root / "tests" / "test_forms.py": frozenset({"Form"})})
    (tmp_path / "work").mkdir()
    with contextlib.closing(mutants.Judge(60.0, tmp_path / "work")) as judge:
        judge.record([])
    source = (ROOT / "kinvert" / "forms.py").read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(source) if "def __add__" in text)
    assert judge.lines.files == ["tests/test_forms.py"] and judge.lines.tests_of("kinvert/forms.py", line)


@pytest.mark.slow
def test_a_fault_is_killed_and_a_change_of_nothing_survives(tmp_path: Path) -> None:
    source = (ROOT / "kinvert" / "flowtimes.py").read_text()
    fault = next(m for m in mutants_of("kinvert/flowtimes.py", source) if m.new.startswith("return None"))
    end = len(source.encode())
    nothing = Mutant("kinvert/flowtimes.py", 1, "", "", 0, end, end, "\n# nothing\n")
    with contextlib.closing(mutants.Judge(400, tmp_path)) as judge:
        assert judge.judge(fault)["result"] == "killed"
        row = judge.judge(nothing)
    assert row["result"] == "survived" and row["passed"]


# -- what is committed -------------------------------------------------------------------------------------------------
def test_the_list_of_equivalent_faults_is_about_lines_that_are_there() -> None:
    known = {mutant.key for mutant in all_mutants()}
    listed = mutants.equivalent()
    assert listed.keys() <= known, sorted(listed.keys() - known)
    assert all(len(reason.split()) > 4 for reason in listed.values())


def test_the_results_count_their_rows() -> None:
    found = json.loads(Path(mutants.RESULT).read_text())
    results = [row["result"] for row in found["rows"]]
    assert found["counts"] == {name: results.count(name) for name in sorted(set(results), key=results.index)}
    assert all(row["test"] for row in found["rows"] if row["result"] == "killed")
    listed = mutants.equivalent()
    assert {key_of(row) for row in found["rows"] if row["result"] == "equivalent"} <= listed.keys()
