"""The route of multistep samplers: what the sweeps leave, and what is said of a run that is lost."""

from __future__ import annotations

import re

import pytest
import torch
from inverting import MIXTURE, UNBOUNDED, guess_of_run, images, schedule, task_of
from torch import Tensor

import kinvert as ki
from kinvert import models
from kinvert.inversion import (
    Reason,
    Sweeps,
)
from kinvert.inversion.whole_run import WholeRun


def test_what_the_sweeps_leave_is_solved_through_a_base() -> None:
    """Adams weights of a uniform grid grow on a Karras schedule of ten steps: the sweeps give up, `invert` does not."""
    plan = ki.compile_plan("ipndm", schedule(10))
    x = images(8)
    root = Sweeps().solve(task_of(plan, x, 3e-10, limit=UNBOUNDED).problem, guess_of_run(plan, x))
    assert float(root.residual.max()) > 1e-3
    assert ki.invert(MIXTURE, images(8), schedule(10), sampler="ipndm").converged.all()


def test_a_lost_run_is_told_apart_from_a_fold() -> None:
    """What the warning calls the smallest singular value of the run's derivative is that; the space is the whole one."""
    plan, x = ki.compile_plan("ipndm", schedule(10)), images(1)
    task = task_of(plan, x, 1e-9)
    found = WholeRun(bases=(), last=None).solve(task, Sweeps())
    assert "solved as a whole run" in found.failures[0] and found.reasons == {0: Reason.STALLED}
    value, without = re.findall(r"derivative is (\S+), without a denoiser it would be (\S+)", found.failures[0])[0]
    derivative = torch.func.jacrev(lambda z: ki.run(plan, MIXTURE, z[None])[0])(found.latent[0])
    assert float(value) == pytest.approx(float(torch.linalg.svdvals(derivative)[-1]), rel=0.05)
    assert float(without) == pytest.approx(0.1 / 10.0, rel=0.05)
    solved = Sweeps().solve(task.problem, guess_of_run(plan, x))
    plain = 2 * plan.evaluations  # which is tried last, up and down
    noise = 2 * plan.evaluations  # which is looked for first
    assert int(found.evaluations) == int(solved.evaluations) + noise + plain + (x.shape[1] + 1) * plan.evaluations


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


def test_a_tolerance_below_rounding_is_the_reason_of_a_run() -> None:
    def network(x: Tensor, sigma: Tensor) -> Tensor:
        scaled = x.double() / (1 + sigma[:, None].double() ** 2).sqrt()
        return torch.tanh(scaled + scaled.roll(1, 1)).to(x.dtype)

    plan, x = ki.compile_plan("lms", schedule(8)), images(2).float()
    found = WholeRun(bases=()).solve(task_of(plan, x, 1e-12, network), Sweeps())
    assert found.reasons == {0: Reason.PRECISION, 1: Reason.PRECISION}


@pytest.mark.parametrize("name", ["dpmpp_2m", "lms"])
def test_in_half_precision_noise_ends_the_search(name: str) -> None:
    """There is no error up to which another search may help: what the sweeps leave in noise costs nothing more."""
    plan, x = ki.compile_plan(name, schedule(8)), images(8).half()
    whole, alone = (WholeRun(bases=bases).solve(task_of(plan, x, 8e-3), Sweeps()) for bases in (WholeRun.bases, ()))
    lost = [i for i, reason in alone.reasons.items() if reason == Reason.PRECISION]
    assert lost and torch.equal(whole.evaluations[lost], alone.evaluations[lost])
