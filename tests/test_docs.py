"""The documentation is tested: its code runs, its outputs are what is printed, its commands and links exist.

A ```python block runs after the blocks above it on its page, in one namespace, with warnings as errors. A ```text block
right below it is its output, to the letter. A fence with other words after the language, e.g. ```python notest, is left
alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import kinvert as ki
from kinvert.inversion import METHODS, ROUTES
from kinvert.inversion.baselines import BASELINES

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)

pages = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


class Block(NamedTuple):
    """A fenced block: what stands after the backticks, the line of its first line of code, and the code."""

    info: str
    line: int
    code: str
    output: str | None


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in FENCE.finditer(text):
        following = FENCE.match(text, match.end() + 2)
        output = following["code"] if following and following["info"] == "text" else None
        yield Block(match["info"], text.count("\n", 0, match.start()) + 2, match["code"], output)


def given(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the code of a page starts with: on the page on diffusers a small pipeline of each family, by its name.

    The same pipelines are in the folder of the page, saved by their names, with a photo.
    """
    if page != ROOT / "docs" / "diffusers.md":
        return {}
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(ROOT / "tests" / "adapters" / "diffusers")
    pipelines = importlib.import_module("pipelines")
    importlib.import_module("saved").save(folder)
    made = {family: pipelines.build(family) for family in pipelines.CALLS}
    return made | {"pipe": pipelines.build("sd15"), "call": pipelines.CALLS["sd15"]}


@pages
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = given(page, tmp_path, monkeypatch)
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    vars(module).update(start)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    registries: list[dict[str, Any]] = [ki.SAMPLERS, METHODS, BASELINES, *(route.methods for route in ROUTES)]
    registered = [dict(registry) for registry in registries]
    try:
        for block in blocks(page):
            if block.info != "python":
                continue
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(code, vars(module))
            if block.output is not None:
                assert stdout.getvalue().strip() == block.output.strip(), f"{page.name}, line {block.line}"
    finally:  # what a page registers is gone after it
        for registry, before in zip(registries, registered, strict=True):
            registry.clear()
            registry.update(before)


def commands(page: Path, program: str) -> set[str]:
    """The words that follow `program` in shell blocks and in inline code."""
    text = page.read_text()
    shell = "\n".join(match["code"] for match in FENCE.finditer(text) if match["info"] in ("bash", "sh", "shell"))
    inline = "\n".join(re.findall(r"`([^`\n]+)`", FENCE.sub("", text)))
    return set(re.findall(rf"^{program} ([a-z][\w-]*)", f"{shell}\n{inline}", re.MULTILINE))


@pages
def test_commands_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert commands(page, "make") <= set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    if names := commands(page, "kinvert"):
        from kinvert.cli import main

        assert names <= set(main.commands)


def anchor(heading: str) -> str:
    """The id that a heading gets."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


@pages
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        path, _, fragment = target.partition("#")
        if re.match(r"https?:", target):
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target}: no such file"
        if fragment:
            text = hook().on_page_markdown(linked.read_text())
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{target}: no such heading"


EXAMPLES = {"two_thirds.py", "adams_two.py", "spectral.py", "midpoint_up.py"}
"""The files that CONTRIBUTING.md shows how to write."""


@pytest.mark.parametrize(
    "page", [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"], ids=lambda page: page.name
)
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`(?:python )?([\w/]+\.py)\b[^`]*`", FENCE.sub("", page.read_text())):
        found = any((root / name).exists() for root in (ROOT, ROOT / "kinvert", ROOT / "tests"))
        assert found or Path(name).name in EXAMPLES, name


def hook() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hook", ROOT / "docs" / "hook.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_long_lines_of_outputs_wrap_on_the_site() -> None:
    """Outputs of prose are marked, tables are not; a block that is not run is a block of Python."""
    short, long = f"```text\n{'a' * 100}\n```\n", f"```text\na\n{'b ' * 51}\n```\n"
    page = hook().on_page_markdown(f"{short}{long}```python notest\nx = 1\n```\n")
    assert page == short + long.replace("```text", "```{ .text .prose }", 1) + "```python\nx = 1\n```\n"


def test_every_sampler_and_schedule_is_listed() -> None:
    for page, names in (("samplers.md", ki.SAMPLERS), ("schedules.md", ki.SCHEDULES)):
        text = hook().on_page_markdown((ROOT / "docs" / page).read_text())
        for name in names:
            assert re.search(rf"^#+ .*`{name}`", text, re.MULTILINE), name
        assert "<!--" not in text


def test_the_table_of_inversions_is_what_was_measured() -> None:
    text = hook().on_page_markdown((ROOT / "docs" / "exact-inversion.md").read_text())
    assert "<!--" not in text
    for path in (ROOT / "benchmarks" / "results").glob("inversion-*.json"):
        for row in json.loads(path.read_text())["rows"]:
            if row["method"] == "auto":
                base, _, options = row["sampler"].partition(":")
                name = f"{base}({options})" if options else base
                cells = f"| `{name}` | {row['steps']} | {row['cfg']:g} | {row['converged']} of {row['samples']} |"
                assert cells in text, cells


def test_the_tables_of_choices_are_what_was_measured() -> None:
    text = hook().on_page_markdown((ROOT / "docs" / "choosing.md").read_text())
    assert "<!--" not in text
    trips = json.loads((ROOT / "benchmarks" / "results" / "round_trip.json").read_text())["samplers"]
    for name in hook().CHOICES:
        assert f"| `{name}` | {trips[name]['psnr']['20']:.0f} dB | {trips[name]['psnr']['50']:.0f} dB |" in text


def test_the_table_of_baselines_is_what_was_measured() -> None:
    text = hook().on_page_markdown((ROOT / "docs" / "baselines.md").read_text())
    assert "<!--" not in text
    for row in json.loads((ROOT / "benchmarks" / "results" / "baselines.json").read_text())["rows"]:
        line = next(line for line in text.splitlines()[::-1] if line.startswith(f"| `{row['baseline']}` |"))
        assert f" {row['median_error']:.1e} " in line


def test_the_table_of_diffusers_is_what_was_measured() -> None:
    text = hook().on_page_markdown((ROOT / "docs" / "diffusers.md").read_text())
    assert "<!--" not in text
    for row in json.loads((ROOT / "benchmarks" / "results" / "diffusers.json").read_text())["rows"]:
        assert f"| `{row['scheduler']}` | {row['options']} | {row['pipeline']}, {row['steps']} |" in text
        assert (row["difference"] > 1e-5) <= bool(row["reason"])


def test_the_table_of_flow_samplers_is_what_was_measured() -> None:
    text = hook().on_page_markdown((ROOT / "docs" / "flow-models.md").read_text())
    assert "<!--" not in text
    measured = json.loads((ROOT / "benchmarks" / "results" / "flow.json").read_text())["samplers"]
    for name, found in measured.items():
        line = re.search(rf"^\| `{name}` \|.*$", text, re.MULTILINE)
        assert line, name
        assert ("| - | - | - | - |" in line[0]) == ("refused" in found["up"])
        assert f"{found['down']['gaussian']['std']:.3f}" in line[0]


def test_the_tables_of_performance_are_what_was_measured() -> None:
    """And what was measured keeps the promises that can be counted."""
    text = hook().on_page_markdown((ROOT / "docs" / "performance.md").read_text())
    assert "<!--" not in text
    for path in (ROOT / "benchmarks" / "results").glob("overhead-*.json"):
        for row in json.loads(path.read_text())["rows"]:
            assert f"| `{row['sampler']}` | {row['who']} | {row['operations']:g} | {row['passes']:g} |" in text
            if row["who"] == "kinvert":
                assert row["passes"] <= 1.5 * row["least_passes"] and row["operations"] <= row["allowed_operations"]
                assert row["synchronisations"] == row["created"] == 0


def test_the_table_of_guidance_is_what_was_measured() -> None:
    text = (ROOT / "docs" / "guidance.md").read_text()
    for row in json.loads((ROOT / "benchmarks" / "results" / "guidance.json").read_text())["rows"]:
        inverted = f"{row['converged']} of {row['count']}"
        shown = f"| `{row['guidance']}` | {inverted} | {row['evaluations']:.1f} | {row['latent_std']:.2f} |"
        assert shown in text, row


def test_the_table_of_comfyui_is_what_was_measured() -> None:
    text = hook().on_page_markdown((ROOT / "docs" / "comfyui.md").read_text())
    assert "<!--" not in text
    for path in (ROOT / "benchmarks" / "results").glob("comfyui-*.json"):
        rows = json.loads(path.read_text())["rows"]
        assert all(row["value"] <= row["most"] for row in rows if row["most"] is not None)
        for check in {row["check"] for row in rows}:
            count = sum(row["check"] == check and row["most"] is not None for row in rows)
            assert re.search(rf"^\| {check.replace('_', ' ')} \|.*\b{count} of {count}\b", text, re.MULTILINE), check


def test_the_architecture_is_read_off_the_code() -> None:
    text = hook().on_page_markdown((ROOT / "docs" / "architecture.md").read_text())
    assert "<!--" not in text
    for route in ROUTES:
        assert f"| `{type(route).__name__}` |" in text
        for field in dataclasses.fields(route):  # type: ignore[arg-type]
            assert re.search(rf"^\| `[\w, ]*\b{field.name}\b[\w, ]*` \|", text, re.MULTILINE), field.name


def test_every_page_is_in_the_navigation() -> None:
    nav = set(re.findall(r"(?:: |- )(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    assert nav == {str(page.relative_to(ROOT / "docs")) for page in DOCS} | notebooks


@pytest.mark.slow
def test_the_table_of_the_readme_is_what_the_demo_measures() -> None:
    from kinvert import demo

    shown = re.findall(
        r"^\| `(\w+)`(?:, by `(invert)`[\w ,]*)? \| (\d+) \| (-?[\d.]+) \| ([\d.]+) \| (\d+) of 8 \|$",
        (ROOT / "README.md").read_text(),
        re.MULTILINE,
    )
    measured = demo.run(demo.Settings()).table()
    names = [(name, method or "unsample") for name, method, *_ in shown]
    assert names == [(row["sampler"], row["method"]) for row in measured]
    for (*_, evaluations, psnr, std, took), row in zip(shown, measured, strict=True):
        assert int(took) == row["edits_took"]
        # An exact inversion ends where rounding decides: its number of evaluations differs by a few.
        assert int(evaluations) == pytest.approx(row["evaluations"], rel=0.05 if row["method"] == "invert" else 0)
        assert float(psnr) == pytest.approx(row["psnr"], abs=5.0 if row["method"] == "invert" else 0.5)
        assert float(std) == pytest.approx(row["latent_std"], rel=0.05)
