"""The published inversions: closed forms, the coordinates they were published in, limits, counts, errors."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import mixture, noise_like, order_slope
from torch import Tensor

import kinvert as ki
from kinvert.engine.eager import run_eager
from kinvert.inversion.baselines import (
    BASELINES,
    aidi,
    ddim_inversion,
    direct_inversion,
    dpm_solver_inversion,
    easyinv,
    fireflow,
    null_text,
    renoise,
    rf_inversion,
    rf_solver,
    sample_null_text,
    steer,
)
from kinvert.rules import DDIMInverse, DirectInversion
from kinvert.tensors import rms

MIXTURE = mixture()
GAUSSIAN = ki.denoisers.Gaussian(0.3, 0.7)
NEGATIVE = mixture(seed=1)


def schedule(steps: int = 10) -> Tensor:
    return ki.schedules.karras(steps + 1, 0.1, 10.0)[:-1]


def images(count: int = 4) -> Tensor:
    return 0.8 * noise_like((count, 6), seed=5)


def labelled(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
    """A mixture for label 0 and another for label 1."""
    return torch.where(label[:, None] == 0, NEGATIVE(x, sigma), MIXTURE(x, sigma))


def guidance(cfg: float, count: int = 4) -> dict[str, Any]:
    ones = torch.ones(count, dtype=torch.int64)
    return {"cfg": cfg, "positive": {"label": ones}, "negative": {"label": 0 * ones}}


def pairs(sigmas: Tensor) -> list[tuple[float, float]]:
    """(clean, noisy) for each step up."""
    return list(itertools.pairwise(sigmas.flip(0).tolist()))


def close(a: Tensor, b: Tensor, tol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol * float(b.abs().max()))


# -- one run upwards -----------------------------------------------------------------------------------------------------
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


# -- rectified flows, in their own time ----------------------------------------------------------------------------------
def velocity(y: Tensor, t: float) -> Tensor:
    """v = (Y - D) / t of the mixture, at Y = (1 - t) x."""
    return (y - MIXTURE(y / (1 - t), torch.full((len(y),), t / (1 - t), dtype=torch.float64))) / t


def flow_times(sigmas: Tensor) -> list[float]:
    return (sigmas / (1 + sigmas)).tolist()


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


def test_rf_inversion_as_published() -> None:
    """dY = (v + gamma (v_1 - v)) dt by Euler's method in flow time, for a mixture of the two fields."""
    y_1 = noise_like((4, 6), seed=3)
    y = images() / 1.1
    for t, t_next in itertools.pairwise(flow_times(schedule())[::-1]):
        v = velocity(y, t)
        y = y + (t_next - t) * (v + 0.3 * ((y_1 - y) / (1 - t) - v))
    close(rf_inversion(MIXTURE, images(), schedule(), gamma=0.3, noise=y_1).latent, y * 11)


def test_rf_inversion_without_and_with_full_control() -> None:
    y_1 = noise_like((4, 6), seed=3)
    plain = rf_inversion(MIXTURE, images(), schedule(), gamma=0.0, noise=y_1)
    exact = ddim_inversion(MIXTURE, images(), schedule(), at="clean")
    close(plain.latent, exact.latent)
    close(plain.round_trip_error, exact.round_trip_error, 1e-9)
    full = rf_inversion(MIXTURE, images(), schedule(), gamma=1.0, noise=y_1)
    close(full.latent, images() + 9.9 * y_1)
    there = rf_inversion(MIXTURE, images(), [1e6, 10.0, 0.1], gamma=1.0, noise=y_1).latent / (1 + 1e6)
    close(there, y_1, 1e-5)  # in flow time, at t = 1


def test_steering_back() -> None:
    x, start = images(), 10 * noise_like((4, 6))
    for cfg in (1.0, 7.5):
        steered = steer(labelled, x, 0.1, eta=1.0)
        close(ki.sample(steered, start, schedule(), **guidance(cfg)), x, 1e-11)
    assert torch.equal(
        ki.sample(steer(MIXTURE, x, 0.1, eta=0.0), start, schedule()), ki.sample(MIXTURE, start, schedule())
    )
    errors = [float(rf_inversion(MIXTURE, x, schedule(), eta=eta).round_trip_error.max()) for eta in (0.0, 0.5, 1.0)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-11
    half = steer(MIXTURE, x, 0.1, eta=1.0, until=2.0)
    at = torch.tensor([0.5, 0.5, 3.0, 3.0], dtype=torch.float64)
    close(half(start, at)[:2], MIXTURE(start, at)[:2])  # type: ignore[index]
    close(half(start, at)[2:], (start - 3.0 * (start - x) / 2.9)[2:])  # type: ignore[index]


# -- an equation a step --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("window", [0, 3])
def test_aidi_converges_to_the_exact_inverse(window: int) -> None:
    exact = ki.invert(MIXTURE, images(), schedule(20), tol=1e-11)
    found = aidi(MIXTURE, images(), schedule(20), iterations=200, window=window)
    assert found.converged.all()
    close(found.latent, exact.latent, 1e-7)
    few, more = (aidi(MIXTURE, images(), schedule(20), iterations=k, window=window) for k in (2, 8))
    assert (few.round_trip_error > more.round_trip_error).all() and not few.converged.any()


def test_aidi_is_the_published_fixed_point() -> None:
    """One step: u <- x_b + (a - b) d(u, a) from DDIM inversion; acceleration needs fewer iterations."""
    sigmas = torch.tensor([2.0, 1.0], dtype=torch.float64)
    u = ddim_inversion(GAUSSIAN, images(), sigmas).latent
    for k in range(1, 6):  # an evaluation each, and none is thrown away
        u = images() + (u - GAUSSIAN(u, torch.full((4,), 2.0, dtype=torch.float64))) / 2.0
        found = aidi(GAUSSIAN, images(), sigmas, iterations=k)
        close(found.latent, u)
        assert (found.evaluations == 1 + k + found.checking).all()
    assert aidi(GAUSSIAN, images(), sigmas, iterations=5, window=2).round_trip_error.max() < 1e-9


@pytest.mark.parametrize("average", [1, 2, 4])
def test_renoise_is_the_mean_of_the_last_predictions(average: int) -> None:
    """One step; u_{k+1} = x_b + (a - b) eps_k, and the last is made with the mean of the last eps."""
    sigmas, a, b = torch.tensor([2.0, 1.0], dtype=torch.float64), 2.0, 1.0
    w = math.sqrt((1 + a * a) / (1 + b * b))
    u, predictions = w * images(), []
    for _ in range(6):
        predictions.append((u - MIXTURE(u, torch.full((4,), a, dtype=torch.float64))) / a)
        u = images() + (a - b) * predictions[-1]
    expected = images() + (a - b) * torch.stack(predictions[-average:]).mean(0)
    found = renoise(MIXTURE, images(), sigmas, iterations=5, average=average)
    close(found.latent, expected)
    assert (found.evaluations - found.checking == 6).all()  # the mean's own residual would be a seventh
    close(found.residuals[0], rms((a - b) * (predictions[-1] - predictions[-2])))


def test_averaging_damps_an_oscillation_that_the_fixed_point_keeps() -> None:
    """F' = r + (1 - r) g = 1.9 at an indefinite point of the iteration: u - u* changes its sign and falls by 0.9."""

    def steep(x: Tensor, sigma: Tensor) -> Tensor:
        return 2.8 * x  # with r = 1/2 the step is 1.9 x

    sigmas = torch.tensor([2.0, 1.0], dtype=torch.float64)
    plain, mean = (renoise(steep, images(), sigmas, iterations=9, average=k).round_trip_error for k in (1, 2))
    close(mean / plain, torch.full_like(plain, (1 / 0.9 - 1) / 2), 1e-9)  # the mean of e / -0.9 and e


def test_dpm_solver_inversion_of_order_one_is_exact() -> None:
    found = dpm_solver_inversion(MIXTURE, images(), schedule(), iterations=500)
    assert found.converged.all() and float(found.round_trip_error.max()) <= 1e-9
    close(found.latent, ki.invert(MIXTURE, images(), schedule(), tol=1e-11).latent, 1e-7)


def test_dpm_solver_inversion_of_order_two_is_approximate() -> None:
    """It is exact where D does not change, and in one step; else its error falls with the steps, not the iterations."""
    dirac = ki.denoisers.Gaussian(0.3, 0.0)
    assert dpm_solver_inversion(dirac, images(), schedule(), order=2, iterations=500).converged.all()
    one = torch.tensor([2.0, 1.0], dtype=torch.float64)
    assert dpm_solver_inversion(MIXTURE, images(), one, order=2, iterations=500).converged.all()
    steps, x = [10, 20, 40], images(2)
    found = [dpm_solver_inversion(MIXTURE, x, schedule(n), order=2) for n in steps]
    errors = [float(f.round_trip_error.max()) for f in found]
    assert order_slope(errors, steps) > 1.5 and errors[-1] > 1e-6
    assert float(found[0].residuals.max()) < 1e-8  # the equations are solved; it is their terms that are estimated
    naive = ki.unsample(MIXTURE, x, schedule(10), sampler="dpmpp_2m", sigma_offset=0.0)
    back = ki.sample(MIXTURE, naive, schedule(10), sampler="dpmpp_2m")
    assert errors[0] < float(rms(back - x).max())


# -- stored corrections --------------------------------------------------------------------------------------------------
def test_direct_inversion_gives_the_image_back() -> None:
    found = direct_inversion(labelled, images(), schedule(), **guidance(7.5))
    # A run sums in another order than `advance`, by which the offsets are found, and amplifies the difference.
    assert found.converged.all() and float(found.round_trip_error.max()) < 1e-10
    close(found.latent, ddim_inversion(labelled, images(), schedule(), **guidance(1.0)).latent)
    replay = ki.noise.replay(found.noises)
    back = ki.sample(labelled, found.latent, schedule(), sampler=DirectInversion(), noise=replay, **guidance(7.5))
    close(back, images(), 1e-10)
    alone = ki.sample(labelled, found.latent, schedule(), **guidance(7.5))
    assert float(rms(alone - images()).min()) > 1e-2  # the latent by itself does not


def shifted(x: Tensor, sigma: Tensor, shift: Tensor) -> Tensor:
    """Conditioning by a continuous vector: the mixture, moved."""
    return MIXTURE(x - shift, sigma) + shift


def test_null_text_lowers_the_error() -> None:
    given: dict[str, Any] = {
        "cfg": 3.0, "positive": {"shift": torch.full((1, 6), 0.5, dtype=torch.float64)},
        "negative": {"shift": torch.zeros(1, 6, dtype=torch.float64)},
    }  # fmt: skip
    latent = ddim_inversion(shifted, images(), schedule(), positive=given["positive"]).latent
    before = rms(ki.sample(shifted, latent, schedule(), **given) - images())
    short, long = (null_text(shifted, images(), schedule(), lr=0.1, iterations=k, **given) for k in (5, 40))
    assert (short.round_trip_error < before).all() and (long.round_trip_error < 0.05 * before).all()
    torch.testing.assert_close(long.latent, latent, rtol=1e-11, atol=1e-11)
    assert long.memory["shift"].shape == (10, 4, 6)
    again = sample_null_text(shifted, latent, schedule(), long.memory, **given)
    close(rms(again - images()), long.round_trip_error, 1e-9)
    assert not given["negative"]["shift"].requires_grad and not long.memory["shift"].requires_grad


def test_null_text_leaves_the_network_alone() -> None:
    scale = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))

    def network(x: Tensor, sigma: Tensor, shift: Tensor) -> Tensor:
        return scale * shifted(x, sigma, shift)

    zero = {"shift": torch.zeros(1, 6, dtype=torch.float64)}
    found = null_text(network, images(), schedule(4), positive={"shift": zero["shift"] + 0.5}, negative=zero)
    assert scale.grad is None and not found.latent.requires_grad


# -- all of them ---------------------------------------------------------------------------------------------------------
SAMPLERS = {"rf_solver": "rf_solver", "fireflow": "fireflow", "dpm_solver_2": "dpmpp_2m"}


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_certificate_is_honest(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = images().to(dtype)
    found = BASELINES[name](labelled, x, schedule(), **guidance(1.5))
    assert found.latent.dtype == dtype and found.sigmas == tuple(schedule().tolist())
    sampler: Any = DirectInversion() if name == "direct_inversion" else SAMPLERS.get(name, "euler")
    noise = ki.noise.replay(found.noises) if found.noises else None
    back = ki.sample(labelled, found.latent, schedule(), sampler=sampler, noise=noise, **guidance(1.5))
    torch.testing.assert_close(
        found.round_trip_error, rms(back - x), rtol=1e-3, atol=1e-6 if dtype is torch.float32 else 1e-12
    )
    assert torch.equal(found.converged, found.round_trip_error <= found.allowed)
    assert "inversion of 4 samples" in str(found)


@pytest.mark.parametrize("name", BASELINES)
def test_evaluations_are_counted(name: str) -> None:
    """Rows that the denoiser saw; of an estimate, of starts and of the check too."""
    rows = 0

    def counting(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return MIXTURE(x, sigma)

    found = BASELINES[name](counting, torch.cat([images(2), 3 * images(1)]), schedule())
    assert rows == int(found.evaluations.sum())


@pytest.mark.parametrize("name", ["aidi", "aidi_anderson", "dpm_solver_1", "dpm_solver_2"])
def test_a_sample_does_not_depend_on_its_neighbours(name: str) -> None:
    x = torch.cat([images(2), 3 * images(1)])
    together = BASELINES[name](labelled, x, schedule(), **guidance(1.5, 3))
    alone = BASELINES[name](labelled, x[1:2], schedule(), **guidance(1.5, 1))
    close(together.latent[1:2], alone.latent, 1e-8)


@pytest.mark.parametrize("name", BASELINES)
def test_what_checks_the_latent_is_one_run_and_is_told(name: str) -> None:
    """`checking` is what the certificate cost: without it are left the evaluations of the way up."""
    found = BASELINES[name](MIXTURE, images(), schedule())
    down = ki.compile_plan({"rf_solver": "rf_solver", "fireflow": "fireflow"}.get(name, "euler"), schedule())
    assert found.checking == down.evaluations
    assert ((found.evaluations - found.checking) / (len(schedule()) - 1) >= 1).all()


def test_a_fixed_point_that_diverges_is_returned_as_it_is() -> None:
    """The last iterate, as published, not the best one; it is not called converged."""
    sigmas = torch.tensor([4.0, 1.0], dtype=torch.float64)
    errors = [aidi(lambda x, s: 4.0 * x, images(), sigmas, iterations=k).round_trip_error for k in (1, 4, 8)]
    assert (errors[2] > errors[1]).all() and (errors[1] > errors[0]).all()
    assert not aidi(lambda x, s: 4.0 * x, images(), sigmas).converged.any()


X, S = images(), schedule()
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "at": (lambda: ddim_inversion(MIXTURE, X, S, at="cleen"), ValueError, "unknown at 'cleen'; did you mean 'clean'. It must be one of clean, noisy"),  # type: ignore[arg-type]
    "ends at 0": (lambda: ddim_inversion(MIXTURE, X, ki.schedules.karras(5, 0.1, 10)), ValueError, r"stop at sigma_min > 0, e.g. sigmas\[:-1\]"),
    "rising": (lambda: aidi(MIXTURE, X, S.flip(0)), ValueError, r"decreasing.*sigmas.flip\(0\)"),
    "half": (lambda: aidi(MIXTURE, X.half(), S), TypeError, "x must be float32 or float64, got torch.float16"),
    "integers": (lambda: renoise(MIXTURE, X.int(), S), TypeError, "floating point"),
    "nan": (lambda: rf_solver(MIXTURE, X * math.nan, S), ValueError, "x has 24 NaN"),
    "nan, solved": (lambda: aidi(MIXTURE, X * math.nan, S), ValueError, "NaN"),
    "negative": (lambda: fireflow(labelled, X, S, cfg=2.0), ValueError, "negative= is missing"),
    "keep": (lambda: easyinv(MIXTURE, X, S, keep=2.0), ValueError, "keep must be a number from 0 to 1, got 2"),
    "iterations": (lambda: aidi(MIXTURE, X, S, iterations=0), ValueError, "iterations must be an int of at least 1, got 0"),
    "window": (lambda: aidi(MIXTURE, X, S, window=-1), ValueError, "window must be an int of at least 0"),
    "average": (lambda: renoise(MIXTURE, X, S, iterations=3, average=4), ValueError, "average must be at most iterations, 3, got 4"),
    "order": (lambda: dpm_solver_inversion(MIXTURE, X, S, order=3), ValueError, "order must be 1 .* or 2"),  # type: ignore[arg-type]
    "tau": (lambda: dpm_solver_inversion(MIXTURE, X, S, tau=0), ValueError, "tau must be a positive number, got 0"),
    "substeps": (lambda: dpm_solver_inversion(MIXTURE, X, S, substeps=1.5), ValueError, "substeps must be an int"),  # type: ignore[arg-type]
    "gamma": (lambda: rf_inversion(MIXTURE, X, S, gamma=1.5), ValueError, r"gamma must be a number from 0 \(not steered\) to 1, got 1.5"),
    "eta": (lambda: rf_inversion(MIXTURE, X, S, eta=-1), ValueError, "eta must be a number from 0"),
    "noise": (lambda: rf_inversion(MIXTURE, X, S, noise=X[:1]), ValueError, r"noise must be a tensor of x's shape \(4, 6\), got \(1, 6\)"),
    "image": (lambda: steer(MIXTURE, X[:3], 0.1, eta=0.5)(X, S[:1].expand(4)), ValueError, "image has shape .3, 6., which does not fit x's .4, 6."),
    "label": (lambda: null_text(labelled, X, S, **guidance(2.0)), TypeError, "negative must have a floating point tensor to optimise, got label; pass the embedding"),
    "no negative": (lambda: null_text(MIXTURE, X, S), TypeError, "to optimise, got nothing"),
    "lr": (lambda: null_text(shifted, X, S, lr=0.0, positive={"shift": X}, negative={"shift": X}), ValueError, "lr must be a positive number"),
    "cfg 1": (lambda: null_text(shifted, X, S, cfg=1.0, positive={"shift": X}, negative={"shift": X}), TypeError, "cfg other than 1"),
    "no gradient": (lambda: null_text(torch.no_grad()(shifted), X, S, positive={"shift": X}, negative={"shift": X}), TypeError, r"no torch.no_grad\(\) inside"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
