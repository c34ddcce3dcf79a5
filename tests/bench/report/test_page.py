"""The report: its files, its page, and the page in a real browser, if there is one."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from benchrecords import everything, record

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'kinvert[cli]'")

from kinvert.bench import report
from kinvert.bench.report import figures, page, tables
from kinvert.bench.results import merge
from kinvert.files import write_file
from kinvert.jsontext import canonical_json, content_key

EVIL = "<script>alert('&')</script>"


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
        if tag not in ("meta", "img", "input", "wbr"):
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


def test_page_is_self_contained(written: Path) -> None:
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


def test_page_lists_failures_and_versions(written: Path) -> None:
    text = (written / "report.html").read_text()
    assert "2 cells could not be measured; in 1 some samples did not come back." in text
    assert (
        "the latent has 4 NaN or infinite values of 256" in text
        and "2 of 4 samples did not come back to within the tolerance" in text
    )
    assert "kinvert 1, machine m, numpy 3, python 4, torch 2" in text


def test_report_of_one_record_and_of_failures(tmp_path: Path) -> None:
    one = page.render([record()], {})
    assert Page(one) and "Nothing failed: every cell was measured" in one and "There is nothing to draw" in one
    assert "#failures" not in one and 'id="failures"' not in one  # nothing leads to a section that is not there
    other = record(steps=5)
    other["versions"] = other["versions"] | {"torch": "9"}
    assert "Not all cells were measured with the same versions" in page.render([record(), other], {})
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
        write_file(tmp_path / f"{one['key']}.json", canonical_json(one).encode())
        if arrays:
            one["arrays"] = arrays
    assert merge(tmp_path, [one["key"] for one in found])
    expected = sorted(found, key=lambda one: one["key"])
    assert report.read([tmp_path]) == report.read(tmp_path) == report.read([tmp_path / "results.jsonl"]) == expected
    assert sum("arrays" in one for one in expected) == 3
    assert report.read([tmp_path, *found]) and len(report.read([tmp_path, tmp_path, *found])) == 4
    with pytest.raises(ValueError, match="there are no results at"):
        report.read([tmp_path / "nowhere"])


def test_the_order_of_records_does_not_matter() -> None:
    found = [record(sampler=s, steps=n) for s in ("euler", "heun") for n in (10, 20)]
    assert page.render(found, {}) == page.render(found[::-1], {})
    first, second = (figures.encode(figures.draw("error-steps", some), "svg") for some in (found, found[::-1]))
    assert first == second


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
    assert json.loads(canonical_json(everything(tmp_path)))


def test_report_removes_files_of_the_report_before(tmp_path: Path) -> None:
    report.write([record(sampler=name, steps=n) for name in ("euler", "heun") for n in (10, 20)], tmp_path)
    before = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    report.write([record(error="refused")], tmp_path)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"report.html"} < before


def test_two_results_for_one_cell_are_refused() -> None:
    one, other = record(relative=0.1), record(relative=0.2)
    assert len(report.read([one, one])) == 1
    with pytest.raises(ValueError, match=r"different results for one cell, digits reconstruction unsample euler"):
        report.read([one, other])


# -- damaged records ---------------------------------------------------------------------------------------------------
def places(tree: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """Every place in a record, but of long lists only the first."""
    if path:
        yield path
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree[:1]) if isinstance(tree, list) else ()
    for key, value in inner:
        yield from places(value, *path, key)


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a place; `...` takes it away."""
    key, *rest = path
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if rest:
        copy[key] = changed(tree[key], tuple(rest), value)
    elif value is ...:
        del copy[key]
    else:
        copy[key] = value
    return copy


@pytest.mark.parametrize("value", [..., None, "text", True, [], {}, [1.0]], ids=repr)
def test_a_damaged_record_is_refused_or_reported(value: Any) -> None:
    """Whatever is missing in a record or of another type: a sentence or a page, and never a traceback."""
    whole, outcomes = record(method="invert", count=3) | {"residuals": None}, Counter[bool]()
    for path in places(whole):
        damaged = changed(whole, path, value)
        if isinstance(damaged.get("cell"), dict) and path != ("key",):
            damaged["key"] = content_key(damaged["cell"])
        try:
            records = page.read([damaged])
        except ValueError as error:
            outcomes[False] += 1
            assert "a record that was given is not as `measure` returns it: " in str(error)
            continue
        outcomes[True] += 1
        page.render(records, {})
        if found := tables.rows(records):
            tables.markdown(found)
        for name in figures.FIGURES if path[0] in ("metrics", "trajectory", "latent") else ():
            with suppress(figures.NothingToDrawError):
                figures.draw(name, records)
    assert outcomes[False] > 20
