"""Tables, figures and the report, on records whose numbers are known; the page in a real browser, where there is one."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'kinvert[cli]'")

from kinvert.bench import drawing, figures, report, store, tables
from kinvert.bench.grid import content_key
from kinvert.files import write_file

ORDERS = {"euler": 1, "heun": 2, "o_belm": 2}
EVIL = "<script>alert('&')</script>"
NAN, INF = math.nan, math.inf


def record(
    *, count: int = 4, error: str | None = None, relative: float | None = None, spent: int | None = None, **cell: Any
) -> dict[str, Any]:
    """A record of the benchmark's form; the relative error is that of the sampler's order unless given."""
    defaults = {
        "model": "digits", "question": "reconstruction", "method": "unsample", "sampler": "euler", "options": {},
        "schedule": "karras", "steps": 20, "cfg": 1.0, "dtype": "float64", "seed": 0, "count": count,
    }  # fmt: skip
    cell = defaults | cell
    versions = {"kinvert": "1", "torch": "2", "numpy": "3", "python": "4", "machine": "m"}
    names = ("inversion_evaluations", "sampling_evaluations", "converged", "trajectory", "residuals", "latent", "error")
    found = {"key": content_key(cell), "cell": cell, "metrics": {}, "versions": versions, **dict.fromkeys(names)}
    if error is not None:
        return found | {"error": error}
    if relative is None:
        floor = {"float64": 1e-15, "float32": 1e-7}[cell["dtype"]]
        relative = max(2.0 * cell["cfg"] * cell["steps"] ** -ORDERS.get(cell["sampler"], 1), floor)
        relative = floor if cell["method"] == "invert" else relative
    decibels = 20 * math.log10(relative) if 0 < relative < INF else {0: -INF}.get(relative, relative)
    spread = [decibels + k for k in range(-(count // 2), count - count // 2)]
    sigmas = [80.0, 5.0, 0.5, 0.02]
    edges = np.linspace(-5, 5, 51)
    counts = np.round(1e4 * np.exp(-(((edges[1:] + edges[:-1]) / 2) ** 2) / 2)).astype(int)
    evaluations = cell["steps"] if spent is None else spent
    return found | {
        "metrics": {
            "nmse_db": spread, "psnr": [-d for d in spread], "mse": [relative] * count, "max_error": [relative] * count,
            "ssim": [0.5] * count, "latent_std": [1.0] * count, "latent_kurtosis": [0.25] * count,
            "distance_to_ode": [0.1] * count, "discretisation": [0.1] * count, "solver": [1e-9] * count,
            "round_off": [0.0] * count,
        },
        "inversion_evaluations": [evaluations] * count,
        "sampling_evaluations": [cell["steps"]] * count,
        "converged": [True] * count if cell["method"] == "invert" else None,
        "trajectory": {"sigma": sigmas, "error": [relative * s for s in sigmas]},
        "latent": {
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            "spectrum": {"frequency": [0.125, 0.25, 0.375, 0.5], "power": [1.1, 0.9, 1.0, 1.2]},
        },
    }  # fmt: skip


def everything(tmp_path: Path) -> list[dict[str, Any]]:
    """Something for every figure."""
    found = [record(sampler=s, steps=n) for s in ORDERS for n in (10, 20, 40, 80)]
    found += [record(method="invert", steps=n, spent=9 * n) for n in (10, 20)]
    found += [record(cfg=w) for w in (2.0, 5.0)] + [record(dtype="float32"), record(method="invert", dtype="float32")]
    found += [record(question="recovery", seed=s) for s in (0, 1)]
    found += [record(sampler="bdia", options={"gamma": 0.5}, error="the latent has 4 NaN or infinite values of 256")]
    arrays = {name: np.random.default_rng(0).normal(size=(4, 1, 8, 8)) for name in ("image", "latent", "restored")}
    for one in found[:3]:
        path = tmp_path / f"{one['key']}.safetensors"
        save_file({name: value.astype(np.float32) for name, value in arrays.items()}, path)
        one["arrays"] = str(path)
    return found


# -- tables ------------------------------------------------------------------------------------------------------------
def test_rows_pool_the_samples_of_all_seeds() -> None:
    better = record(sampler="heun", relative=1e-3)
    a, b = record(seed=0, relative=0.1, count=3), record(seed=1, relative=1.0, count=2)
    found = tables.rows([a, record(error="no"), b, better])
    assert [row.settings["sampler"] for row in found] == ["heun", "euler"]
    # -21, -20, -19 and -1, 0 dB.
    assert found[1].values["nmse_db"] == -19 and found[1].values["samples"] == 5
    assert found[1].values["evaluations"] == 40 and "converged" not in found[1].values


def test_rows_with_nan_come_last_and_options_tell_samplers_apart() -> None:
    lost = record(sampler="bdia", options={"gamma": 0.5})
    lost["metrics"]["nmse_db"] = [1.0, NAN, 2.0, 3.0]
    found = tables.rows([lost, record(sampler="bdia", relative=0.5)])
    assert [row.settings["sampler"] for row in found] == ["bdia", "bdia (gamma=0.5)"]
    assert math.isnan(found[1].values["nmse_db"])


def test_converged_is_a_share_and_a_claim_of_some_methods_only() -> None:
    claimed = record(method="invert", count=4)
    claimed["converged"] = [True, False, False, False]
    assert tables.rows([claimed])[0].values["converged"] == 0.25


def test_edits_that_took_are_a_share_too() -> None:
    edited = record(count=4)
    edited["metrics"] |= {"edit_took": [1.0, 0.0, 1.0, 1.0], "edit_ssim": [0.1, 0.2, 0.4, 0.9]}
    (row,) = tables.rows([edited])
    assert row.values["edit_took"] == 0.75 and row.values["edit_ssim"] == pytest.approx(0.3)


def test_median() -> None:
    assert tables.median([3, 1, 2]) == 2 and tables.median([1, 2]) == 1.5
    assert tables.median([-INF, -INF, 3]) == -INF and tables.median([1, INF, INF]) == INF
    assert math.isnan(tables.median([])) and math.isnan(tables.median([1, NAN, 2]))


@pytest.mark.parametrize(
    ("value", "spec", "shown"),
    [
        (None, ".1f", "–"), (-1.26, ".1f", "−1.3"), (INF, ".1f", "∞"), (-INF, ".1e", "−∞"), (NAN, ".1e", "nan"),
        (1.26e-5, ".1e", "1.3e−5"), (-2.5e-12, ".1e", "−2.5e−12"), (3e4, ".1e", "3.0e4"), (1.0, ".1e", "1.0e0"),
        (0.25, ".0%", "25%"), (1e10, ".0e", "1e10"),
    ],
)  # fmt: skip
def test_how_numbers_are_shown(value: float | None, spec: str, shown: str) -> None:
    assert tables.text(value, spec) == shown


def small() -> list[tables.Row]:
    return tables.rows([
        record(sampler="euler", relative=0.1, model="my_model"),
        record(sampler="o_belm", options={"a|b": "50%"}, relative=1e-15, model="my_model", method="invert"),
    ])  # fmt: skip


def test_markdown() -> None:
    assert tables.markdown(small(), ["nmse_db", "latent_kurtosis"]) == (
        "Medians over the samples; my\\_model, reconstruction, karras, 20 steps, cfg 1, float64.\n\n"
        "| method | sampler | NMSE (dB) | latent kurtosis |\n"
        "| --- | --- | ---: | ---: |\n"
        "| invert | o\\_belm (a\\|b=50%) | **−300.5** | 0.25 |\n"
        "| unsample | euler | −20.5 | 0.25 |\n"
    )


def test_latex() -> None:
    assert tables.latex(small(), ["nmse_db", "converged"], label="tab:x") == (
        "\\begin{table}\n"
        "  \\centering\n"
        "  \\caption{Medians over the samples; my\\_model, reconstruction, karras, 20 steps, cfg 1, float64.}\n"
        "  \\label{tab:x}\n"
        "  \\begin{tabular}{llrr}\n"
        "    \\toprule\n"
        "    method & sampler & NMSE (dB) & converged \\\\\n"
        "    \\midrule\n"
        "    invert & o\\_belm (a|b=50\\%) & \\textbf{$-$300.5} & 100\\% \\\\\n"
        "    unsample & euler & $-$20.5 & -- \\\\\n"
        "    \\bottomrule\n"
        "  \\end{tabular}\n"
        "\\end{table}\n"
    )


def test_every_special_character_of_latex_is_escaped() -> None:
    row = tables.rows([record(sampler=r"a\b{c}_%&#$~^<>", relative=0.5)])
    assert (
        r"a\textbackslash{}b\{c\}\_\%\&\#\$\textasciitilde{}\textasciicircum{}\textless{}\textgreater{} &"
        in tables.latex(row)
    )


def test_tables_of_nothing() -> None:
    for function in (tables.markdown, tables.latex):
        with pytest.raises(ValueError, match="no rows to tabulate"):
            function([])


# -- figures -----------------------------------------------------------------------------------------------------------
def axes_of(figure: Any) -> list[Any]:
    return [ax for part in figure.subfigs for ax in part.axes]


def legend_of(part: Any) -> list[str]:
    return [text.get_text() for text in part.legends[0].get_texts() if text.get_text().strip()]


def test_orders_are_in_the_legend_and_points_where_they_belong() -> None:
    found = [record(sampler=s, steps=n) for s in ("euler", "heun") for n in (10, 20, 40, 80)]
    figure = figures.draw("error-steps", found)
    assert legend_of(figure.subfigs[0]) == ["heun (slope 2.0)", "euler (slope 1.0)"]
    euler = axes_of(figure)[0].lines[1]
    assert list(euler.get_xdata()) == [10, 20, 40, 80]
    # The median of four values a decibel apart is half a decibel below the relative error.
    expected = [2.0 / n * 10 ** (-0.5 / 20) for n in (10, 20, 40, 80)]
    np.testing.assert_allclose(euler.get_ydata(), expected)
    evaluations = figures.draw("error-evaluations", found)
    assert list(axes_of(evaluations)[0].lines[0].get_xdata()) == [20, 40, 80, 160]
    assert legend_of(evaluations.subfigs[0]) == legend_of(figure.subfigs[0])


def test_the_order_of_the_sampler_is_in_the_distance_from_the_ode() -> None:
    found = [record(sampler="heun", steps=n, question="recovery") for n in (10, 20, 40)]
    for one in found:
        one["metrics"]["distance_to_ode"] = [7.0 * one["cell"]["steps"] ** -3.0] * 4
    figure = figures.draw("order", found)
    assert legend_of(figure.subfigs[0]) == ["heun (order 3.0)"]
    np.testing.assert_allclose(axes_of(figure)[0].lines[0].get_ydata(), [7.0 * n**-3.0 for n in (10, 20, 40)])


def test_order_leaves_out_round_off_and_what_has_not_begun_to_converge() -> None:
    steps = [5, 10, 20, 40, 80, 160]
    errors = [3.0, *(0.1 * (10 / n) ** 3 for n in steps[1:4]), 1e-14, 1e-14]
    assert drawing.order(steps, errors, "float64") == pytest.approx(3)
    assert math.isnan(drawing.order(steps[:3], errors[:3], "float64"))
    assert math.isnan(drawing.order(steps[:4], errors[:4], "float16"))


def test_a_panel_never_mixes_settings() -> None:
    found = [record(steps=n, cfg=w) for n in (10, 20, 40) for w in (1.0, 3.0)] + [record(steps=80, cfg=3.0)]
    found += [record(steps=n, dtype="float32") for n in (10, 20)] + [record(steps=n, model="mnist") for n in (10, 20)]
    by_steps = drawing.panels(found, "steps")
    assert [(p.model, p.held) for p in by_steps] == [
        ("digits", {"schedule": "karras", "cfg": 3.0, "dtype": "float64"}),
        ("mnist", {"schedule": "karras", "cfg": 1.0, "dtype": "float64"}),
    ]
    assert [r["cell"]["steps"] for r in by_steps[0].curves["unsample", "euler"]] == [10, 20, 40, 80]
    assert [p.model for p in drawing.panels(found, "cfg")] == ["digits"]  # one point makes no curve
    assert drawing.title(by_steps[0], drawing.Looks.of(by_steps)) == (
        "digits: reconstruction\nunsample, euler, karras, cfg 3, float64"
    )


def test_a_panel_keeps_the_best_curves_and_says_so() -> None:
    found = [record(sampler=f"s{k}", relative=10.0**-k) for k in range(12)]
    (panel,) = drawing.panels(found)
    assert [sampler for _, sampler in panel.curves] == [f"s{k}" for k in range(11, 1, -1)] and panel.left_out == 2
    looks = drawing.Looks.of([panel])
    assert drawing.title(panel, looks).endswith("best 10 of 12")
    # Ten curves, ten colours and ten markers.
    styles = [looks.style(key) for key in panel.curves]
    assert len({style["color"] for style in styles}) == len({style["marker"] for style in styles}) == 10


def test_a_curve_looks_the_same_in_every_panel() -> None:
    shared = [record(model=m, sampler="euler") for m in ("a", "b", "c")]
    own = [record(model=m, sampler=f"of_{m}_{k}") for m in ("a", "b", "c") for k in range(9)]
    found = drawing.panels(shared + own)
    looks = drawing.Looks.of(found)
    assert looks.style(("unsample", "euler"))["color"] == drawing.COLOURS[0]
    for panel in found:
        assert len({looks.style(key)["color"] for key in panel.curves}) == 10


def test_front() -> None:
    assert drawing.front([(3, 0.5), (1, 1.0), (2, 1.0), (2, 0.7), (4, 0.5), (5, 0.1)]) == [
        (1, 1.0), (2, 0.7), (3, 0.5), (5, 0.1),
    ]  # fmt: skip


def test_the_front_is_that_of_all_curves() -> None:
    cheap = [record(sampler="cheap", relative=0.9, steps=2)]
    found = cheap + [record(sampler=f"s{k}", relative=10.0 ** -(k + 1), steps=20 + k) for k in range(12)]
    dominated = [record(sampler=f"d{k}", relative=0.5, steps=100 + k) for k in range(5)]
    figure = figures.draw("pareto", found + dominated)
    # All that are on the front, though these are more than ten; no others.
    assert legend_of(figure.subfigs[0]) == [*(f"s{k}" for k in range(11, -1, -1)), "cheap"]
    assert figure.subfigs[0].get_suptitle().endswith("best 13 of 18")
    (step,) = [ax for ax in axes_of(figure)[0].lines if ax.get_drawstyle() == "steps-post"]
    assert list(step.get_xdata()) == [4, *(40 + 2 * k for k in range(12))]


def test_zeros_infinities_and_nans_are_drawn_at_the_edge_or_left_out() -> None:
    found = [record(steps=n, relative=e) for n, e in ((10, INF), (20, 1e-3), (40, 0.0))]
    found.append(record(steps=80, relative=NAN))
    line = axes_of(figures.draw("error-steps", found))[0].lines[0]
    np.testing.assert_allclose(line.get_ydata()[[0, 2]], [drawing.HIGHEST, drawing.LOWEST])
    assert math.isnan(line.get_ydata()[3])
    for name in ("error-steps", "pareto"):
        figures.encode(figures.draw(name, found), "svg")


def test_precision_and_truth_have_a_row_for_each_curve(tmp_path: Path) -> None:
    found = everything(tmp_path)
    precision = axes_of(figures.draw("precision", found))[0]
    assert [t.get_text() for t in precision.get_yticklabels()] == ["invert", "unsample"]
    truth = axes_of(figures.draw("truth", found))[0]
    round_off = next(line for line in truth.lines if line.get_label() == "round-off")
    assert all(math.isnan(x) for x in round_off.get_xdata())  # a part of 0 is not drawn


def test_latents_are_densities() -> None:
    found = [record(seed=s) for s in (0, 1)]
    figure = figures.draw("latents", found)
    (values, edges, _) = axes_of(figure)[0].patches[0].get_data()
    assert (values * np.diff(edges)).sum() == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(axes_of(figure)[1].lines[0].get_ydata(), [1.1, 0.9, 1.0, 1.2])
    found[0]["latent"]["spectrum"] = found[1]["latent"]["spectrum"] = None
    assert len(axes_of(figures.draw("latents", found))) == 1


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_is_drawn_the_same_twice_or_not_at_all(name: str, tmp_path: Path) -> None:
    found = everything(tmp_path)
    first, second = (figures.draw(name, found) for _ in range(2))
    svg = figures.encode(first, "svg")
    assert svg == figures.encode(second, "svg") and b"<dc:date>" not in svg and b"http://www.w3.org" in svg
    png = figures.encode(first, "png")
    assert png.startswith(b"\x89PNG") and png == figures.encode(second, "png")
    width, height = first.get_size_inches()
    assert width in (drawing.COLUMN, drawing.PAGE) and 1 < height < 12
    for nothing in ([], [record(error="no")]):
        with pytest.raises(figures.NothingToDrawError):
            figures.draw(name, nothing)


def test_drawing_leaves_the_settings_of_matplotlib_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.encode(figures.draw("error-cfg", everything(tmp_path)), "svg")
    assert dict(matplotlib.rcParams) == before


# -- the page ----------------------------------------------------------------------------------------------------------
class Page(HTMLParser):
    """Elements of a page, checked to be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    unconverged = record(method="invert", sampler="heun", steps=5)
    unconverged["converged"] = [True, False, False, True]
    records = [*everything(folder), unconverged, record(model=EVIL, sampler="heun", error=EVIL)]
    report.write([*records, record(model=EVIL)], folder)
    return folder


def test_the_files_of_a_report(written: Path) -> None:
    names = {path.name for path in written.iterdir() if path.suffix != ".safetensors"}
    assert names == {"report.html", "leaderboard.md", "leaderboard.tex", "figures"}
    drawn = {path.name for path in (written / "figures").iterdir()}
    assert drawn == {f"{name}.{suffix}" for name in figures.FIGURES for suffix in ("svg", "png")}
    assert not list(written.rglob(".*"))  # nothing partial is left


def test_the_page_is_whole_and_needs_nothing_else(written: Path) -> None:
    text = (written / "report.html").read_text()
    tags = Page(text).tags
    links = [str(value) for _, attributes in tags for key, value in attributes.items() if key in ("src", "href")]
    assert links and all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in links)
    ids = Counter(attributes["id"] for _, attributes in tags if "id" in attributes)
    assert set(ids.values()) == {1} and {link[1:] for link in links if link[0] == "#"} <= set(ids)
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert len(images) == len(figures.FIGURES) and all(image["alt"] for image in images)
    assert {tag for tag, _ in tags} >= {"main", "nav", "h1", "h2", "caption", "script"} - {"caption"}


def test_everything_is_escaped(written: Path) -> None:
    text = (written / "report.html").read_text()
    assert EVIL not in text and "&lt;script&gt;alert(" in text
    assert sum(tag == "script" for tag, _ in Page(text).tags) == 1


def test_failures_and_versions_are_told(written: Path) -> None:
    text = (written / "report.html").read_text()
    assert "2 cells could not be measured; in 1 some samples did not converge." in text
    assert "the latent has 4 NaN or infinite values of 256" in text and "2 of 4 samples did not converge" in text
    assert "kinvert 1, machine m, numpy 3, python 4, torch 2" in text


def test_reports_of_little(tmp_path: Path) -> None:
    one = report.page([record()], {})
    assert Page(one) and "Every cell was measured" in one and "There is nothing to draw" in one
    other = record(steps=5)
    other["versions"] = other["versions"] | {"torch": "9"}
    assert "Not all cells were measured with the same versions" in report.page([record(), other], {})
    path = report.write([record(error="no"), record(steps=5, error="nor this")], tmp_path / "none")
    assert path == tmp_path / "none" / "report.html"
    assert Page(path.read_text()) and "nor this" in path.read_text()
    assert not (tmp_path / "none" / "leaderboard.md").exists()
    with pytest.raises(ValueError, match="no records to report"):
        report.write([], tmp_path)


def test_records_are_read_from_folders_and_files(tmp_path: Path) -> None:
    found = everything(tmp_path)[:4]
    for one in found:
        arrays = one.pop("arrays", None)
        write_file(tmp_path / f"{one['key']}.json", store.dumps(one).encode())
        if arrays:
            one["arrays"] = arrays
    assert store.merge(tmp_path, [one["key"] for one in found])
    expected = sorted(found, key=lambda one: one["key"])
    assert report.read([tmp_path]) == report.read(tmp_path) == report.read([tmp_path / "results.jsonl"]) == expected
    assert sum("arrays" in one for one in expected) == 3
    assert report.read([tmp_path, *found]) and len(report.read([tmp_path, tmp_path, *found])) == 4
    with pytest.raises(ValueError, match="there are no results at"):
        report.read([tmp_path / "nowhere"])


def test_the_order_of_records_does_not_matter() -> None:
    found = [record(sampler=s, steps=n) for s in ("euler", "heun") for n in (10, 20)]
    assert report.page(found, {}) == report.page(found[::-1], {})
    first, second = (figures.encode(figures.draw("error-steps", some), "svg") for some in (found, found[::-1]))
    assert first == second


# -- the page in a browser ---------------------------------------------------------------------------------------------
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture
def opened(written: Path) -> Iterator[Any]:
    """The page in headless Chromium, and what it asked of the network and said on the console."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        pytest.skip(f"needs one of the browsers {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page, log = browser.new_page(viewport={"width": 1280, "height": 900}), []
        page.on("request", lambda request: log.append(("request", request.url)))
        page.on("console", lambda message: log.append(("console", message.text)))
        page.on("pageerror", lambda error: log.append(("error", str(error))))
        page.on("dialog", lambda dialog: log.append(("dialog", dialog.message)))
        url = (written / "report.html").as_uri()
        page.goto(url)
        yield page
        browser.close()
        assert [entry for entry in log if not entry[1].startswith("data:")] == [("request", url)]


def column(page: Any, title: str) -> list[str]:
    """The values of a column in the rows that are shown."""
    script = """title => {
      const table = document.getElementById("board");
      const k = [...table.tHead.rows[0].cells].findIndex(c => c.innerText.trim() === title);
      return [...table.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[k].dataset.value);
    }"""
    return page.evaluate(script, title)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")  # the driver's own
def test_the_page_sorts_and_filters_in_a_browser(opened: Any) -> None:
    page = opened
    total = len(column(page, "model"))
    assert page.inner_text("#shown") == f"{total} of {total} rows" and total > 15
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    # Sorting: by a number, up and down, with what has none at the end; by a word.
    heading = page.get_by_role("button", name="NMSE (dB)")
    heading.click()
    up = [float(value) for value in column(page, "NMSE (dB)")]
    assert up == sorted(up) and page.get_attribute("th[aria-sort]", "aria-sort") == "ascending"
    heading.click()
    assert [float(v) for v in column(page, "NMSE (dB)")] == up[::-1]
    page.get_by_role("button", name="converged").click()
    shares = column(page, "converged")
    assert "NaN" in shares and shares == sorted(shares, key=lambda v: (v == "NaN", v))
    page.get_by_role("button", name="sampler").click()
    assert column(page, "sampler") == sorted(column(page, "sampler"))
    assert page.locator("th[aria-sort]").count() == 1
    # Filtering: by a setting, by words, by both; and all back.
    page.select_option("select[name=sampler]", "heun")
    assert set(column(page, "sampler")) == {"heun"}
    page.fill("#search", "INVERT 5")
    assert column(page, "method") == ["invert"] and page.inner_text("#shown") == f"1 of {total} rows"
    page.fill("#search", "nothing like this")
    assert column(page, "model") == []
    page.get_by_role("button", name="Clear").click()
    page.wait_for_function("n => document.getElementById('shown').textContent.startsWith(n + ' of')", arg=total)
    page.select_option("select[name=model]", EVIL)
    assert column(page, "model") == [EVIL]
    # The other metrics appear when asked for.
    extra = page.get_by_role("button", name="latent kurtosis")
    assert not extra.is_visible()
    page.check("#every")
    assert extra.is_visible()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_the_page_works_by_keyboard_and_on_a_phone(opened: Any) -> None:
    page = opened
    page.get_by_role("button", name="steps").focus()
    page.keyboard.press("Enter")
    steps = [int(value) for value in column(page, "steps")]
    assert steps == sorted(steps)
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_records_of_the_tests_are_valid_json(tmp_path: Path) -> None:
    assert json.loads(store.dumps(everything(tmp_path)))


def test_a_report_has_nothing_of_the_one_before(tmp_path: Path) -> None:
    report.write([record(sampler=name, steps=n) for name in ("euler", "heun") for n in (10, 20)], tmp_path)
    before = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    report.write([record(error="refused")], tmp_path)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"report.html"} < before


def test_two_results_for_one_cell_are_refused() -> None:
    one, other = record(relative=0.1), record(relative=0.2)
    assert len(report.read([one, one])) == 1
    with pytest.raises(ValueError, match=r"different results for one cell, digits reconstruction unsample euler"):
        report.read([one, other])
