"""dpm_adaptive: the controller against recorded runs, its errors, and its tolerance."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from problems import mixture, noise_like
from recordings import Case, Counted, RecordedNoise, array, index, recorded_denoiser, relative_error, shared
from torch import Tensor

import kinvert as ki
from kinvert.engine.adaptive import AdaptiveInfo, run_adaptive
from kinvert.rules.adaptive import DPMAdaptive

CASES = [case for case in index()["samplers"] if case["sampler"] == "dpm_adaptive"]
FALLING = [10.0, 1.0, 0.1]
MIXTURE = mixture()


def replay(case: Case, dtype: torch.dtype) -> tuple[Tensor, AdaptiveInfo, Counted]:
    sigmas = shared(f"sigmas_{case['schedule']}", torch.float64)
    if case["direction"] == "sample":
        x = (shared("x_init_unit", torch.float32) * sigmas[0].float()).to(dtype)
    else:
        x = shared(f"x0_clean_{case['denoiser']}", dtype)
    counted = Counted(recorded_denoiser(case, dtype), recorded_denoiser(case, dtype), None)
    solver = DPMAdaptive(**{key: value for key, value in case["kwargs"].items() if key != "return_info"})
    return *run_adaptive(solver, counted, x, sigmas, RecordedNoise(case, sigmas.tolist(), dtype)), counted


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_matches_recording(case: Case) -> None:
    dtype = getattr(torch, case["dtype"])
    got, info, counted = replay(case, dtype)
    # In float32 the widths of the steps follow the rounding of the error.
    assert relative_error(got, array(case, "final")) <= (1e-9 if dtype == torch.float64 else 1e-3)
    assert counted.calls == info.evaluations == case["n_calls"]
    assert info.accepted + info.rejected == info.steps
    if "noise_calls" in case["arrays"]:  # one draw an accepted step
        assert info.accepted == len(array(case, "noise_calls"))


def exact(x: Tensor, sigmas: list[float]) -> Tensor:
    return ki.run(ki.compile_plan("res_4s_krogstad", ki.schedules.karras(400, sigmas[-1], sigmas[0])[:-1]), MIXTURE, x)


@pytest.mark.parametrize("order", [2, 3])
def test_error_follows_the_tolerance(order: int) -> None:
    x = 10 * noise_like((8, 6))
    want = exact(x, FALLING)
    errors, evaluations = [], []
    for tolerance in (1e-2, 1e-3, 1e-4):
        got, info = run_adaptive(DPMAdaptive(order=order, rtol=tolerance, atol=tolerance), MIXTURE, x, FALLING)
        errors.append(float((got - want).norm() / want.norm()))
        evaluations.append(info.evaluations)
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert evaluations == sorted(evaluations)


def test_up_and_down_again() -> None:
    x = MIXTURE.means[:1] + 0.1 * noise_like((4, 6))
    solver = DPMAdaptive(rtol=1e-5, atol=1e-5)
    up, _ = run_adaptive(solver, MIXTURE, x, FALLING[::-1])
    down, _ = run_adaptive(solver, MIXTURE, up, [*FALLING, 0.0])  # a final 0 is left out
    torch.testing.assert_close(down, x, rtol=0, atol=1e-2)


def test_single_step_equals_fixed_sampler() -> None:
    x = 10 * noise_like((2, 6))
    loose = {"rtol": 1e3, "h_init": 5.0}
    sigmas = [10.0, 6.0]
    got, info = run_adaptive(DPMAdaptive(order=2, **loose), MIXTURE, x, sigmas)
    assert info == AdaptiveInfo(steps=1, evaluations=2, accepted=1, rejected=0)
    torch.testing.assert_close(got, ki.run(ki.compile_plan("dpm_2", sigmas), MIXTURE, x), rtol=1e-12, atol=1e-12)
    plan = ki.compile_plan("dpm_fast", [10.0, 9.0, 8.0, 7.0, 6.0])  # sub-steps of orders 3 and 1
    first = replace(plan, steps=plan.steps[:1])
    got, _ = run_adaptive(DPMAdaptive(**loose), MIXTURE, x, [10.0, plan.steps[0].sigma_next])
    torch.testing.assert_close(got, ki.run(first, MIXTURE, x), rtol=1e-12, atol=1e-12)


def test_callback_sees_accepted_steps() -> None:
    seen: list[ki.Progress] = []
    _, info = run_adaptive(DPMAdaptive(), MIXTURE, 10 * noise_like((2, 6)), FALLING, callback=seen.append)
    assert [step.index for step in seen] == list(range(info.accepted))
    assert seen[0].sigma == 10.0 and seen[-1].sigma_next == 0.1
    assert all(a.sigma_next == b.sigma for a, b in itertools.pairwise(seen))


def test_one_level_returns_a_copy_of_x() -> None:
    x = noise_like((2, 6))
    got, info = run_adaptive(DPMAdaptive(), MIXTURE, x, [10.0, 0.0])
    assert torch.equal(got, x) and got is not x
    assert info == AdaptiveInfo(0, 0, 0, 0)


def test_same_seed_same_result_and_x_is_left_alone() -> None:
    x = 10 * noise_like((2, 6))
    kept = x.clone()
    runs = [run_adaptive(DPMAdaptive(eta=1.0), MIXTURE, x, FALLING, ki.noise.white(5))[0] for _ in range(2)]
    assert torch.equal(*runs)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    x = 10 * noise_like((2, 6))
    got, _ = run_adaptive(DPMAdaptive(), MIXTURE, x.to(dtype), FALLING)
    assert got.dtype == dtype
    assert float((got.double() - exact(x, FALLING)).norm() / exact(x, FALLING).norm()) < 0.1


def test_nan_is_an_error_that_names_sigma() -> None:
    def broken(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(sigma[:, None] < 1, torch.nan, 0.0) * x

    with pytest.raises(ValueError, match=r"dpm_adaptive: in the trial step \d+ from sigma .* error estimate is nan"):
        run_adaptive(DPMAdaptive(), broken, 10 * noise_like((2, 6)), FALLING)


def test_jumping_denoiser_is_an_error() -> None:
    generator = torch.Generator().manual_seed(0)

    def jumping(x: Tensor, sigma: Tensor) -> Tensor:
        return 1e12 * torch.randn(x.shape, generator=generator, dtype=x.dtype)

    with pytest.raises(ValueError, match="use larger rtol or atol"):
        run_adaptive(DPMAdaptive(), jumping, 10 * noise_like((2, 6)), FALLING)


def test_rising_run_refuses_noise() -> None:
    with pytest.raises(ValueError, match="use eta=0"):
        run_adaptive(DPMAdaptive(eta=1.0), MIXTURE, noise_like((2, 6)), FALLING[::-1])


def test_compile_plan_refuses_dpm_adaptive() -> None:
    with pytest.raises(ValueError, match=r"dpm_adaptive chooses its steps .* use ki\.sample"):
        ki.compile_plan(DPMAdaptive(), FALLING)


@pytest.mark.parametrize("options", [{"order": 4}, {"rtol": -1.0}, {"atol": 0.0}, {"accept_safety": 2.0}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        DPMAdaptive(**options)


def test_without_control_every_trial_has_the_first_width_and_is_accepted() -> None:
    """All exponents are 0, so the factor of the width is exactly 1: it is accepted by any `accept_safety` up to 1."""
    solver = DPMAdaptive(pcoeff=0.0, icoeff=0.0, dcoeff=0.0, accept_safety=1.0, h_init=0.5)
    _, info = run_adaptive(solver, MIXTURE, 10.0 * noise_like((2, 6)), FALLING)
    assert (info.steps, info.rejected) == (10, 0)  # 10 is the ceiling of ln(100) / 0.5
