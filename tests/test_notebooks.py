"""The notebooks of the documentation are executed, and what they print is what is committed."""

from __future__ import annotations

import importlib.util
import json
import re
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("docs_notebooks", ROOT / "docs" / "notebooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(outputs: list[dict[str, Any]]) -> list[str]:
    """What outputs say, without the numbers, which depend on the machine, and which of them are figures."""
    texts = ("".join(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in outputs)
    return [re.sub(r"[-+]?\d[\d.]*(e[-+]?\d+)?", "#", text) for text in texts]


@each
def test_was_executed(path: Path) -> None:
    """Every cell ran, in order, and the file is what the script writes."""
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"])
    assert path.read_text() == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    assert path.stat().st_size < 500_000


@each
def test_links_resolve(path: Path) -> None:
    text = "\n".join(
        "".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown"
    )
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    assert targets and all((path.parent / target).exists() for target in targets)


@pytest.mark.slow
@each
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for cell, outputs in script().run(json.loads(path.read_text()), path.name):
        assert words(outputs) == words(cell["outputs"]), "".join(cell["source"])


def test_outputs_of_a_cell(tmp_path: Path) -> None:
    """Prints come first, then the last expression; None and statements show nothing. The page has the same."""
    sources = ["a = 2\nprint('once')\na + 1", "a", "None", "b = a"]
    cells = [{"cell_type": "markdown", "source": ["# Title"]}]
    cells += [{"cell_type": "code", "source": source.splitlines(keepends=True)} for source in sources]
    path = tmp_path / "small.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    module = script()
    module.execute(path)
    written = json.loads(path.read_text())["cells"]
    assert [words(cell["outputs"]) for cell in written[1:]] == [["once\n", "#"], ["#"], [], []]
    page = module.markdown(path)
    assert page.startswith("# Title\n") and "```text\n3\n```" in page and "[notebook](small.ipynb){download}" in page


def test_html_and_figures_are_shown() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    class Shown:
        def _repr_html_(self) -> str:
            return "<b>bold</b>"

    module = script()
    figure = {"data": module.represent(Figure(figsize=(1, 1)))}
    assert 'src="data:image/png;base64,' in module.shown(figure)
    assert module.shown({"data": module.represent(Shown())}) == '<div class="output">\n<b>bold</b>\n</div>'


def test_links_to_notebooks_lead_to_their_pages() -> None:
    text = "[a](notebooks/first.ipynb), [b](first.ipynb){download}"
    assert script().on_page_markdown(text) == "[a](notebooks/first.md), [b](first.ipynb){download}"
