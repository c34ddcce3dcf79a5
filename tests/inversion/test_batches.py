"""What the denoiser of an inversion is called with: few batch sizes, tensors of its own, or one size alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import mixture, noise_like
from torch import Tensor
from torch._dynamo.utils import counters

import kinvert as ki
from kinvert.inversion.batches import FewBatches

MIXTURE = mixture()
SIGMAS = ki.schedules.karras(9, 0.1, 10.0)[:-1]
ROUTES = [("heun", "auto"), ("dpmpp_2m", "auto"), ("ipndm", "auto"), ("o_belm", "auto"), ("dpmpp_2m_cfg_pp", "auto")]
ROUTES += [("euler", method) for method in ("anderson", "newton", "continuation", "sweeps")]


def images(count: int) -> Tensor:
    """Of different sizes, so that they finish one by one."""
    return noise_like((count, 6), seed=5) * torch.logspace(-1, 0.5, count, dtype=torch.float64)[:, None]


def model(sampler: str) -> Any:
    """CFG++ is given a pair that differs a little: far from it its sweeps fail."""
    return pair if "cfg" in sampler else MIXTURE


def pair(x: Tensor, sigma: Tensor) -> ki.Guided:
    denoised = MIXTURE(x, sigma)
    return ki.Guided(denoised, 0.9 * denoised + 0.1 * ki.denoisers.Gaussian(0.0, 0.7)(x, sigma))


@pytest.mark.parametrize("largest, sizes", [(8, {8, 4, 2, 1}), (7, {7, 4, 2, 1}), (3, {3, 2, 1}), (1, {1})])
def test_batches_are_halves_of_halves(largest: int, sizes: set[int]) -> None:
    few = FewBatches(None, largest)
    assert {few.size(count) for count in range(1, largest + 1)} == sizes
    assert all(count <= few.size(count) < max(2 * count, 2) + 1 for count in range(1, largest + 1))
    assert {FewBatches(None, largest, fixed=True).size(count) for count in range(1, largest + 1)} == {largest}


@pytest.mark.parametrize("sampler, method", ROUTES)
def test_the_denoiser_sees_few_tensors_of_its_own(sampler: str, method: str) -> None:
    seen = set()

    def spy(x: Tensor, sigma: Tensor) -> Any:
        assert not x._is_view() and not sigma._is_view()
        seen.add((len(x), len(sigma), x.stride(), sigma.stride(), x.storage_offset(), sigma.storage_offset()))
        return model(sampler)(x, sigma)

    assert ki.invert(spy, images(5), SIGMAS, sampler=sampler, method=method, tol=1e-7).converged.all()
    assert {row[0] for row in seen} <= {5, 3, 2, 1}
    assert seen <= {(n, n, (6, 1), (1,), 0, 0) for n in (5, 3, 2, 1)}


@pytest.mark.parametrize("max_batch", [None, 2, 8])
@pytest.mark.parametrize("sampler, method", ROUTES)
def test_a_denoiser_of_one_batch_size_is_inverted(sampler: str, method: str, max_batch: int | None) -> None:
    """Also the last part of a batch in parts, and a batch smaller than the only size; conditioning goes along."""
    x, size = images(5), max_batch or 5
    shifts = torch.linspace(-0.1, 0.1, 5, dtype=torch.float64)[:, None]

    def static(x: Tensor, sigma: Tensor, shift: Tensor) -> Any:
        assert len(x) == len(sigma) == len(shift) == size
        out = model(sampler)(x - shift, sigma)
        return type(out)(*(part + shift for part in out)) if isinstance(out, tuple) else out + shift

    found = ki.invert(
        static, x, SIGMAS, sampler=sampler, method=method, tol=1e-7, positive={"shift": shifts}, max_batch=max_batch,
        fixed_batch=True,
    )  # fmt: skip
    assert found.converged.all() and (found.round_trip_error <= found.allowed).all()
    assert found.row_checks is not None
    for i in (0, 4):  # copies are not charged
        alone = ki.invert(
            lambda x, sigma, i=i: _shifted(model(sampler), x, sigma, shifts[i]), x[i : i + 1], SIGMAS,
            sampler=sampler, method=method, tol=1e-7,
        )  # fmt: skip
        torch.testing.assert_close(found.latent[i], alone.latent[0], rtol=1e-4, atol=1e-4)
        cost = int(found.evaluations[i] - found.row_checks[i])
        assert abs(cost - int(alone.evaluations[0])) <= 0.1 * int(alone.evaluations[0])


def _shifted(denoiser: Any, x: Tensor, sigma: Tensor, shift: Tensor) -> Any:
    out = denoiser(x - shift, sigma)
    return type(out)(*(part + shift for part in out)) if isinstance(out, tuple) else out + shift


@pytest.mark.filterwarnings("ignore:dtype=float64")
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "uni_pc"])
def test_a_compiled_denoiser_is_compiled_a_few_times(sampler: str) -> None:
    """Once for each of the whole batch, batches of any size and of one; all verbs together need no more."""

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1 + sigma[:, None] ** 2) + 0.1 * torch.tanh(x) / (1 + sigma[:, None])

    x = images(3)
    verbs = {
        "sample": (1, lambda d: ki.sample(d, x, SIGMAS, sampler=sampler)),
        "unsample": (1, lambda d: ki.unsample(d, x, SIGMAS, sampler=sampler)),
        "round_trip": (1, lambda d: ki.round_trip(d, x, SIGMAS, sampler=sampler)),
        "extract_noise": (1, lambda d: ki.extract_noise(d, x, SIGMAS)),
        "invert": (3, lambda d: ki.invert(d, x, SIGMAS, sampler=sampler)),
        "fixed": (1, lambda d: ki.invert(d, x, SIGMAS, sampler=sampler, fixed_batch=True)),
    }
    for verb, (most, call) in verbs.items():
        torch._dynamo.reset()
        counters.clear()
        call(torch.compile(network, backend="eager"))
        assert 1 <= counters["frames"]["ok"] <= most, verb
