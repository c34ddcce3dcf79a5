"""What is kept for later runs is bounded in bytes, however many Plans and shapes there were."""

from __future__ import annotations

import gc
import threading
import tracemalloc

import pytest
import torch
from problems import noise_like
from torch import Tensor

import kinvert as ki
from kinvert import moments, plan
from kinvert.caches import SizedCache, sized_cache
from kinvert.engine import fused, kernels

CACHES = {
    "plans": plan._compiled.cache,  # type: ignore[attr-defined]
    "programs": kernels.program.cache,  # type: ignore[attr-defined]
    "laws": moments._fault.cache,  # type: ignore[attr-defined]
    "uploads": fused._LATEST,
}


def shrink(x: Tensor, sigma: Tensor) -> Tensor:
    return x / (1 + sigma.reshape(-1, *(1,) * (x.ndim - 1)) ** 2)


def test_the_least_recently_used_goes_first() -> None:
    cache: SizedCache[str, int] = SizedCache(10)
    for key, size in (("a", 4), ("b", 4)):
        cache.put(key, 0, size)
    assert cache.get("a") == 0
    cache.put("c", 1, 4)
    assert cache.get("b") is None and cache.get("a") == 0 and cache.get("c") == 1 and cache.size == 8
    cache.put("a", 2, 5)
    assert cache.get("a") == 2 and cache.size == 9
    cache.put("d", 3, 100)
    assert (len(cache), cache.size, cache.get("d")) == (1, 100, 3)  # the newest stays
    cache.put("e", 4, 1)
    assert (len(cache), cache.size, cache.get("e")) == (1, 1, 4)
    cache.clear()
    assert (len(cache), cache.size, cache.get("e")) == (0, 0, None)


def test_a_function_that_keeps_its_results() -> None:
    calls = []

    @sized_cache(10, lambda result, *_: result)
    def double(n: int, times: int = 2) -> int:
        calls.append(n)
        return times * n

    assert [double(n) for n in (1, 2, 1, 4, 1, 2)] == [2, 4, 2, 8, 2, 4] and calls == [1, 2, 4, 2]
    assert double(1, times=3) == 3


def test_threads_share_a_cache() -> None:
    cache: SizedCache[int, int] = SizedCache(100)

    def work() -> None:
        for n in range(2000):
            cache.put(n % 37, n % 37, 7)
            assert cache.get(n % 37) in (None, n % 37)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.size == 7 * len(cache) <= 100


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "uni_pc", "sa_solver", "res_3s"])
def test_the_size_of_a_plan_is_estimated(name: str) -> None:
    """Within a factor of 1.5, as tracemalloc counts it."""
    sigmas = ki.schedules.karras(200, 0.01, 70.0).tolist()
    ki.compile_plan(name, sigmas[:50])
    gc.collect()
    tracemalloc.start()
    try:
        made = plan._compile(ki.sampler(name), tuple(sigmas), None)
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert size / 1.5 <= plan.plan_size(made) <= 1.5 * size


def run_many(count: int) -> None:
    """Run many Plans on many shapes, and hold all Plans."""
    held = []
    for i in range(count):
        held.append(ki.compile_plan("euler", [10.0 + i, 5.0, 1.0]))
        with torch.no_grad():
            ki.run(held[-1], shrink, torch.ones(1 + i % 5, 2))


def test_caches_stay_within_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for cache in CACHES.values():
        cache.clear()
        monkeypatch.setattr(cache, "limit", 2**15)
    run_many(200)
    assert all(0 < CACHES[name].size <= 2**15 for name in ("plans", "programs", "uploads"))
    flow = [ki.levels.FlowTimes(torch.tensor([0.9 - 1e-4 * i, 0.5, 0.1])) for i in range(100)]
    for sigmas in flow:
        moments.check_flow_spread(ki.compile_plan("euler", sigmas), "flow")
    assert 0 < CACHES["laws"].size <= 2**15


@pytest.mark.slow
def test_ten_thousand_plans_and_shapes_do_not_grow_without_limit() -> None:
    run_many(10_000)
    gc.collect()
    assert sum(cache.size for cache in CACHES.values()) <= sum(cache.limit for cache in CACHES.values()) <= 2**26


@pytest.mark.parametrize("batch", [fused.ROWS, fused.ROWS + 1])
def test_a_level_is_one_number_where_a_large_batch_shares_it(batch: int) -> None:
    """The denoiser gets a tensor of its own all the same, and may write into it."""
    sigmas = ki.schedules.karras(21, 0.1, 10.0)
    plan, x, seen = ki.compile_plan("heun", sigmas), noise_like((batch, 2)), []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        out = shrink(x, sigma)
        seen.append(sigma.clone())
        assert sigma.is_contiguous() and sigma.storage_offset() == 0 and sigma.shape == (batch,)
        sigma.mul_(2)
        return out

    wanted = ki.run(plan, shrink, x)
    fused._LATEST.clear()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(ki.run(plan, denoiser, x), wanted)
    with ki.engine.plain_loop(), torch.no_grad():
        torch.testing.assert_close(ki.run(plan, denoiser, x), wanted)
    assert [float(sigma[-1]) for sigma in seen] == pytest.approx(list(plan.stage_levels) * 3)
    kept = fused.Uploaded.of(plan, x).nbytes
    assert kept == x.itemsize * plan.evaluations * (batch if batch <= fused.ROWS else 1)
