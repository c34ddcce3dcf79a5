"""`invert` over the samplers: exact round trips, samples that do not disturb each other, budgets, bad input."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inverting import MIXTURE, images, schedule
from problems import cost_alike, mixture, noise_like
from torch import Tensor

import kinvert as ki
from kinvert import models
from kinvert.analysis import properties
from kinvert.tensors import rms

ONE_STEP = ["euler", "heun", "dpm_2", "heunpp2", "midpoint", "rk4", "res_2s"]

QUIET = {"dpmpp_2s_ancestral": {"eta": 0}, "dpmpp_sde": {"eta": 0}, "seeds_2": {"eta": 0}}

MULTISTEP = ["lms", "dpmpp_2m", "ipndm", "deis", "res_multistep", "uni_pc", "res_2m"]


@pytest.mark.parametrize("steps", [5, 15])
@pytest.mark.parametrize("name", [*ONE_STEP, *QUIET])
def test_one_step_samplers_are_inverted_exactly(name: str, steps: int) -> None:
    rule = ki.sampler(name, **QUIET.get(name, {}))
    found = ki.invert(MIXTURE, images(), schedule(steps), sampler=rule, tol=1e-10)
    assert found.converged.all()
    again = ki.sample(MIXTURE, found.latent, schedule(steps), sampler=rule)
    torch.testing.assert_close(rms(again - images()), found.round_trip_error, rtol=1e-3, atol=1e-13)
    assert float(found.round_trip_error.max()) <= 1e-10
    stages = properties(rule).evaluations_per_step
    assert float(found.evaluations.double().mean()) / steps <= 15 * stages


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_samplers_are_inverted_exactly(name: str, steps: int) -> None:
    x = images(3)
    found = ki.invert(MIXTURE, x, schedule(steps), sampler=name, tol=1e-8)
    assert found.converged.all()
    again = ki.sample(MIXTURE, found.latent, schedule(steps), sampler=name)
    assert float(rms(again - x).max()) <= 1e-8
    assert float(found.evaluations.double().median()) / steps <= 200


def test_stochastic_samplers_without_their_noise() -> None:
    for name in ("dpmpp_2m_sde", "dpmpp_3m_sde"):
        assert ki.invert(MIXTURE, images(), schedule(6), sampler=ki.sampler(name, eta=0)).converged.all()


@pytest.mark.parametrize("name", ["euler", pytest.param("dpmpp_2m", marks=pytest.mark.slow)])
def test_a_trained_network(name: str) -> None:
    """Held-out images of the embedded digits model, 20 steps from sigma 80, with and without a little guidance."""
    denoiser = models.load("digits", dtype=torch.float64)
    x, labels = (part[:3] for part in models.held_out("digits"))
    found = ki.invert(
        denoiser, x.double(), ki.schedules.karras(21, 0.02, 80.0)[:-1], sampler=name, tol=1e-8,
        positive={"label": labels},
    )  # fmt: skip
    assert found.converged.all()
    assert float(found.latent.std()) > 40  # it is the latent at sigma 80, not something near the image


def test_float32() -> None:
    found = ki.invert(mixture(), images().float(), schedule(20), sampler="euler")
    assert found.converged.all() and found.latent.dtype == torch.float32


def test_a_sampler_that_discards_its_last_step_is_inverted_as_it_is() -> None:
    rule = ki.sampler("sa_solver", eta=0, keep_last=False)
    found = ki.invert(MIXTURE, images(3), schedule(10), sampler=rule)
    assert found.converged.all()
    assert float(rms(ki.sample(MIXTURE, found.latent, schedule(10), sampler=rule) - images(3)).max()) <= 1e-9


# -- samples are alone


@pytest.mark.parametrize(("name", "method"), [("euler", "anderson"), ("euler", "newton"), ("dpmpp_2m", "auto")])
def test_a_sample_does_not_depend_on_its_neighbours(name: str, method: str) -> None:
    x = images(4)
    together = ki.invert(MIXTURE, x, schedule(8), sampler=name, method=method)
    for i in range(4):
        alone = ki.invert(MIXTURE, x[i : i + 1], schedule(8), sampler=name, method=method)
        torch.testing.assert_close(alone.latent[0], together.latent[i], rtol=1e-9, atol=1e-9)
        mixed = (3, 1, 0, 0)[i]  # evaluations that tell whether rows are mixed
        assert cost_alike(alone.evaluations, together.evaluations[i] - mixed)


def test_a_solved_sample_costs_no_more() -> None:
    """Rows seen by the denoiser, but for copies, are the evaluations that are counted, sample by sample."""
    rows = 0

    def counting(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x.unique(dim=0))
        return MIXTURE(x, sigma)

    x = torch.cat([images(3), 3 * images(2)])
    found = ki.invert(counting, x, schedule(10), method="anderson", tol=1e-9)
    assert rows == int(found.evaluations.sum()) - 1  # to see whether it mixes rows, a sample is put beside itself
    assert found.evaluations.unique().numel() > 1


def test_conditioning_follows_its_sample() -> None:
    """Guidance and masks are restricted to the samples that are still open."""

    def labelled(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        return MIXTURE(x - label[:, None], sigma) + label[:, None]

    x, label = images(4), torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=torch.float64)
    guided: dict[str, Any] = {"cfg": 1.5, "positive": {"label": label}, "negative": {"label": torch.zeros(1)}}
    mask = torch.ones(4, 6)
    mask[1, :3] = 0
    found = ki.invert(labelled, x, schedule(10), sampler="heun", mask=mask, **guided)
    assert found.converged.all()
    alone = ki.invert(
        labelled, x[1:2], schedule(10), sampler="heun", mask=mask[1:2], cfg=1.5, positive={"label": label[1:2]},
        negative={"label": torch.zeros(1)},
    )  # fmt: skip
    torch.testing.assert_close(found.latent[1:2], alone.latent, rtol=1e-7, atol=1e-7)


def test_what_is_not_of_the_batch_belongs_to_every_sample() -> None:
    """A conditioning or a mask without a batch dimension is not cut up when samples are solved apart."""
    x, weight = images(4), torch.linspace(-1, 1, 6, dtype=torch.float64)  # of the event, not of the batch
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0])

    def shifted(y: Tensor, sigma: Tensor, weight: Tensor) -> Tensor:
        assert weight.shape == (6,)
        return MIXTURE(y - weight, sigma) + weight

    for sampler in ("euler", "dpmpp_2m"):
        found = ki.invert(shifted, x, schedule(6), sampler=sampler, positive={"weight": weight}, mask=mask)
        assert found.converged.all()
        alone = ki.invert(shifted, x[2:3], schedule(6), sampler=sampler, positive={"weight": weight}, mask=mask)
        torch.testing.assert_close(alone.latent, found.latent[2:3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "o_belm"])
def test_max_batch_is_the_same_in_parts(name: str) -> None:
    """Every call sees at most so many samples, each with its own conditioning; the certificate is whole."""
    rows: list[int] = []

    def labelled(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        rows.append(len(x))
        return MIXTURE(x - label[:, None], sigma) + label[:, None]

    given: dict[str, Any] = {"positive": {"label": torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)}, "sampler": name}
    parts = ki.invert(labelled, images(5), schedule(10), max_batch=2, **given)
    assert max(rows) == 2
    whole = ki.invert(labelled, images(5), schedule(10), **given)
    for part, of_all in ((parts.latent, whole.latent), (parts.restored, whole.restored)):
        torch.testing.assert_close(part, of_all, rtol=1e-8, atol=1e-8)
    assert parts.converged.all() and cost_alike(parts.evaluations, whole.evaluations)
    assert parts.residuals.shape == whole.residuals.shape and set(parts.memory) == set(whole.memory)
    assert (parts.contraction is None) == (whole.contraction is None)


def test_a_warning_names_the_sample_of_the_whole_batch() -> None:
    def broken(x: Tensor, sigma: Tensor, bad: Tensor) -> Tensor:
        return torch.where(bad[:, None], torch.nan, MIXTURE(x, sigma))

    bad = torch.tensor([False, False, True])
    with pytest.warns(RuntimeWarning, match="sample 2 not inverted"):
        found = ki.invert(broken, images(3), schedule(8), positive={"bad": bad}, max_batch=1)
    assert found.converged.tolist() == [True, True, False]


def test_a_denoiser_that_fails_is_not_called_solved() -> None:
    def broken(x: Tensor, sigma: Tensor) -> Tensor:
        return MIXTURE(x, sigma) * torch.where(sigma[:, None] > 1.0, torch.nan, 1.0)

    with pytest.warns(RuntimeWarning, match="not inverted"):
        found = ki.invert(broken, images(2), schedule(8), sampler="dpmpp_2m")
    assert not found.converged.any() and found.round_trip_error.isinf().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_half_precision_is_judged_as_it_is(sampler: str, dtype: torch.dtype) -> None:
    """Rounding decides how far it comes; what is said of it holds, and the small linear systems can be solved."""

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return MIXTURE(x.double(), sigma.double()).to(x.dtype)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = ki.invert(denoiser, images().to(dtype), schedule(10), sampler=sampler)
    assert found.latent.dtype == dtype and torch.isfinite(found.latent).all()
    again = ki.sample(denoiser, found.latent, schedule(10), sampler=sampler)
    error = rms(again.double() - images().to(dtype).double())
    torch.testing.assert_close(error, found.round_trip_error.double(), rtol=0.02, atol=1e-3)
    assert float(error.median()) < 0.1


def test_small_errors_in_half_precision_are_not_zero() -> None:
    """Their squares are below what float16 holds, and those of states at high noise above."""
    small = torch.full((1, 4), 1e-4, dtype=torch.float16)
    assert float(rms(small)) == pytest.approx(1e-4, rel=1e-3)
    assert float(rms(torch.full((1, 4), 300.0, dtype=torch.float16))) == 300.0


@pytest.mark.parametrize(
    ("sampler", "method"),
    [
        (s, m)
        for s in ("euler", "heun", "rk4")
        for m in ("auto", "anderson", "picard", "newton", "continuation", "sweeps")
    ]
    + [(s, m) for s in ("dpmpp_2m", "uni_pc") for m in ("auto", "sweeps")],
)
def test_max_evals_bounds_what_a_sample_costs(method: str, sampler: str) -> None:
    """The denoiser's own count, for a learned-like denoiser that few evaluations do not invert."""
    weights, calls = 0.4 * noise_like((16, 16), seed=0), 0

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.tanh(x / (1 + sigma[:, None] ** 2).sqrt() @ weights)

    least = 5 * ki.compile_plan(sampler, schedule(5)).evaluations
    for most in (least, least + 7, 2 * least, 6 * least):
        calls = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found = ki.invert(
                denoiser, noise_like((1, 16), seed=1), schedule(5), sampler=sampler, method=method, tol=1e-13,
                max_evals=most,
            )  # fmt: skip
        assert calls == int(found.evaluations) <= most
        assert found.residuals.isfinite().all()


X = images()


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "ends at 0": (lambda: ki.invert(MIXTURE, X, ki.schedules.karras(5, 0.1, 10)), ValueError, r"cannot invert the step of euler from sigma 0.1 to 0: x has coefficient 0 there; .*sigmas\[:-1\]"),
    "noise": (lambda: ki.invert(MIXTURE, X, schedule(5), sampler="euler_ancestral"), ValueError, "cannot invert euler_ancestral: it draws noise 5 times.*eta=0"),
    "adaptive": (lambda: ki.invert(MIXTURE, X, schedule(5), sampler="dpm_adaptive"), ValueError, "dpm_adaptive chooses its steps"),
    "rising": (lambda: ki.invert(MIXTURE, X, schedule(5).flip(0)), ValueError, r"decreasing.*sigmas.flip\(0\)"),
    "last_step": (lambda: ki.invert(MIXTURE, X, schedule(5), last_step="least"), ValueError, "unknown last_step 'least'; did you mean 'least_change'"),
    "method": (lambda: ki.invert(MIXTURE, X, schedule(5), method="andersen"), ValueError, "unknown method 'andersen'; did you mean 'anderson'.* or a Solver"),
    "tol": (lambda: ki.invert(MIXTURE, X, schedule(5), tol=0.0), ValueError, "tol must be a positive number"),
    "max_evals": (lambda: ki.invert(MIXTURE, X, schedule(5), max_evals=3), ValueError, "max_evals must be an int of at least 14, a run up"),
    "x": (lambda: ki.invert(MIXTURE, X.int(), schedule(5)), TypeError, "floating point"),
    "event": (lambda: ki.invert(MIXTURE, X[:, 0], schedule(5)), ValueError, r"x must have shape \(batch, \*event\) with values"),
    "callback": (lambda: ki.invert(MIXTURE, X, schedule(5), callback=3), TypeError, "callback must be callable"),
    "soft mask": (lambda: ki.invert(MIXTURE, X, schedule(5), mask=torch.full(X.shape[1:], 0.5)), ValueError, "mask must be 0 or 1 everywhere.*such as 0.5"),
    "nothing evaluated": (lambda: ki.invert(MIXTURE, X, [2.0, 1.0], sampler=ki.sampler("sa_solver", eta=0, keep_last=False)), ValueError, "its run leaves x as it is.*keep_last=False"),
    "window": (lambda: ki.inversion.Sweeps(window=0), ValueError, "window must be an int of at least 1"),
    "krylov": (lambda: ki.inversion.NewtonKrylov(krylov=0), ValueError, "krylov must be an int of at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_warnings_point_at_the_line_of_the_user() -> None:
    """Of a sample that is not inverted, of a tolerance below rounding, of a denoiser that is no function."""
    generator = torch.Generator().manual_seed(0)

    def dropout(x: Tensor, sigma: Tensor) -> Tensor:
        return MIXTURE(x, sigma) * (torch.rand(x.shape, generator=generator) > 0.5)

    def broken(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.full_like(x, torch.nan)

    with pytest.warns(RuntimeWarning) as caught:
        ki.invert(broken, images(2), schedule(4))
        ki.invert(broken, images(2), schedule(4), sampler="dpmpp_2m")
        ki.invert(broken, images(2), schedule(4), sampler="o_belm")
        ki.invert(MIXTURE, images(2).float(), schedule(4), tol=1e-12, max_evals=40)
        ki.invert(dropout, images(2), schedule(4), max_evals=40)
        ki.extract_noise(dropout, images(2), schedule(4))
    assert {warning.filename for warning in caught} == {__file__} and len(caught) >= 7
