"""The example runs on a small pipeline, as a user runs it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from saved import save

EXAMPLE = Path(__file__).parents[3] / "examples" / "diffusers_edit.py"


@pytest.mark.parametrize("options", [["--tol", "1e-3"], ["--noises"]], ids=["latents", "noises"])
def test_the_example_inverts_edits_and_reports(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, "sdxl")
    monkeypatch.chdir(tmp_path)
    given = ["photo.png", "--model", "sdxl", "--prompt", "a cat", "--edit", "a dog", "--steps", "4", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *given, *options])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    report = capsys.readouterr().out
    assert report.strip() == (tmp_path / "edited" / "report.txt").read_text().strip()
    assert "converged        1 of 1" in report and "the pipeline itself: error of the latents" in report
    made = {path.name for path in (tmp_path / "edited").iterdir()}
    assert made == {"restored.png", "edited.png", "latents.safetensors", "scheduler", "report.txt"}
    saved = {path.name for path in (tmp_path / "edited" / "scheduler").iterdir()}
    assert ("kinvert_state.safetensors" in saved) == ("--noises" in options)
