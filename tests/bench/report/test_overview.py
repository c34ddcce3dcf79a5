"""The comparison at equal evaluations: records whose numbers are known, by budget, in three forms."""

from __future__ import annotations

import html.parser
import re
from pathlib import Path
from typing import Any

from benchrecords import record

from kinvert.bench import report
from kinvert.bench.report.overview import BUDGETS, Number, as_html, as_latex, as_markdown, overview
from kinvert.bench.report.page import render
from kinvert.bench.report.rows import rows


def asked(question: str, metrics: dict[str, list[float]], **settings: Any) -> dict[str, Any]:
    """A record of a question whose metrics are known."""
    found = record(question=question, count=8, **settings)
    return found | {"metrics": metrics}


def spread(middle: float, width: float = 0.01) -> list[float]:
    return [middle + width * k for k in (-3, -2, -1, 0, 0, 1, 2, 3)]


def known() -> list[dict[str, Any]]:
    """Three methods, of 1, 4 and 10 evaluations a step; the dearest is no better than the second in bits."""
    found = []
    for method, spent, error, bits in (
        ("unsample", 20, 0.1, 0.8),
        ("invert_4", 80, 1e-3, 0.9),
        ("aidi", 200, 1e-5, 0.9),
    ):
        found.append(record(method=method, relative=error, spent=spent, count=8))
        found.append(asked("recovery_jpeg", {"bits": spread(bits)}, method=method, spent=spent))
    found.append(
        asked("uniqueness", {"latents": [1.0] * 8, "unique": [1.0] * 8, "likeliest": [1.0] * 8}, method="invert")
    )
    return found


def text(value: str | Number) -> str:
    return value if isinstance(value, str) else value.text


def test_a_line_for_each_method_sorted_by_cost_and_bold_within_its_budget() -> None:
    methods, winners, unique = overview(rows(known()))
    assert methods.titles == (
        "at most", "method", "sampler", "kept too", "spent", "reconstruction, NMSE (dB)", "recovery jpeg, bits right",
    )  # fmt: skip
    assert [tuple(map(text, line[:5])) for line in methods.lines] == [
        ("1", "unsample", "euler", "", "1"), ("4", "invert_4", "euler", "", "4"), ("20", "aidi", "euler", "", "10"),
    ]  # fmt: skip
    bold = [[one.is_bold for one in line[5:]] for line in methods.lines]
    assert bold == [[False, False], [True, True], [True, False]]  # the first one has no rival
    settings = "cfg 1; digits: 20 steps, karras, float64"
    assert (methods.about, winners.about) == (f"Methods; {settings}", f"The best at each budget; {settings}")
    assert unique.about == "uniqueness; digits, euler" and unique.titles[0] == "method"


def test_the_best_at_each_budget_and_how_many_are_as_good() -> None:
    winners = overview(rows(known()))[1]
    assert winners.titles == ("", "1", "2", "4", "8", "20", "any") and len(BUDGETS) == 6
    errors, bits = winners.lines
    assert errors[0] == "digits: reconstruction, NMSE (dB)"
    assert [one.words for one in errors[1:]] == ["unsample"] * 2 + ["invert_4"] * 2 + ["aidi"] * 2
    assert [one.words.partition("; ")[2] for one in bits[1:]] == [""] * 4 + ["not told apart from 1"] * 2


def test_what_keeps_more_than_a_latent_is_compared_with_nothing() -> None:
    perfect = record(method="extract_noise", sampler="euler_ancestral", relative=1e-8, spent=20, count=8)
    methods, winners, _ = overview(rows([*known(), perfect]))
    first = methods.lines[0]
    assert [text(one) for one in first[1:4]] == ["extract_noise", "euler_ancestral", "noises"]
    assert not first[5].is_bold and methods.lines[2][5].is_bold  # type: ignore[union-attr]
    assert not any("extract_noise" in one.words for line in winners.lines for one in line[1:])  # type: ignore[union-attr]


def test_a_cost_above_the_last_budget_is_of_any() -> None:
    dear = record(method="dpm_solver_1", relative=1e-6, spent=540, count=8)
    assert text(overview(rows([*known(), dear]))[0].lines[-1][0]) == "any"


def test_a_number_of_which_neither_end_is_best_is_never_bold() -> None:
    bits = [asked("density", {"bits_per_value": spread(k)}, method=m) for k, m in enumerate(("unsample", "invert"))]
    methods, winners = overview(rows(bits))
    assert not any(line[5].is_bold for line in methods.lines) and winners.lines == ()


def test_each_scale_of_guidance_and_the_settings_that_most_methods_have() -> None:
    more = [record(method=m, cfg=3.0, relative=0.1, count=8) for m in ("unsample", "aidi")]
    other = record(method="unsample", steps=40, relative=1e-9, count=8)
    sheets = overview(rows([*known(), *more, other]))
    assert [sheet.about.split("; ")[1] for sheet in sheets] == [
        "cfg 1",
        "cfg 1",
        "cfg 3",
        "cfg 3",
        "digits, euler",
    ]
    assert "20 steps" in sheets[0].about and not any("−180" in text(one) for line in sheets[0].lines for one in line)


def bare(found: dict[str, Any]) -> dict[str, Any]:
    """A record of which no figure can be drawn."""
    metrics = {name: values for name, values in found["metrics"].items() if name in ("bits", "mse")}
    return found | {"metrics": metrics, "latent": None, "trajectory": None}


def test_round_trips_alone_have_no_overview(tmp_path: Path) -> None:
    bits = [asked("recovery_jpeg", {"bits": spread(0.9)}, method=method) for method in ("unsample", "invert")]
    assert "At equal evaluations" in report.write(map(bare, bits), tmp_path).read_text()
    assert "**0.9" not in (tmp_path / "overview.md").read_text() and (tmp_path / "overview.tex").exists()
    trips = [bare(record(method=method, count=8)) for method in ("unsample", "invert")]
    assert overview(rows(trips)) == [] and as_html([], []) == ""
    assert "At equal evaluations" not in report.write(trips, tmp_path).read_text()
    assert not list(tmp_path.glob("overview.*"))


def test_questions_without_an_error_have_a_page() -> None:
    shown, found = render(known(), {}), rows(known())
    assert shown.count("At equal evaluations") == 2 and "recovery jpeg, bits right" in shown
    markdown = as_markdown(overview(found), found)
    assert "| 4 | invert\\_4 | euler |  | 4 | **−60.5**" in markdown
    assert "**0.900** \\[0.880, 0.920\\]" in markdown
    assert "Lowest error in reconstruction" in shown and "in recovery_jpeg" not in shown


def test_the_three_forms_have_the_same_numbers() -> None:
    found = rows(known())
    sheets = overview(found)
    cells: list[str] = []

    class Cells(html.parser.HTMLParser):
        def handle_data(self, data: str) -> None:
            cells.append(data)

    Cells().feed(as_html(sheets, found))
    markdown, latex = as_markdown(sheets, found), as_latex(sheets, found)
    for sheet in sheets:
        for line in sheet.lines:
            for one in line:
                if isinstance(one, Number):
                    assert one.text in cells and one.text in markdown
                    assert one.text.replace("−", "-").replace("%", r"\%") in latex.replace("--", "–")
    assert latex.count(r"\begin{table*}") == len(sheets) == latex.count(r"\end{table*}")


def test_words_are_escaped() -> None:
    bad = "<i>|"
    found = rows([*known(), record(model=bad, relative=0.1, count=8), record(model=bad, method="aidi", count=8)])
    sheets = overview(found)
    assert "&lt;i&gt;|" in as_html(sheets, found) and "<i>" not in as_html(sheets, found)
    assert r"\<i\>\|" in as_markdown(sheets, found)


def test_the_words_of_the_page_have_numbers_of_the_table() -> None:
    root = Path(__file__).parents[3]
    shown = (root / "benchmarks" / "results" / "invbench.md").read_text()
    words = (root / "docs" / "invbench.md").read_text().partition("## What it shows")[2].partition("\n## ")[0]
    numbers = re.findall(r"−\d+\.\d|\b0\.\d{3}\b|\d\.\d\d\b", words)
    assert len(numbers) > 25
    assert not [number for number in numbers if number not in shown]
