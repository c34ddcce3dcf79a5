"""Few evaluations: climbs, fair shares, latents that nobody checks, and the default limit."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from inverting import MIXTURE, images, schedule
from torch import Tensor

import kinvert as ki
from kinvert.inversion import climbs
from kinvert.inversion.climbs import CLIMBS, PAIRS, PLAIN, _Pairs, affordable
from kinvert.inversion.forecasts import Forecasts
from kinvert.inversion.problem import Reason
from kinvert.inversion.steps import fair_share, levels_of, step_problem
from kinvert.plan import compile_plan
from kinvert.tensors import rms

SIGMAS = schedule(8)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "reversible_heun"])
def test_an_unchecked_latent_costs_one_run_and_claims_nothing(sampler: str) -> None:
    runs = ki.compile_plan(sampler, SIGMAS).evaluations
    found = ki.invert(MIXTURE, images(3), SIGMAS, sampler=sampler, max_evals=runs + 4, check=False, max_batch=2)
    assert found.checking == 0
    if sampler != "reversible_heun":  # which is undone in closed form, at its own cost
        assert int(found.evaluations.max()) <= runs + 4
    assert found.round_trip_error.isnan().all() and not found.converged.any() and found.restored is None
    assert found.reasons == (ki.inversion.Reason.UNCHECKED,) * 3
    assert "not checked" in str(found)
    again = rms(found.sample(MIXTURE) - images(3))
    assert (again < 0.5 * rms(images(3))).all()


def test_the_checked_latent_is_the_same() -> None:
    most = 2 * (len(SIGMAS) - 1) + 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        checked = ki.invert(MIXTURE, images(3), SIGMAS, max_evals=most)
    unchecked = ki.invert(MIXTURE, images(3), SIGMAS, max_evals=most - len(SIGMAS) + 1, check=False)
    assert torch.equal(checked.latent, unchecked.latent)
    assert torch.equal(checked.round_trip_error, rms(unchecked.sample(MIXTURE) - images(3)))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_one_evaluation_a_step_is_better_than_plain_unsampling(sampler: str, cfg: float) -> None:
    """Measured by the worst of three images."""
    negative = {} if cfg == 1 else {"negative": {}}
    x, given = images(3), {"sampler": sampler, "cfg": cfg, **negative}
    runs = ki.compile_plan(sampler, SIGMAS).evaluations
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = ki.invert(MIXTURE, x, SIGMAS, max_evals=2 * runs + 4, **given)
    plain = rms(ki.sample(MIXTURE, ki.unsample(MIXTURE, x, SIGMAS, sigma_offset=0.0, **given), SIGMAS, **given) - x)
    assert float(found.round_trip_error.max()) <= float(plain.max()) * (1 + 1e-9)


@pytest.mark.parametrize(("steps", "reserve"), [(5, 40), (1, 3), (7, 7)])
def test_a_fair_share_leaves_one_evaluation_of_each_step(steps: int, reserve: int) -> None:
    plan = compile_plan(ki.sampler("heun"), tuple(float(s) for s in schedule(steps)))
    left = torch.tensor([2 * reserve])
    for step in reversed(plan.steps):
        share = fair_share(left, step)
        assert (share >= 2).all() and (left - share >= 2 * step.index).all()
        assert (share <= (2 * left // (step.index + 1)).maximum(left - 24 * step.index)).all()
        left = left - share


def test_the_climbs_that_are_affordable_are_the_first_ones() -> None:
    euler, heun = (ki.compile_plan(name, SIGMAS) for name in ("euler", "heun"))
    assert affordable(euler, 2) == ((1,), 2)
    assert affordable(euler, 3) == ((1,), 2)
    assert affordable(euler, 10**6) == (CLIMBS, sum(max(most, 1) + 1 for most in CLIMBS))
    assert affordable(heun, 4) == ((PLAIN, 1), 4)
    known = [affordable(euler, runs) for runs in range(2, 40)]
    assert all(cost <= runs for runs, (_, cost) in zip(range(2, 40), known, strict=True))


def test_a_climb_leaves_a_step_that_is_exact_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a later climb takes less than it may, and no latent is worse than that of the climb before it."""
    costs = []
    for gain in (0.0, 0.01, 1.0):
        monkeypatch.setattr(climbs, "GAIN", gain)
        errors = []
        for runs in (2, 4, 7):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                found = ki.invert(MIXTURE, images(3), SIGMAS, max_evals=runs * (len(SIGMAS) - 1) + 4)
            errors.append(found.round_trip_error)
        assert (errors[1] <= errors[0]).all() and (errors[2] <= errors[1]).all()
        costs.append(int(found.evaluations.sum()))
    assert costs[0] > costs[1] > costs[2]


def test_pairs_of_an_affine_map_point_to_its_solution() -> None:
    """With as many differences as the map has directions, Anderson's extrapolation is exact."""
    matrix = torch.tensor([[0.9, 0.2], [-0.1, 0.7]], dtype=torch.float64)
    y, pairs = torch.tensor([[1.0, -2.0]], dtype=torch.float64), _Pairs.of(torch.zeros(1, 2, dtype=torch.float64))
    solution = torch.linalg.solve(matrix, y[0])
    for offset in ([0.1, 0.0], [0.0, 0.1], [0.1, 0.1]):
        u = (solution + torch.tensor(offset, dtype=torch.float64))[None]
        pairs.add(torch.tensor([0]), u, u @ matrix.T, y)
    assert pairs.count == PAIRS
    assert torch.allclose(pairs.propose(y)[0][0], solution, atol=1e-9)
    # Another y, as the next climb has: the pairs are as good for it.
    other = torch.tensor([[1.05, -2.0]], dtype=torch.float64)
    assert torch.allclose(pairs.propose(other)[0][0], torch.linalg.solve(matrix, other[0]), atol=1e-9)


def test_the_forecast_is_exact_if_the_denoiser_is_linear_in_the_logarithm_of_sigma() -> None:
    plan = compile_plan(ki.sampler("euler"), (8.0, 4.0, 2.0, 1.0))
    slope = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return (3.0 + sigma.log()[:, None]) * slope

    forecasts, y = Forecasts(torch.ones(1, dtype=torch.float64), 8.0), torch.ones(1, 3, dtype=torch.float64)
    levels, ends = levels_of(plan, y), torch.zeros(1, dtype=torch.float64)
    bound: Any = ki.denoisers.guide(denoiser, 1.0, None, None)
    for step in reversed(plan.steps):
        problem = step_problem(plan, step, bound, y, levels[step.index], ends, torch.tensor([9]))
        guess = forecasts.guess(problem)
        r = step.sigma_next / step.sigma
        exact = (y - (1 - r) * denoiser(y, torch.tensor([step.sigma], dtype=torch.float64))) / r
        if step.index == 0:  # two steps are known, and which forecast is best is known from the last one
            assert torch.allclose(forecasts._made["order 2"], denoiser(y, torch.tensor([step.sigma]).double()))
        forecasts.learn(problem, exact)
        y = exact
    assert guess.shape == y.shape


def test_the_default_limit_ends_a_search_that_goes_nowhere() -> None:
    """An image that no latent leads to: the search ends within 256 runs, and 4 for each value."""

    def folded(x: Tensor, sigma: Tensor) -> Tensor:
        return 3.0 * torch.sin(7.0 * x)

    x, sigmas = images(2), schedule(4)
    with pytest.warns(RuntimeWarning, match="not inverted"):
        found = ki.invert(folded, x, sigmas, tol=1e-12)
    assert not found.converged.all()
    assert int(found.evaluations.max()) <= 4 * (256 + 4 * x[0].numel()) + 4


@pytest.mark.parametrize(("runs", "some"), [(28, False), (52, True)])
def test_the_warning_tells_what_no_attempt_takes_up(runs: int, some: bool) -> None:
    x, sigmas = images(1), schedule(4)
    with pytest.warns(RuntimeWarning, match="not inverted") as caught:
        found = ki.invert(lambda x, sigma: 3.0 * torch.sin(7.0 * x), x, sigmas, tol=1e-12, max_evals=4 * runs + 4)
    assert found.reasons == (Reason.BUDGET,)
    left = 4 * runs - int(found.evaluations)  # 4 evaluations are for the comparison of rows
    assert (left >= 4) == some
    assert (f"; {left} evaluations are left, too few for another attempt" in str(caught[0].message)) == some


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_looser_tolerance_is_cheaper(sampler: str) -> None:
    costs = []
    for tol in (1e-9, 1e-5, 1e-2):
        found = ki.invert(MIXTURE, images(3), SIGMAS, sampler=sampler, tol=tol)
        assert found.converged.all()
        assert found.row_checks is not None
        costs.append(float((found.evaluations - found.checking - found.row_checks).double().mean()))
    assert costs[0] > costs[1] > costs[2]


def test_the_noise_of_the_network_is_stated() -> None:
    def rounded(x: Tensor, sigma: Tensor) -> Tensor:
        return MIXTURE(x, sigma).bfloat16().to(x.dtype)

    with pytest.warns(RuntimeWarning, match="noise"):
        found = ki.invert(rounded, images(3), SIGMAS, tol=1e-7)
    assert found.floor is not None
    lost = torch.tensor([reason == ki.inversion.Reason.PRECISION for reason in found.reasons])
    assert (
        lost.any()
        and (found.floor[lost] > 1e-5).all()
        and (found.round_trip_error[lost] < 20 * found.floor[lost]).all()
    )
    assert "noise floor" in str(found)
    exact = ki.invert(MIXTURE, images(3), SIGMAS)
    assert exact.floor is not None and not exact.floor.any()


def test_a_share_of_a_budget_without_end_does_not_overflow() -> None:
    """The published inversions set no limit: the largest int64, of which no multiple exists."""
    plan = ki.compile_plan("euler", [3.0, 2.0, 1.0])
    left = torch.tensor([torch.iinfo(torch.int64).max])
    assert all(int(fair_share(left, step)) >= 2**60 for step in plan.steps)
