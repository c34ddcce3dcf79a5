"""The methods of the benchmark: what they find, what they cost, and what they claim."""

from __future__ import annotations

import itertools
import json
import math

import torch
from cells import SMALL, cells, measured

import kinvert as ki
from kinvert import bench
from kinvert.bench import METHODS, Cell
from kinvert.bench.measurement import setup_of
from kinvert.bench.problems import make_problem
from kinvert.jsontext import canonical_json


def test_ddim_noisy_is_the_usual_inverse_scheduler() -> None:
    """It hands the network the variance-preserving latent of level b with the time of a: `w x_b` in these coordinates.

    On N(0, s^2) that is `x_a = x_b (1 + (a - b) w a / (s^2 + a^2))`, `w = sqrt((1 + a^2) / (1 + b^2))`.
    """
    problem = make_problem("gaussian", 2, 0, torch.float64)
    setup = setup_of(Cell(**SMALL), problem)
    x = problem.images
    for b, a in itertools.pairwise(setup.sigmas[::-1]):
        x = x * (1 + (a - b) * math.hypot(1, a) / math.hypot(1, b) * a / (problem.denoiser.std**2 + a**2))
    torch.testing.assert_close(METHODS["ddim_noisy"](setup, problem.images).latent, x)


def test_evaluations_are_per_sample_and_a_guided_pair_is_one() -> None:
    guided = measured(model="mixture", cfg=3.0)
    assert guided["inversion_evaluations"] == guided["sampling_evaluations"] == [3, 3]
    inverted = measured(method="invert")
    assert inverted["sampling_evaluations"] == [3, 3] and inverted["converged"] == [True, True]
    assert min(inverted["inversion_evaluations"]) > 6
    assert measured(method="extract_noise", sampler="euler_ancestral")["inversion_evaluations"] == [3, 3]
    assert measured(method="easyinv")["inversion_evaluations"] == [3, 3]  # its own check is left out
    assert measured(method="rf_solver", sampler="rf_solver")["inversion_evaluations"] == [6, 6]
    assert measured(sampler="euler_cfg_pp", model="mixture")["sampling_evaluations"] == [3, 3]


def test_limits_are_evaluations_of_each_step_on_the_way_up() -> None:
    """For every sampler the run that checks comes on top, and an evaluation of a step of Heun's is two calls."""
    for sampler, run in (("euler", 6), ("heun", 12), ("dpmpp_2m", 6)):
        errors = []
        for limit in (1, 3, 6, 10):
            record = measured(method=f"invert_{limit}", sampler=sampler, steps=6, model="mixture")
            assert max(record["inversion_evaluations"]) <= limit * run
            errors.append(max(record["metrics"]["mse"]))
        assert errors == sorted(errors, reverse=True)
        assert sampler != "euler" or errors[-1] < 1e-6 * errors[0]


def test_reversible_with_and_without_auxiliary_state() -> None:
    worst = {
        (question, method): max(
            measured(question=question, method=method, sampler="o_belm", steps=12)["metrics"]["mse"]
        )
        for question in ("reconstruction", "recovery")
        for method in ("reversible", "reversible_alone")
    }
    assert worst["reconstruction", "reversible"] < 1e-24 and worst["recovery", "reversible"] < 1e-24
    assert worst["reconstruction", "reversible_alone"] > 1e-6 and worst["recovery", "reversible_alone"] > 1e-6


def test_extract_noise_reconstructs_and_refuses_recovery() -> None:
    for method in ("extract_noise", "extract_noise_chain"):
        record = measured(method=method, sampler="euler_ancestral")
        assert max(record["metrics"]["max_error"]) < 1e-12 and "distance_to_ode" not in record["metrics"]
        refused = measured(method=method, sampler="euler_ancestral", question="recovery")
        assert "recovers none" in refused["error"]


def test_every_method_gives_a_record_that_is_json() -> None:
    for cell in cells(method=list(METHODS), sampler=["euler", "leapfrog", "euler_ancestral"], question=["recovery"]):
        record, _ = bench.measure(cell)
        assert json.loads(canonical_json(record))["key"] == cell.key
        assert record.keys() == measured().keys()


def test_evaluations_leave_out_the_certificate() -> None:
    """What a method spends on its check and its diagnostics is left out: the same count as the library's own."""
    for sampler in ("heun", "dpmpp_2m", "reversible_heun", "edict"):
        cell = Cell("gaussian", method="invert", sampler=sampler, steps=8, count=2)
        problem = make_problem(cell.model, cell.count, cell.seed, torch.float64)
        setup = setup_of(cell, problem)
        found = ki.invert(setup.denoiser, problem.images, setup.sigmas, sampler=setup.sampler)
        record, _ = bench.measure(cell)
        alone = found.evaluations - found.checking - found.row_checks
        assert record["inversion_evaluations"] == alone.tolist()


def test_unused_method_is_an_error_of_the_cell() -> None:
    for sampler, used in (("dpmpp_2m", "'auto', 'sweeps', 'levenberg' or a Solver of runs"), ("o_belm", "'auto'")):
        record, _ = bench.measure(Cell("gaussian", method="picard", sampler=sampler, steps=4, count=1))
        assert record["error"].startswith(f"method must be {used} for {sampler}, got 'picard'")
        assert record["converged"] is None and record["metrics"] == {}


def test_baseline_claims_convergence_for_its_own_sampler_only() -> None:
    for sampler, claim in (("euler", [True, True]), ("heun", None)):
        record, _ = bench.measure(Cell("mixture", method="aidi_anderson", sampler=sampler, steps=40, count=2))
        assert record["converged"] == claim, sampler
