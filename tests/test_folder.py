"""A folder inverted: every file once, as `invert` would do it, whatever happens to the process meanwhile."""

from __future__ import annotations

import json
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import PIXELS, write_digits
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.torch_version import TorchVersion

import kinvert as ki
from kinvert import bench, models
from kinvert.bench import Cell
from kinvert.denoisers import guide
from kinvert.engine import run_state
from kinvert.folder import invert_folder
from kinvert.folderback import open_shard
from kinvert.plan import compile_plan

SIGMAS = ki.schedules.karras(4, 0.02, 80.0)[:-1]
CELL = Cell("digits", steps=3, dtype="float32")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_digits(tmp_path / "images")


def images(*indices: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(PIXELS[list(indices), None].astype(np.float64)).div(127.5).sub(1).to(dtype)


def manifest(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def latents(out: Path, rows: list[dict[str, Any]]) -> torch.Tensor:
    return torch.stack([load_file(out / row["shard"])["latents"][row["row"]] for row in rows])


def test_every_file_is_inverted_once(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = invert_folder(source, out, CELL, shard_size=2)
    assert rows == manifest(out)
    assert [row["file"] for row in rows] == ["a.png", "b.PNG", "c.png", "more/a.png", "more/d.png"]
    assert [row["row"] for row in rows] == [0, 1, 0, 1, 0] and len({row["shard"] for row in rows}) == 3
    x, denoiser = images(0, 1, 2, 3, 4), models.load("digits")
    found = ki.unsample(denoiser, x, SIGMAS, sigma_offset=0.0)
    torch.testing.assert_close(latents(out, rows), found, rtol=1e-4, atol=1e-3)
    error = (ki.sample(denoiser, found, SIGMAS) - x).square().mean((1, 2, 3)).sqrt()
    assert [row["round_trip_error"] for row in rows] == pytest.approx(error.tolist(), rel=1e-3)
    assert {row["evaluations"] for row in rows} == {3} and {row["converged"] for row in rows} == {None}
    files = {path.name for path in out.iterdir()}
    keys = {row["shard"].partition(".")[0] for row in rows}
    assert files == {"manifest.jsonl", "settings.json"} | {f"{k}.{s}" for k in keys for s in ("json", "safetensors")}


def test_exact_inversion_is_certified(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "batch.npy", np.random.default_rng(0).normal(size=(3, 16)))
    rows = invert_folder(tmp_path / "in", tmp_path / "out", Cell("gaussian", method="invert", steps=4))
    assert [(row["index"], row["converged"]) for row in rows] == [(0, True), (1, True), (2, True)]
    assert max(row["round_trip_error"] for row in rows) <= 1e-9


@pytest.mark.usefixtures("one_thread")  # which models have that come with kinvert
def test_conditioning_and_guidance(source: Path, tmp_path: Path) -> None:
    cell = Cell("digits", steps=3, dtype="float32", cfg=3.0)
    rows = invert_folder(source, tmp_path / "out", cell, positive={"label": 3}, negative={"label": 10})
    guidance = {"cfg": 3.0, "positive": {"label": torch.tensor([3])}, "negative": {"label": torch.tensor([10])}}
    x = images(0, 1, 2, 3, 4)
    found = ki.unsample(models.load("digits"), x, SIGMAS, sigma_offset=0.0, **guidance)
    torch.testing.assert_close(latents(tmp_path / "out", rows), found, rtol=1e-4, atol=1e-3)


def test_noises_and_memory_are_kept_with_the_latents(tmp_path: Path) -> None:
    x = torch.randn(2, 16, dtype=torch.float64, generator=torch.manual_seed(0))
    (tmp_path / "in").mkdir()
    save_file({"x": x}, tmp_path / "in" / "x.safetensors")
    problem = bench.PROBLEMS["gaussian"](1, 0, torch.float64)
    sigmas = ki.schedules.karras(5, 0.03, 15.0)[:-1]
    kept = {}
    for method, sampler in (("extract_noise", "euler_ancestral"), ("reversible", "edict")):
        cell = Cell("gaussian", method=method, sampler=sampler, steps=4)
        (row, _) = invert_folder(tmp_path / "in", tmp_path / method, cell)
        kept[method] = load_file(tmp_path / method / row["shard"])
    noises = [kept["extract_noise"][f"noises/{i}"] for i in range(4)]
    again = ki.sample(
        problem.denoiser, kept["extract_noise"]["latents"], sigmas, sampler="euler_ancestral",
        noise=ki.noise.replay(noises),
    )  # fmt: skip
    torch.testing.assert_close(again, x, rtol=0, atol=1e-12)
    state = {"x": kept["reversible"]["latents"], "y": kept["reversible"]["memory/y"]}
    again = run_state(compile_plan("edict", sigmas).closed, guide(problem.denoiser), state)["x"]
    torch.testing.assert_close(again, x, rtol=0, atol=1e-12)


def test_every_format_gives_the_same_latent(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    x = images(0, dtype=torch.float64)
    Image.fromarray(PIXELS[0]).convert("RGB").save(folder / "rgb.png")
    Image.fromarray(PIXELS[0]).save(folder / "grey.jpg", quality=100, subsampling=0)
    np.save(folder / "one.npy", x[0].numpy())
    torch.save(x, folder / "one.pt")
    save_file({"anything": x}, folder / "one.safetensors")
    rows = invert_folder(folder, tmp_path / "out", replace(CELL, dtype="float64"))
    found = dict(zip([row["file"] for row in rows], latents(tmp_path / "out", rows), strict=True))
    for name in ("rgb.png", "one.npy", "one.pt"):
        torch.testing.assert_close(found[name], found["one.safetensors"])
    assert (found["grey.jpg"] - found["one.npy"]).square().mean() < 0.1 * found["one.npy"].square().mean()


# -- what goes wrong ---------------------------------------------------------------------------------------------------
SUICIDAL = """
import os, signal
from dataclasses import replace
from pathlib import Path
from kinvert.bench.problems import PROBLEMS

HERE = Path(__file__).parent

def model(count, seed, dtype):
    problem = PROBLEMS["gaussian"](count, seed, dtype)

    def denoiser(x, sigma):
        with (HERE / f"calls-{os.getpid()}").open("a") as file:
            file.write("call\\n")
        calls = (HERE / f"calls-{os.getpid()}").read_text().count("call")
        if calls == 12:
            try:
                (HERE / "died").touch(exist_ok=False)  # by one worker only, however they race
            except FileExistsError:
                return problem.denoiser(x, sigma)
            os.kill(os.getpid(), signal.SIGKILL)
        return problem.denoiser(x, sigma)

    return replace(problem, denoiser=denoiser)
"""


def test_killed_worker_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsampling 3 steps and sampling back makes 6 calls a shard: a worker dies at the end of its second."""
    modules, folder = tmp_path / "modules", tmp_path / "in"
    for path in (modules, folder):
        path.mkdir()
    (modules / "suicidal.py").write_text(SUICIDAL)
    monkeypatch.syspath_prepend(modules)
    generator = np.random.default_rng(0)
    for i in range(12):
        np.save(folder / f"{i:02}.npy", generator.normal(size=16))
    cell = Cell("suicidal:model", steps=3)
    try:
        with pytest.raises(
            bench.UnfinishedError, match=r"(?s)^1 of 12 are not done.*npy: its process was killed by SIGKILL"
        ):
            invert_folder(folder, tmp_path / "out", cell, shard_size=1, workers=2, threads=1)
        done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.json")}
        assert len(done) == 11 + 1 and not (tmp_path / "out" / "manifest.jsonl").exists()
        rows = invert_folder(folder, tmp_path / "out", cell, shard_size=1, workers=2, threads=1)
        assert (
            done.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.json")}.items()
        )
        assert [row["file"] for row in rows] == [f"{i:02}.npy" for i in range(12)]
        assert len({row["shard"] for row in rows}) == 12
        again = invert_folder(folder, tmp_path / "again", cell, shard_size=1, threads=1)
        assert again == rows
        assert torch.equal(latents(tmp_path / "out", rows), latents(tmp_path / "again", again))
    finally:
        sys.modules.pop("suicidal", None)


@pytest.mark.parametrize("damage", ["gone", "cut short", "other bytes", "edited rows", "rows cut short"])
def test_a_damaged_shard_is_computed_again(damage: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = invert_folder(source, out, CELL, shard_size=2)
    before = {path: path.read_bytes() for path in out.iterdir()}
    path, note = out / rows[2]["shard"], (out / rows[2]["shard"]).with_suffix(".json")
    if damage == "gone":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(before[path][:-5])
    elif damage == "other bytes":
        path.write_bytes(before[path][:-1] + bytes([before[path][-1] ^ 1]))
    elif damage == "edited rows":
        note.write_bytes(before[note].replace(b'"row":1', b'"row":0'))
    else:
        note.write_bytes(before[note][:-5])
    with pytest.raises(ValueError, match=r"cannot read .*`kinvert invert` that wrote it computes it again"):
        open_shard(path)
    with pytest.warns(
        RuntimeWarning, match=r"1 damaged result is set aside, and computed again:\n  c\.png to more/a\.png"
    ):
        assert invert_folder(source, out, CELL, shard_size=2) == rows
    assert before.items() <= {path: path.read_bytes() for path in out.iterdir()}.items()
    assert invert_folder(source, out, CELL, shard_size=2) == rows  # without a warning


@pytest.mark.parametrize("damage", ["gone", "cut short", "a list", "a folder"])
def test_damaged_settings_are_those_of_the_shards(damage: str, source: Path, tmp_path: Path) -> None:
    out, how = tmp_path / "out", {"positive": {"label": 3}}
    rows = invert_folder(source, out, CELL, **how)
    path = out / "settings.json"
    before = path.read_bytes()
    for positive in ({"label": 3}, {"label": 4}):
        path.unlink()
        if damage == "a folder":
            path.mkdir()
        elif damage != "gone":
            path.write_bytes(before[:-5] if damage == "cut short" else b"[]")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if positive == how["positive"]:
                assert invert_folder(source, out, CELL, **how) == rows
            else:
                with pytest.raises(ValueError, match="made with positive={'label': 3}, got {'label': 4}"):
                    invert_folder(source, out, CELL, positive=positive)
        said = [str(warning.message) for warning in caught]
        assert len(said) == (damage != "gone") and all("settings.json is damaged" in words for words in said)
        assert path.read_bytes() == before
        for aside in out.glob("*.damaged"):
            aside.rmdir() if aside.is_dir() else aside.unlink()


def test_a_file_that_changes_during_the_run_is_no_result(source: Path, tmp_path: Path) -> None:
    """The latents would belong to another content than the key of their shard says."""

    def change(setup: Any, x: torch.Tensor) -> Any:
        Image.fromarray(PIXELS[7]).save(source / "more" / "d.png")
        return bench.METHODS["unsample"](setup, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.METHODS, "changing", change)
        with pytest.raises(bench.UnfinishedError, match=r"1 of 3 are not done.*\n.*more/d\.png was changed since"):
            invert_folder(source, tmp_path / "out", replace(CELL, method="changing"), shard_size=2)


def test_later_files_are_added(source: Path, tmp_path: Path) -> None:
    first = invert_folder(source, tmp_path / "out", CELL, shard_size=2)
    Image.fromarray(PIXELS[7]).save(source / "z.png")
    second = invert_folder(source, tmp_path / "out", CELL, shard_size=2)
    assert second[:4] == first[:4] and [row["file"] for row in second[4:]] == ["more/d.png", "z.png"]


def test_changed_content_is_inverted_again(source: Path, tmp_path: Path) -> None:
    """Files of the same names and sizes: latents of an earlier content are not those of this one."""
    x = np.random.default_rng(0).normal(size=(2, 1, 8, 8))
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "0.npy", x[0 if name == "one" else 1])
    found = [
        latents(tmp_path / "out", invert_folder(tmp_path / name, tmp_path / "out", CELL))
        for name in ("one", "other", "one")
    ]
    assert torch.equal(found[0], found[2]) and not torch.allclose(found[0], found[1])
    np.save(tmp_path / "one" / "0.npy", x[1])
    assert torch.equal(latents(tmp_path / "out", invert_folder(tmp_path / "one", tmp_path / "out", CELL)), found[1])


def test_bad_files_do_not_spoil_their_shard(source: Path, tmp_path: Path) -> None:
    (source / "c.png").write_bytes(b"nonsense")
    (source / "more" / "a.png").write_bytes(b"nonsense")
    with pytest.raises(bench.UnfinishedError, match=r"(?s)2 of 5 are not done; the others are.*c\.png.*a\.png"):
        invert_folder(source, tmp_path / "out", CELL)
    assert [row["file"] for row in manifest(tmp_path / "out")] == ["a.png", "b.PNG", "more/d.png"]


NESTED = "dense tensor, got nested" if TorchVersion(torch.__version__) >= "2.5" else "Weights only load failed"


def write_odd_files(folder: Path) -> dict[str, str]:
    """Write files that cannot be inverted, and return what is to be said of each."""
    x = torch.zeros(1, 8, 8)
    torch.save(x.to_sparse(), folder / "sparse.pt")
    torch.save(x.to("meta"), folder / "meta.pt")
    torch.save(torch.nested.nested_tensor([x[0], x[0]], layout=torch.jagged), folder / "nested.pt")
    torch.save(x.to(torch.float8_e4m3fn), folder / "float8.pt")
    torch.save(x.to(torch.complex64), folder / "complex.pt")
    torch.save(torch.nn.Linear(1, 1), folder / "module.pt")
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 8, 8), }\n"
    (folder / "huge.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    (folder / "empty.npz").write_bytes(b"PK")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "bomb.png")
    content = (folder / "bomb.png").read_bytes()
    size = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + content[24:29]
    (folder / "bomb.png").write_bytes(content[:12] + size + zlib.crc32(size).to_bytes(4, "big") + content[33:])
    (folder / "nowhere.png").symlink_to(folder / "gone.png")
    return {
        "sparse.pt": "dense tensor, got torch.sparse_coo", "meta.pt": "no values (meta or fake)",
        "nested.pt": NESTED, "float8.pt": "float8_e4m3fn", "complex.pt": "complex64",
        "module.pt": "", "huge.npy": "", "empty.npz": "", "bomb.png": "decompression bomb", "nowhere.png": "No such file",
    }  # fmt: skip


def test_odd_files_cost_themselves_alone(source: Path, tmp_path: Path) -> None:
    odd = write_odd_files(source)
    with (
        warnings.catch_warnings(),
        pytest.raises(bench.UnfinishedError, match=f"^{len(odd)} of {5 + len(odd)} are not done") as unfinished,
    ):
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        warnings.filterwarnings("ignore", "Validating sparse tensor invariants")  # torch 2.14
        invert_folder(source, tmp_path / "out", CELL)
    said = str(unfinished.value).splitlines()[1:]
    for name, why in odd.items():
        assert any(name in line and why in line for line in said), (name, said)
    assert [row["file"] for row in manifest(tmp_path / "out")] == [
        "a.png",
        "b.PNG",
        "c.png",
        "more/a.png",
        "more/d.png",
    ]


def test_failed_first_run_leaves_the_folder_free(source: Path, tmp_path: Path) -> None:
    with pytest.raises(bench.UnfinishedError, match="euler_ancestral cannot unsample"):
        invert_folder(source, tmp_path / "out", replace(CELL, sampler="euler_ancestral"))
    with pytest.raises(ValueError, match="the model does not take positive lable=3"):
        invert_folder(source, tmp_path / "out", CELL, positive={"lable": 3})
    assert len(invert_folder(source, tmp_path / "out", CELL, positive={"label": 3})) == 5


def test_out_may_lie_in_source(source: Path) -> None:
    rows = invert_folder(source, source / "out", CELL)
    assert invert_folder(source, source / "out", CELL) == rows and len(rows) == 5


def test_a_bad_file_is_named_and_the_others_are_done(source: Path, tmp_path: Path) -> None:
    def spoil(name: str, content: bytes = b"nonsense") -> None:
        (source / name).write_bytes(content)

    spoil("c.png")
    with pytest.raises(
        bench.UnfinishedError, match=r"(?s)1 of 5 are not done.*cannot read .*c\.png: cannot identify image"
    ):
        invert_folder(source, tmp_path / "out", CELL, shard_size=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4
    Image.fromarray(PIXELS[2]).save(source / "c.png")
    assert len(invert_folder(source, tmp_path / "out", CELL, shard_size=1)) == 5


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda p: np.save(p / "x.npy", np.zeros((1, 9, 9))), r"x\.npy has shape \(1, 9, 9\), but the model takes \(1, 8, 8\)"),
        (lambda p: np.save(p / "x.npy", np.zeros((0, 1, 8, 8))), r"has shape \(0, 1, 8, 8\)"),
        (lambda p: np.save(p / "x.npy", np.full((1, 8, 8), np.nan)), "has NaN or infinite values"),
        (lambda p: np.save(p / "x.npy", np.zeros((1, 8, 8), dtype=int)), "must hold a floating point tensor"),
        (lambda p: torch.save({"x": torch.zeros(1, 8, 8)}, p / "x.pt"), "must hold a floating point tensor, it has dict"),
        (lambda p: save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, p / "x.safetensors"), "must hold one tensor"),
        (lambda p: Image.fromarray(np.zeros((8, 8), np.uint16)).save(p / "x.png"), "convert it to 8 bits"),
        (lambda p: (p / "x.jpg").write_bytes(b""), r"cannot read .*x\.jpg"),
    ],
)  # fmt: skip
def test_bad_files_are_refused(save: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save(tmp_path / "in")
    with pytest.raises(bench.UnfinishedError, match=message):
        invert_folder(tmp_path / "in", tmp_path / "out", CELL)


def test_bad_folders_are_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="source must be a folder"):
        invert_folder(tmp_path / "nowhere", tmp_path / "out", CELL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images or latents in .*it takes \.png"):
        invert_folder(tmp_path / "empty", tmp_path / "out", CELL)
    with pytest.raises(ValueError, match="shard_size must be a positive int, got 0"):
        invert_folder(source, tmp_path / "out", CELL, shard_size=0)
    invert_folder(source, tmp_path / "out", CELL)
    with pytest.raises(ValueError, match=r"made with steps=3, got 4; choose another folder"):
        invert_folder(source, tmp_path / "out", Cell("digits", steps=4, dtype="float32"))
    with pytest.raises(ValueError, match=r"made with positive=\{\}, got \{'label': 1\}"):
        invert_folder(source, tmp_path / "out", CELL, positive={"label": 1})
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"images needs Pillow.*pip install 'kinvert\[cli\]'"):
        invert_folder(source, tmp_path / "other", CELL)
