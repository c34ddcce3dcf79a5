"""Schedules computed from a denoiser, against closed forms, brute force, and the published search in plain numbers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inverting import MIXTURE, images
from problems import noise_like
from publications import guidance, labelled
from torch import Tensor

import kinvert as ki
from kinvert.optimal import oss, round_trip_schedule

GAUSSIAN = ki.denoisers.Gaussian(0.3, 0.5)
KARRAS = ki.schedules.karras(5, 0.1, 10.0)[:-1]
SEVEN = ki.schedules.karras(7, 0.1, 10.0)[:-1]


def data(*shape: int) -> Tensor:
    return 0.3 + 0.5 * noise_like(shape or (8, 4), seed=3)


def trip_error(denoiser: ki.Denoiser, x: Tensor, sigmas: Any, **options: Any) -> float:
    options = options if "method" in options else options | {"sigma_offset": 0.0}
    return float(ki.round_trip(denoiser, x, sigmas, **options).mse.mean())


@given(std=st.floats(0.05, 5.0), high=st.floats(1.0, 50.0), low=st.floats(0.01, 0.5), n=st.integers(2, 8))
@settings(max_examples=10, deadline=None)
def test_the_round_trip_of_euler_is_a_product_of_squared_cosines(std: float, high: float, low: float, n: int) -> None:
    sigmas = ki.schedules.karras(n + 1, low, high)[:-1]
    x = data(2, 3)
    trip = ki.round_trip(ki.denoisers.Gaussian(0.3, std), x, sigmas, sigma_offset=0.0)
    factor = float((sigmas / std).atan().diff().cos().square().prod())
    torch.testing.assert_close(trip.reconstruction, 0.3 + factor * (x - 0.3), rtol=0, atol=1e-10)


@pytest.mark.parametrize("std", [0.2, 1.0, 3.0])
def test_for_gaussian_data_the_angles_are_equal(std: float) -> None:
    """From Karras' levels, and from images of another spread, which do not hint at the answer."""
    gaussian, x = ki.denoisers.Gaussian(0.3, std), data()
    found = round_trip_schedule(gaussian, x, KARRAS)
    expected = std * torch.linspace(math.atan(10 / std), math.atan(0.1 / std), 5, dtype=torch.float64).tan()
    assert float((found / expected - 1).abs().max()) < 2e-3
    assert trip_error(gaussian, x, found) <= trip_error(gaussian, x, expected) * (1 + 1e-6)
    assert found.dtype == torch.float64 and found[0] == KARRAS[0] and found[-1] == KARRAS[-1]
    if std == 1.0:
        torch.testing.assert_close(expected, ki.schedules.kl_optimal(5, 0.1, 10.0)[:-1])


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_no_schedule_of_a_fine_grid_is_better(sampler: str) -> None:
    """Two spreads at once have no closed form: all pairs of inner levels are tried."""
    gaussian, x = ki.denoisers.Gaussian(0.0, torch.tensor([0.2, 0.2, 2.0, 2.0], dtype=torch.float64)), data()
    sigmas = ki.schedules.exponential(4, 0.1, 10.0)[:-1]
    found = trip_error(gaussian, x, round_trip_schedule(gaussian, x, sigmas, sampler=sampler), sampler=sampler)
    grid = np.geomspace(10.0, 0.1, 12)
    pairs = itertools.combinations(grid[1:-1].tolist(), 2)
    errors = [trip_error(gaussian, x, [10.0, *inner, 0.1], sampler=sampler) for inner in pairs]
    assert 0.5 * min(errors) < found <= min(errors) * (1 + 1e-6)


@pytest.mark.parametrize("options", [{"method": "ddim_noisy"}, guidance(1.5), {"sampler": "heun"}], ids=str)
def test_it_never_gets_worse(options: dict[str, Any]) -> None:
    options = guidance(1.0) | options
    found = round_trip_schedule(labelled, images(4), KARRAS, iterations=2, **options)
    assert trip_error(labelled, images(4), found, **options) < trip_error(labelled, images(4), KARRAS, **options)
    assert torch.equal(found, round_trip_schedule(labelled, images(4), KARRAS, iterations=2, **options))


def test_what_it_returns_is_at_least_as_good_as_a_schedule_that_is_best_already() -> None:
    best = round_trip_schedule(GAUSSIAN, data(), KARRAS)
    again = round_trip_schedule(GAUSSIAN, data(), best)
    assert trip_error(GAUSSIAN, data(), again) <= trip_error(GAUSSIAN, data(), best)


def test_in_flow_time_and_down_to_zero() -> None:
    velocity = ki.denoisers.from_velocity(flow_velocity, ki.levels.flow(), coordinates="flow")
    times = ki.schedule("simple", 5, ki.levels.flow(3.0))
    found = round_trip_schedule(velocity, data(), times, iterations=2)
    assert isinstance(found, ki.levels.FlowTimes) and found[0] == 1 and found[-1] == 0 and len(found) == 6
    before, after = (float(ki.round_trip(velocity, data(), t).mse.mean()) for t in (times, found))
    assert after < before


def flow_velocity(x: Tensor, t: Tensor) -> Tensor:
    """The velocity of data N(0.3, 0.5²) in flow time, `(x - D) / t`; the network is told 1000 t."""
    t = (t / 1000).reshape(-1, *[1] * (x.ndim - 1)).clamp(min=1e-9)
    gain = 0.25 * (1 - t) / (0.25 * (1 - t) ** 2 + t**2)
    return (x - 0.3 - gain * (x - (1 - t) * 0.3)) / t


def test_single_precision_gains_as_well() -> None:
    found = round_trip_schedule(GAUSSIAN, data().float(), KARRAS, iterations=5)
    assert trip_error(GAUSSIAN, data(), found) < 0.65 * trip_error(GAUSSIAN, data(), KARRAS)


def test_one_step_has_nothing_to_choose() -> None:
    assert round_trip_schedule(GAUSSIAN, data(), [10.0, 0.1]).tolist() == [10.0, 0.1]


# -- OSS ---------------------------------------------------------------------------------------------------------------


def published(x: float, levels: list[float], steps: int, std: float) -> tuple[float, ...]:
    """The search as published, for one number of Gaussian data of mean 0, in plain Python."""

    def euler(z: float, i: int, j: int) -> float:
        velocity = z * levels[i] / (std**2 + levels[i] ** 2)
        return z + (levels[j] - levels[i]) * velocity

    count = len(levels)
    teacher = [x]
    for i in range(count - 1):
        teacher.append(euler(teacher[i], i, i + 1))
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, x, [0])}
    for _ in range(steps):
        after: dict[int, tuple[float, float, list[int]]] = {}
        for j in range(1, count):
            for i, (_, z, path) in best.items():
                if i < j and (e := (euler(z, i, j) - teacher[j]) ** 2) < after.get(j, (math.inf,))[0]:
                    after[j] = (e, euler(z, i, j), [*path, j])
        best = after
    return tuple(levels[i] for i in best[count - 1][2])


@given(std=st.floats(0.2, 3.0), n=st.integers(1, 6), rho=st.floats(1.0, 8.0))
@settings(max_examples=8, deadline=None)
def test_oss_is_the_published_search(std: float, n: int, rho: float) -> None:
    fine = ki.schedules.karras(9, 0.1, 10.0, rho=rho)
    x = torch.full((1, 1), 7.0, dtype=torch.float64)
    found = oss(ki.denoisers.Gaussian(0.0, std), x, fine, steps=n)
    assert tuple(found.tolist()) == published(7.0, fine.tolist(), n, std)


@pytest.mark.parametrize(("sampler", "steps"), [("euler", 2), ("euler", 3), ("heun", 3), ("dpm_2", 2)])
def test_for_gaussian_data_no_subset_of_the_levels_is_nearer_to_the_teacher(sampler: str, steps: int) -> None:
    fine = ki.schedules.karras(10, 0.1, 10.0)[:-1].tolist()
    latents = 10.0 * noise_like((3, 2), seed=1)
    teacher = ki.sample(GAUSSIAN, latents, fine, sampler=sampler)

    def distance(levels: Any) -> float:
        return float((ki.sample(GAUSSIAN, latents, levels, sampler=sampler) - teacher).square().mean())

    found = oss(GAUSSIAN, latents, fine, steps=steps, sampler=sampler)
    subsets = [[fine[0], *inner, fine[-1]] for inner in itertools.combinations(fine[1:-1], steps - 1)]
    assert found.tolist() in subsets
    assert distance(found) <= min(map(distance, subsets)) * (1 + 1e-9)


@pytest.mark.parametrize(("sampler", "more"), [("euler", 0), ("heun", 1)])
def test_steps_from_a_state_share_their_first_evaluation(sampler: str, more: int) -> None:
    rows = 0

    def counting(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return MIXTURE(x, sigma)

    oss(counting, 10 * images(2), SEVEN, steps=3, sampler=sampler)
    # of the teacher; from the start; to the two levels that two more steps end from, and from there to the end
    states, tried = 6 + 1 + 4 + 4, 6 + 4 + (1 + 2 + 3 + 4) + 4
    assert rows == 2 * (states + more * tried)


def test_oss_of_all_steps_is_the_teacher_and_guidance_matters() -> None:
    latents = 10 * noise_like((4, 6))
    assert torch.equal(oss(labelled, latents, SEVEN, steps=6, **guidance(2.0)), SEVEN)
    fine = ki.schedules.karras(14, 0.1, 10.0)[:-1]
    plain, guided = (oss(labelled, latents, fine, steps=4, **guidance(cfg)).tolist() for cfg in (1.0, 6.0))
    assert plain != guided and set(plain) | set(guided) <= set(fine.tolist())


def test_oss_in_flow_time() -> None:
    velocity = ki.denoisers.from_velocity(flow_velocity, ki.levels.flow(), coordinates="flow")
    found = oss(velocity, noise_like((2, 3)), ki.schedule("simple", 10, ki.levels.flow()), steps=4)
    assert isinstance(found, ki.levels.FlowTimes) and found[0] == 1 and found[-1] == 0 and len(found) == 5


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "too many": (lambda: oss(GAUSSIAN, data(), KARRAS, steps=5), ValueError, "steps must be at most those of sigmas, 4, got 5"),
    "no number": (lambda: oss(GAUSSIAN, data(), KARRAS, steps=2.5), ValueError, "steps must be an int"),  # type: ignore[arg-type]
    "rising": (lambda: oss(GAUSSIAN, data(), KARRAS.flip(0), steps=3), ValueError, r"decreasing.*sigmas.flip\(0\)"),
    "remembers": (lambda: oss(GAUSSIAN, data(), KARRAS, steps=3, sampler="dpmpp_2m"), ValueError, "'dpmpp_2m', which draws noise or remembers"),
    "a pair": (lambda: oss(GAUSSIAN, data(), KARRAS, steps=3, sampler="edict"), ValueError, "depend on x alone"),
    "draws": (lambda: oss(GAUSSIAN, data(), KARRAS, steps=3, sampler="euler_ancestral"), ValueError, "'euler_ancestral', which draws noise"),
    "by name": (lambda: ki.schedule("OSS", 10, ki.levels.flow()), ValueError, "computed from a denoiser, by ki.optimal.oss"),
    "integers": (lambda: oss(GAUSSIAN, data().int(), KARRAS, steps=3), TypeError, "floating point"),
    "exact": (lambda: round_trip_schedule(GAUSSIAN, data(), KARRAS, method="direct_inversion"), ValueError, "round trip of euler is exact to rounding"),
    "solved": (lambda: round_trip_schedule(GAUSSIAN, data(), KARRAS, method="invert"), ValueError, "'invert' is exact on every schedule"),
    "upwards": (lambda: round_trip_schedule(GAUSSIAN, data(), KARRAS.flip(0)), ValueError, r"decreasing.*sigmas.flip\(0\)"),
    "noise": (lambda: round_trip_schedule(GAUSSIAN, data(), KARRAS, sampler="euler_ancestral"), ValueError, "euler_ancestral"),
    "way up": (lambda: round_trip_schedule(GAUSSIAN, data(), KARRAS, method="ddim"), ValueError, "unknown method 'ddim'"),
    "iterations": (lambda: round_trip_schedule(GAUSSIAN, data(), KARRAS, iterations=0), ValueError, "iterations must be an int of at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
