"""Tables of records: rows, numbers, Markdown and LaTeX."""

from __future__ import annotations

import math
import re

import pytest
from benchrecords import INF, NAN, record

from kinvert.bench.report import tables
from kinvert.bench.report.page import _fitting
from kinvert.bench.report.rows import choose, top


def test_rows_pool_the_samples_of_all_seeds() -> None:
    better = record(sampler="heun", relative=1e-3)
    a, b = record(seed=0, relative=0.1, count=3), record(seed=1, relative=1.0, count=2)
    found = tables.rows([a, record(error="no"), b, better])
    assert [row.settings["sampler"] for row in found] == ["heun", "euler"]
    # -21, -20, -19 and -1, 0 dB.
    assert found[1].values["nmse_db"] == -19 and found[1].values["samples"] == 5
    assert found[1].values["evaluations"] == 40 and "converged" not in found[1].values


def test_rows_with_nan_come_last_and_options_are_in_the_sampler() -> None:
    lost = record(sampler="bdia", options={"gamma": 0.5})
    lost["metrics"]["nmse_db"] = [1.0, NAN, 2.0, 3.0]
    found = tables.rows([lost, record(sampler="bdia", relative=0.5)])
    assert [row.settings["sampler"] for row in found] == ["bdia", "bdia (gamma=0.5)"]
    assert math.isnan(found[1].values["nmse_db"])


def test_converged_is_a_share_of_samples() -> None:
    claimed = record(method="invert", count=4)
    claimed["converged"] = [True, False, False, False]
    assert tables.rows([claimed])[0].values["converged"] == 0.25


def test_edit_took_is_a_share_of_samples() -> None:
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


NOTE = (
    " 95% intervals, from 2000 paired bootstrap samples over images and seeds (shares: Wilson). "
    "Bold: the best, if the interval of its difference from every other row excludes 0."
)


def small(count: int = 8) -> list[tables.Row]:
    return tables.rows([
        record(sampler="euler", relative=0.1, model="my_model", count=count),
        record(
            sampler="o_belm", options={"a|b": "50%"}, relative=1e-15, model="my_model", method="invert", count=count
        ),
    ])  # fmt: skip


def test_markdown() -> None:
    assert tables.markdown(small(), ["nmse_db", "latent_kurtosis"]) == (
        "Medians over the samples; my\\_model, reconstruction, karras, 20 steps, cfg 1, float64. "
        f"Brackets:{NOTE}\n\n"
        "| method | sampler | NMSE (dB) | latent kurtosis |\n"
        "| --- | --- | ---: | ---: |\n"
        "| invert | o\\_belm (a\\|b=50%) | **−300.5** \\[−303.0, −298.0\\] | 0.25 |\n"
        "| unsample | euler | −20.5 \\[−23.0, −18.0\\] | 0.25 |\n"
    )


def test_latex() -> None:
    assert tables.latex(small(), ["nmse_db", "max_error", "converged"], label="tab:x") == (
        "\\begin{table}\n"
        "  \\centering\n"
        "  \\footnotesize\n"
        "  \\setlength{\\tabcolsep}{3pt}\n"
        "  \\caption{Medians over the samples; my\\_model, reconstruction, karras, 20 steps, cfg 1, float64. "
        f"Sub- and superscripts:{NOTE.replace('%', chr(92) + '%')}}}\n"
        "  \\label{tab:x}\n"
        "  \\begin{tabular}{llrrr}\n"
        "    \\toprule\n"
        "    method & sampler & NMSE (dB) & max error & converged \\\\\n"
        "    \\midrule\n"
        "    invert & o\\_belm (a|b=50\\%) & $\\mathbf{-300.5}_{-303.0}^{-298.0}$ & $\\mathbf{1.0\\mathrm{e}{-15}}$ "
        "& $100\\%_{68\\%}^{100\\%}$ \\\\\n"
        "    unsample & euler & $-20.5_{-23.0}^{-18.0}$ & $1.0\\mathrm{e}{-1}$ & -- \\\\\n"
        "    \\bottomrule\n"
        "  \\end{tabular}\n"
        "\\end{table}\n"
    )


def test_few_samples_prove_nothing() -> None:
    written = tables.markdown(small(count=4))
    assert "Of 4 independent samples no interval holds the median in more than 88% of cases." in written
    assert "**" not in written


def test_the_best_is_bold_only_beyond_doubt() -> None:
    """Medians of −20.5 and −20.45 dB: told apart where every sample differs alike, not where they are mixed."""
    a = record(sampler="a", relative=0.1, count=8)
    for order, is_told_apart in ((1, True), (-1, False)):
        b = record(sampler="b", relative=0.1, count=8)
        b["metrics"]["nmse_db"] = [value + 0.05 for value in a["metrics"]["nmse_db"][::order]]
        found = tables.rows([a, b])
        assert [row.settings["sampler"] for row in found] == ["a", "b"]
        assert ("**" in tables.markdown(found, ["nmse_db"])) == is_told_apart
    # The same numbers of other images are resampled apart.
    other = record(sampler="b", relative=0.1, count=8, seed=7, model="mnist")
    first = record(sampler="a", relative=0.1, count=8, model="mnist")
    other["metrics"]["nmse_db"] = [x + 0.05 for x in first["metrics"]["nmse_db"]]
    assert "**" not in tables.markdown(tables.rows([first, other]), ["nmse_db"])


def test_of_the_same_cell_with_fewer_samples_the_larger_counts() -> None:
    few, many = record(count=4, relative=0.5), record(count=8, relative=0.1)
    (row,) = tables.rows([few, many])
    assert row == tables.rows([many, few])[0] and row.values["samples"] == 8


def test_choosing_rows() -> None:
    found = [record(sampler=s, cfg=w, relative=w / 100) for s in ("euler", "heun") for w in (1.0, 3.0)]
    assert [r["cell"]["cfg"] for r in choose(found, {"cfg": "1.0"})] == [1, 1]
    assert len(choose(found, {"cfg": ["1", "3"], "sampler": "heun"})) == 2 and choose(found, {}) == found
    with pytest.raises(ValueError, match=r"no record has cfg 2; there are 1, 3"):
        choose(found, {"cfg": "2"})
    with pytest.raises(ValueError, match=r"unknown setting 'sampller'; did you mean 'sampler'"):
        choose(found, {"sampller": "heun"})
    with pytest.raises(ValueError, match=r"no record has all of cfg=3 and model=mnist; leave one out"):
        choose([*found, record(model="mnist")], {"cfg": "3", "model": "mnist"})
    rows = tables.rows([*found, record(model="mnist")])
    assert [(r.settings["model"], r.settings["cfg"]) for r in top(rows, 1)] == [("digits", 1), ("mnist", 1)]
    assert top(rows, None) == rows
    with pytest.raises(ValueError, match="top must be"):
        top(rows, 0)
    with pytest.raises(ValueError, match=r"unknown column 'nmse_bd'; did you mean 'nmse_db'"):
        tables.markdown(rows, ["nmse_bd"])


def test_what_a_page_has_no_room_for_is_told() -> None:
    many = [record(sampler=f"sampler_{k}", model=m, relative=0.5 / (k + 1)) for k in range(40) for m in ("a", "b")]
    told, columns = _fitting(tables.rows(many), list(tables.COLUMNS)).partition("\n")[0], list(tables.COLUMNS)
    assert told.startswith("% Left out to fit a page: 42 of 80 rows, those with the highest NMSE; the columns ")
    assert told.endswith(f"{columns[-1]}. Choose with --where, --columns and --top.")
    assert not _fitting(tables.rows(many[:2]), columns[:2]).startswith("%")


def test_a_latex_table_fits_a_page_or_is_refused() -> None:
    many = [record(sampler=f"sampler_{k}", model=m, relative=0.5 / (k + 1)) for k in range(40) for m in ("a", "b")]
    rows = tables.rows(many)
    with pytest.raises(ValueError, match="a page holds 40 lines, got 82"):
        tables.latex(rows)
    kept = tables.fitting_rows(rows)
    assert [len([r for r in kept if r.settings["model"] == m]) for m in "ab"] == [19, 19]
    assert kept[0].settings["sampler"] == "sampler_39"  # the lowest error
    written = tables.latex(kept)
    assert written.count("sampler\\_") == 38 and written.count(r"\multicolumn") == 2
    with pytest.raises(ValueError, match="a line must have at most 80 characters, got"):
        tables.latex(kept, list(tables.COLUMNS))
    columns = tables.fitting_columns(kept, list(tables.COLUMNS))
    assert columns == list(tables.COLUMNS)[: len(columns)] and 3 <= len(columns) < len(tables.COLUMNS)
    assert tables.fits(kept, columns) and not tables.fits(kept, list(tables.COLUMNS)[: len(columns) + 1])
    for line in written.splitlines():  # what is set, without the commands that set it
        if line.endswith(r" \\") and "multicolumn" not in line:
            plain = re.sub(r"\\mathrm\{e\}|\\mathbf|[$_^{}\\]|_\{[^}]*\}", "", line)
            assert len(plain.strip()) <= 1.4 * tables.WIDTH


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
