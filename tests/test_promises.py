"""What docs/promises.md promises and no other test shows; and that every sentence there names tests that exist."""

from __future__ import annotations

import ast
import copy
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import measured
from inverting import MIXTURE, images, schedule
from torch import Tensor

import kinvert as ki
from kinvert import bench
from kinvert.bench import report
from kinvert.engine import contract
from kinvert.jsontext import canonical_json, content_key

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "promises.md"
SIGMAS = schedule(5)
COPIES: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]


# -- the page ----------------------------------------------------------------------------------------------------------
def promises() -> list[tuple[str, list[tuple[str, str]]]]:
    """The rows of the tables of the page: a sentence, and the files and names of its tests."""
    rows = re.findall(r"^\| (.+?) \| (`tests/.+) \|$", PAGE.read_text(), re.MULTILINE)
    return [(said, re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)) for said, tests in rows]


def test_every_promise_names_tests_that_exist() -> None:
    found = promises()
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    heads = [
        line
        for line in lines
        if line.startswith(("| Promise |", "| --- |", "| Sampler, steps |", "| `euler`", "| `heun`", "| `dpmpp_2m`"))
    ]
    assert len(found) == len(lines) - len(heads) >= 30
    for said, tests in found:
        assert tests, said
        for file, name in tests:
            tree = ast.parse((ROOT / file).read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


# -- what is never executed --------------------------------------------------------------------------------------------
SERIALIZERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
ALLOWED = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}


def test_no_module_unpickles_or_evaluates() -> None:
    """Read off the source: no pickle, no `eval` and `exec`, and loaders only where they refuse pickles."""
    for path in (ROOT / "kinvert").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                named = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not SERIALIZERS & {name.partition(".")[0] for name in named}, path
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__"), path
            if called in ALLOWED:
                assert ALLOWED[called] in ast.unparse(node), f"{path}: {called}"


class Trap:
    """Runs code where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_file_with_a_pickle_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"x": Trap(mark)}, tmp_path / "a.pt")
    (tmp_path / "a.json").write_bytes(pickle.dumps(Trap(mark)))
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Trap(mark)))
    for name in ("a.json", "a.safetensors", "a.pt"):
        for read in (ki.load, ki.pictures.read):
            with pytest.raises((ValueError, TypeError)):
                read(tmp_path / name)
    assert not mark.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert mark.exists()


def test_records_and_their_report_import_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of a record is an entry point of the user's own, which is here but is not called for."""
    record = measured()
    record["cell"]["model"] = "a_trap:model"
    record["key"] = content_key(record["cell"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{record['key']}.json").write_text(canonical_json(record))
    (tmp_path / "a_trap.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    records = bench.load(tmp_path / "out")
    assert "a_trap:model" in repr(records) + records._repr_html_()
    assert report.write([tmp_path / "out"], tmp_path / "report").exists()
    assert "a_trap" not in sys.modules


# -- determinism -------------------------------------------------------------------------------------------------------
RUN = """
import hashlib, torch, kinvert as ki
x = ki.noise.white([3, 4]).bind(torch.zeros(2, 6))(1.0, 0.5)
gaussian, sigmas = ki.denoisers.Gaussian(0.3, 0.5), ki.schedules.karras(6, 0.1, 10.0)
parts = [ki.sample(gaussian, 10 * x, sigmas, sampler="dpmpp_2m_sde", noise=ki.noise.brownian(7))]
parts.append(ki.invert(gaussian, x, sigmas[:-1], sampler="heun").latent)
print(hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest())
"""


def test_another_process_computes_the_same_bits(capsys: pytest.CaptureFixture[str]) -> None:
    exec(RUN, {})
    here = capsys.readouterr().out.strip()
    run = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == here and len(here) == 64


# -- threads -----------------------------------------------------------------------------------------------------------
def works(sampler: str) -> list[Callable[[], Tensor]]:
    """Runs of one Plan and one denoiser: down, up, inverted, one evaluation at a time, and with a careless denoiser."""
    plan, x = ki.compile_plan(sampler, SIGMAS), 8 * images(3)
    noise = ki.noise.brownian(3)

    def careless(y: Tensor, sigma: Tensor) -> Tensor:
        out: Tensor = MIXTURE(y, sigma)
        sigma.fill_(float("nan"))
        return out

    def by_hand() -> Tensor:
        run = ki.stepwise(plan, x, noise)
        while not run.done:
            run.send(MIXTURE(run.x, run.sigma))
        return run.result

    found: list[Callable[[], Tensor]] = [
        lambda: ki.run(plan, MIXTURE, x, noise),
        lambda: ki.sample(careless, x, SIGMAS, sampler=sampler, noise=noise),
        by_hand,
    ]
    if not plan.is_stochastic:
        found.append(lambda: ki.unsample(MIXTURE, images(3), SIGMAS, sampler=sampler))
        found.append(lambda: ki.invert(MIXTURE, images(3), SIGMAS, sampler=sampler, max_evals=60).latent)
    return found


@pytest.mark.filterwarnings("ignore:.*not inverted")
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpmpp_2m_sde"])
def test_four_threads_share_a_plan_and_a_denoiser(sampler: str) -> None:
    """Bit for bit what one thread computes alone."""
    work = works(sampler)
    barrier, problems = threading.Barrier(4), list[str]()

    @torch.no_grad()  # threads have this setting each for itself
    def thread(number: int) -> None:
        barrier.wait()
        for i in range(8):
            at = (number + i) % len(work)
            if not torch.equal(work[at](), alone[at]):
                problems.append(f"thread {number}, job {at}")

    with torch.no_grad():
        alone = [one() for one in work]
    threads = [threading.Thread(target=thread, args=(number,)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not problems


# -- copies ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m_sde", "bdia", "uni_pc", "euler_ancestral"])
def test_plans_are_copied_and_pickled(name: str, way: Callable[[Any], Any]) -> None:
    plan, x = ki.compile_plan(name, SIGMAS), 8 * images(2)
    again = way(plan)
    assert again == plan and hash(again) == hash(plan)
    assert torch.equal(ki.run(again, MIXTURE, x, ki.noise.white(1)), ki.run(plan, MIXTURE, x, ki.noise.white(1)))


@pytest.mark.parametrize("way", COPIES)
def test_results_and_sources_are_copied_and_pickled(way: Callable[[Any], Any]) -> None:
    found = ki.invert(MIXTURE, images(2), SIGMAS, sampler="bdia")
    again = way(found)
    assert torch.equal(again.latent, found.latent) and again.reasons == found.reasons
    assert torch.equal(again.sample(MIXTURE), found.sample(MIXTURE))
    trip = ki.round_trip(MIXTURE, images(2), SIGMAS)
    assert torch.equal(way(trip).latent, trip.latent) and torch.equal(way(trip).psnr, trip.psnr)
    sigmas = ki.Schedule(SIGMAS, "karras", ki.levels.edm(0.1, 10.0))
    assert torch.equal(way(sigmas).levels.sigmas, sigmas.levels.sigmas)  # type: ignore[union-attr]
    for source in (ki.noise.white(3), ki.noise.brownian([3, 4])):
        draws = [one.bind(images(2))(2.0, 1.0) for one in (source, way(source))]
        assert torch.equal(*draws)
    run = ki.stepwise(ki.compile_plan("heun", SIGMAS), images(2))
    run.send(MIXTURE(run.x, run.sigma))
    state = way(run.state)
    assert state["stage"] == 1 and torch.equal(state["x"], run.x)


# -- limits ------------------------------------------------------------------------------------------------------------
def never(x: Tensor, sigma: Tensor) -> Tensor:
    raise AssertionError("the denoiser was called")


PLAN = ki.compile_plan("uni_pc", SIGMAS)
VERBS: dict[str, Callable[[Tensor], object]] = {
    "sample": lambda x: ki.sample(never, x, SIGMAS),
    "unsample": lambda x: ki.unsample(never, x, SIGMAS),
    "invert": lambda x: ki.invert(never, x, SIGMAS),
    "extract_noise": lambda x: ki.extract_noise(never, x, SIGMAS, sampler="euler_ancestral"),
    "round_trip": lambda x: ki.round_trip(never, x, SIGMAS),
    "run": lambda x: ki.run(PLAN, never, x),
    "stepwise": lambda x: ki.stepwise(PLAN, x),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_state_that_does_not_fit_is_refused_before_the_work(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view of one number, which would be 1.1 TB: nothing reads it."""
    monkeypatch.setattr(contract, "memory_limit", lambda: 64 * 2**30)
    x = torch.zeros(1).expand(2**17, 2**21)
    with pytest.raises(ValueError, match=r"does not fit: a tensor of its size takes 1,099\.5 GB.* has 68\.7 GB"):
        VERBS[verb](x)


def test_the_estimate_is_what_the_plan_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 tensors for UniPC: 9 fit or not with x; small states, and systems that tell no limit, are not asked."""
    x, limit = torch.zeros(2**10), 2**12
    monkeypatch.setattr(contract, "LARGE", 2**12)
    for room, fits in ((9 * limit, True), (9 * limit - 1, False)):
        monkeypatch.setattr(contract, "memory_limit", lambda room=room: room)
        if fits:
            contract.check_room(x, PLAN)
        else:
            with pytest.raises(ValueError, match="a run needs at least 8 of them besides x"):
                contract.check_room(x, PLAN)
    contract.check_room(x[1:], PLAN)
    monkeypatch.setattr(contract, "memory_limit", lambda: None)
    contract.check_room(x, PLAN)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the memory is known on Linux")
def test_the_memory_of_the_machine_is_known() -> None:
    from kinvert.devices import memory_limit

    assert 2**28 < (memory_limit() or 0) < 2**50


@pytest.mark.parametrize("sigmas", [range(10**8 + 1, 0, -1), torch.zeros(1).expand(10**8 + 1), iter(range(1, 10**9))])
def test_a_schedule_of_too_many_steps_is_refused_before_it_is_read(sigmas: Any) -> None:
    with pytest.raises(ValueError, match="sigmas must have at most 1000000 steps, got 100000"):
        ki.compile_plan("euler", sigmas)
    for make in (lambda n: ki.schedules.karras(n, 0.1, 10.0), lambda n: ki.schedule("simple", n, ki.levels.flow())):
        with pytest.raises(ValueError, match=r"steps must be at most 1000000, got 100000000; .* would take 0\.8 GB"):
            make(10**8)
