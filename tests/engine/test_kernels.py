"""Kernels of a Plan: operations, passes over memory, rows."""

from __future__ import annotations

import importlib
import weakref
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from problems import noise_like
from runs import IN_FEW_PASSES, KARRAS, PLANS, gaussian, plain_run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kinvert as ki
from kinvert.engine.kernels import StepKernels, outlives, program
from kinvert.engine.operations import Add, Blend, Lerp, Mix, Scale, Sum
from kinvert.forms import Denoised, Form, State
from kinvert.rules import Rule


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
def test_value_with_two_names(terms: int) -> None:
    """In a chain and in a product."""
    plan, x = ki.compile_plan(TwoNames(terms), KARRAS), 10 * noise_like((2, 6))
    with torch.no_grad():
        got = ki.run(plan, gaussian, x)
    torch.testing.assert_close(got, plain_run(plan, gaussian, {"x": x})["x"], rtol=1e-12, atol=1e-12)


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
def test_memory_equals_program_memory(name: str) -> None:
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


def test_kernels_of_euler_are_one_lerp() -> None:
    (kernel,) = program(PLANS["euler"]).steps[0].update
    step = PLANS["euler"].steps[0]
    assert kernel == Lerp(0, -2, -1, pytest.approx(step.x[State("x")]))  # from D towards x: the smaller weight


def test_every_operation_occurs_in_the_registry() -> None:
    def found(half: bool) -> set[type[Any]]:
        steps = [step for plan in PLANS.values() for step in program(plan, half).steps]
        return {
            type(kernel)
            for step in steps
            for kernels in (step.update, *(c.kernels for c in step.calls))
            for kernel in kernels
        }

    assert found(half=False) == {Lerp, Add, Scale, Mix} and found(half=True) == {Blend, Sum}


def test_outlives() -> None:
    """What heun's first evaluation returns is read after the second; dpmpp_2s_ancestral's enters its input alone."""
    assert outlives(PLANS["heun"].steps[0], 0) and not outlives(PLANS["dpmpp_2s_ancestral"].steps[0], 0)
    assert outlives(PLANS["euler"].steps[-1], 0)  # handed out as the result
    step = PLANS["dpmpp_2s_ancestral"].steps[0]
    handed_on = replace(step.stages[1], input=Form.of(Denoised(0)))
    assert outlives(replace(step, stages=(step.stages[0], handed_on)), 0)


def test_old_names() -> None:
    """The old path gives the new names, with a warning, and the old name of a step."""
    old = importlib.import_module("kinvert.program")
    with pytest.warns(DeprecationWarning, match="kinvert.program is now kinvert.engine.kernels"):
        assert old.program is program
    with pytest.warns(DeprecationWarning):
        assert old.Pass is StepKernels
