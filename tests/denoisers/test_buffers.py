"""Denoisers that use their memory again, callbacks that write, and where tensors start: no run is changed by them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import noise_like
from torch import Tensor

import kinvert as ki
from kinvert.analysis import properties
from kinvert.denoisers import Guided
from kinvert.denoisers.buffers import keep, lay_out
from kinvert.engine import plain_loop
from kinvert.engine.adaptive import Trial, run_adaptive
from kinvert.engine.eager import run_eager
from kinvert.rules import DPMAdaptive

KARRAS = ki.schedules.karras(6, 0.1, 10.0)
SHAPE = (2, 6)


def exact(x: Tensor, sigma: Tensor) -> Tensor:
    s = sigma[:, None]
    return 0.7 * x / (1 + s**2) + 0.3 * torch.tanh(x / (1 + s))


class Static:
    """The denoiser `exact`, whose results lie in memory that it uses again."""

    def __init__(self, how: str, like: Tensor) -> None:
        self.how, self.at = how, itertools.cycle(range(2 if how == "alternating" else 1))
        self.buffers = [torch.empty(3, *like.shape, dtype=like.dtype) for _ in range(2)]
        self.whole = [torch.empty_like(like) for _ in range(2)]
        self.array = np.empty(tuple(like.shape), dtype=str(like.dtype).removeprefix("torch."))

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        value, at = exact(x, sigma), next(self.at)
        n, whole = len(x), len(x) == len(self.array)  # else a part of the batch
        if self.how == "views":
            return self.buffers[at][1, :n].copy_(value)
        if self.how == "out":
            return torch.add(value, 0, out=self.whole[at] if whole else self.whole[at][:n])
        if self.how == "numpy":
            self.array[:n] = value.detach().numpy()
            return torch.from_numpy(self.array[:n])
        return (self.whole[at] if whole else self.whole[at][:n]).copy_(value)


UPWARDS = ["dpm_adaptive"] + [
    name for name in ki.SAMPLERS if name != "dpm_adaptive" and properties(ki.sampler(name)).unsamples
]
HOW = ["whole", "views", "out", "alternating", "numpy"]


def guided(denoiser: Any) -> Any:
    """The same as a pair, of which both are of that memory."""
    buffer = torch.empty(SHAPE, dtype=torch.float64)

    def pair(x: Tensor, sigma: Tensor) -> Guided:
        D = denoiser(x, sigma)
        return Guided(D, torch.mul(D, 0.9, out=buffer) if denoiser is not exact else 0.9 * D)

    return pair


def denoisers(name: str, how: str, x: Tensor) -> tuple[Any, Any]:
    pair = name != "dpm_adaptive" and ki.compile_plan(name, KARRAS).is_guided
    static = Static(how, x)
    return (guided(exact), guided(static)) if pair else (exact, static)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ki.SAMPLERS)
def test_reused_output_memory_changes_no_run(name: str, how: str) -> None:
    """Down and up, in the buffers, in the plain loop and without a Plan; what a callback sees, too."""
    x = 10 * noise_like(SHAPE)
    plain, static = denoisers(name, how, x)
    noise = ki.noise.replay([noise_like(SHAPE, seed=i) for i in range(60)])
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for direction in (ki.sample, ki.unsample):
        if direction is ki.unsample and name not in UPWARDS:
            continue
        start = x if direction is ki.sample else x / 10
        runs = [
            direction(f, start, KARRAS, sampler=name, noise=noise, callback=lambda p, i=i: seen[i].append(p.denoised))
            for i, f in enumerate((plain, static))
        ]
        torch.testing.assert_close(runs[1], runs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-12, atol=1e-12)
    if name != "dpm_adaptive":
        plan = ki.compile_plan(name, KARRAS)
        runs = [ki.run(plan, f, x, noise) for f in (plain, static)]  # the plain loop: gradients are on
        torch.testing.assert_close(runs[1], runs[0], rtol=1e-12, atol=1e-12)
        runs = [run_eager(ki.sampler(name), f, x, KARRAS, noise) for f in (plain, static)]
        torch.testing.assert_close(runs[1], runs[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "uni_pc", "o_belm", "bdia"])
def test_reused_output_memory_in_invert(name: str, how: str) -> None:
    x = noise_like(SHAPE)
    want, got = (ki.invert(f, x, KARRAS[:-1], sampler=name) for f in (exact, Static(how, x)))
    torch.testing.assert_close(got.latent, want.latent, rtol=1e-9, atol=1e-9)
    assert got.evaluations.tolist() == want.evaluations.tolist()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m_sde", "dpmpp_sde", "seeds_2"])
def test_reused_output_memory_in_extract_noise(name: str, how: str) -> None:
    x = noise_like(SHAPE)
    want, got = (
        ki.extract_noise(f, x, KARRAS[:-1], sampler=name, generator=torch.Generator().manual_seed(0))
        for f in (exact, Static(how, x))
    )
    torch.testing.assert_close(got.noises, want.noises, rtol=1e-9, atol=1e-9)


def test_reused_output_memory_in_baselines() -> None:
    from kinvert.inversion import baselines

    x = noise_like(SHAPE)
    for name, baseline in baselines.BASELINES.items():
        options = {"noise": noise_like(SHAPE, seed=3)} if name == "rf_inversion" else {}
        if name == "null_text":
            continue
        want, got = (baseline(f, x, KARRAS[:-1], **options) for f in (exact, Static("whole", x)))
        torch.testing.assert_close(got.latent, want.latent, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("how", HOW)
def test_reused_output_memory_in_guidance_and_parts(how: str) -> None:
    x = 10 * noise_like(SHAPE)
    whole = Static(how, x)
    half = Static(how, x[:1])

    def conditioned(f: Callable[[Tensor, Tensor], Tensor]) -> Any:
        return lambda x, sigma, shift=(): f(x - len(shift), sigma)

    given = {"positive": {"shift": (0,)}, "negative": {"shift": ()}, "cfg": 3.0}  # different lengths: two calls
    want = ki.sample(conditioned(exact), x, KARRAS, sampler="dpmpp_2m", **given)
    torch.testing.assert_close(ki.sample(conditioned(whole), x, KARRAS, sampler="dpmpp_2m", **given), want)
    parts = ki.sample(conditioned(half), x, KARRAS, sampler="dpmpp_2m", max_batch=1, **given)
    torch.testing.assert_close(parts, want)


def test_reused_output_memory_with_gradients() -> None:
    """And a compiled run copies what it remembers."""
    plan, x, buffer = ki.compile_plan("dpmpp_2m", KARRAS[:-1]), 10 * noise_like(SHAPE), []

    def held(y: Tensor, sigma: Tensor) -> Tensor:
        buffer[:] = [exact(y, sigma)]
        return buffer[0]

    gradients = []
    for f in (exact, held):
        y = x.clone().requires_grad_()
        gradients += torch.autograd.grad(ki.run(plan, f, y).sum(), y)
    assert torch.equal(*gradients)


def test_keep_copies_only_held_outputs() -> None:
    with torch.no_grad():
        outputs: list[Any] = [torch.ones(2, 3) * 2, Guided(torch.ones(2), torch.ones(2) + 1), None]
        places = [outputs[0].data_ptr(), outputs[1].denoised.data_ptr(), outputs[1].uncond.data_ptr()]
        keep(outputs)
        assert [outputs[0].data_ptr(), outputs[1].denoised.data_ptr(), outputs[1].uncond.data_ptr()] == places
        held = torch.ones(2)
        outputs = [held, held[:1], Guided(held, held)]
        keep(outputs)
        held.zero_()
        assert outputs[0].tolist() == [1, 1] and outputs[1].tolist() == [1] and outputs[2].uncond.tolist() == [1, 1]


def overwrite(p: ki.Progress) -> None:
    """What a preview may do."""
    p.denoised.add_(1).clamp_(-1, 1)
    p.x.zero_()


@pytest.mark.parametrize("name", ki.SAMPLERS)
def test_callback_may_write_into_progress(name: str) -> None:
    """Down and up, in the buffers and in the plain loop."""
    x, plain = 10 * noise_like(SHAPE), denoisers(name, "whole", noise_like(SHAPE))[0]
    noise = ki.noise.replay([noise_like(SHAPE, seed=i) for i in range(60)])
    before = x.clone()
    ways: list[Callable[..., Tensor]] = [lambda f: ki.sample(plain, x, KARRAS, sampler=name, noise=noise, callback=f)]
    if name != "dpm_adaptive":
        plan = ki.compile_plan(name, KARRAS)
        ways.append(lambda f: ki.run(plan, plain, x, noise, callback=f))
        with torch.no_grad(), plain_loop():
            want, got = (ki.run(plan, plain, x, noise, callback=f) for f in (None, overwrite))
            assert torch.equal(got, want)
    if not ki.sampler(name).noise_options and name != "dpm_adaptive":
        ways.append(lambda f: ki.unsample(plain, x, KARRAS, sampler=name, callback=f))
    for way in ways:
        assert torch.equal(way(overwrite), way(None)) and torch.equal(x, before)


@pytest.mark.filterwarnings("ignore:.*not inverted")
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "bdia"])
def test_callback_of_an_inversion_may_write_into_progress(sampler: str) -> None:
    """The plain run up and down, which steps that fail start from, is watched too: `max_evals` makes it count."""
    x, sigmas = noise_like(SHAPE), KARRAS[:-1]
    budgets: list[dict[str, Any]] = [{}, {"max_evals": 60}]
    for options in budgets:
        want, got = (
            ki.invert(exact, x, sigmas, sampler=sampler, callback=f, **options) for f in (lambda p: None, overwrite)
        )
        assert torch.equal(got.latent, want.latent) and torch.equal(got.restored, want.restored)
        assert torch.equal(got.evaluations, want.evaluations)


def test_callbacks_of_extraction_and_of_chosen_steps_may_write_into_progress() -> None:
    """What `watch` is told of a trial is no part of what the callback got."""
    x, seen = noise_like(SHAPE), list[list[Tensor]]()
    for f in (lambda p: None, overwrite):
        found = ki.extract_noise(
            exact, x, KARRAS[:-1], sampler="euler_ancestral", generator=torch.Generator().manual_seed(0), callback=f
        )
        trials = list[Trial]()
        run_adaptive(DPMAdaptive(), exact, 10 * x, KARRAS, callback=f, watch=trials.append)
        seen.append([found.latent, *found.noises, *(part for trial in trials for part in (trial.x, trial.denoised))])
    assert len(seen[0]) == len(seen[1]) and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


# -- what a compiled network asks about its inputs ---------------------------------------------------------------------
STRIDED: dict[str, Callable[[], Tensor]] = {
    "own": lambda: 10 * noise_like((2, 3, 4, 4)),
    "part of a batch": lambda: 10 * noise_like((5, 3, 4, 4))[3:],
    "every second column": lambda: 10 * noise_like((2, 3, 4, 8))[..., ::2],
    "channels last": lambda: (10 * noise_like((2, 3, 4, 4))).to(memory_format=torch.channels_last),
    "expanded": lambda: (10 * noise_like((1, 3, 4, 4))).expand(2, -1, -1, -1),
}


@pytest.mark.parametrize("given", STRIDED)
@pytest.mark.parametrize("name", [name for name in ki.SAMPLERS if name != "dpm_adaptive"])
def test_denoiser_inputs_have_one_layout(name: str, given: str) -> None:
    """One stride and no offset, for x and sigma; also where x is a part of something."""
    x, plan, seen = STRIDED[given](), ki.compile_plan(name, KARRAS), set()

    def look(y: Tensor, sigma: Tensor) -> Any:
        seen.add((y.stride(), y.storage_offset(), sigma.stride(), sigma.storage_offset()))
        D = y / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)
        return Guided(D, 0.9 * D) if plan.is_guided else D

    noise = ki.noise.replay([noise_like((2, 3, 4, 4), seed=i) for i in range(60)])
    ki.sample(look, x, KARRAS, sampler=name, noise=noise)
    if not plan.is_guided:
        ki.sample(look, x, KARRAS, sampler=name, noise=noise, max_batch=1)
    assert seen == {(lay_out(x).stride(), 0, (1,), 0)}
