"""`save` and `ki.load`: results come back bit by bit, and sample the same image; what cannot be kept is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from inverting import MIXTURE, images, schedule
from publications import guidance, labelled, shifted
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import kinvert as ki
from kinvert.forms import Form
from kinvert.inversion import Inversion, Reason
from kinvert.inversion.baselines import null_text, rf_inversion
from kinvert.inversion.result import WayBack
from kinvert.packing import Unsaved
from kinvert.rules import Rule, StepBuilder, interpolate

FILES = Path(__file__).parent / "data" / "files"
SIGMAS = schedule(4)
MASK = torch.tensor([1.0, 1, 1, 0, 0, 1])


@dataclass(frozen=True)
class Mine(Rule):
    """A rule that nobody registered."""

    name: ClassVar[str] = "mine_alone"
    ode_order: ClassVar[int] = 1

    def step(self, s: StepBuilder) -> Form:
        return interpolate(s.x, s.denoise(s.x, s.sigma), s.sigma_next / s.sigma)


def in_flow_time(x: Tensor, t: Tensor) -> Tensor:
    return MIXTURE(x / (1.0 - t)[:, None], t / (1.0 - t))


in_flow_time.coordinates = "flow"  # type: ignore[attr-defined]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(9e99), b.nan_to_num(9e99))
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, WayBack):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(type(a) is type(b) and a == b)


def inverted(sampler: str, **options: Any) -> Callable[[], tuple[Any, Inversion]]:
    return lambda: (MIXTURE, ki.invert(MIXTURE, images(2), SIGMAS, sampler=sampler, **options))


def guided(cfg: Any) -> Callable[[], tuple[Any, Inversion]]:
    return lambda: (labelled, ki.invert(labelled, images(2), SIGMAS, **{**guidance(2.0, 2), "cfg": cfg}))


def extracted(sampler: str) -> Callable[[], tuple[Any, Inversion]]:
    noise = ki.noise.white(0)
    return lambda: (MIXTURE, ki.extract_noise(MIXTURE, images(2), SIGMAS, sampler=sampler, noise=noise, mask=MASK))


def in_flow() -> tuple[Any, Inversion]:
    times = ki.levels.FlowTimes([0.9, 0.5, 0.1])
    return in_flow_time, ki.invert(in_flow_time, 0.9 * images(2), times, sampler="dpmpp_2m")


def embedded() -> tuple[Any, Inversion]:
    given: dict[str, Any] = {
        "cfg": 3.0, "positive": {"shift": torch.full((1, 6), 0.5, dtype=torch.float64)},
        "negative": {"shift": torch.zeros(1, 6, dtype=torch.float64)},
    }  # fmt: skip
    return shifted, null_text(shifted, images(2), SIGMAS, lr=0.1, iterations=2, **given)


CASES: dict[str, Callable[[], tuple[Any, Inversion]]] = {
    "euler": inverted("euler"),
    "multistep": inverted("dpmpp_2m", mask=MASK),
    "pair": inverted("edict", mask=MASK),
    "bdia": inverted("bdia"),
    "mccallum": inverted("mccallum_foster"),
    "not checked": inverted("euler", check=False),
    "too few": inverted("heun", max_evals=20),
    "noises": extracted("euler_ancestral"),
    "brownian": extracted("dpmpp_sde"),
    "flow": in_flow,
    "embedded": embedded,
    "steered": lambda: (MIXTURE, rf_inversion(MIXTURE, images(2), SIGMAS, eta=0.5)),
    "scale": guided(2.0),
    "per step": guided([1.5, 2.0, 2.5, 1.0]),
    "rescaled": guided(ki.guidance.Rescale(ki.guidance.Interval(2.0, 0.5, 5.0), 0.5, "x0")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_inversion_comes_back_bit_by_bit_and_samples_the_same(case: str, tmp_path: Path) -> None:
    denoiser, found = CASES[case]()
    found.save(tmp_path / "found.safetensors")
    again = ki.load(tmp_path / "found.safetensors")
    assert isinstance(again, Inversion) and str(again) == str(found)
    for f in fields(found):
        assert same(getattr(found, f.name), getattr(again, f.name)), f.name
    assert torch.equal(again.sample(denoiser), found.sample(denoiser))
    assert [path.name for path in tmp_path.iterdir()] == ["found.safetensors"]


def test_conditioning_is_kept_or_asked_for(tmp_path: Path) -> None:
    class Prompt:
        """Something that a file cannot hold."""

    def denoiser(x: Tensor, sigma: Tensor, **given: Any) -> Tensor:
        seen.append(given)
        return MIXTURE(x, sigma)

    seen: list[dict[str, Any]] = []
    kept = {
        "text": ["a", "b"], "pair": (1, 2.5), "sizes": {"width": 8, 3: None}, "flag": True,
        "array": torch.arange(3.0).numpy(), "embedding": torch.ones(2, 4, dtype=torch.bfloat16),
    }  # fmt: skip
    found = ki.invert(denoiser, images(2), SIGMAS, positive=kept)
    found.save(tmp_path / "a")
    again: Any = ki.load(tmp_path / "a")
    assert again.back.positive["array"].tolist() == [0, 1, 2]
    assert same({**again.back.positive, "array": 0}, {**kept, "array": 0})
    again.sample(denoiser)
    assert (
        seen[-1]["text"] == ["a", "b"] and seen[-1]["pair"] == (1, 2.5) and seen[-1]["sizes"] == {"width": 8, 3: None}
    )
    lost = {"prompt": [Prompt()], "complex": torch.ones(2, dtype=torch.complex64), "n": 1}
    found = ki.invert(denoiser, images(2), SIGMAS, positive=lost)
    found.save(tmp_path / "b")
    again = ki.load(tmp_path / "b")
    with pytest.raises(
        ValueError, match=r"positive\['prompt'\]\[0\] was an object of .*Prompt, which a file cannot hold; give"
    ):
        again.sample(denoiser)
    assert torch.equal(again.sample(denoiser, positive=lost), found.sample(denoiser))
    again.save(tmp_path / "c")  # what was lost stays described
    assert ki.load(tmp_path / "c").back.positive["complex"] == Unsaved("Tensor of shape (2,)")


def test_a_function_for_cfg_is_asked_for(tmp_path: Path) -> None:
    def mine(cond: Tensor, uncond: Tensor, sigma: Tensor) -> Tensor:
        return uncond + 2.0 * (cond - uncond)

    for cfg in (mine, ki.guidance.Function(mine), ki.guidance.Rescale(mine, 0.5, "x0"), [1.5, mine, 2.0, 1.0]):
        found = ki.invert(labelled, images(2), SIGMAS, **{**guidance(2.0, 2), "cfg": cfg})
        found.save(tmp_path / "a")
        again: Any = ki.load(tmp_path / "a")
        with pytest.raises(ValueError, match=r"cfg(\[1\])? was .*mine.*, which a file cannot hold; give it again"):
            again.sample(labelled)
        assert torch.equal(again.sample(labelled, cfg=cfg), found.sample(labelled))


def test_a_rule_that_is_not_registered_is_asked_for(tmp_path: Path) -> None:
    found = ki.invert(MIXTURE, images(2), SIGMAS, sampler=Mine())
    found.save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"/a' was made with the sampler 'mine_alone', .*ki\.load\(path, sampler=rule"):
        ki.load(tmp_path / "a")
    again: Any = ki.load(tmp_path / "a", sampler=Mine())
    assert torch.equal(again.sample(MIXTURE), found.sample(MIXTURE))


def test_to_moves_states_and_conditioning_and_says_that_the_certificate_is_older(tmp_path: Path) -> None:
    given: dict[str, Any] = {"positive": {"shift": torch.full((1, 6), 0.5, dtype=torch.float64), "text": "a"}}
    found = ki.invert(
        lambda x, s, shift, text: shifted(x, s, shift), images(2), SIGMAS, sampler="edict", mask=MASK, **given
    )
    narrow = found.to("cpu", torch.float32)
    states = [narrow.latent, narrow.restored, *narrow.memory.values(), narrow.back.image, narrow.back.mask]
    assert {state.dtype for state in states if state is not None} == {torch.float32}
    assert narrow.back.positive["shift"].dtype == torch.float32 and narrow.back.positive["text"] == "a"  # type: ignore
    assert narrow.residuals.dtype == torch.float64 and narrow.warnings[-1].startswith("converted from torch.float64 to")
    assert found.to("cpu").warnings == found.warnings and torch.equal(found.to("cpu").latent, found.latent)
    with pytest.raises(TypeError, match="dtype must be one of"):
        found.to(dtype=torch.int64)
    meta = found.to("meta")
    assert meta.latent.is_meta and meta.round_trip_error.is_meta
    with pytest.raises(ValueError, match="latent has a shape but no values"):
        meta.save(tmp_path / "a")


def test_round_trips_and_schedules(tmp_path: Path) -> None:
    result = ki.round_trip(MIXTURE, images(2), SIGMAS)
    result.save(tmp_path / "new" / "r.safetensors")
    again: Any = ki.load(tmp_path / "new" / "r.safetensors")
    assert all(same(getattr(result, f.name), getattr(again, f.name)) for f in fields(result))
    assert (
        again.to(dtype=torch.float32).latent.dtype == torch.float32 and again.to(dtype=torch.float32).mse is again.mse
    )
    for levels in (
        ki.levels.edm(), ki.levels.flow(3.0), ki.levels.stable_diffusion(), ki.levels.v_diffusion(0.1, 10.0),
        ki.levels.from_table([0.1, 1.0, 9.0], [1.0, 2.0, 5.0]), None,
    ):  # fmt: skip
        sigmas = ki.schedule("simple", 3, levels or ki.levels.edm())
        ki.Schedule(sigmas, "simple", levels, {"rho": 7.0}).save(tmp_path / "s")
        found: Any = ki.load(tmp_path / "s")
        assert torch.equal(found.sigmas, sigmas) and type(found.sigmas) is type(sigmas)
        assert found.coordinates == getattr(sigmas, "coordinates", None) and found.options == {"rho": 7.0}
        if levels is None:
            assert found.levels is None
            continue
        assert type(found.levels) is type(levels) and torch.equal(found.levels.sigmas, levels.sigmas)
        assert torch.equal(found.levels.timestep(sigmas[1]), levels.timestep(sigmas[1]))
    with pytest.raises(TypeError, match="sigmas must be a 1-D tensor"):
        ki.Schedule([1.0, 0.0])  # type: ignore[arg-type]


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors' holds no result that ki\.load reads.*ki\.pictures\.read"):
        ki.load(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="it is of the kind 'latent'"):
        ki.load(FILES / "1.0" / "latent.safetensors")
    whole = (FILES / "1.0" / "inversion.safetensors").read_bytes()
    for at in (0, 40, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:at])
        with pytest.raises(ValueError, match=r"cannot read .*/cut'"):
            ki.load(tmp_path / "cut")
    with pytest.raises(ValueError, match=r"cannot read .*/nowhere'"):
        ki.load(tmp_path / "nowhere")


def rewritten(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The committed inversion, with another content of its metadata."""
    with safe_open(FILES / "1.0" / "inversion.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        head = json.loads(file.metadata()["kinvert"])
    change(head)
    save_file(tensors, tmp_path / "new.safetensors", {"kinvert": json.dumps(head)})
    return tmp_path / "new.safetensors"


def test_a_file_of_a_newer_minor_version_is_read_with_a_warning(tmp_path: Path) -> None:
    def newer(head: dict[str, Any]) -> None:
        head["version"] = [1, 9]
        head["content"] |= {"colour": "red"}
        head["content"]["back"]["speed"] = 3
        head["content"]["reasons"][0] = "TIRED"

    with pytest.warns(RuntimeWarning) as told:
        found: Any = ki.load(rewritten(tmp_path, newer))
    said = " ".join(str(one.message) for one in told)
    assert "Inversion) has entries" in said and "colour" in said and "WayBack) has entries" in said and "TIRED" in said
    assert {Path(one.filename).name for one in told} == {"test_loading.py"}
    assert found.reasons == (Reason.STALLED, Reason.CONVERGED) and bool(found.converged.all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: head.update(version=[2, 0]), r"file version 2\.0.*pip install -U kinvert"),
        (lambda head: head["content"].pop("latent"), "has no entry 'latent'"),
        (lambda head: head["content"]["back"].update(cfg={"$spell": 1}), "holds a spell, which this version"),
        (lambda head: head["content"]["back"].update(cfg={"$object": {"class": "Path"}}), "holds a Path, which this"),
        (lambda head: head["content"].update(latent={"$tensor": "gone"}), "is damaged, KeyError: 'gone'"),
        (lambda head: head["content"].update(back=3), "is damaged"),
        (lambda head: head.update(content=3), "is damaged"),
    ],
)
def test_what_cannot_be_right_is_an_error(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as told:
        ki.load(rewritten(tmp_path, change))
    assert "new.safetensors" in str(told.value)


# -- files of every version --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", ["1.0"])
def test_the_files_of_every_version_are_read(version: str) -> None:
    """Made by tests/data/files/make.py; what it computed is what is in them."""
    denoiser = ki.denoisers.Gaussian(0.0, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
    place = FILES / version
    found: Any = ki.load(place / "inversion.safetensors")
    assert (
        found.back.sampler == ki.sampler("bdia")
        and found.converged.all()
        and found.memory
        and found.back.mask is not None
    )
    torch.testing.assert_close(found.sample(denoiser), found.restored, rtol=0, atol=1e-12)
    noises: Any = ki.load(place / "noises.safetensors")
    assert len(noises.noises) == 3
    torch.testing.assert_close(noises.sample(denoiser), noises.restored, rtol=0, atol=1e-12)
    sigmas = ki.schedule("karras", 4, ki.levels.edm(0.1, 10.0))
    stored: Any = ki.load(place / "schedule.safetensors")
    torch.testing.assert_close(stored.sigmas, sigmas, rtol=1e-12, atol=0)
    assert stored.name == "karras" and stored.levels.sigma_max == 10.0
    plan: Any = ki.load(place / "plan.json")
    assert plan.rule == ki.sampler("dpmpp_2m_sde") and plan.draws == 3
    result: Any = ki.load(place / "round_trip.safetensors")
    assert result.psnr.shape == (2,) and result.latent.dtype == torch.float64


def test_an_inversion_made_by_hand_is_kept_without_its_way_back(tmp_path: Path) -> None:
    found = replace(ki.invert(MIXTURE, images(2), SIGMAS), back=None)
    found.save(tmp_path / "a")
    again: Any = ki.load(tmp_path / "a")
    assert again.back is None
    shutil.copy(tmp_path / "a", tmp_path / "b")
    assert same(ki.load(tmp_path / "b").latent, found.latent)
