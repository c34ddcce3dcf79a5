"""Recorded runs and evaluations.

Without a CUDA device the recorder below stands for CUDA's: it takes down every operation with its tensors and carries
them out again, in place, as a graph does. So nothing but those tensors may decide a result: a number read while
recording, a tensor replaced, or a buffer of another run would show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import mixture, noise_like
from runs import KARRAS, denoiser_for
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kinvert as ki
from kinvert import graphs

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


def conditioned(x: Tensor, sigma: Tensor, shift: Tensor | None = None) -> Tensor:
    denoised = x / (1 + sigma[:, None] ** 2)
    return denoised if shift is None else denoised + shift[:, None]


@pytest.mark.parametrize("steps", ["all", "each"])
@pytest.mark.parametrize("name", NAMES)
def test_captured_run_equals_run(name: str, steps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_captured_run_with_other_shape_or_callback_runs_without_graph(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_callback_of_captured_steps(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_number_of_noise_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tensors as the longest part of the run draws."""
    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorded)
    plan, x = ki.compile_plan("dpmpp_sde", KARRAS), torch.zeros(2, 6, dtype=torch.float64)
    sizes = {steps: len(graphs.CapturedRun(plan, mixture(), x, steps)._noises) for steps in ("all", "each")}
    assert sizes == {"all": plan.draws, "each": 2}


def test_nan_of_one_launch_does_not_enter_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that mean nothing yet are read with weight 0, and 0 times nan is nan."""
    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorded)
    plan, x = ki.compile_plan("lms", KARRAS), 10 * noise_like((2, 6))
    for steps in ("all", "each"):
        captured = graphs.CapturedRun(plan, mixture(), x, steps)
        want = captured(x)
        assert captured(torch.full_like(x, torch.nan)).isnan().all()
        assert torch.equal(captured(x), want)


def test_capture_refuses_unknown_steps() -> None:
    plan, x = ki.compile_plan("euler", KARRAS), torch.zeros(2, 6)
    with pytest.raises(ValueError, match="unknown steps 'eahc'; did you mean 'each'. It must be one of all, each"):
        ki.graphs.capture(plan, mixture(), x, "eahc")  # type: ignore[arg-type]


def test_reason_without_cuda() -> None:
    plan, x = ki.compile_plan("heun", KARRAS), 10 * noise_like((2, 6))
    captured = ki.graphs.capture(plan, mixture(), x)
    assert captured.reason == "x is on cpu, and only a CUDA device has graphs"
    with torch.no_grad():
        assert torch.equal(captured(x), ki.run(plan, mixture(), x))
    with pytest.warns(RuntimeWarning, match="running without a graph: x is on cpu"):
        result = ki.sample(mixture(), x, KARRAS, sampler="heun", graph=True)
    assert torch.equal(result, captured(x))


def test_reason_of_denoiser_that_reads_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorded)
    plan, x, denoise = ki.compile_plan("euler", KARRAS), 10 * noise_like((2, 6)), mixture()

    def reads(y: Tensor, sigma: Tensor) -> Any:
        return denoise(y, sigma) * (1.0 if float(sigma[0]) > 0 else 0.0)

    captured = ki.graphs.capture(plan, reads, x)
    assert captured.reason == "the denoiser cannot be recorded: operation not permitted when stream is capturing"
    with torch.no_grad():
        assert torch.equal(captured(x), ki.run(plan, denoise, x))


@pytest.mark.parametrize("name", ["dpmpp_2m", "euler_cfg_pp"])
def test_captured_denoiser_equals_denoiser(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every evaluation returns a tensor of its own: multistep samplers keep them."""
    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorded)
    x, shift = 10 * noise_like((4, 6)), torch.arange(4.0, dtype=torch.float64)
    shared: dict[str, Any] = dict(sampler=name, cfg=3.0, positive={"shift": shift}, negative={})
    plain = ki.sample(conditioned, x, KARRAS, **shared)
    assert torch.equal(ki.sample(conditioned, x, KARRAS, **shared, graph=True), plain)
    in_parts = ki.sample(conditioned, x, KARRAS, **shared, graph=True, max_batch=3)
    torch.testing.assert_close(in_parts, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "lms", "uni_pc", "dpmpp_2m_sde"])
def test_captured_runs_on_gpu(name: str) -> None:
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
