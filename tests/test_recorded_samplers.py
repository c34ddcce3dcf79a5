"""Every registered sampler against the outputs of ComfyUI's and k-diffusion's own functions."""

from __future__ import annotations

import pytest
import torch
from recordings import Case, Counted, RecordedNoise, array, index, recorded_denoiser, relative_error, shared

import kinvert as ki

# What k-diffusion does differently, as options.
K_DIFFUSION = {"lms": {"at_zero": "adams"}, "euler_ancestral": {"noise_at_down_zero": True}}
# er_sde sums 200 points in float32, whatever the dtype of the run.
TOLERANCE = {"er_sde": 1e-6}


# On a rectified flow the ancestral samplers have a split of their own; those with lambda change coordinates, and start
# at t = shift(0.9999) in place of 1 for the recorded shift of 3; all others run on the flow times as they are.
FLOW_SPLIT = {
    "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "lcm", "euler_cfg_pp", "euler_ancestral_cfg_pp",
}  # fmt: skip
FLOW_COORDINATES = {
    "dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu",
    "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "er_sde", "seeds_2", "seeds_3", "sa_solver", "sa_solver_pece",
}  # fmt: skip
FLOW_START = 3 * 0.9999 / (1 + 2 * 0.9999)


def recorded_rule(case: Case) -> ki.Rule:
    options = K_DIFFUSION.get(case["sampler"], {}) if case["peer"] == "kdiff" else {}
    options = {**options, **case["kwargs"]}
    if case["process"] == "CONST" and case["sampler"] in FLOW_SPLIT:
        options["flow"] = True
    if case["process"] == "CONST" and case["sampler"].startswith("sa_solver"):
        # At 20% and 80% of the time of a flow with shift 3, t = 12/13 and 3/7; as noise levels t / (1 - t).
        options |= {"sde_start": 12.0, "sde_end": 0.75}
    if case["sampler"].startswith("sa_solver"):
        options["keep_last"] = False  # as it was in the recorded version
    rule = ki.sampler(case["sampler"], **options)
    if case["process"] == "CONST" and case["sampler"] in FLOW_COORDINATES:
        return ki.rules.Flow(rule, start=FLOW_START)
    return rule


def replay(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, Counted]:
    sigmas = shared(f"sigmas_{case['schedule']}", torch.float64)
    if case["direction"] == "sample":
        x = (shared("x_init_unit", torch.float32) * sigmas[0].float()).to(dtype)
    else:
        x = shared(f"x0_clean_{case['denoiser']}", dtype)
    denoisers = [recorded_denoiser(case, dtype, uncond) for uncond in (False, True)]
    counted = Counted(*denoisers, case.get("cfg"))
    plan = ki.compile_plan(recorded_rule(case), sigmas)
    return ki.run(plan, counted, x, RecordedNoise(case, sigmas.tolist(), dtype)), counted


CASES = [
    case
    for case in index()["samplers"]
    if case["sampler"] in ki.SAMPLERS and case["sampler"] != "dpm_adaptive" and case["error"] is None
]


@pytest.mark.parametrize("case", [c for c in CASES if c["finite"]], ids=lambda c: c["id"])
def test_matches_recording(case: Case) -> None:
    dtype = getattr(torch, case["dtype"])
    got, counted = replay(case, dtype)
    error = relative_error(got, array(case, "final"))
    if dtype == torch.float64:
        assert error <= TOLERANCE.get(case["sampler"], 1e-9)
    else:
        # A step up from sigma = 1e-4 amplifies rounding; there the measure is our own float32 against float64.
        rounding = relative_error(got, replay(case, torch.float64)[0].numpy())
        assert error <= max(2e-4, 10 * rounding)
    assert counted.calls <= case["n_calls"]


@pytest.mark.parametrize("case", [c for c in CASES if not c["finite"]], ids=lambda c: c["id"])
def test_where_the_recording_is_not_finite_we_are_or_say_why(case: Case) -> None:
    """NaN upstream is an error before the first evaluation here, or a finite result."""
    try:
        got, _ = replay(case, getattr(torch, case["dtype"]))
    except ValueError as error:
        assert case["sampler"] in str(error) or ki.SAMPLERS[case["sampler"]].rule.name in str(error)
        assert "use " in str(error)
    else:
        if case["dtype"] == "float32" and not torch.isfinite(got).all():  # overflow: in float64 it is finite, and huge
            got, _ = replay(case, torch.float64)
            assert float(got.abs().max()) > 1e15
        assert torch.isfinite(got).all()
