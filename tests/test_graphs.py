"""Recorded runs and evaluations, compiled runs, and batches in parts.

Without a CUDA device the recorder below stands for it: it takes down every operation with its tensors and carries them
out again, in place, as a graph does. So what is checked is that nothing but those tensors decides a result: a number read
while recording, a tensor replaced, or a buffer of another run would show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import mixture, noise_like
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kinvert as ki
from kinvert import graphs
from kinvert.denoisers import guide

KARRAS = ki.schedules.karras(6, 0.1, 10.0)
NAMES = ["euler", "heun", "dpmpp_2m", "lms", "uni_pc", "dpmpp_2m_sde", "euler_ancestral", "euler_cfg_pp", "edict"]


class Operations(TorchDispatchMode):
    """Takes operations down and carries them out again into the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.__name__.startswith("_local_scalar_dense"):
            raise RuntimeError("operation not permitted when stream is capturing")
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def launch(self) -> None:
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            if not any(r.alias_info for r in func._schema.returns):
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.numel() == new.numel():  # else it was made empty, for `set_`
                        old.copy_(new)


def recorded(functions: Sequence[Callable[[], Any]], x: Tensor) -> graphs.Recording:
    launches, result = [], None
    try:
        with torch.no_grad():
            for _ in range(graphs.WARM_UPS):
                for function in functions:
                    function()
            for function in functions:
                with Operations() as operations:
                    result = function()
                launches.append(operations.launch)
    except RuntimeError as error:
        return graphs.Recording([], None, f"the denoiser cannot be recorded: {error}")
    return graphs.Recording(launches, result, None)


def denoiser_for(plan: ki.Plan) -> ki.Denoiser:
    denoise = mixture()
    return (lambda x, sigma: ki.Guided(denoise(x, sigma), 0.9 * denoise(x, sigma))) if plan.is_guided else denoise


@pytest.mark.parametrize("steps", ["all", "each"])
@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_run_is_the_run(name: str, steps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For other states and other noise than those that were recorded, again and again."""
    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorded)
    plan = ki.compile_plan(name, KARRAS)
    captured = ki.graphs.capture(plan, denoiser_for(plan), torch.zeros(2, 6, dtype=torch.float64), steps)
    assert captured.reason is None
    results = []
    for seed in (1, 2, 1):
        x = 10 * noise_like((2, 6), seed=seed)
        results.append(captured(x, ki.noise.white(seed)))
        with torch.no_grad():
            assert torch.equal(results[-1], ki.run(plan, denoiser_for(plan), x, ki.noise.white(seed)))
    assert torch.equal(results[0], results[2])  # the first is a tensor of its own


def test_a_call_that_is_unlike_the_recorded_one_runs_without_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorded)
    plan, seen = ki.compile_plan("heun", KARRAS), list[int]()
    captured = ki.graphs.capture(plan, mixture(), torch.zeros(2, 6, dtype=torch.float64))
    for x in (10 * noise_like((3, 6)), 10 * noise_like((2, 6)).float()):
        with torch.no_grad():
            assert torch.equal(captured(x), ki.run(plan, mixture(), x))
    x = 10 * noise_like((2, 6))
    assert torch.equal(captured(x, callback=lambda step: seen.append(step.index)), captured(x))
    assert seen == list(range(len(plan.steps)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_callback_sees_a_run_that_is_recorded_step_by_step(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it gets stays as it is, and the run goes through the graphs: the denoiser is not called again."""
    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorded)
    plan, calls = ki.compile_plan(name, KARRAS), 0
    denoise = denoiser_for(plan)

    def counted(x: Tensor, sigma: Tensor) -> Any:
        nonlocal calls
        calls += 1
        out = denoise(x.double(), sigma.double())
        return ki.Guided(*(part.float().to(x) for part in out)) if plan.is_guided else out.to(x)

    captured = ki.graphs.capture(plan, counted, torch.zeros(2, 6, dtype=dtype), "each")
    before = calls
    got, want = list[Any](), list[Any]()
    for seed in (1, 2):
        x = (10 * noise_like((2, 6), seed=seed)).to(dtype)
        result = captured(x, ki.noise.white(seed), got.append)
        assert calls == before
        with torch.no_grad():
            assert torch.equal(result, ki.run(plan, counted, x, ki.noise.white(seed), want.append))
        before = calls
    assert len(got) == len(want) > 0
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.x, other.x) and torch.equal(one.denoised, other.denoised)
        assert vars(replace(one, x=x, denoised=x)) == vars(replace(other, x=x, denoised=x))


def test_noise_is_drawn_step_by_step_or_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tensors as the longest part of the run draws."""
    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorded)
    plan, x = ki.compile_plan("dpmpp_sde", KARRAS), torch.zeros(2, 6, dtype=torch.float64)
    sizes = {steps: len(graphs.CapturedRun(plan, mixture(), x, steps)._noises) for steps in ("all", "each")}
    assert sizes == {"all": plan.draws, "each": 2}


def test_what_a_run_leaves_behind_does_not_enter_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that mean nothing yet are read with weight 0, and 0 times nan is nan."""
    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorded)
    plan, x = ki.compile_plan("lms", KARRAS), 10 * noise_like((2, 6))
    for steps in ("all", "each"):
        captured = graphs.CapturedRun(plan, mixture(), x, steps)
        want = captured(x)
        assert captured(torch.full_like(x, torch.nan)).isnan().all()
        assert torch.equal(captured(x), want)


def test_steps_are_all_or_each() -> None:
    plan, x = ki.compile_plan("euler", KARRAS), torch.zeros(2, 6)
    with pytest.raises(ValueError, match="unknown steps 'eahc'; did you mean 'each'. It must be one of all, each"):
        ki.graphs.capture(plan, mixture(), x, "eahc")  # type: ignore[arg-type]


def test_without_a_device_the_reason_is_given() -> None:
    plan, x = ki.compile_plan("heun", KARRAS), 10 * noise_like((2, 6))
    captured = ki.graphs.capture(plan, mixture(), x)
    assert captured.reason == "x is on cpu, and only a CUDA device has graphs"
    with torch.no_grad():
        assert torch.equal(captured(x), ki.run(plan, mixture(), x))
    with pytest.warns(RuntimeWarning, match="running without a graph: x is on cpu"):
        result = ki.sample(mixture(), x, KARRAS, sampler="heun", graph=True)
    assert torch.equal(result, captured(x))


def test_a_denoiser_that_reads_the_device_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorded)
    plan, x, denoise = ki.compile_plan("euler", KARRAS), 10 * noise_like((2, 6)), mixture()

    def reads(y: Tensor, sigma: Tensor) -> Any:
        return denoise(y, sigma) * (1.0 if float(sigma[0]) > 0 else 0.0)

    captured = ki.graphs.capture(plan, reads, x)
    assert captured.reason == "the denoiser cannot be recorded: operation not permitted when stream is capturing"
    with torch.no_grad():
        assert torch.equal(captured(x), ki.run(plan, denoise, x))


@pytest.mark.parametrize("name", ["dpmpp_2m", "euler_cfg_pp"])
def test_a_recorded_denoiser_gives_the_same_samples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every evaluation returns a tensor of its own: multistep samplers keep them."""
    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorded)
    x, shift = 10 * noise_like((4, 6)), torch.arange(4.0, dtype=torch.float64)
    shared: dict[str, Any] = dict(sampler=name, cfg=3.0, positive={"shift": shift}, negative={})
    plain = ki.sample(conditioned, x, KARRAS, **shared)
    assert torch.equal(ki.sample(conditioned, x, KARRAS, **shared, graph=True), plain)
    in_parts = ki.sample(conditioned, x, KARRAS, **shared, graph=True, max_batch=3)
    torch.testing.assert_close(in_parts, plain, rtol=1e-12, atol=1e-12)


# -- batches in parts --------------------------------------------------------------------------------------------------
def conditioned(x: Tensor, sigma: Tensor, shift: Tensor | None = None) -> Tensor:
    denoised = x / (1 + sigma[:, None] ** 2)
    return denoised if shift is None else denoised + shift[:, None]


@pytest.mark.parametrize("max_batch", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("name", ["euler", "lms", "dpmpp_2m_sde", "euler_ancestral_cfg_pp"])
def test_a_batch_in_parts_gives_the_same_result(name: str, max_batch: int) -> None:
    """With conditioning and noise of each sample, and no call of the denoiser with more samples than allowed."""
    calls: list[int] = []

    def counted(x: Tensor, sigma: Tensor, shift: Tensor | None = None) -> Tensor:
        calls.append(len(x))
        return conditioned(x, sigma, shift)

    x, shift = 10 * noise_like((5, 6)), torch.arange(5.0, dtype=torch.float64)
    shared: dict[str, Any] = dict(
        sampler=name, cfg=2.0, positive={"shift": shift}, negative={}, noise=ki.noise.white([1, 2, 3, 4, 5])
    )
    whole = ki.sample(conditioned, x, KARRAS, **shared)
    parts = ki.sample(counted, x, KARRAS, **shared, max_batch=max_batch)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    assert max(calls) <= max_batch
    alone = ki.sample(
        conditioned, x[3:4], KARRAS, **(shared | dict(positive={"shift": shift[3:4]}, noise=ki.noise.white([4])))
    )
    torch.testing.assert_close(parts[3:4], alone, rtol=1e-12, atol=1e-12)


def test_unsampling_in_parts() -> None:
    x, shift = noise_like((5, 6)), torch.arange(5.0, dtype=torch.float64)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)[None, None].expand(5, 1, 6)
    shared: dict[str, Any] = dict(sampler="dpmpp_2m", positive={"shift": shift}, mask=mask, normalize=True)
    x = x[:, None, None, :]

    def denoise(y: Tensor, sigma: Tensor, shift: Tensor) -> Tensor:
        return conditioned(y.flatten(1), sigma, shift).view_as(y)

    whole = ki.unsample(denoise, x, KARRAS, **shared)
    torch.testing.assert_close(ki.unsample(denoise, x, KARRAS, **shared, max_batch=2), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("max_batch", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_max_batch_is_a_positive_int(max_batch: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_batch must be"):
        ki.sample(conditioned, torch.ones(2, 3), KARRAS, max_batch=max_batch)


# -- compiled runs -----------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, when it generates code
@pytest.mark.parametrize(
    ("name", "backend"),
    [("euler", "eager"), ("uni_pc", "eager"), pytest.param("lms", "inductor", marks=pytest.mark.slow)],
)
def test_a_run_compiles_without_graph_breaks(name: str, backend: str) -> None:
    """On a denoiser that compiles. Generating code takes minutes; the run is traced as a whole without it, too."""
    plan, x = ki.compile_plan(name, KARRAS), 10 * noise_like((2, 6))
    compiled = torch.compile(lambda y: ki.run(plan, conditioned, y), fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), ki.run(plan, conditioned, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_guided_run_compiles_without_graph_breaks(cfg: float) -> None:
    """With an analytic denoiser of another dtype than x, which casts its parameters."""
    gaussian = ki.denoisers.Gaussian(0.0, 0.5)
    branches: list[dict[str, Any]] = [{"shift": {"by": shift}} for shift in (torch.ones(2, 3), torch.zeros(2, 3))]
    bound = guide(lambda x, sigma, shift: gaussian(x, sigma) + shift["by"], cfg, *branches)
    plan, x = ki.compile_plan("dpmpp_2m", KARRAS), 10 * noise_like((2, 3)).float()
    compiled = torch.compile(lambda y: ki.run(plan, bound, y), fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), ki.run(plan, bound, x), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "lms", "uni_pc", "dpmpp_2m_sde"])
def test_on_a_gpu(name: str) -> None:
    plan, x = ki.compile_plan(name, KARRAS), (10 * noise_like((2, 600))).float().cuda()
    for steps in ("all", "each"):
        captured = graphs.CapturedRun(plan, conditioned, x, steps)
        assert captured.reason is None
        for seed in (1, 2):
            want_seen, seen = list[Any](), list[Any]()
            with torch.no_grad():
                want = ki.run(plan, conditioned, x + seed, ki.noise.white(seed), want_seen.append)
            got = captured(x + seed, ki.noise.white(seed), seen.append if steps == "each" else None)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            for one, other in zip(seen, want_seen, strict=steps == "each"):
                torch.testing.assert_close(one.x, other.x, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(one.denoised, other.denoised, rtol=1e-5, atol=1e-5)
    want = ki.sample(conditioned, x, KARRAS, sampler=name, noise=ki.noise.white(0))
    got = ki.sample(conditioned, x, KARRAS, sampler=name, noise=ki.noise.white(0), graph=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
