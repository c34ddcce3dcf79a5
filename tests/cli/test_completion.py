"""What the shell offers after TAB."""

from __future__ import annotations

import pytest
from click.shell_completion import BashComplete, FishComplete, ZshComplete

import kinvert as ki
from kinvert import bench
from kinvert.cli import main
from kinvert.rules import SamplerEntry


def offered(*words: str, shell: type = BashComplete) -> list[str]:
    """The values that are offered for the last of the words."""
    complete = shell(main, {}, "kinvert", "_KINVERT_COMPLETE")
    return [item.value for item in complete.get_completions(list(words[:-1]), words[-1])]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["plan", "bdi"], ["bdia"]),
        (["demo", "--samplers", "eul"], ["euler", "euler_ancestral", "euler_ancestral_cfg_pp", "euler_cfg_pp"]),
        (["demo", "--samplers", "heun,euler_a"], ["heun,euler_ancestral", "heun,euler_ancestral_cfg_pp"]),
        (["demo", "--samplers", "dpm_2,dpm_2"], ["dpm_2,dpm_2_ancestral"]),
        (["demo", "--schedule", "kar"], ["karras"]),
        (["unsample", "--sampler", "lm"], ["lms"]),
        (["unsample", "--schedule", "be"], ["beta", "beta57"]),
        (["invert", "--sampler", "lm"], ["lms"]),
        (["invert", "--method", "invert_1"], ["invert_1", "invert_10"]),
        (["invert", "--model", "di"], ["digits_exact", "digits"]),
        (["invert", "--device", "c"], ["cpu"]),
        (["invert", "--dtype", "b"], ["bfloat16"]),
        (["bench", "run", "--preset", "qu"], ["quick"]),
        (["bench", "run", "--methods", "unsample,pic"], ["unsample,picard"]),
        (["bench", "--preset", "qu"], ["quick"]),
        (["bench", "comp"], ["compare"]),
        (["doc"], ["doctor"]),
    ],
)
def test_names_are_completed(words: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert offered(*words) == expected


def test_the_registries_are_offered_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert offered("plan", "") == list(ki.SAMPLERS)
    assert offered("plan", "--schedule", "") == list(ki.SCHEDULES)
    assert offered("invert", "--method", "") == list(bench.METHODS)
    monkeypatch.setitem(ki.SAMPLERS, "my_own", SamplerEntry("my_own", ki.rules.Euler))
    assert offered("plan", "my_") == ["my_own"]


def test_devices_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for kind in ("mps", "xpu"):
        monkeypatch.setattr(f"torch.{kind}.device_count", lambda: 0)
    assert offered("demo", "--device", "") == ["cpu", "cuda", "cuda:0", "cuda:1"]


@pytest.mark.parametrize("shell", [BashComplete, ZshComplete, FishComplete])
def test_shells_get_their_script_and_the_summaries(shell: type) -> None:
    complete = shell(main, {}, "kinvert", "_KINVERT_COMPLETE")
    assert "_KINVERT_COMPLETE" in complete.source()
    items = complete.get_completions(["plan"], "heun")
    assert items[0].value == "heun" and items[0].help == ki.SAMPLERS["heun"].summary
    assert "heun" in complete.format_completion(items[0])
