"""Published inversions that are one run upwards, in the coordinates that they were published in."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from inverting import MIXTURE
from problems import noise_like, order_slope
from publications import GAUSSIAN, close, flow_times, guidance, images, labelled, pairs, schedule, velocity
from torch import Tensor

import kinvert as ki
from kinvert.engine.eager import run_eager
from kinvert.inversion.baselines import (
    BASELINES,
    ddim_inversion,
    easyinv,
    forward_first,
    uni_inv,
)
from kinvert.rules import DDIMInverse, UniInv


@pytest.mark.parametrize("at", ["clean", "noisy"])
def test_ddim_inversion_of_gaussian_data_is_linear(at: Any) -> None:
    """D = m + g (x - m) with g = s^2 / (s^2 + sigma^2), so x -> A x + B with numbers A and B."""
    m, var = 0.3, 0.49
    gain, offset = 1.0, 0.0
    for b, a in pairs(schedule()):
        level, w = (b, 1.0) if at == "clean" else (a, math.sqrt((1 + a * a) / (1 + b * b)))
        k = (a - b) / level * (1 - var / (var + level**2))  # x' = x + k (w x - m)
        gain, offset = (1 + k * w) * gain, (1 + k * w) * offset - k * m
    found = ddim_inversion(GAUSSIAN, images(), schedule(), at=at)
    close(found.latent, gain * images() + offset)


def test_ddim_inversion_at_the_clean_level_is_unsample() -> None:
    found = ddim_inversion(labelled, images(), schedule(), at="clean", **guidance(3.0))
    up = ki.unsample(labelled, images(), schedule(), sigma_offset=0.0, **guidance(3.0))
    assert torch.equal(found.latent, up)


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_ddim_inversion_and_easyinv_as_published(keep: float) -> None:
    """On variance-preserving latents z = alpha x: the network gets z and the next timestep; EasyInv mixes z' and z."""
    z = images() / math.hypot(1.0, 0.1)
    for i, (b, a) in enumerate(pairs(schedule(20))):
        alpha, sigma, alpha_next, sigma_next = (f / math.hypot(1.0, s) for s in (b, a) for f in (1.0, s))
        x = z / alpha_next  # what a network for (z, timestep of a) denoises
        eps = (x - MIXTURE(x, torch.full((4,), a, dtype=torch.float64))) / a
        last, z = z, alpha_next * (z - sigma * eps) / alpha + sigma_next * eps
        if 0.05 * 20 < i < 0.25 * 20:
            z = keep * z + (1 - keep) * last
    method = easyinv if keep < 1 else functools.partial(ddim_inversion, at="noisy")
    close(method(MIXTURE, images(), schedule(20)).latent, z * math.hypot(1.0, 10.0))


def test_the_rules_of_inversions_are_the_same_compiled_and_eager() -> None:
    rising, x = schedule(6).flip(0), images()
    rule = DDIMInverse(keep=0.7, stop=0.9)
    close(ki.run(ki.compile_plan(rule, rising), MIXTURE, x), run_eager(rule, MIXTURE, x, rising))


# -- rectified flows, in their own time


def test_rf_solver_and_fireflow_as_published() -> None:
    x = 10 * noise_like((4, 6))
    y = z = x / 11
    remembered = None
    for t, t_next in itertools.pairwise(flow_times(schedule())):
        h = t_next - t
        v = velocity(y, t)
        y = (
            y + h * v + h**2 / 2 * (velocity(y + h / 2 * v, t + h / 2) - v) / (h / 2)
        )  # Taylor, derivative by difference
        v = velocity(z, t) if remembered is None else remembered
        remembered = velocity(z + h / 2 * v, t + h / 2)
        z = z + h * remembered
    close(ki.sample(MIXTURE, x, schedule(), sampler="rf_solver"), y * 1.1)
    close(ki.sample(MIXTURE, x, schedule(), sampler="fireflow"), z * 1.1)


def test_rf_solver_is_the_midpoint_method_on_flow_times() -> None:
    def flow(y: Tensor, t: Tensor) -> Tensor:
        return MIXTURE(y / (1 - t[:, None]), t / (1 - t))

    y, times = noise_like((4, 6)), flow_times(schedule())
    through = ki.sample(flow, y, times, sampler=ki.rules.Flow(ki.sampler("rf_solver")))
    close(through, ki.sample(flow, y, times, sampler="midpoint"))


@pytest.mark.parametrize("name", ["rf_solver", "fireflow"])
def test_round_trips_of_order_two(name: str) -> None:
    """Step halving: the error of FireFlow's round trip falls as that of the midpoint method, at half the cost."""
    steps = [40, 80, 160]
    found = [BASELINES[name](GAUSSIAN, images(), schedule(n)) for n in steps]
    assert order_slope([float(f.round_trip_error.max()) for f in found], steps) > 1.8
    assert found[0].evaluations[0] == {"rf_solver": 4 * 40, "fireflow": 2 * 41}[name]


def test_uni_inv_as_published() -> None:
    """In flow time, from clean to noisy: the last velocity predicts the state, and the velocity there makes the step."""
    z, times = images() / 1.1, flow_times(schedule())[::-1]
    v = velocity(z, times[0])
    for t, t_next in itertools.pairwise(times):
        v = velocity(z - (t - t_next) * v, t_next)
        z = z - (t - t_next) * v
    found = uni_inv(MIXTURE, images(), schedule())
    close(found.latent, z * 11)
    assert found.evaluations[0] == 10 + 1 + found.checking

    def flow(y: Tensor, t: Tensor) -> Tensor:
        return MIXTURE(y / (1 - t[:, None]), t / (1 - t))

    rising = torch.tensor(times, dtype=torch.float64)
    close(ki.run(ki.compile_plan(UniInv(flow=True), rising), flow, images() / 1.1), z)


def test_uni_inv_misses_by_order_two_and_less_than_ddim() -> None:
    steps = [40, 80, 160]
    errors = [float(uni_inv(GAUSSIAN, images(), schedule(n)).round_trip_error.max()) for n in steps]
    assert 1.8 < order_slope(errors, steps) < 2.5
    assert 5 * errors[0] < float(ddim_inversion(GAUSSIAN, images(), schedule(40)).round_trip_error.max())


def test_uni_inv_goes_down_as_euler() -> None:
    x = 10 * noise_like((4, 6))
    assert torch.equal(ki.sample(MIXTURE, x, schedule(), sampler=UniInv()), ki.sample(MIXTURE, x, schedule()))


@pytest.mark.parametrize("forward", [0, 3, 10])
def test_forward_first_is_noise_and_then_ddim_inversion(forward: int) -> None:
    noise, rising = noise_like((4, 6), seed=8), schedule().flip(0)
    x = images() + (rising[forward] ** 2 - 0.1**2).clamp(min=0).sqrt() * noise
    expected = ddim_inversion(MIXTURE, x, rising[forward:].flip(0)).latent if forward < 10 else x
    found = forward_first(MIXTURE, images(), schedule(), forward=forward, noise=noise)
    close(found.latent, expected)
    assert (found.evaluations - found.checking == 10 - forward).all()
