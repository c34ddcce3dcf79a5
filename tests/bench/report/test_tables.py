"""Tables of records: rows, numbers, Markdown and LaTeX."""

from __future__ import annotations

import math

import pytest
from benchrecords import INF, NAN, record

from kinvert.bench.report import tables


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
