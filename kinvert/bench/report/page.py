"""Write a report of results: one HTML file that needs no network, and its figures and tables as files for a paper.

The page has a leaderboard to sort and filter, the figures of `kinvert.bench.report.figures`, the failures, and what was
measured with which versions. `write` needs matplotlib: `pip install 'kinvert[cli]'`.
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from kinvert.bench.grid import describe
from kinvert.bench.report import tables
from kinvert.bench.report.tables import COLUMNS, SETTINGS, Row, plain
from kinvert.bench.results import FIX, Record, check_record, load
from kinvert.files import write_file
from kinvert.jsontext import canonical_json
from kinvert.resultfiles import DATA, check_data, measured

__all__ = ["read", "render", "write"]

TITLE = "How reversible are samplers?"
PAGE = Path(__file__).parent / "page.html"


def write(source: Iterable[Record | Path | str], out: Path | str) -> Path:
    """Write `report.html`, and beside it `figures/*.svg`, `figures/*.png`, `leaderboard.md` and `leaderboard.tex`.

    Each file is complete or not there. The same records give the same files, up to the last digit of positions.

    Args:
        source: records, or places that `kinvert.bench.load` reads: folders of results and `results.jsonl` files.
        out: a folder, made if it is not there.

    Returns:
        The path of `report.html`.

    Raises:
        ValueError: no records; what `load` raises for a place without results or with damaged ones.
    """
    records = read(source)
    if not records:
        raise ValueError("there are no records to report; run `kinvert bench` first, and give its folder")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for path in (out / "leaderboard.md", out / "leaderboard.tex"):
        path.unlink(missing_ok=True)  # of other records
    images = _write_figures(records, out / "figures")
    if found := tables.rows(records):
        write_file(out / "leaderboard.md", tables.markdown(found).encode())
        write_file(out / "leaderboard.tex", tables.latex(found).encode())
    write_file(out / "report.html", render(records, images).encode())
    return out / "report.html"


def _write_figures(records: Sequence[Record], folder: Path) -> dict[str, bytes]:
    """Write all figures that the records allow, delete the others, and return the SVG images by name."""
    from kinvert.bench.report import figures  # here, because it needs matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    for name in figures.FIGURES:
        for kind in ("svg", "png"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)  # of other records
    images = {}
    for name in figures.FIGURES:
        try:
            figure = figures.draw(name, records)
        except figures.NothingToDrawError:
            continue
        images[name] = figures.encode(figure, "svg")
        write_file(folder / f"{name}.svg", images[name])
        write_file(folder / f"{name}.png", figures.encode(figure, "png"))
    return images


def read(source: Iterable[Record | Path | str]) -> list[Record]:
    """Collect records that are given directly or loaded from places, each cell once.

    The path of a record's images, if it has any, is under "arrays".

    Raises:
        ValueError: two different results for one cell; as `kinvert.bench.load`.
    """
    records: list[Record] = []
    for one in [source] if isinstance(source, (str, Path)) else source:
        if isinstance(one, dict):
            try:
                check_record(one)
            except ValueError as error:
                raise ValueError(f"a record that was given is not as `measure` returns it: {error}") from error
            records.append(one)
            continue
        place = Path(one)
        for record in load(place):
            path = (place if place.is_dir() else place.parent) / f"{record['key']}.safetensors"
            records.append(_with_arrays(record, path))
    found: dict[str, Record] = {}
    for record in records:
        cell = json.dumps(record["cell"], sort_keys=True)
        if cell in found and _bare(found[cell]) != _bare(record):
            raise ValueError(
                f"there are different results for one cell, {describe(record['cell'])}; report one of them, or "
                "see `kinvert bench compare`"
            )
        found[cell] = record
    return list(found.values())


def _with_arrays(record: Record, path: Path) -> Record:
    """Add the path of a record's images, if they are there."""
    if record.get(DATA, {}) is None or not path.exists():
        return record
    try:
        check_data(path, record)
    except ValueError as error:
        raise ValueError(f"the images of {path.with_suffix('.json')} are damaged: {error}; {FIX}") from error
    return record | {"arrays": str(path)}


def _bare(record: Record) -> str:
    return canonical_json({key: value for key, value in measured(record).items() if key != "arrays"})


def render(records: Sequence[Record], images: dict[str, bytes]) -> str:
    """Return the HTML page.

    Args:
        records: what to report.
        images: SVG figures by name.
    """
    found = tables.rows(records)
    models = sorted({record["cell"]["model"] for record in records})
    samples = sum(int(row.values["samples"]) for row in found)
    summary = f"{len(records)} cells, {samples} samples; {_count(len(models), 'model')}: {', '.join(models)}."
    return Template(PAGE.read_text()).substitute(
        title=escape(TITLE),
        summary=escape(summary),
        filters="\n".join(_filter(name, column, found) for column, name in enumerate(_varied(found))),
        board=_board(found),
        figures="\n".join(_figure(name, image) for name, image in images.items()) or "<p>There is nothing to draw.</p>",
        failures=_failures(records),
        measured=_measured(records),
    )


# -- parts -------------------------------------------------------------------------------------------------------------
NUMBERS = ("steps", "cfg")  # settings that sort as numbers


def _varied(found: Sequence[Row]) -> list[str]:
    """Return the settings in which rows differ."""
    return [name for name in SETTINGS if len({row.settings[name] for row in found}) > 1]


def _ordered(values: Iterable[Any]) -> list[Any]:
    return sorted(set(values), key=lambda value: (isinstance(value, str), value))


def _filter(name: str, column: int, found: Sequence[Row]) -> str:
    """Return a control that chooses one value of a setting, or all."""
    values = map(plain, _ordered(row.settings[name] for row in found))
    options = "".join(f'<option value="{escape(value)}">{escape(value)}</option>' for value in values)
    select = f'<select name="{name}" data-column="{column}"><option value="">all</option>{options}</select>'
    return f"<label>{name} {select}</label>"


def _board(found: Sequence[Row]) -> str:
    have = dict.fromkeys(name for row in found for name in row.values)
    numbers = [name for name in COLUMNS if name in have] + sorted(set(have) - set(COLUMNS))
    varied = _varied(found) or ["sampler"]

    def heading(name: str) -> str:
        number = name not in SETTINGS or name in NUMBERS
        classes = " ".join(["number"] * number + ["extra"] * (name not in COLUMNS and name not in SETTINGS))
        title = name if name in SETTINGS else tables.column(name).title
        kind = "number" if number else "text"
        return (
            f'<th scope="col" class="{classes}" data-kind="{kind}"><button type="button">{escape(title)}</button></th>'
        )

    def line(row: Row) -> str:
        words = escape(" ".join(plain(value) for value in row.settings.values()).lower())
        settings = "".join(_setting(name, plain(row.settings[name])) for name in varied)
        values = "".join(_number(row.values.get(name), name) for name in numbers)
        return f'<tr data-text="{words}">{settings}{values}</tr>'

    head = "".join(map(heading, (*varied, *numbers)))
    return f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(map(line, found)) + "\n</tbody>"


def _setting(name: str, value: str) -> str:
    classes = ' class="number"' if name in NUMBERS else ""
    return f'<td{classes} data-value="{escape(value)}">{escape(value)}</td>'


def _number(value: float | None, name: str) -> str:
    classes = "number" if name in COLUMNS else "number extra"
    sortable = "NaN" if value is None or math.isnan(value) else repr(value).replace("inf", "Infinity")
    return f'<td class="{classes}" data-value="{sortable}">{escape(tables.text(value, tables.column(name).spec))}</td>'


def _figure(name: str, image: bytes) -> str:
    from kinvert.bench.report import figures

    title = name.replace("-", " ").capitalize()
    caption = (figures.FIGURES[name].__doc__ or "").strip().split("\n\n")[0]
    data = base64.b64encode(image).decode()
    return (
        f'<figure id="{escape(name)}"><h3>{escape(title)}</h3>'
        f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(f"{title}: {caption}")}">'
        f"<figcaption>{escape(caption)} Files: figures/{escape(name)}.svg, .png.</figcaption></figure>"
    )


def _failures(records: Sequence[Record]) -> str:
    failed = [(record, record["error"]) for record in records if record["error"] is not None]
    stalled = [
        (record, f"{record['converged'].count(False)} of {len(record['converged'])} samples did not converge")
        for record in records
        if record["converged"] and not all(record["converged"])
    ]
    if not failed and not stalled:
        return "<p>Every cell was measured, and every inversion that claims to be exact converged.</p>"
    summary = f"{_count(len(failed), 'cell')} could not be measured; in {len(stalled)} some samples did not converge."
    head = "".join(f'<th scope="col">{name}</th>' for name in (*SETTINGS, "what happened"))
    lines = [_failure(record, message) for record, message in failed + stalled]
    return (
        f'<p>{summary}</p><div class="scroll" tabindex="0" role="region" aria-label="Failures"><table class="plain">'
        f"<thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
    )


def _failure(record: Record, message: str) -> str:
    settings = "".join(f"<td>{escape(plain(value))}</td>" for value in tables.settings(record).values())
    return f'<tr>{settings}<td class="wrap">{escape(message)}</td></tr>'


def _measured(records: Sequence[Record]) -> str:
    """List the values of every setting, and the versions, with a warning if they differ."""
    cells = [{**record["cell"], **tables.settings(record)} for record in records]
    values = {name: _ordered(cell[name] for cell in cells) for name in (*SETTINGS, "seed", "count")}
    grid = "".join(
        f'<tr><th scope="row">{name}</th><td class="wrap">{escape(", ".join(map(plain, found)))}</td></tr>'
        for name, found in values.items()
    )
    builds = Counter(", ".join(f"{name} {value}" for name, value in sorted(r["versions"].items())) for r in records)
    lines = "".join(f"<li>{escape(words)} ({_count(number, 'cell')})</li>" for words, number in builds.most_common())
    warning = "<p>Not all cells were measured with the same versions.</p>" if len(builds) > 1 else ""
    return f"<table>{grid}</table>\n<h3>Versions</h3>{warning}<ul>{lines}</ul>"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
