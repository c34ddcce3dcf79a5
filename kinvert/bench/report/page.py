"""Write a report of results: one HTML file that needs no network, and its figures and tables as files for a paper.

The page has a headline, a leaderboard to sort and filter, the figures of `kinvert.bench.report.figures`, the failures,
and what was measured with which versions. `write` needs matplotlib: `pip install 'kinvert[cli]'`.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from kinvert.bench.grid import describe
from kinvert.bench.report import tables
from kinvert.bench.report.headline import headline, summary
from kinvert.bench.report.overview import as_html, as_latex, as_markdown, overview
from kinvert.bench.report.rows import SETTINGS, Row, as_columns, choose, leaders, plain, rows, settings
from kinvert.bench.report.rows import top as top_rows
from kinvert.bench.results import FIX, Record, check_record, load
from kinvert.files import write_file
from kinvert.jsontext import canonical_json
from kinvert.plot.style import method_colours
from kinvert.resultfiles import DATA, check_data, measured

__all__ = ["read", "render", "write"]

TITLE = "How reversible are samplers?"
PAGE = Path(__file__).parent / "page.html"
SCALE = 8.1  # rem on the page for an inch of a figure


def write(
    source: Iterable[Record | Path | str],
    out: Path | str,
    *,
    columns: Sequence[str] | None = None,
    where: Mapping[str, str | Sequence[str]] | None = None,
    top: int | None = None,
) -> Path:
    """Write `report.html`, and beside it `figures/*.svg`, `figures/*.png`, `leaderboard.md` and `leaderboard.tex`.

    If more than round trips was asked for, `overview.md` and `overview.tex` compare methods at equal evaluations.

    Each file is complete or not there. The same records give the same files, up to the last digit of positions.
    `leaderboard.tex` fits a page: what does not fit is left out, and its first line says what.

    Args:
        source: records, or places that `kinvert.bench.load` reads: folders of results and `results.jsonl` files.
        out: a folder, made if it is not there.
        columns: the numbers of the leaderboard, names of metrics; by default those of `tables.COLUMNS`.
        where: settings that the records of the report must have, e.g. `{"model": "digits", "cfg": ["1", "3"]}`.
        top: how many rows of each model and question the leaderboard has, those with the lowest NMSE.

    Returns:
        The path of `report.html`.

    Raises:
        ValueError: no records; what `load` raises for a place without results or with damaged ones; a column, setting
            or value that no record has.
    """
    records = read(source)
    if not records:
        raise ValueError("there are no records to report; run `kinvert bench` first, and give its folder")
    records = choose(records, where or {})
    found = rows(records)
    shown = top_rows(found, top)
    numbers = as_columns(shown, columns)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("leaderboard.md", "leaderboard.tex", "overview.md", "overview.tex"):
        (out / name).unlink(missing_ok=True)  # of other records
    images = _write_figures(records, out / "figures")
    if shown:
        write_file(out / "leaderboard.md", tables.markdown(shown, numbers).encode())
        write_file(out / "leaderboard.tex", _fitting(shown, numbers).encode())
    if sheets := overview(found):
        write_file(out / "overview.md", as_markdown(sheets, found).encode())
        write_file(out / "overview.tex", as_latex(sheets, found).encode())
    write_file(out / "report.html", render(records, images, columns=columns, top=top).encode())
    return out / "report.html"


def _fitting(shown: Sequence[Row], numbers: Sequence[str]) -> str:
    """Return the LaTeX table of what fits a page, under a comment that says what was left out."""
    kept = tables.fitting_rows(shown)
    fitting = tables.fitting_columns(kept, numbers)
    left_out = [name for name in numbers if name not in fitting]
    words = []
    if len(kept) < len(shown):
        words.append(f"{len(shown) - len(kept)} of {len(shown)} rows, those with the highest NMSE")
    if left_out:
        words.append(f"the columns {', '.join(left_out)}")
    if not tables.fits(kept, fitting):
        return "% The settings alone are wider than a page: choose rows with --where.\n"
    comment = (
        f"% Left out to fit a page: {'; '.join(words)}. Choose with --where, --columns and --top.\n" if words else ""
    )
    return comment + tables.latex(kept, fitting)


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


def render(
    records: Sequence[Record],
    images: dict[str, bytes],
    *,
    columns: Sequence[str] | None = None,
    top: int | None = None,
) -> str:
    """Return the HTML page.

    Args:
        records: what to report.
        images: SVG figures by name.
        columns, top: as in `write`.
    """
    found = rows(records)
    shown = top_rows(found, top)
    models = sorted({record["cell"]["model"] for record in records})
    samples = sum(int(row.values["samples"]) for row in found)
    said = f"{len(records)} cells, {samples} samples; {_count(len(models), 'model')}: {', '.join(models)}."
    failures, sheets = _failures(records), overview(found)
    return Template(PAGE.read_text()).substitute(
        title=escape(TITLE),
        summary=escape(said),
        headline=_headline(found, records),
        overview=as_html(sheets, found),
        to_overview='<a href="#overview">At equal evaluations</a>' if sheets else "",
        note=escape(tables.note(shown, "Small numbers")) if shown else "",
        filters="\n".join(_filter(name, column, shown) for column, name in enumerate(_varied(shown))),
        board=_board(shown, columns),
        figures="\n".join(_figure(name, image) for name, image in images.items()) or "<p>There is nothing to draw.</p>",
        failures=f'<section id="failures">\n<h2>Failures</h2>\n{failures}\n</section>' if failures else "",
        to_failures='<a href="#failures">Failures</a>' if failures else "",
        measured=_measured(records),
    )


# -- parts -------------------------------------------------------------------------------------------------------------
NUMBERS = ("steps", "cfg")  # settings that sort as numbers


def _headline(found: Sequence[Row], records: Sequence[Record]) -> str:
    """Return three sentences, and the table behind them."""
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in headline(found, records))
    titles, *lines = summary(found)
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    table = (
        '<details><summary>The lowest errors, by model and question</summary><div class="scroll" tabindex="0" '
        f'role="region" aria-label="Lowest errors"><table class="plain details"><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div></details>"
    )
    return f'<ul class="headline">{said}</ul>' + (table if lines else "")


def _varied(found: Sequence[Row]) -> list[str]:
    """Return the settings in which rows differ, those first that stay in sight when the table scrolls."""
    return [name for name in dict.fromkeys(STICKY + SETTINGS) if len({row.settings[name] for row in found}) > 1]


def _ordered(values: Iterable[Any]) -> list[Any]:
    return sorted(set(values), key=lambda value: (isinstance(value, str), value))


def _filter(name: str, column: int, found: Sequence[Row]) -> str:
    """Return a control that chooses one value of a setting, or all."""
    values = map(plain, _ordered(row.settings[name] for row in found))
    options = "".join(f'<option value="{escape(value)}">{escape(value)}</option>' for value in values)
    select = f'<select name="{name}" data-column="{column}"><option value="">all</option>{options}</select>'
    return f"<label>{name} {select}</label>"


def _board(found: Sequence[Row], columns: Sequence[str] | None) -> str:
    have = dict.fromkeys(name for row in found for name in row.values)
    numbers = as_columns(found, columns)
    extra = sorted(set(have) - set(numbers)) if columns is None else []
    varied = _varied(found) or ["sampler"]
    colours = method_colours(row.settings["method"] for row in found)
    leading = {name: list(map(id, leaders(found, name).values())) for name in (*numbers, *extra)}

    def heading(name: str) -> str:
        number = name not in SETTINGS or name in NUMBERS
        classes = " ".join(["number"] * number + ["extra"] * (name in extra) + _sticky(name, varied))
        title = name if name in SETTINGS else tables.column(name).title
        kind = "number" if number else "text"
        return (
            f'<th scope="col" class="{classes}" data-kind="{kind}"><button type="button">{escape(title)}</button></th>'
        )

    def setting(row: Row, name: str) -> str:
        value = escape(plain(row.settings[name]))
        classes = " ".join(["number"] * (name in NUMBERS) + ["dotted"] * (name == "method") + _sticky(name, varied))
        dot = f'<i style="background:{colours[row.settings["method"]]}"></i>' if name == "method" else ""
        shown = value.replace("_", "_<wbr>")
        return f'<td class="{classes}" data-value="{value}">{dot}{shown}</td>'

    def line(row: Row) -> str:
        words = escape(" ".join(plain(value) for value in row.settings.values()).lower())
        cells = "".join(setting(row, name) for name in varied)
        cells += "".join(_number(row, name, name in extra, id(row) in leading[name]) for name in (*numbers, *extra))
        return f'<tr data-text="{words}">{cells}</tr>'

    head = "".join(map(heading, (*varied, *numbers, *extra)))
    return f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(map(line, found)) + "\n</tbody>"


STICKY = ("method", "sampler")


def _sticky(name: str, varied: Sequence[str]) -> list[str]:
    """Return the classes of a column that stays in sight: the first, and the second beside it."""
    return ["first" if name == varied[0] else "second"] if name in STICKY and name in varied[:2] else []


def _number(row: Row, name: str, is_extra: bool, leads: bool) -> str:
    value, (shown, ends) = row.values.get(name), tables.with_interval(row, name)
    classes = "number extra" if is_extra else "number"
    sortable = "NaN" if value is None or math.isnan(value) else repr(value).replace("inf", "Infinity")
    shown = f"<b>{escape(shown)}</b>" if leads else escape(shown)
    beside = f"<small>{escape(ends[0])} to {escape(ends[1])}</small>" if ends else ""
    return f'<td class="{classes}" data-value="{sortable}">{shown}{beside}</td>'


def _figure(name: str, image: bytes) -> str:
    from kinvert.bench.report import figures

    title = name.replace("-", " ").capitalize()
    caption = (figures.FIGURES[name].__doc__ or "").strip().split("\n\n")[0]
    data = base64.b64encode(_small(image)).decode()
    points = re.search(rb'<svg [^>]*width="([0-9.]+)pt"', image.replace(b"\n", b" "))
    width = f"{float(points[1]) / 72 * SCALE:.1f}" if points else "56"  # all figures have letters of one size
    alt = escape(f"{title}: {caption}")
    return (
        f'<figure id="{escape(name)}"><h3>{escape(title)}</h3>'
        f'<div class="picture" style="--width:{width}rem" tabindex="0">'
        f'<img src="data:image/svg+xml;base64,{data}" alt="{alt}"></div>'
        f"<figcaption>{escape(caption)} Files: figures/{escape(name)}.svg, .png.</figcaption></figure>"
    )


def _small(svg: bytes) -> bytes:
    """Return an SVG image without comments and space between tags, and with paths to a hundredth of a point."""
    svg = re.sub(rb">\s+<", b"><", re.sub(rb"<!--.*?-->", b"", svg, flags=re.DOTALL))
    attribute = re.compile(rb' (?:d|x|y)="[^"]*"')
    return attribute.sub(lambda found: re.sub(rb"(\.\d\d)\d+", rb"\1", found[0]).replace(b"\n", b" "), svg)


def _failures(records: Sequence[Record]) -> str:
    """Return a table of what could not be measured and of what did not come back; empty if there is nothing."""
    failed = [(record, record["error"]) for record in records if record["error"] is not None]
    stalled = [(r, _not_back(r["converged"])) for r in records if r["converged"] and not all(r["converged"])]
    if not failed and not stalled:
        return ""
    summary = f"{_count(len(failed), 'cell')} could not be measured; in {len(stalled)} some samples did not come back."
    head = "".join(f'<th scope="col">{name}</th>' for name in (*SETTINGS, "what happened"))
    lines = [_failure(record, message) for record, message in failed + stalled]
    return (
        f'<p>{summary}</p><div class="scroll" tabindex="0" role="region" aria-label="Failures"><table class="plain">'
        f"<thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
    )


def _not_back(converged: Sequence[bool]) -> str:
    return f"{converged.count(False)} of {len(converged)} samples did not come back to within the tolerance"


def _failure(record: Record, message: str) -> str:
    cells = "".join(f"<td>{escape(plain(value))}</td>" for value in settings(record).values())
    return f'<tr>{cells}<td class="wrap">{escape(message)}</td></tr>'


def _measured(records: Sequence[Record]) -> str:
    """List the values of every setting, and the versions, with a warning if they differ."""
    cells = [{**record["cell"], **settings(record)} for record in records]
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
