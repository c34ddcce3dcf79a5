"""The scripts that run kinvert in other surroundings tell what differs, and the page shows what they found."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import kinvert as ki

ROOT = Path(__file__).parents[2]


def script(path: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


environments = script("benchmarks/environments.py")
versions = script("tests/versions.py")
RESULTS = ROOT / "benchmarks" / "results"


# -- conditions --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", environments.MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layouts_differ_and_values_do_not(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(environments.SHAPE, dtype=dtype)
    y = environments.MEMORY[name](x)
    assert torch.equal(x, y) and y.dtype == dtype
    assert (y.stride(), y.storage_offset()) != (x.stride(), x.storage_offset())


def test_every_condition_but_one_keeps_the_values_of_x() -> None:
    x = torch.randn(environments.SHAPE)
    for name, condition in environments.CONDITIONS.items():
        want = x[:1].expand(x.shape) if "equal_rows" in (name, condition.like) else x
        assert torch.equal(condition.given(x.clone()), want), name
        assert torch.equal(condition.returned(x.clone()), x), name
        assert environments.CONDITIONS[condition.like].given is environments.same or condition.like == "equal_rows"


def test_the_calls_are_of_every_sampler_and_verb() -> None:
    names = {name.partition(",")[0] for name in environments.calls(None)}
    verbs = {"sample", "unsample", "round_trip", "run", "invert", "extract_noise"}
    assert names == {f"{verb} {name}" for verb in verbs for name in ki.SAMPLERS}


# -- verdicts ----------------------------------------------------------------------------------------------------------
def outcome(call: Any, x: torch.Tensor | None = None) -> dict[str, Any]:
    return environments.outcome(call, torch.ones(2, 3) if x is None else x)


def refuse(message: str) -> Any:
    def call(x: torch.Tensor) -> None:
        raise ValueError(message)

    return call


def test_differences_between_conditions_are_reported() -> None:
    base = outcome(lambda x: x + 1)
    weight = torch.ones(1, requires_grad=True)
    for call, want in {
        (lambda x: x + 1 + 1e-6): [],
        (lambda x: x + 1.01): ["values"],
        (lambda x: x * torch.nan): ["values"],
        (lambda x: (x + 1)[:1]): ["values", "form"],
        (lambda x: (x + 1).double()): ["form"],
        (lambda x: x + weight): ["graph"],
        (lambda x: x.add_(1)): ["written"],
        refuse("no"): ["refused: ValueError: no"],
    }.items():
        assert environments.judge(base, outcome(call), "sample")[0] == want
    assert environments.judge(base, outcome(lambda x: x + weight), "run")[0] == []  # it keeps the graph, on purpose
    refused = outcome(refuse("no"))
    assert environments.judge(refused, outcome(refuse("no")), "sample")[0] == []
    assert environments.judge(refused, outcome(refuse("never")), "sample")[0] == ["refused: ValueError: never"]
    assert environments.judge(refused, base, "sample")[0] == ["refused: no more"]


def test_inversions_are_compared_by_verdict_and_cost() -> None:
    def found(**more: Any) -> dict[str, Any]:
        values = {"latent": torch.ones(2, 3), "converged": torch.tensor([True, True]), "evaluations": torch.ones(2)}
        return outcome(lambda x: types.SimpleNamespace(**values | more))

    judge = environments.judge
    assert judge(found(), found(), "invert") == ([], 0.0)
    assert judge(found(), found(converged=torch.tensor([True, False])), "invert")[0] == ["converged"]
    assert judge(found(), found(latent=torch.zeros(2, 3)), "invert") == (["values"], 1.0)
    assert judge(found(), found(evaluations=2 * torch.ones(2)), "invert")[0] == ["evaluations: 2 to 4"]


def test_a_hang_and_a_crash_are_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environments.start("again", tmp_path, 0.05) == {"end": "no end after 0.05 s, in the import"}
    monkeypatch.setitem(environments.CONDITIONS, "not in the child", environments.Condition("unknown there"))
    assert environments.start("not in the child", tmp_path, 300)["end"].startswith("exit status 2: ")


# -- versions ----------------------------------------------------------------------------------------------------------
def test_the_oldest_are_the_floors_of_pyproject() -> None:
    oldest, newest = (versions.requirements(kind) for kind in (True, False))
    assert {"torch==2.4", "click==8.2.1", "scipy==1.11.1", "pytest==8"} <= set(oldest)
    hosts = {"diffusers", "transformers", "accelerate"}  # which need a newer torch than kinvert does
    assert "torch>=2.4,<3" in newest and len(oldest) == len(newest) - len(hosts)
    assert all(any(text.startswith(name) for text in newest) for name in hosts)
    assert not any(name in text for text in oldest for name in ("kinvert", "ruff", "mypy"))


@pytest.mark.parametrize(
    ("last", "want"),
    [
        ("1 failed, 238 passed, 5 skipped in 157.44s (0:02:37)", {"failed": 1, "passed": 238, "skipped": 5}),
        ("2 skipped, 3 deselected in 0.12s", {"skipped": 2}),
        ("==== 1 error in 3.02s ====", {"error": 1}),
        ("3 errors in 3.02s", {"error": 3}),
        ("Killed", {}),
    ],
)
def test_counts_are_read_off_the_last_line(last: str, want: dict[str, int]) -> None:
    assert versions.counts(f"7 passed in 1.00s\n..F\n{last}" if last != "Killed" else last) == want


# -- the page ----------------------------------------------------------------------------------------------------------
def page() -> str:
    return str(script("docs/hook.py").on_page_markdown((ROOT / "docs" / "environments.md").read_text()))


def test_the_page_shows_what_was_found() -> None:
    """And nothing hung or crashed."""
    text, rows = page(), json.loads((RESULTS / "environments.json").read_text())["rows"]
    assert "<!--" not in text
    compared = {row["like"] for row in rows}  # other images are no condition, but what one is compared with
    for row in rows:
        if row["condition"] in compared - {"baseline"}:
            assert f"| `{row['condition']}` | {row['what']}: to compare with | - | - | ends |" in text
            continue
        line = next(line for line in text.splitlines() if line.startswith(f"| `{row['condition']}` |"))
        for dtype in ("float32", "float64"):
            differ = row[dtype]["differ"]
            assert (f"{differ} of {row[dtype]['calls']} (" if differ else "none (") in line
        assert line.endswith("| ends |")
    tried = [row["condition"] for row in rows]
    assert tried == [name for name in environments.CONDITIONS if name in tried]


def test_the_page_shows_where_the_tests_ran() -> None:
    text = page()
    for row in json.loads((RESULTS / "versions.json").read_text())["rows"]:
        assert f"| {row['kind']} | {row['versions']['python']} | {row['versions']['torch']} |" in text
        assert f"| {row['passed']} | {row['failed']} | {row['error']} | {row['skipped']} |" in text
        assert all(f"`{name}`" in text for name in row["failures"])
