"""The loop: no waiting for the device, no copies of what need not be copied, the callbacks, the checks."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from problems import count_on_simulated_device, mixture, noise_like
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kinvert as ki
from kinvert import engine
from kinvert.engine import advance, combine, run_state, stage_sigmas
from kinvert.engine.kernels import program
from kinvert.forms import Form, State
from kinvert.rules import Rule

KARRAS = ki.schedules.karras(6, 0.1, 10.0)

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


def test_advance_is_one_step_of_run() -> None:
    plan, x = ki.compile_plan("lms", KARRAS), 10 * noise_like((2, 6))
    state, seen = {"x": x}, []
    for step in plan.steps:
        sigmas = stage_sigmas([stage.sigma for stage in step.stages], x)
        state, first = advance(step, mixture(), state, lambda a, b: x, sigmas)
        seen.append(first)
    assert torch.equal(state["x"], ki.run(plan, mixture(), x))
    assert seen[0] is not None and seen[0][0] is x


# -- buffers that are used again ---------------------------------------------------------------------------------------
PLANS = {name: ki.compile_plan(name, KARRAS) for name in ki.SAMPLERS if name != "dpm_adaptive"}
IN_FEW_PASSES = [
    "euler",
    "heun",
    "dpm_2",
    "lms",
    "dpmpp_2m",
    "dpmpp_2s_ancestral",
    "dpmpp_2m_sde",
    "deis",
    "uni_pc",
    "er_sde",
]


def denoiser_for(plan: ki.Plan) -> ki.Denoiser:
    denoise = mixture()
    return (lambda x, sigma: ki.Guided(denoise(x, sigma), 0.9 * denoise(x, sigma))) if plan.is_guided else denoise


def plain_run(plan: ki.Plan, denoiser: ki.Denoiser, state: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    with torch.enable_grad():
        return run_state(plan, denoiser, state, **kwargs)


def given_noise(like: Tensor) -> Callable[[float, float], Tensor]:
    """Noise that depends on the interval only."""
    return lambda a, b: math.sin(1e3 * a + b) * noise_like(tuple(like.shape)).to(like)


@pytest.mark.parametrize("ends_at_zero", [True, False])
@pytest.mark.parametrize("name", PLANS)
def test_few_passes_give_what_the_plain_loop_gives(name: str, ends_at_zero: bool) -> None:
    """Started from x alone and from the auxiliary state, in float64; the results are tensors of their own."""
    plan = PLANS[name] if ends_at_zero else ki.compile_plan(name, KARRAS[:-1])
    for p in {plan, plan.closed}:
        x = 10 * noise_like((2, 6))
        state = {key: x + 0.1 * noise_like((2, 6), seed=7) for key in p.steps[0].reads} | {"x": x}
        before = {key: value.clone() for key, value in state.items()}
        want = plain_run(p, denoiser_for(p), state, noise=given_noise(x))
        with torch.no_grad():
            got = run_state(p, denoiser_for(p), state, noise=given_noise(x))
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert float((got[key] - value).norm()) <= 1e-12 * float(value.norm())
            assert got[key].untyped_storage().nbytes() == value.nbytes
        assert all(torch.equal(value, before[key]) for key, value in state.items())


@dataclass(frozen=True)
class TwoNames(Rule):
    """Remembers one value under two names and uses both."""

    terms: int
    name: ClassVar[str] = "two_names"
    ode_order: ClassVar[int] = 0

    def step(self, s: ki.rules.StepBuilder) -> Form:
        denoised, a, b = s.denoise(s.x, s.sigma), s.recall("a"), s.recall("b")
        s.remember("a", denoised)
        s.remember("b", denoised)
        if a is None or b is None:
            return 0.7 * s.x + 0.3 * denoised
        past = 0.1 * a + 0.2 * b
        return 0.5 * s.x + 0.2 * denoised + past if self.terms == 4 else 0.7 * s.x + past


@pytest.mark.parametrize("terms", [3, 4])
def test_a_value_may_have_two_names(terms: int) -> None:
    """In a chain and in a product."""
    plan, x = ki.compile_plan(TwoNames(terms), KARRAS), 10 * noise_like((2, 6))
    with torch.no_grad():
        got = ki.run(plan, gaussian, x)
    torch.testing.assert_close(got, plain_run(plan, gaussian, {"x": x})["x"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["euler", "dpm_2", "dpmpp_2m", "uni_pc", "euler_ancestral"])
def test_few_passes_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """One rounding an update, as in the plain loop: a network in float32 or in half gives the same bits, or one off."""
    for wide in (False, True):

        def denoise(x: Tensor, sigma: Tensor, wide: bool = wide) -> Tensor:
            out = x.float() / (1 + sigma[:, None] ** 2)
            return out if wide else out.to(dtype)

        x = (10 * noise_like((2, 6))).to(dtype)
        want = plain_run(PLANS[name], denoise, {"x": x}, noise=given_noise(x))["x"]
        got = ki.sample(denoise, x, KARRAS, sampler=name, noise=given_noise(x))
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("width", [600, engine.BLOCK])
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("name", ["lms", "uni_pc"])
def test_products_are_as_exact_as_sums(name: str, precision: str, width: int) -> None:
    """In one piece or in several; also where the user allows low precision in products: that is for the network."""
    x = 10 * noise_like((2, width)).float()
    before = torch.get_float32_matmul_precision()
    want = plain_run(PLANS[name], gaussian, {"x": x})["x"]
    torch.set_float32_matmul_precision(precision)
    try:
        got = ki.sample(gaussian, x, KARRAS, sampler=name)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    return x / (1 + sigma.reshape(-1, *(1,) * (x.ndim - 1)) ** 2)


class Ledger(TorchDispatchMode):
    """Operations on tensors as large as x: how many, the bytes they read and write, and the tensors they create."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.numel, self.operations, self.bytes, self.created = x.numel(), 0, 0, 0
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.paused or any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
            return out
        written = list(
            filter(self.large, [kwargs.get("out"), *(args[:1] if func.__name__.endswith("_.default") else ())])
        )
        reads = [t for t in filter(self.large, args) if not (t in Seen(written) and func.__name__ == "copy_.default")]
        created = [] if written else list(filter(self.large, [out]))
        if written or reads or created:
            self.operations += 1
            self.bytes += sum(t.numel() * t.itemsize for t in [*written, *reads, *created])
            self.created += len(created)
        return out

    def large(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.numel() >= self.numel


class Seen(list[Tensor]):
    """Tensors by identity."""

    def __contains__(self, item: object) -> bool:
        return any(item is known for known in self)


def ledger(name: str, steps: int) -> Ledger:
    rule = ki.sampler(name, eta=0.0) if name == "dpmpp_2s_ancestral" else name
    plan, x = ki.compile_plan(rule, ki.schedules.karras(steps, 0.1, 10.0)), torch.ones(1, 64)
    outputs = [torch.ones(1, 64) for _ in range(2 * plan.evaluations)]  # each is handed out once: nobody holds it then

    class Silent(ki.noise.NoiseSource):
        def bind(self, x: Tensor) -> Any:
            return self

        def __call__(self, a: float, b: float) -> Tensor:
            raise AssertionError("it can write to a buffer")

        def into(self, out: Tensor, a: float, b: float) -> None:
            pass

    with torch.no_grad():
        ki.run(plan, lambda x, sigma: outputs.pop(), x, Silent())  # uploads the coefficients
        with Ledger(x) as counted:
            ki.run(plan, lambda x, sigma: outputs.pop(), x, Silent())
    return counted


@pytest.mark.parametrize("name", IN_FEW_PASSES)
def test_operations_and_passes_per_step(name: str) -> None:
    """At most 1.5 times the bytes of one kernel per input and update, few operations, and no new tensor in the loop."""
    rule = ki.sampler(name, eta=0.0) if name == "dpmpp_2s_ancestral" else name
    step = ki.compile_plan(rule, ki.schedules.karras(30, 0.1, 10.0)).steps[15]
    inputs = [stage.input for stage in step.stages if stage.input.alias() is None]
    rows = [form for form in (step.x, *(form for _, form in step.memory)) if form.alias() is None]
    least = sum(len(form) + 1 for form in inputs) + len({s for form in rows for s, _ in form}) + len(rows)
    long, short = ledger(name, 30), ledger(name, 15)
    assert long.created == short.created
    assert (long.bytes - short.bytes) / 15 / (64 * 4) <= 1.5 * least
    assert (long.operations - short.operations) / 15 <= len(step.stages) + 1 + len(step.memory) + 1


@pytest.mark.parametrize("ends_at_zero", [True, False])
def test_loops_by_hand_give_the_same(ends_at_zero: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the benchmark compares with does the same work."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from best_case import BEST_CASES, best_case

    assert list(BEST_CASES) == IN_FEW_PASSES
    for name in IN_FEW_PASSES:
        rule = ki.sampler(name, eta=0.0) if name == "dpmpp_2s_ancestral" else name
        plan = ki.compile_plan(rule, KARRAS if ends_at_zero else KARRAS[:-1])
        x, noise = 10 * noise_like((2, 6)), noise_like((2, 6), seed=1)
        with torch.no_grad():
            want = ki.run(plan, gaussian, x, lambda a, b, noise=noise: noise)
            torch.testing.assert_close(best_case(plan, gaussian, x, noise)(), want, rtol=1e-12, atol=1e-12)


def test_an_input_that_the_denoiser_keeps_is_not_overwritten() -> None:
    """Whether it keeps the tensor or a part of it, and whether x lies in a row of its own or among others."""
    for name, view in itertools.product(("heun", "lms"), (False, True)):
        kept: list[tuple[Tensor, Tensor]] = []

        def keep(x: Tensor, sigma: Tensor, view: bool = view, kept: list[Any] = kept) -> Tensor:
            kept.append((x[:, 1:] if view else x, x.clone()))
            return gaussian(x, sigma)

        x = 10 * noise_like((2, 6))
        got = ki.sample(keep, x, KARRAS, sampler=name)
        assert torch.equal(got, ki.sample(gaussian, x, KARRAS, sampler=name))
        for value, at_the_time in kept:
            assert torch.equal(value, at_the_time[:, 1:] if view else at_the_time)


@pytest.mark.parametrize("name", ["dpmpp_2m", "lms", "heun", "uni_pc", "euler_cfg_pp", "edict"])
def test_a_denoiser_may_return_its_input(name: str) -> None:
    def same(x: Tensor, sigma: Tensor) -> Any:
        return ki.Guided(x, x.view_as(x)) if PLANS[name].is_guided else x.view_as(x)

    x = 10 * noise_like((2, 6))
    torch.testing.assert_close(ki.sample(same, x, KARRAS, sampler=name), x, rtol=1e-12, atol=1e-12)


def test_outputs_and_what_a_callback_gets_are_left_alone() -> None:
    for name in IN_FEW_PASSES:
        kept: list[tuple[Tensor, Tensor]] = []

        def denoise(x: Tensor, sigma: Tensor, kept: list[Any] = kept) -> Tensor:
            out = gaussian(x, sigma)
            kept.append((out, out.clone()))
            return out

        def callback(step: ki.engine.Progress, kept: list[Any] = kept) -> None:
            kept.append((step.x, step.x.clone()))

        steps: list[Any] = []
        x = 10 * noise_like((2, 6))
        noise = given_noise(x)
        ki.sample(denoise, x, KARRAS, sampler=name, noise=noise, callback=callback)
        assert all(torch.equal(value, at_the_time) for value, at_the_time in kept)
        plain_run(PLANS[name], gaussian, {"x": x}, noise=noise, callback=steps.append)
        torch.testing.assert_close(steps[-1].x, kept[-1][0], rtol=1e-9, atol=1e-12)


def test_a_sigma_that_the_denoiser_changes_is_not_seen_by_the_next_run() -> None:
    def careless(x: Tensor, sigma: Tensor) -> Tensor:
        out = gaussian(x, sigma)
        sigma.fill_(float("nan"))
        return out

    x = 10 * noise_like((2, 6))
    want = ki.sample(gaussian, x, KARRAS)
    assert torch.equal(ki.sample(careless, x, KARRAS), want)
    assert torch.equal(ki.sample(careless, x, KARRAS), want)
    assert torch.equal(ki.sample(gaussian, x, KARRAS), want)


def test_strides_are_kept() -> None:
    x = (10 * noise_like((2, 3, 4, 4))).to(memory_format=torch.channels_last)
    for name in ("euler", "lms", "dpmpp_2m_sde"):
        seen: list[bool] = []

        def denoise(y: Tensor, sigma: Tensor, seen: list[bool] = seen) -> Tensor:
            seen.append(y.is_contiguous(memory_format=torch.channels_last))
            return gaussian(y, sigma)

        result = ki.sample(denoise, x, KARRAS, sampler=name, noise=ki.noise.white(0))
        assert all(seen) and result.is_contiguous(memory_format=torch.channels_last)
        flat = ki.sample(gaussian, x.contiguous(), KARRAS, sampler=name, noise=ki.noise.white(0))
        torch.testing.assert_close(result, flat)


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


class Live(TorchDispatchMode):
    """Bytes of tensors as large as x that are alive, the most at any time."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.size, self.now, self.most = x.nbytes, 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().nbytes() >= self.size:
                self.add(t.untyped_storage())
        return out

    def add(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self.known and storage.resizable():  # else it is a part of a buffer that is counted
            self.known.add(key)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.drop, key, storage.nbytes())

    def drop(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.now -= nbytes


@pytest.mark.parametrize("name", PLANS)
def test_memory_is_what_the_program_says(name: str) -> None:
    """At each call of the denoiser, besides x and what the denoiser holds itself: rows, and denoised values kept."""
    plan, x = PLANS[name], torch.ones(1, 4096)
    most = 0

    def denoise(y: Tensor, sigma: Tensor) -> Any:
        nonlocal most
        most = max(most, live.now)
        return ki.Guided(0.5 * y, 0.4 * y) if plan.is_guided else 0.5 * y

    with torch.no_grad(), Live(x) as live:
        ki.run(plan, denoise, x, lambda a, b: torch.ones(1, 4096))
    assert most <= program(plan).memory * x.nbytes
    in_a_step = max((1 + plan.is_guided) * len(step.stages) + len(step.noises) for step in plan.steps)
    assert program(plan).memory <= 3 + 2 * plan.memory_size + in_a_step


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
