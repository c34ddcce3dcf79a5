"""`invert`: exact round trips, the theorem for exact denoisers, per-sample independence, honest failure."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinvert.inversion.choice import METHODS, choose
from kinvert.inversion.stepwise import levels_of, step_map
from problems import cost_alike, mixture, noise_like
from torch import Tensor

import kinvert as ki
from kinvert import models
from kinvert.analysis import properties
from kinvert.bench.problems import make_problem
from kinvert.engine import run_state
from kinvert.inversion import Anderson, Auto, Continuation, Damped, NewtonKrylov, Picard, Sweeps
from kinvert.inversion.solvers import Equation
from kinvert.tensors import rms

# The first forward-mode derivative of a process makes torch use a function of its own that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
MIXTURE = mixture()


def schedule(steps: int) -> Tensor:
    return ki.schedules.karras(steps + 1, 0.1, 10.0)[:-1]


def images(count: int = 6) -> Tensor:
    return 0.8 * noise_like((count, 6), seed=5)


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
    assert float(found.evaluations.double().median()) / steps <= 15 * stages


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_samplers_are_inverted_exactly(name: str, steps: int) -> None:
    x = images(3)
    found = ki.invert(MIXTURE, x, schedule(steps), sampler=name, tol=1e-8)
    assert found.converged.all()
    again = ki.sample(MIXTURE, found.latent, schedule(steps), sampler=name)
    assert float(rms(again - x).max()) <= 1e-8
    assert float(found.evaluations.double().median()) / steps <= 200


@pytest.mark.parametrize("name", ["edict", "bdia", "o_belm", "leapfrog", "reversible_heun", "mccallum_foster"])
def test_reversible_samplers_are_undone_in_closed_form(name: str) -> None:
    """The latent comes with an auxiliary state; the pair gives the image to rounding."""
    plan = ki.compile_plan(name, schedule(12))
    found = ki.invert(MIXTURE, images(), schedule(12), sampler=name)
    assert found.converged.all() and float(found.round_trip_error.max()) < 1e-11
    assert set(found.memory) == set(plan.auxiliary) != set()
    again = run_state(plan.closed, MIXTURE, {"x": found.latent, **found.memory})["x"]
    torch.testing.assert_close(again, images(), rtol=1e-10, atol=1e-10)


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


# -- the theorem: for an exact denoiser the Euler step is the gradient of a strongly convex function --------------------
def euler_step(sigma: float, sigma_next: float) -> tuple[Callable[[Tensor, Tensor], Tensor], float]:
    plan = ki.compile_plan("euler", [sigma, sigma_next])
    return step_map(plan.steps[0], lambda index: MIXTURE, levels_of(plan, images(2))[0]), sigma_next / sigma


def equation(function: Callable[[Tensor, Tensor], Tensor], y: Tensor, tolerance: float = 1e-12) -> Equation:
    return Equation(function, y, y.new_full((len(y),), tolerance), torch.full((len(y),), 10**6))


@given(sigma=st.floats(0.3, 8.0), ratio=st.floats(0.1, 0.9), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_every_point_has_one_preimage(sigma: float, ratio: float, seed: int) -> None:
    """Existence and uniqueness: from two starts far apart, the same solution, of a residual that vanishes."""
    function, _ = euler_step(sigma, ratio * sigma)
    y = sigma * noise_like((2, 6), seed)
    roots = [Auto().solve(equation(function, y), start) for start in (y, y + 5 * sigma * noise_like((2, 6), seed + 1))]
    for root in roots:
        assert float(root.residual.max()) <= 1e-12
    torch.testing.assert_close(roots[0].u, roots[1].u, rtol=1e-8, atol=1e-8 * sigma / ratio)


@given(sigma=st.floats(0.3, 8.0), ratio=st.floats(0.1, 0.9), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_damped_iteration_converges_below_the_bound(sigma: float, ratio: float, seed: int) -> None:
    """tau < 2 / (r + (1 - r) lmax(D')): here lmax is bounded by the covariance of the data over sigma^2."""
    function, r = euler_step(sigma, ratio * sigma)
    spread = torch.cdist(MIXTURE.means, MIXTURE.means).max() ** 2 / 4 + MIXTURE.std.max() ** 2
    tau = 1.0 / (r + (1 - r) * float(spread) / sigma**2)
    y = sigma * noise_like((1, 6), seed)
    iterations = math.ceil(40 / (tau * r))  # the slowest direction contracts by at least 1 - tau r
    root = Anderson(window=0, tau=tau, max_iterations=iterations, growth=math.inf).solve(equation(function, y, 1e-9), y)
    assert float(root.residual.max()) <= 1e-9


def test_picard_oscillates_where_anderson_converges() -> None:
    """Few steps: the published fixed point stalls where r + (1 - r) lmax(D') > 2."""
    close = ki.denoisers.GaussianMixture(
        torch.tensor([[2.0, 0.0], [-2.0, 0.0]], dtype=torch.float64), torch.tensor([0.2, 0.2], dtype=torch.float64)
    )
    x, sigmas = torch.tensor([[0.4, 0.1], [0.05, 0.2]], dtype=torch.float64), [4.0, 1.0, 0.5]
    with pytest.warns(RuntimeWarning, match="not inverted"):
        stalled = ki.invert(close, x, sigmas, method="picard")
    assert not stalled.converged.all()
    assert ki.invert(close, x, sigmas, method="auto").converged.all()


@pytest.mark.parametrize("name", [name for name in ki.SAMPLERS if name != "dpm_adaptive"])
def test_a_method_is_used_or_refused(name: str) -> None:
    """Over the registry: what is accepted for a Plan is what solves it, and the refusal lists what is accepted."""
    plan = ki.compile_plan(name, schedule(4))
    solvers = {
        **{key: make() for key, make in METHODS.items()},
        "mine": Anderson(window=2),
        "my sweeps": Sweeps(window=3),
    }
    if plan.auxiliary:
        used = {"auto"}
    elif plan.is_multistep:
        used = {"auto", "sweeps", "my sweeps"}
    else:
        used = set(solvers)
    for key, solver in solvers.items():
        for method in (solver, *([key] if key in METHODS else [])):
            if key in used:
                assert choose(method, plan) == solver
                continue
            with pytest.raises(ValueError, match=rf"method must be .*'auto'.* for {name}, got .*"):
                choose(method, plan)


def test_the_method_that_is_refused_is_named() -> None:
    refused = [("dpmpp_2m", "picard", "'auto', 'sweeps' or a Sweeps for dpmpp_2m, got 'picard'")]
    refused += [("o_belm", "sweeps", "'auto' for o_belm, got 'sweeps': its steps are undone in closed form")]
    for sampler, method, message in refused:
        with pytest.raises(ValueError, match=message):
            ki.invert(MIXTURE, images(), schedule(6), sampler=sampler, method=method)
    with pytest.raises(ValueError, match="got Anderson"):
        ki.invert(MIXTURE, images(), schedule(6), sampler="lms", method=Anderson(window=2))


# -- samples are alone ---------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize(
    "solver", [Anderson(), Damped(tau=0.5, max_iterations=2000), NewtonKrylov(), Continuation(), Picard(200), Auto()]
)
def test_solvers_agree(solver: ki.inversion.Solver) -> None:
    found = ki.invert(MIXTURE, images(), schedule(20), method=solver, tol=1e-8)
    exact = ki.invert(MIXTURE, images(), schedule(20), tol=1e-10)
    assert found.converged.all()
    torch.testing.assert_close(found.latent, exact.latent, rtol=1e-4, atol=1e-4)


# -- honest failure ------------------------------------------------------------------------------------------------------
def test_what_has_no_preimage_is_said_to_have_none() -> None:
    """F(u) = r u + (1 - r) D(u) with D(u) = -u^2 / c never exceeds a bound, so an image above it cannot be reached."""

    def parabola(x: Tensor, sigma: Tensor) -> Tensor:
        return -x.square()

    x = torch.tensor([[0.05], [5.0]], dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match=r"sample 1 not inverted.*step 0 \(sigma 2 -> 1\)"):
        found = ki.invert(parabola, x, [2.0, 1.0])
    assert found.converged.tolist() == [True, False]
    assert found.round_trip_error[1] > 1 and torch.isfinite(found.latent).all()
    assert "sample 1 not inverted" in str(found) and "converged        1 of 2" in str(found)
    assert found.round_trip_error[1] < 4.9  # 5 less the top of the parabola u/2 - u^2/2, which is 1/8


# -- folds ---------------------------------------------------------------------------------------------------------------
def folded(strength: float) -> Callable[[Tensor, Tensor], Tensor]:
    """`F(u) = u + bounded`: onto, but folded along every coordinate where strength > 1."""
    return lambda u, index: u - strength * torch.sin(u) + 0.1 * torch.cos(u.sum(1, keepdim=True))


@pytest.mark.parametrize("strength", [0.5, 6.0])
def test_continuation_reaches_every_value_of_a_bounded_perturbation(strength: float) -> None:
    """What its theorem says: with or without folds, every sample, from any start; the others stall at folds."""
    y = 3 * noise_like((12, 5), seed=3)
    for start in (y, torch.zeros_like(y)):
        root = Continuation().solve(equation(folded(strength), y), start)
        assert float(root.residual.max()) <= 1e-12
        index = torch.arange(len(y))
        torch.testing.assert_close(folded(strength)(root.u, index), y, rtol=0, atol=1e-10)
    if strength > 1:
        for other in (NewtonKrylov(max_iterations=100), Anderson(max_iterations=100)):
            assert float(other.solve(equation(folded(strength), y), y).residual.max()) > 1e-3


def test_a_folded_sample_leaves_its_neighbours_alone() -> None:
    y = 3 * noise_like((4, 5), seed=3)
    together = Auto().solve(equation(folded(6.0), y), y)
    for i in range(4):
        alone = Auto().solve(equation(folded(6.0), y[i : i + 1]), y[i : i + 1])
        torch.testing.assert_close(alone.u[0], together.u[i], rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [50, 20])
def test_strong_guidance(steps: int) -> None:
    """cfg 7.5: every image of the trained network is reached, where Anderson's method alone fails for some."""
    denoiser = models.load("digits", dtype=torch.float64)
    x, labels = (part[:4] for part in models.held_out("digits"))
    sigmas = ki.schedules.karras(steps + 1, 0.02, 80.0)[:-1]
    guided: dict[str, Any] = {
        "cfg": 7.5, "positive": {"label": labels}, "negative": {"label": torch.full_like(labels, denoiser.null_label)},
    }  # fmt: skip
    with pytest.warns(RuntimeWarning, match="not inverted.*smallest singular value"):
        plain = ki.invert(denoiser, x.double(), sigmas, method="anderson", **guided)
    found = ki.invert(denoiser, x.double(), sigmas, tol=1e-8, **guided)
    assert found.converged.all() and not plain.converged.all()
    again = ki.sample(denoiser, found.latent, sigmas, **guided)
    assert float(rms(again - x.double()).max()) <= 1e-8


# -- the certificate -----------------------------------------------------------------------------------------------------
def test_contraction_is_the_factor_of_the_fixed_point() -> None:
    """For one Gaussian D' = s^2 / (s^2 + sigma^2), and I - F' = (1 - r) (1 - D') at every state."""
    gaussian = ki.denoisers.Gaussian(torch.zeros(6, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    found = ki.invert(gaussian, images(), schedule(9))
    levels = schedule(9)
    r, sigma = levels[1:] / levels[:-1], levels[:-1]
    exact = (1 - r) * (1 - 0.49 / (0.49 + sigma**2))
    assert found.contraction is not None
    torch.testing.assert_close(found.contraction, exact[:, None].expand(-1, 6), rtol=1e-4, atol=1e-6)


def test_restored_is_what_the_sampler_makes_of_the_latent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for sampler in ("euler", "dpmpp_2m"):
            found = ki.invert(MIXTURE, images(), schedule(8), sampler=sampler, tol=1e-13, max_evals=80)
            assert found.restored is not None
            torch.testing.assert_close(found.restored, ki.sample(MIXTURE, found.latent, schedule(8), sampler=sampler))
            torch.testing.assert_close(rms(found.restored - images()), found.round_trip_error)


def test_rounding_that_will_grow_is_announced() -> None:
    """EDICT with a small p over many steps, in float32: the warning names the prediction, and the result bears it out."""
    rule = ki.sampler("edict", p=0.8)
    with pytest.warns(RuntimeWarning, match="edict magnifies rounding about .* times.*higher precision or fewer steps"):
        found = ki.invert(mixture(), images().float(), schedule(40), sampler=rule)
    assert found.amplification is not None and found.amplification > 1e4
    assert "amplification" in str(found) and not found.converged.all()


def test_the_report() -> None:
    report = str(ki.invert(MIXTURE, images(), schedule(8)))
    for line in ("converged        6 of 6", "residuals        at most", "contraction ", "kurtosis", "KS distance"):
        assert line in report


# -- the step to sigma = 0 -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_the_step_to_zero_is_inverted_when_asked(name: str) -> None:
    sigmas = ki.schedules.karras(8, 0.1, 10.0)
    assert sigmas[-1] == 0
    x = MIXTURE(images(), torch.full((6,), 0.05, dtype=torch.float64))  # what a denoiser can say
    found = ki.invert(MIXTURE, x, sigmas, sampler=name, last_step="least_change", tol=1e-8)
    assert found.converged.all()
    assert float(rms(ki.sample(MIXTURE, found.latent, sigmas, sampler=name) - x).max()) <= 1e-8


def test_least_change_is_the_nearest_of_many() -> None:
    """`D(x) = P x` with a projection P: of all x with P x = image, the image itself is nearest."""
    q = torch.linalg.qr(noise_like((6, 3), seed=1))[0]
    projection = q @ q.T

    def project(x: Tensor, sigma: Tensor) -> Tensor:
        return x @ projection

    x = images() @ projection
    found = ki.invert(project, x, [0.5, 0.0], last_step="least_change")
    assert found.converged.all()
    torch.testing.assert_close(found.latent, x, rtol=0, atol=1e-9)
    with pytest.warns(RuntimeWarning, match="not inverted"):
        outside = ki.invert(project, images(), [0.5, 0.0], last_step="least_change")
    torch.testing.assert_close(outside.restored, images() @ projection, rtol=0, atol=1e-9)


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


@pytest.mark.parametrize("sampler", ["edict", "bdia", "o_belm", "leapfrog", "reversible_heun", "mccallum_foster"])
def test_what_a_reversible_sampler_costs_is_counted(sampler: str) -> None:
    rows = 0

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return MIXTURE(x, sigma)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = ki.invert(denoiser, images(2), schedule(6), sampler=sampler)
    assert int(found.evaluations.sum()) == rows
    assert (found.evaluations - torch.tensor([3, 1])).unique().numel() == 1
    assert found.checking == ki.compile_plan(sampler, schedule(6)).closed.evaluations


def test_parts_of_a_batch_have_the_certificate_of_the_whole() -> None:
    """The contraction of a sample does not depend on its place, the amplification not on the part that comes first."""
    weights = 0.5 * noise_like((16, 16), seed=0)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(x / (1 + sigma[:, None] ** 2).sqrt() @ weights)

    whole, parts = (ki.invert(denoiser, noise_like((4, 16), seed=3), schedule(6), max_batch=b) for b in (None, 1))
    assert whole.contraction is not None and parts.contraction is not None
    torch.testing.assert_close(whole.contraction, parts.contraction, rtol=1e-6, atol=0)
    x = torch.cat([torch.full((1, 16), size, dtype=torch.float64) for size in (1e-3, 1e3)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = [
            ki.invert(MIXTURE, y, schedule(6), sampler="bdia", max_batch=b)
            for y in (x[:, :6], x.flip(0)[:, :6])
            for b in (None, 1)
        ]
    assert [f.amplification for f in found] == pytest.approx([found[0].amplification] * 4) and found[
        0
    ].amplification > 9


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


def test_round_trip_with_invert() -> None:
    trip = ki.round_trip(MIXTURE, images(), schedule(12), sampler="dpmpp_2m", method="invert")
    assert float(trip.max_error.max()) < 1e-7
    assert trip.evaluations > 24


X = images()
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "ends at 0": (lambda: ki.invert(MIXTURE, X, ki.schedules.karras(5, 0.1, 10)), ValueError, r"cannot invert the step of euler from sigma 0.1 to 0: x has coefficient 0 there; .*sigmas\[:-1\]"),
    "noise": (lambda: ki.invert(MIXTURE, X, schedule(5), sampler="euler_ancestral"), ValueError, "cannot invert euler_ancestral: it draws noise 5 times.*eta=0"),
    "adaptive": (lambda: ki.invert(MIXTURE, X, schedule(5), sampler="dpm_adaptive"), ValueError, "dpm_adaptive chooses its steps"),
    "rising": (lambda: ki.invert(MIXTURE, X, schedule(5).flip(0)), ValueError, r"decreasing.*sigmas.flip\(0\)"),
    "last_step": (lambda: ki.invert(MIXTURE, X, schedule(5), last_step="least"), ValueError, "unknown last_step 'least'; did you mean 'least_change'"),
    "method": (lambda: ki.invert(MIXTURE, X, schedule(5), method="andersen"), ValueError, "unknown method 'andersen'; did you mean 'anderson'.* or a Solver"),
    "tol": (lambda: ki.invert(MIXTURE, X, schedule(5), tol=0.0), ValueError, "tol must be a positive number"),
    "max_evals": (lambda: ki.invert(MIXTURE, X, schedule(5), max_evals=3), ValueError, "max_evals must be an int of at least 15, a run up"),
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


@pytest.mark.parametrize("cfg", [5.0, 7.5])
def test_errors_that_the_way_down_magnifies_are_made_smaller(cfg: float) -> None:
    """At strong guidance a step's residual grows some hundred times on the way down; the second attempt allows for it."""
    problem = make_problem("mixture", 8, 0, torch.float64)
    guided: dict[str, Any] = {"cfg": cfg, "positive": problem.positive, "negative": problem.negative}
    found = ki.invert(problem.denoiser, problem.images, ki.schedules.karras(21, 0.03, 15.0)[:-1], **guided)
    assert found.converged.all()


def test_a_sampler_that_discards_its_last_step_is_inverted_as_it_is() -> None:
    rule = ki.sampler("sa_solver", eta=0, keep_last=False)
    found = ki.invert(MIXTURE, images(3), schedule(10), sampler=rule)
    assert found.converged.all()
    assert float(rms(ki.sample(MIXTURE, found.latent, schedule(10), sampler=rule) - images(3)).max()) <= 1e-9
