"""The loop: no waiting for the device, derivatives, compilation, and what the denoiser sees and returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import count_on_simulated_device, mixture, noise_like
from runs import KARRAS, PLANS, gaussian
from torch import Tensor

import kinvert as ki
from kinvert.denoisers import guide
from kinvert.engine import plain_loop

COUNT_SYNCS = """
import sys
sys.path.insert(0, sys.argv[1])
import simdevice, torch
import kinvert as ki

def count(name, n, peek=False, plain=False, noise=True):
    plan = ki.compile_plan(name, ki.schedules.karras(n, 0.1, 10.0))
    x = simdevice.to_sim(torch.ones(2, 3))
    def denoiser(y, sigma):
        D = y / (1 + sigma[:, None] ** 2)
        return ki.Guided(D, 0.5 * D) if plan.is_guided else D
    callback = (lambda step: float(step.x.sum())) if peek else (lambda step: None)
    zero = torch.zeros(2, 3)
    with simdevice.sim(), torch.set_grad_enabled(plain):
        ki.run(plan, denoiser, x, (lambda a, b: simdevice.to_sim(zero)) if noise else None, callback)
    return sum(simdevice.SYNC.values()), sum(simdevice.H2D.values())

for plain in (False, True):  # the engine's buffers, and the plain loop
    for name in (name for name in ki.SAMPLERS if name != "dpm_adaptive"):
        short, long = count(name, 4, plain=plain), count(name, 8, plain=plain)
        assert short[0] == long[0] == 0, (name, plain, "synchronisations", short, long)
        assert short[1] == long[1] <= 3, (name, plain, "uploads", short, long)
    assert count("euler", 5, peek=True, plain=plain)[0] == 5, "the count must see a read"
for name in ("dpmpp_2m_sde", "euler_ancestral"):  # the sources of noise themselves
    assert count(name, 5, noise=False)[0] == count(name, 15, noise=False)[0] == 0, name
print("counted")
"""


def test_no_synchronisation_and_no_upload_in_the_loop() -> None:
    """Of every registered sampler, by equality of two run lengths; a callback that reads is seen."""
    count_on_simulated_device(COUNT_SYNCS)


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


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, at the first jvp
def test_derivatives_flow_through_a_run() -> None:
    """Reverse, forward and vectorised; also where gradients are off, as in the solvers, forward mode is not lost."""
    plan, x = ki.compile_plan("lms", KARRAS[:-1]), 10 * noise_like((2, 6))
    v = noise_like((2, 6), seed=1)

    def f(y: Tensor) -> Tensor:
        return ki.run(plan, gaussian, y)

    linear = f(v)  # the denoiser is linear
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((f(y) * v).sum(), y)
    torch.testing.assert_close((gradient * x).sum(), (f(x) * v).sum())
    with torch.no_grad():
        torch.testing.assert_close(torch.func.jvp(f, (x,), (v,))[1], linear)
        torch.testing.assert_close(torch.func.vmap(f)(torch.stack([x, v]))[1], linear)
        with torch.autograd.forward_ad.dual_level():
            dual = f(torch.autograd.forward_ad.make_dual(x, v))
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, linear)


def test_inference_mode() -> None:
    x = 10 * noise_like((2, 6))
    with torch.inference_mode():
        inside = ki.sample(gaussian, x, KARRAS, sampler="lms")
    weight = torch.ones((), dtype=x.dtype, requires_grad=True)

    def guided(y: Tensor, sigma: Tensor) -> Tensor:
        with torch.enable_grad():  # guidance by a gradient: sigma takes part in it
            out = weight * gaussian(y.clone().requires_grad_(), sigma)
            torch.autograd.grad(out.sum(), weight)
        return out.detach()

    torch.testing.assert_close(ki.sample(guided, x, KARRAS, sampler="lms"), inside)


def test_result_is_not_the_buffer_of_the_denoiser() -> None:
    """The last step hands out a tensor of its own, not the denoiser's."""
    buffer = torch.zeros(2, 6)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return buffer.zero_()

    result = ki.run(ki.compile_plan("euler", KARRAS), denoiser, torch.ones(2, 6))
    buffer.fill_(7.0)
    assert result.tolist() == [[0.0] * 6] * 2


def test_plain_loop_context() -> None:
    """It gives what a run with gradients gives, to the bit, in new tensors at every evaluation."""
    x, seen = 10 * noise_like((2, 6)), list[Tensor]()

    def denoise(y: Tensor, sigma: Tensor) -> Tensor:
        seen.append(y)
        return gaussian(y, sigma)

    with torch.enable_grad():
        want = ki.run(PLANS["lms"], gaussian, x)
    with torch.no_grad(), plain_loop():
        assert torch.equal(ki.run(PLANS["lms"], denoise, x), want)
    with torch.no_grad():
        assert not torch.equal(ki.run(PLANS["lms"], denoise, x), want)  # the context is over


# -- compiled runs -----------------------------------------------------------------------------------------------------
def conditioned(x: Tensor, sigma: Tensor, shift: Tensor | None = None) -> Tensor:
    denoised = x / (1 + sigma[:, None] ** 2)
    return denoised if shift is None else denoised + shift[:, None]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, when it generates code
@pytest.mark.parametrize(
    ("name", "backend"),
    [("euler", "eager"), ("uni_pc", "eager"), pytest.param("lms", "inductor", marks=pytest.mark.slow)],
)
def test_run_compiles_without_graph_breaks(name: str, backend: str) -> None:
    """On a denoiser that compiles. Generating code takes minutes; the run is traced as a whole without it, too."""
    plan, x = ki.compile_plan(name, KARRAS), 10 * noise_like((2, 6))
    compiled = torch.compile(lambda y: ki.run(plan, conditioned, y), fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), ki.run(plan, conditioned, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_guided_run_compiles_without_graph_breaks(cfg: float) -> None:
    """With an analytic denoiser of another dtype than x, which casts its parameters."""
    gaussian = ki.denoisers.Gaussian(0.0, 0.5)
    branches: list[dict[str, Any]] = [{"shift": {"by": shift}} for shift in (torch.ones(2, 3), torch.zeros(2, 3))]
    bound = guide(lambda x, sigma, shift: gaussian(x, sigma) + shift["by"], cfg, *branches)
    plan, x = ki.compile_plan("dpmpp_2m", KARRAS), 10 * noise_like((2, 3)).float()
    compiled = torch.compile(lambda y: ki.run(plan, bound, y), fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), ki.run(plan, bound, x), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["euler", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde"])
def test_run_on_gpu(name: str) -> None:
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
