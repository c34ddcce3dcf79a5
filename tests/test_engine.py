"""The loop: no waiting for the device, no copies of what need not be copied, the callbacks, the checks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import mixture, noise_like
from torch import Tensor

import kinvert as ki
from kinvert.engine import advance, combine, stage_sigmas
from kinvert.forms import Form, State

KARRAS = ki.schedules.karras(6, 0.1, 10.0)

# Runs in its own process, because the simulated device registers a backend with torch for good.
COUNT_SYNCS = """
import sys
sys.path.insert(0, sys.argv[1])
import simdevice, torch
import kinvert as ki

def count(name, n, peek=False):
    plan = ki.compile_plan(name, ki.schedules.karras(n, 0.1, 10.0))
    x = simdevice.to_sim(torch.ones(2, 3))
    def denoiser(y, sigma):
        D = y / (1 + sigma[:, None] ** 2)
        return ki.Guided(D, 0.5 * D) if plan.is_guided else D
    callback = (lambda step: float(step.x.sum())) if peek else (lambda step: None)
    zero = torch.zeros(2, 3)
    with simdevice.sim():
        ki.run(plan, denoiser, x, lambda a, b: simdevice.to_sim(zero), callback)
    return sum(simdevice.SYNC.values()), sum(simdevice.H2D.values())

for name in (name for name in ki.SAMPLERS if name != "dpm_adaptive"):
    short, long = count(name, 5), count(name, 15)
    assert short[0] == long[0] == 0, (name, "synchronisations", short, long)
    assert short[1] == long[1] <= 2, (name, "uploads", short, long)
assert count("euler", 5, peek=True)[0] == 5, "the count must see a read"
print("counted")
"""


def test_no_synchronisation_and_no_upload_in_the_loop() -> None:
    """Of every registered sampler, by equality of two run lengths; a callback that reads is seen."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COUNT_SYNCS, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "counted\n", result.stderr[-2000:]


def test_advance_is_one_step_of_run() -> None:
    plan, x = ki.compile_plan("lms", KARRAS), 10 * noise_like((2, 6))
    state, seen = {"x": x}, []
    for step in plan.steps:
        sigmas = stage_sigmas([stage.sigma for stage in step.stages], x)
        state, first = advance(step, mixture(), state, lambda a, b: x, sigmas)
        seen.append(first)
    assert torch.equal(state["x"], ki.run(plan, mixture(), x))
    assert seen[0] is not None and seen[0][0] is x


def test_sigmas_that_the_denoiser_sees() -> None:
    """Shape (batch,), contiguous, in x's dtype, float32 for half precision."""
    seen: list[Tensor] = []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return torch.zeros_like(x)

    for dtype, wanted in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
    ]:
        seen.clear()
        ki.run(ki.compile_plan("euler", KARRAS), denoiser, torch.ones(3, 2, dtype=dtype))
        assert all(sigma.shape == (3,) and sigma.is_contiguous() and sigma.dtype == wanted for sigma in seen)
        torch.testing.assert_close(torch.stack(seen)[:, 0].double(), KARRAS[:-1], rtol=1e-6, atol=0)


def test_combine() -> None:
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    known = {State("x"): x, State("y"): y}
    assert combine(Form({State("x"): 1.0}), known, x) is x
    assert combine(Form({State("x"): 2.0, State("y"): -1.0}), known, x).tolist() == [-1.0, -1.0]
    assert combine(Form({}), known, x).tolist() == [0.0, 0.0]
    assert x.tolist() == [1.0, 2.0]


def test_half_precision_is_rounded_once() -> None:
    """1 + 2^-10 - 1: rounding after the first sum would lose the small term."""
    one, small = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 2.0**-10, dtype=torch.bfloat16)
    known = {State("a"): one, State("b"): small, State("c"): one}
    form = Form({State("a"): 1.0, State("b"): 1.0, State("c"): -1.0})
    assert combine(form, known, one).item() == 2.0**-10


def test_a_denoiser_that_reuses_its_buffer_does_not_change_the_result() -> None:
    """The last step hands out a tensor of its own, not the denoiser's."""
    buffer = torch.zeros(2, 6)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return buffer.zero_()

    result = ki.run(ki.compile_plan("euler", KARRAS), denoiser, torch.ones(2, 6))
    buffer.fill_(7.0)
    assert result.tolist() == [[0.0] * 6] * 2


def test_float32_output_for_half_states_is_accepted() -> None:
    x = torch.ones(2, 6, dtype=torch.float16)
    result = ki.run(ki.compile_plan("heun", KARRAS), lambda y, sigma: y.float() / (1 + sigma[:, None] ** 2), x)
    assert result.dtype == torch.float16
    with pytest.raises(TypeError, match=r"dtype torch.float32, got torch.float16 in step 0 \(sigma 10\)"):
        ki.run(ki.compile_plan("heun", KARRAS), lambda y, sigma: y.half(), torch.ones(2, 6))


def test_a_guided_plan_needs_a_pair() -> None:
    guided = [name for name in ki.SAMPLERS if name.endswith("cfg_pp")]
    for name in guided:
        plan = ki.compile_plan(name, KARRAS)
        with pytest.raises(TypeError, match=r"needs a pair Guided\(denoised, uncond\).*negative="):
            ki.run(plan, mixture(), 10 * noise_like((2, 6)))


def test_a_plain_plan_takes_the_denoised_of_a_pair() -> None:
    x, denoise, plan = 10 * noise_like((2, 6)), mixture(), ki.compile_plan("heun", KARRAS)
    paired = ki.run(plan, lambda y, sigma: ki.Guided(denoise(y, sigma), torch.zeros_like(y)), x)
    assert torch.equal(paired, ki.run(plan, denoise, x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["euler", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde"])
def test_on_a_gpu(name: str) -> None:
    """The same result as on the CPU, without a synchronisation in the loop."""
    plan, x = ki.compile_plan(name, KARRAS), (10 * noise_like((2, 6))).float()
    zero = torch.zeros_like(x)
    want = ki.run(plan, mixture(), x, lambda a, b: zero)
    denoise, on_gpu, zero_gpu = mixture(), x.cuda(), zero.cuda()
    ki.run(plan, denoise, on_gpu, lambda a, b: zero_gpu)  # parameters are copied to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = ki.run(plan, denoise, on_gpu, lambda a, b: zero_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)
