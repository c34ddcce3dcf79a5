"""Notebooks of the documentation: executed here, and shown as pages.

`python docs/notebooks.py` runs the notebooks in `docs/notebooks` and writes their outputs into them; names of files
choose some. MkDocs calls `on_files`, which makes a page of each. Jupyter is not needed for either. In Jupyter the
notebooks run as they are.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "notebooks"


def run(notebook: dict[str, Any], name: str) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Run the code cells in one namespace and yield each with its outputs: what it prints, and its last expression."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(line for line in cell["source"] if not line.startswith("%")))  # magics are Jupyter's
        shown = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        where, value = f"{name}, cell {number}", None
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            exec(compile(tree, where, "exec"), namespace)
            if shown:
                value = eval(compile(ast.Expression(shown.value), where, "eval"), namespace)
        outputs = []
        if text := stdout.getvalue():
            outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
        if value is not None:
            outputs.append({"output_type": "display_data", "metadata": {}, "data": represent(value)})
        yield cell, outputs


def represent(value: Any) -> dict[str, Any]:
    """Return what a notebook keeps of a value: a figure as PNG, anything else as text, and as HTML if it has that."""
    if hasattr(value, "savefig"):
        file = io.BytesIO()
        value.savefig(file, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
        return {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": ["<Figure>"]}
    data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
    if hasattr(value, "_repr_html_"):
        data["text/html"] = value._repr_html_().splitlines(keepends=True)
    return data


def execute(path: Path) -> None:
    """Run a notebook and write its outputs into it."""
    notebook = json.loads(path.read_text())
    for count, (cell, outputs) in enumerate(run(notebook, path.name), 1):
        cell["execution_count"], cell["outputs"] = count, outputs
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def markdown(path: Path) -> str:
    """Return a notebook as the text of a page."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source.removeprefix('%matplotlib inline').strip()}\n```")
        parts += [shown(output) for output in cell["outputs"]]
    download = f"This page is a [notebook]({path.name}){{download}}. Its cells run in the order in which they stand."
    return "\n\n".join([parts[0], download, *parts[1:]]) + "\n"


def shown(output: dict[str, Any]) -> str:
    """Return an output of a cell as Markdown."""
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="The figure that the cell above draws" src="data:image/png;base64,{data["image/png"]}">'
    if "text/html" in data:
        return f'<div class="output">\n{"".join(data["text/html"]).strip()}\n</div>'
    return f"```text\n{''.join(data.get('text/plain', output.get('text', ''))).rstrip()}\n```"


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add a page for each notebook. Called by MkDocs."""
    from mkdocs.structure.files import File

    for path in sorted(FOLDER.glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=markdown(path)))
    return files


def on_page_markdown(text: str, **_: Any) -> str:
    """Let links to notebooks lead to their pages. Called by MkDocs with the text of every page."""
    return text.replace(".ipynb)", ".md)").replace(".md){download}", ".ipynb){download}")


if __name__ == "__main__":
    for chosen in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        execute(chosen)
