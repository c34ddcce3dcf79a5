"""The headline: three sentences about records whose numbers are known."""

from __future__ import annotations

from benchrecords import INF, NAN, record

from kinvert.bench.report.headline import headline, summary
from kinvert.bench.report.rows import rows


def known() -> list:
    """Eight samples, whose median is half a decibel below the relative error."""
    return [
        record(method="unsample", steps=10, relative=1e-1, count=8),  # 20 evaluations
        record(method="unsample", steps=20, relative=1e-2, count=8),  # 40
        record(method="ddim_noisy", steps=20, relative=1e-1, count=8),
        record(method="invert", steps=20, relative=1e-6, count=8, spent=100),  # 120
        record(model="mnist", method="unsample", steps=20, relative=1e-1, count=8),
        record(model="mnist", method="picard", steps=20, relative=1e-3, count=8, spent=15),  # 35
        record(question="recovery", method="reversible", steps=10, relative=1e-5, count=8),
    ]


def test_three_sentences() -> None:
    stalled = record(method="picard", steps=10, relative=0.5, count=8, spent=60)
    stalled["converged"] = [True] * 5 + [False] * 3
    found = [*known(), record(method="reversible", error="no"), record(method="rf_solver", error="no"), stalled]
    found.append(record(method="rf_solver", steps=5, error="no"))
    assert headline(rows(found), found) == [
        "Lowest error in reconstruction: invert for digits (−120 dB), picard for mnist (−60 dB); "
        "in recovery: reversible for digits (−100 dB).",
        "Best with at most 20 evaluations, up and down together, in reconstruction: unsample for digits (−20 dB); "
        "in recovery: reversible for digits (−100 dB); "
        "with at most 40, in reconstruction: unsample for digits (−40 dB), picard for mnist (−60 dB); "
        "in recovery: reversible for digits (−100 dB).",
        "Failed: of 11 cells, 3 cells could not be measured (rf_solver 2, reversible 1); "
        "3 samples did not come back to within the tolerance, in 1 cell (picard 1).",
    ]


def test_a_sentence_where_nothing_failed_and_where_nothing_is_known() -> None:
    found = [record(steps=20, relative=1e-2)]
    lowest, cheap, failed = headline(rows(found), found)
    assert lowest == "Lowest error in reconstruction: unsample for digits (−40 dB)."
    assert cheap.startswith(
        "Best with at most 20 evaluations, up and down together, of none; with at most 40, in recon"
    )
    assert failed == "Nothing failed: every cell was measured, and every sample whose inversion was checked came back."
    for none in ([], [record(relative=NAN)]):
        assert headline(rows(none), none)[0] == "Lowest error of none."
    assert "(−∞ dB)" in headline(rows([record(relative=0.0)]), [])[0]
    assert "(∞ dB)" in headline(rows([record(relative=INF)]), [])[0]


def test_the_table_says_how_many_rows_are_as_good() -> None:
    near = record(method="aidi", steps=20, count=8, spent=100)
    near["metrics"]["nmse_db"] = [-120.0, -110, -125, -119, -122, -118, -120.9, -121.5]  # its median is −120.45
    titles, digits, recovery, mnist = summary(rows([*known(), near]))
    assert titles == [
        "model", "question", "at any cost", "with at most 20 evaluations", "with at most 40 evaluations",
    ]  # fmt: skip
    assert digits[:2] == ["digits", "reconstruction"] and recovery[:2] == ["digits", "recovery"]
    words = "invert, 20 steps: −120.5 dB (−123.0 to −118.0), 120 evaluations; not told apart from 1"
    assert digits[2] == words
    assert digits[3].startswith("unsample, 10 steps: −20.5 dB (") and digits[3].endswith("20 evaluations")
    assert mnist[3] == "–" and "picard, 20 steps" in mnist[4]
