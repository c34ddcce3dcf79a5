"""The caller's modes, and devices that can do less: what the solvers compute is the same, the denoiser keeps its modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from problems import count_on_simulated_device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kinvert as ki

X = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
SIGMAS = ki.schedules.karras(6, 0.1, 10.0)
METHODS = ["auto", "anderson", "damped", "newton", "continuation", "sweeps"]


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    sigma = sigma.reshape(-1, 1, 1, 1)
    return 0.25 / (0.25 + sigma**2) * x + 0.1 * torch.sin(2 * x) / (1 + sigma)


def folding(x: Tensor, sigma: Tensor) -> Tensor:
    """An image in its range at every level, which several states may have."""
    return torch.tanh(2 * x / (1 + sigma.reshape(-1, 1, 1, 1)))


def pair(x: Tensor, sigma: Tensor) -> ki.Guided:
    return ki.Guided(denoiser(x, sigma), 0.9 * denoiser(x, sigma))


CALLS: dict[str, Callable[[Tensor], ki.Inversion]] = {
    **{
        name: lambda x, name=name: ki.invert(denoiser, x, SIGMAS[:-1], sampler=name)
        for name in ("heun", "rk4", "dpmpp_2m", "deis", "uni_pc", "o_belm")
    },
    **{method: lambda x, m=method: ki.invert(denoiser, x, SIGMAS[:-1], method=m) for method in METHODS},
    "least_change": lambda x: ki.invert(folding, 0.5 * x[:, :1, :2].tanh(), SIGMAS[2:], last_step="least_change"),
    "guided": lambda x: ki.invert(pair, x, SIGMAS[:-1], sampler="dpmpp_2m_cfg_pp"),
    "extract_noise": lambda x: ki.extract_noise(denoiser, x, SIGMAS[:-1]),
}


@contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "medium": lambda: precision("medium"),
}


class NarrowProducts(TorchDispatchMode):
    """Records products of matrices, of which one is not float64: the modes have a say in those.

    Those that the engine writes into its buffers are its own affair: it looks at the modes, and
    tests/engine/test_products.py at it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        matrices = name in ("mm", "bmm", "mv", "dot", "addmm", "addmv", "baddbmm", "addbmm", "_linalg_solve_ex")
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if (
            matrices
            and func._schema.overload_name != "out"
            and any(tensor.dtype != torch.float64 for tensor in tensors)
        ):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_modes_change_nothing(call: Callable[[Tensor], ki.Inversion]) -> None:
    """The same evaluations and latents in float32, and no product of matrices that a GPU's modes could narrow."""
    with NarrowProducts() as products:
        torch.manual_seed(0)
        exact = call(X)
    assert not products.found
    for mode in MODES.values():
        torch.manual_seed(0)
        with mode():
            found = call(X)
        assert torch.equal(found.converged, exact.converged)
        spent = [int(result.evaluations.sum()) for result in (found, exact)]
        assert abs(spent[0] - spent[1]) <= 0.1 * spent[1], spent
        torch.testing.assert_close(found.latent, exact.latent, rtol=1e-4, atol=1e-3)


def test_a_narrow_product_is_seen() -> None:
    with NarrowProducts() as products:
        _ = torch.ones(2, 2) @ torch.ones(2, 2)
        _ = torch.ones(2, 2).double() @ torch.ones(2, 2).double()
    assert products.found == ["mm"]


def of_each_family() -> list[str]:
    """The first and the last sampler of each file of rules."""
    families: dict[str, list[str]] = {}
    for name in ki.SAMPLERS:
        families.setdefault(type(ki.sampler(name)).__module__, []).append(name)
    return [name for names in families.values() for name in dict.fromkeys((names[0], names[-1]))]


SAMPLERS = pytest.mark.parametrize(
    "names", [of_each_family(), pytest.param(list(ki.SAMPLERS), marks=pytest.mark.slow)], ids=["families", "all"]
)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@SAMPLERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samplers_are_inverted_under_autocast(dtype: torch.dtype, names: list[str]) -> None:
    for name in names:
        if name == "dpm_adaptive":
            continue
        plan = ki.compile_plan(name, SIGMAS[:-1])
        if plan.is_stochastic or any(step.forgets_x for step in plan.steps):
            continue
        model: Any = pair if plan.is_guided else denoiser
        exact = ki.invert(model, X.to(dtype), SIGMAS[3:-1], sampler=name)
        with torch.autocast("cpu", torch.bfloat16):
            found = ki.invert(model, X.to(dtype), SIGMAS[3:-1], sampler=name)
        assert torch.equal(found.converged, exact.converged), name
        assert int((found.evaluations - exact.evaluations).abs().max()) <= 0.1 * int(exact.evaluations.max()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_denoiser_keeps_the_modes(dtype: torch.dtype) -> None:
    seen = set()

    def asking(x: Tensor, sigma: Tensor) -> Tensor:
        seen.add((torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()))
        return denoiser(x, sigma)

    with torch.autocast("cpu", torch.bfloat16), precision("medium"):
        for sampler in ("euler", "dpmpp_2m"):
            ki.invert(asking, X.to(dtype), SIGMAS[:-1], sampler=sampler)
    assert seen == {(True, "medium")}


WITHOUT_FLOAT64 = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
import simdevice, torch
import kinvert as ki

torch.set_num_threads(1)
warnings.simplefilter("ignore")
simdevice.STATE["paused"] = 1  # nothing is counted here
x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
sigmas = ki.schedules.karras(4, 0.2, 5.0)
levels = ki.levels.edm(0.03, 15.0)

def denoiser(x, sigma):
    return x / (1 + sigma[:, None] ** 2) + 0.1 * torch.tanh(x) / (1 + sigma[:, None])

def pair(x, sigma):
    return ki.Guided(denoiser(x, sigma), 0.9 * denoiser(x, sigma))

def every(x):
    for name in NAMES:
        plan = None if name == "dpm_adaptive" else ki.compile_plan(name, sigmas)
        model = pair if plan is not None and plan.is_guided else denoiser
        noise = ki.noise.white(0)
        for verb in (ki.sample, ki.unsample, ki.round_trip, ki.extract_noise, ki.invert):
            options = {}
            if verb in (ki.sample, ki.unsample):
                options = dict(noise=noise)
            torch.manual_seed(0)
            try:
                result = verb(model, x, sigmas if verb is ki.sample else sigmas[:-1], sampler=name, **options)
            except (ValueError, NotImplementedError) as error:  # a combination that has no meaning
                yield name, verb.__name__, type(error), None
                continue
            report = "" if isinstance(result, torch.Tensor) else str(result)
            value = getattr(result, "latent", result)
            converged = getattr(result, "converged", None)
            yield name, verb.__name__, converged, value
    yield "levels", "timestep", None, levels.timestep(x.abs() + 0.1)
    yield "levels", "sigma", None, levels.sigma(x.abs() + 0.1)

def host(value):
    return value.elem if isinstance(value, simdevice.SimT) else value

expected = list(every(x))
with simdevice.sim(float64=False):
    try:
        simdevice.to_sim(x).double()
        raise AssertionError("the device must refuse float64")
    except TypeError:
        pass
    found = list(every(simdevice.to_sim(x)))
ran = 0
for (name, verb, there, value), (*_, converged, exact) in zip(found, expected, strict=True):
    assert (value is None) == (exact is None), (name, verb, there, converged)
    if exact is not None:
        ran += 1
        assert isinstance(value, simdevice.SimT), (name, verb)
        if converged is not None:
            assert torch.equal(host(there), converged), (name, verb)
        torch.testing.assert_close(host(value), exact, rtol=1e-3, atol=1e-3, msg=f"{name} {verb}")
assert ran > 2 * len(NAMES), ran
print("counted")
"""


@SAMPLERS
def test_every_verb_runs_without_float64(names: list[str]) -> None:
    """And gives what the CPU gives; what has no meaning there has none here."""
    count_on_simulated_device(f"NAMES = {names}\n{WITHOUT_FLOAT64}")
