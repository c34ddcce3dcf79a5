"""The inverse of a whole run: its equations hold for every sampler, its sweeps solve them, and cost what they say."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest
import torch
from kinvert.inversion.stepwise import Auto, invert_steps
from kinvert.inversion.trajectory import equations
from problems import cost_alike, count_on_simulated_device, guided_mixture, mixture, noise_like
from torch import Tensor

import kinvert as ki
from kinvert import models
from kinvert.inversion import StepSweeps, Sweeps
from kinvert.inversion.solvers import StepEquation
from kinvert.tensors import rms

MIXTURE = mixture()
GUIDED = ["euler_cfg_pp", "dpmpp_2m_cfg_pp", "res_multistep_cfg_pp", "gradient_estimation_cfg_pp"]


def schedule(steps: int) -> Tensor:
    return ki.schedules.karras(steps + 1, 0.1, 10.0)[:-1]


def images(count: int = 4) -> Tensor:
    return 0.8 * noise_like((count, 6), seed=5)


def deterministic() -> list[str]:
    """Every sampler whose run at the default options is a linear map of x and what the denoiser returns."""
    names = []
    for name in ki.rules.SAMPLERS:
        if name == "dpm_adaptive":
            continue
        plan = ki.compile_plan(name, schedule(7))
        if not plan.is_stochastic and not any(step.forgets_x for step in plan.steps):
            names.append(name)
    return names


@pytest.mark.parametrize("name", deterministic())
def test_the_equations_hold_on_every_run(name: str) -> None:
    """`Y = a x_N + C D` and `x_0 = (x_N - B D) / alpha` for the evaluations that a run makes."""
    plan = ki.compile_plan(name, schedule(7))
    denoiser = guided_mixture() if plan.is_guided else MIXTURE
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def recording(x: Tensor, sigma: Tensor) -> Tensor:
        result = denoiser(x, sigma)
        inputs.append(x.clone())
        outputs.extend(part.clone() for part in (result if isinstance(result, tuple) else (result,)))
        return result

    x = 10 * noise_like((2, 6))
    end = ki.run(plan, recording, x)
    system = equations(plan)
    a, C, B = (torch.from_numpy(part) for part in (system.a, system.C, system.B))
    Y, D = torch.stack(inputs), torch.stack(outputs)
    torch.testing.assert_close(a[:, None, None] * end + torch.tensordot(C, D, 1), Y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((end - torch.tensordot(B, D, 1)) / system.alpha, x, rtol=1e-9, atol=1e-9)
    assert system.levels == tuple(stage.sigma for step in plan.steps for stage in step.stages)


@pytest.mark.parametrize("name", [n for n in deterministic() if not ki.analysis.properties(n).memory])
def test_a_step_is_a_mean(name: str) -> None:
    """A step without memory from sigma to r sigma is `r x + (1 - r) mean(D)`."""
    plan = ki.compile_plan(name, schedule(7))
    for step in plan.steps:
        system = equations(replace(plan, steps=(step,), sigmas=(step.sigma, step.sigma_next)))
        r = step.sigma_next / step.sigma
        assert system.alpha == pytest.approx(r, rel=1e-12)
        assert system.B.sum() == pytest.approx(1 - r, rel=1e-12)
        assert system.weights.sum() == pytest.approx(1, rel=1e-12)


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

    x = images()
    found = ki.invert(pair, x, schedule(20), sampler=name, method="sweeps", tol=1e-8)
    assert found.converged.all()
    again = ki.run(ki.compile_plan(name, schedule(20)), pair, found.latent)
    assert float(rms(again - x).max()) <= 1e-8


@pytest.mark.parametrize("name", ["euler", "heun", "rk4"])
def test_one_step_samplers_as_a_whole(name: str) -> None:
    """The same latent as step by step."""
    steps = ki.invert(MIXTURE, images(), schedule(12), sampler=name, tol=1e-10)
    whole = ki.invert(MIXTURE, images(), schedule(12), sampler=name, method=Sweeps(window=12), tol=1e-10)
    assert whole.converged.all()
    torch.testing.assert_close(whole.latent, steps.latent, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "rk4", "res_3s"])
def test_what_the_last_states_tell_is_expected_of_the_next(name: str) -> None:
    """A denoiser that is a polynomial of degree 2 in ln(sigma) is foreseen: each evaluation is made once."""
    coefficients = noise_like((3, 6), seed=3)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return sum((c * sigma.log()[:, None] ** k for k, c in enumerate(coefficients)), torch.zeros_like(x))

    plan, found = ki.compile_plan(name, schedule(8)), None
    for foreseen in (5, 8):  # steps; all of them where an earlier solution is given
        found = invert_steps(
            plan,
            lambda index: denoiser,
            images(),
            lambda step: torch.full((4,), 1e-9, dtype=torch.float64),
            Auto(),
            torch.full((4,), 10**6),
            found and found.states,
        )
        torch.testing.assert_close(ki.run(plan, denoiser, found.states[0]), images(), rtol=0, atol=1e-8)
        stages = len(plan.steps[0].stages)
        assert (found.evaluations <= plan.evaluations + (8 - foreseen) * 2 * stages).all()
        assert (found.evaluations >= plan.evaluations).all()


def test_where_the_denoiser_fails_the_start_is_what_is_known() -> None:
    """Not memory that nobody wrote: what a failing step leaves to the next one's forecast is the mean at its start."""
    plan, y = ki.compile_plan("heun", [10.0, 5.0]), images()
    equation = StepEquation(
        plan,
        lambda index: lambda x, sigma: torch.full_like(x, torch.nan),
        lambda u, index: u,
        y,
        rms(y),
        10**6 * torch.ones(4),
    )
    root = StepSweeps().solve(equation, 2 * y)
    assert root.residual.isinf().all() and torch.equal(root.u, 2 * y)
    assert equation.said is not None and torch.equal(equation.said, equation.mean(2 * y))


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
    solution = Sweeps().solve(plan, lambda index: MIXTURE, images(), 1e-12, budget=45)
    assert max(solution.evaluations) <= 45 and min(solution.errors) > 1e-12


def test_what_the_sweeps_leave_is_solved_through_a_base() -> None:
    """Adams weights of a uniform grid grow on a Karras schedule of ten steps: the sweeps give up, `invert` does not."""
    plan = ki.compile_plan("ipndm", schedule(10))
    solution = Sweeps().solve(plan, lambda index: MIXTURE, images(8), 3e-10, budget=10**6)
    assert max(solution.errors) > 1e-3
    assert ki.invert(MIXTURE, images(8), schedule(10), sampler="ipndm").converged.all()


def test_a_denoiser_that_fails_is_not_called_solved() -> None:
    def broken(x: Tensor, sigma: Tensor) -> Tensor:
        return MIXTURE(x, sigma) * torch.where(sigma[:, None] > 1.0, torch.nan, 1.0)

    with pytest.warns(RuntimeWarning, match="not inverted"):
        found = ki.invert(broken, images(2), schedule(8), sampler="dpmpp_2m")
    assert not found.converged.any() and found.round_trip_error.isinf().all()


def test_a_lost_run_is_told_apart_from_a_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the warning calls the smallest singular value of the run's derivative is that; the space is the whole one."""
    monkeypatch.setattr(sys.modules["kinvert.inversion.whole_run"], "BASES", ())
    plan, x = ki.compile_plan("ipndm", schedule(10)), images(1)
    with pytest.warns(RuntimeWarning, match="solved as a whole run") as caught:
        found = ki.invert(MIXTURE, x, schedule(10), sampler="ipndm")
    value, without = re.findall(r"derivative is (\S+), without a denoiser it would be (\S+)", str(caught[0].message))[0]
    derivative = torch.func.jacrev(lambda z: ki.run(plan, MIXTURE, z[None])[0])(found.latent[0])
    assert float(value) == pytest.approx(float(torch.linalg.svdvals(derivative)[-1]), rel=0.05)
    assert float(without) == pytest.approx(0.1 / 10.0, rel=0.05)
    solved = Sweeps().solve(plan, lambda index: MIXTURE, x, found.tolerance, budget=2**62)
    plain = 2 * plan.evaluations  # which is tried last, up and down
    assert int(found.evaluations) == solved.evaluations[0] + plain + (x.shape[1] + 1) * plan.evaluations


COUNT_READS = """
import sys
sys.path.insert(0, sys.argv[1])
import simdevice, torch
import kinvert as ki
from kinvert.inversion import Anderson

def count(sampler, method, peek=False, dtype=torch.float32):
    calls = 0
    def denoiser(x, sigma):
        nonlocal calls
        calls += 1
        assert not (peek and float(x.sum()) == 0.123)
        return x / (1 + sigma[:, None] ** 2) + 0.2 * torch.tanh(x) / (1 + sigma[:, None])
    x = simdevice.to_sim(torch.linspace(-1, 1, 6, dtype=dtype).reshape(2, 3))
    simdevice.SYNC.clear()
    with simdevice.sim():
        ki.invert(denoiser, x, ki.schedules.karras(9, 0.1, 10.0)[:-1], sampler=sampler, method=method)
    return calls, sum(simdevice.SYNC.values())

certificate = 8 + 8 + 2  # calls of the check and of the contraction, which nothing reads
calls, reads = count("euler", "anderson")
assert reads <= calls - certificate + 5, ("one read an iteration", calls, reads)
assert count("euler", "anderson", peek=True)[1] >= reads + calls, "the count must see the denoiser's own reads"
seldom_calls, seldom = count("euler", Anderson(check_every=3))
assert seldom < reads and seldom_calls >= calls, ("every third iteration", reads, seldom)
calls, reads = count("dpmpp_2m", "auto", dtype=torch.float64)  # in float32 the last sweeps are of a few levels
few = 12  # a run: of rows that mix (2), the tolerance and the check (2), what is left for bases (3) and verdicts (3)
assert reads <= calls / 8 + few, ("one read a sweep", calls, reads)
calls, reads = count("heun", "newton")
assert reads <= calls, ("one read a product or trial step", calls, reads)
print("counted")
"""


def test_the_host_reads_the_device_once_a_check() -> None:
    count_on_simulated_device(COUNT_READS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lms", "dpmpp_2m", "ipndm", "deis", "res_multistep", "uni_pc"])
def test_a_trained_network(name: str) -> None:
    """Held-out digits, 20 steps from sigma 80, to 1e-8."""
    denoiser = models.load("digits", dtype=torch.float64)
    x, labels = (part[:4] for part in models.held_out("digits"))
    sigmas = ki.schedules.karras(21, 0.02, 80.0)[:-1]
    found = ki.invert(denoiser, x.double(), sigmas, sampler=name, tol=1e-8, positive={"label": labels})
    assert found.converged.all()
    assert float(found.evaluations.double().median()) / 20 <= (200 if name == "ipndm" else 35)
