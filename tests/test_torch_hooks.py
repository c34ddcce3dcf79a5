"""Private names of torch: they stand in one file, and without each of them the results are the same."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import noise_like
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import kinvert as ki
from kinvert import torch_hooks
from kinvert.denoisers.buffers import keep
from kinvert.engine import plain_loop

PACKAGE = Path(__file__).parent.parent / "kinvert"
KARRAS = ki.schedules.karras(6, 0.1, 10.0)
SAMPLERS = ("heun", "dpmpp_2m", "lms")
PRIVATE = re.compile(
    r"torch\._C|getrefcount|_cdata|\._version\b|_current_level|peek_interpreter_stack|_subclasses|_python_dispatch|_is_view|_dynamo"
)


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    return x / (1 + sigma[:, None] ** 2)


def without_refcounts(monkeypatch: pytest.MonkeyPatch) -> None:
    public = {name: getattr(sys, name) for name in dir(sys) if name != "getrefcount"}
    monkeypatch.setattr(torch_hooks, "sys", SimpleNamespace(**public))


REMOVALS: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "getrefcount": without_refcounts,
    "storage_use_count": lambda patch: patch.delattr(torch._C, "_storage_Use_Count"),
    "functorch": lambda patch: patch.delattr(torch._C, "_functorch"),
    "interpreter_stack": lambda patch: patch.delattr(torch._C._functorch, "peek_interpreter_stack"),
    "forward_mode": lambda patch: patch.delattr(torch.autograd.forward_ad, "_current_level"),
    "wrappers": lambda patch: patch.delattr(torch.utils._python_dispatch, "is_traceable_wrapper_subclass"),
    "version": lambda patch: [patch.setattr(torch_hooks, f, lambda x: None) for f in ("version", "total_version")],
    "fake": lambda patch: patch.delattr(torch._subclasses, "FakeTensor"),
}
PLAIN = {"getrefcount", "storage_use_count", "functorch", "interpreter_stack", "forward_mode"}


def test_private_names_stand_in_one_file() -> None:
    found = {path.name for path in PACKAGE.rglob("*.py") if PRIVATE.search(path.read_text())}
    assert found == {"torch_hooks.py"}


@pytest.mark.parametrize("name", REMOVALS)
def test_results_without_a_private_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops agree to rounding, and no input that the denoiser keeps is overwritten, nor an output that it reuses."""
    x, kept, buffer = 10 * noise_like((2, 6)), list[tuple[Tensor, Tensor]](), torch.empty(2, 6, dtype=torch.float64)

    def careless(y: Tensor, sigma: Tensor) -> Tensor:
        kept.append((y, y.clone()))
        return buffer.copy_(gaussian(y, sigma))

    want = {sampler: ki.sample(gaussian, x, KARRAS, sampler=sampler) for sampler in SAMPLERS}
    with plain_loop():
        plain = {sampler: ki.sample(gaussian, x, KARRAS, sampler=sampler) for sampler in SAMPLERS}
    REMOVALS[name](monkeypatch)
    assert torch_hooks.can_reuse_memory() == (name not in PLAIN)
    for sampler in SAMPLERS:
        for _ in range(2):  # the second run finds what the first one uploaded
            got = ki.sample(careless, x, KARRAS, sampler=sampler)
            torch.testing.assert_close(got, want[sampler], rtol=1e-12, atol=0)
        assert name not in PLAIN or torch.equal(got, plain[sampler])
    assert all(torch.equal(value, at_the_time) for value, at_the_time in kept)


def test_loops_differ_where_the_test_above_tells_them_apart() -> None:
    x = 10 * noise_like((2, 6))
    with plain_loop():
        plain = ki.sample(gaussian, x, KARRAS, sampler="lms")
    assert not torch.equal(ki.sample(gaussian, x, KARRAS, sampler="lms"), plain)


@pytest.mark.parametrize("name", ["getrefcount", "storage_use_count", "functorch", "interpreter_stack"])
def test_outputs_are_copied_without_a_private_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def place_after_keeping() -> tuple[int, int]:
        outputs: list[Any] = [torch.ones(2)]
        before = outputs[0].data_ptr()
        keep(outputs)
        return before, outputs[0].data_ptr()

    before, after = place_after_keeping()
    assert before == after
    REMOVALS[name](monkeypatch)
    before, after = place_after_keeping()
    assert before != after


def test_sigma_that_is_written_to_without_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run does not see it: the levels are uploaded again."""

    def careless(x: Tensor, sigma: Tensor) -> Tensor:
        out = gaussian(x, sigma)
        sigma.fill_(float("nan"))
        return out

    REMOVALS["version"](monkeypatch)
    x = 10 * noise_like((2, 6))
    want = ki.sample(gaussian, x, KARRAS)
    assert torch.equal(ki.sample(careless, x, KARRAS), want)
    assert torch.equal(ki.sample(gaussian, x, KARRAS), want)


def test_parameters_of_exact_denoisers_without_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    REMOVALS["version"](monkeypatch)
    mean, x = torch.zeros((), dtype=torch.float64), torch.ones(2, 6)
    denoiser = ki.denoisers.Gaussian(mean, 0.5)
    before = denoiser(x, torch.ones(2))
    mean.fill_(1.0)
    assert not torch.equal(denoiser(x, torch.ones(2)), before)


def test_what_hooks_tell() -> None:
    x = torch.ones(2)
    assert not torch_hooks.is_transformed() and not torch_hooks.is_forward_mode()
    assert not torch_hooks.is_wrapper(x) and not torch_hooks.is_fake(x)
    with FakeTensorMode():
        assert torch_hooks.is_fake(torch.ones(2))
    assert torch_hooks.is_view(x[1:]) and not torch_hooks.is_view(x)
    assert torch_hooks.storage_key(x) == torch_hooks.storage_key(x[1:]) != torch_hooks.storage_key(x.clone())
    before = torch_hooks.version(x)
    x.add_(1)
    assert before is not None and torch_hooks.version(x) == before + 1
    torch.func.vmap(lambda y: [torch_hooks.is_transformed(), y][1])(x)
    seen: list[bool] = []
    torch.func.vmap(lambda y: [seen.append(torch_hooks.is_transformed()), y][1])(x)
    assert seen == [True]


def test_a_constant_is_marked_as_torch_marks_it() -> None:
    def function() -> int:
        return 1

    marked = dict(vars(torch_hooks.constant_result(function)))
    vars(function).clear()
    assert marked == vars(torch.compiler.assume_constant_result(function))
