"""Sweeps over the evaluations of a run or of a step: they solve it, and cost what they say."""

from __future__ import annotations

import pytest
import torch
from inverting import MIXTURE, guess_of_run, images, problem_of_step, schedule, task_of
from problems import cost_alike, count_on_simulated_device
from torch import Tensor

import kinvert as ki
from kinvert.inversion import (
    Guess,
    Reason,
    StepSweeps,
    Sweeps,
)
from kinvert.tensors import rms

GUIDED = ["euler_cfg_pp", "dpmpp_2m_cfg_pp", "res_multistep_cfg_pp", "gradient_estimation_cfg_pp"]


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("name", ["lms", "dpmpp_2m", "deis", "res_multistep", "uni_pc", "res_2m"])
def test_sweeps_cost_few_evaluations(name: str, steps: int) -> None:
    """To 1e-9, the check included."""
    found = ki.invert(MIXTURE, images(16), schedule(steps), sampler=name)
    assert found.converged.all() and float(found.round_trip_error.max()) <= 1e-9
    assert float(found.evaluations.double().median()) / steps <= (25 if steps == 10 else 12)


@pytest.mark.parametrize("name", GUIDED)
def test_guided_pairs_are_two_unknowns(name: str) -> None:

    def pair(x: Tensor, sigma: Tensor) -> ki.Guided:
        denoised = MIXTURE(x, sigma)
        return ki.Guided(denoised, 0.9 * denoised + 0.1 * ki.denoisers.Gaussian(0.0, 0.7)(x, sigma))

    x = images(4)
    found = ki.invert(pair, x, schedule(20), sampler=name, method="sweeps", tol=1e-8)
    assert found.converged.all()
    again = ki.run(ki.compile_plan(name, schedule(20)), pair, found.latent)
    assert float(rms(again - x).max()) <= 1e-8


@pytest.mark.parametrize("name", ["euler", "heun", "rk4"])
def test_one_step_samplers_as_a_whole(name: str) -> None:
    """The same latent as step by step."""
    steps = ki.invert(MIXTURE, images(4), schedule(12), sampler=name, tol=1e-10)
    whole = ki.invert(MIXTURE, images(4), schedule(12), sampler=name, method=Sweeps(window=12), tol=1e-10)
    assert whole.converged.all()
    torch.testing.assert_close(whole.latent, steps.latent, rtol=1e-6, atol=1e-6)


def test_where_the_denoiser_fails_the_start_is_what_is_known() -> None:
    """Not memory that nobody wrote: what a failing step leaves to the next one's forecast is the mean at its start."""
    y = images(4)
    problem = problem_of_step("heun", 10.0, 5.0, y, lambda x, sigma: torch.full_like(x, torch.nan))
    root = StepSweeps().solve(problem, Guess(2 * y))
    assert root.residual.isinf().all() and torch.equal(root.u, 2 * y)
    expected = problem.denoised(2 * y)
    assert root.denoised is not None and expected is not None and torch.equal(root.denoised, expected)
    assert (root.reason == Reason.NOT_FINITE).all()


def test_only_open_samples_are_evaluated() -> None:
    """Rows seen by the denoiser, but for copies, are the evaluations that are counted; what a sample finds is its own."""
    rows = 0

    def counting(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x.unique(dim=0))
        return MIXTURE(x, sigma)

    x = torch.cat([images(3), 4 * images(2)])
    found = ki.invert(counting, x, schedule(10), sampler="dpmpp_2m")
    assert found.converged.all() and found.row_checks is not None
    assert rows == int(found.evaluations.sum()) - 1  # to see whether it mixes rows, a sample is put beside itself
    assert found.evaluations.unique().numel() > 1
    for i in range(len(x)):
        alone = ki.invert(MIXTURE, x[i : i + 1], schedule(10), sampler="dpmpp_2m")
        torch.testing.assert_close(alone.latent[0], found.latent[i], rtol=1e-8, atol=1e-8)
        assert cost_alike(alone.evaluations, found.evaluations[i] - found.row_checks[i])


def test_the_budget_is_kept() -> None:
    plan = ki.compile_plan("deis", schedule(10))
    x = images(4)
    root = Sweeps().solve(task_of(plan, x, 1e-12, limit=45).problem, guess_of_run(plan, x))
    assert int(root.evaluations.max()) <= 45 and float(root.residual.min()) > 1e-12
    assert (root.reason == Reason.BUDGET).all()


COUNT_READS = """
import sys
sys.path.insert(0, sys.argv[1])
import simdevice, torch
import kinvert as ki
from kinvert.inversion import Anderson

def count(sampler, method, peek=False, dtype=torch.float32, **options):
    calls = 0
    def denoiser(x, sigma):
        nonlocal calls
        calls += 1
        assert not (peek and float(x.sum()) == 0.123)
        return x / (1 + sigma[:, None] ** 2) + 0.2 * torch.tanh(x) / (1 + sigma[:, None])
    x = simdevice.to_sim(torch.linspace(-1, 1, 6, dtype=dtype).reshape(2, 3))
    simdevice.SYNC.clear()
    with simdevice.sim():
        ki.invert(denoiser, x, ki.schedules.karras(9, 0.1, 10.0)[:-1], sampler=sampler, method=method, **options)
    return calls, sum(simdevice.SYNC.values())

certificate = 8 + 8 + 2  # calls of the check and of the contraction, which nothing reads
calls, reads = count("euler", "anderson")
assert reads <= calls - certificate + 5, ("one read an iteration", calls, reads)
assert count("euler", "anderson", peek=True)[1] >= reads + calls, "the count must see the denoiser's own reads"
seldom_calls, seldom = count("euler", Anderson(check_every=3))
assert seldom < reads and seldom_calls >= calls, ("every third iteration", reads, seldom)
calls, reads = count("dpmpp_2m", "auto", dtype=torch.float64)  # the last sweeps are of a few levels
few = 15  # a run: rows that mix, the batch size (3), size, tolerance, check, what is left for bases (3), verdicts (3)
assert reads <= calls / 7 + few, ("one read a sweep", calls, reads)
calls, reads = count("heun", "newton")
assert reads <= calls, ("one read a product or trial step", calls, reads)
for name, method in (("euler", "auto"), ("heun", "anderson"), ("euler", "newton"), ("dpmpp_2m", "auto")):
    watched = count(name, method, watch=lambda now: None)
    assert watched == count(name, method), ("to be watched takes no read", name, method)
print("counted")
"""


def test_the_host_reads_the_device_once_a_check() -> None:
    count_on_simulated_device(COUNT_READS)
