"""Denoisers whose conditioning belongs to the whole batch: they have a `take`, and are called with nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from inverting import MIXTURE, images, schedule
from problems import mixture
from torch import Tensor

import kinvert as ki
from kinvert.denoisers import Masked, guide

OTHER = mixture(seed=1)
SIGMAS = schedule(6)
MASK = torch.tensor([[1.0, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])


@dataclass
class Pipeline:
    """A host's denoiser: prepared for the rows of its shifts, and for no others.

    Guidance hands it a `branch` for each row, which would stack.
    """

    shift: Tensor
    calls: list[int] = field(default_factory=list)

    def take(self, index: Tensor) -> Pipeline:
        """The same for some rows; a row may be there several times."""
        return Pipeline(self.shift[index], self.calls)

    def __call__(self, x: Tensor, sigma: Tensor, branch: Tensor | None = None) -> Tensor:
        if len(x) != len(self.shift):
            raise RuntimeError(f"prepared for {len(self.shift)} rows, got {len(x)}")
        self.calls.append(len(x))
        return branches(x, sigma, self.shift[:, None], branch)


def branches(x: Tensor, sigma: Tensor, shift: Tensor, branch: Tensor | None) -> Tensor:
    """One mixture, or the other where `branch` is 0, moved."""
    positive = MIXTURE(x - shift, sigma)
    return shift + (
        positive if branch is None else torch.where(branch[:, None] == 0, OTHER(x - shift, sigma), positive)
    )


SHIFT = torch.linspace(-0.5, 0.5, 3, dtype=torch.float64)
GUIDED: dict[str, Any] = {"cfg": 1.1, "positive": {"branch": torch.ones(3)}, "negative": {"branch": torch.zeros(3)}}


def plain(x: Tensor, sigma: Tensor, shift: Tensor, branch: Tensor | None = None) -> Tensor:
    """The same, with its shifts as ordinary conditioning."""
    return branches(x, sigma, shift, branch)


def ordinary(given: dict[str, Any]) -> dict[str, Any]:
    shift = {"shift": SHIFT[:, None]}
    positive, negative = ((given.get(name) or {}) | shift for name in ("positive", "negative"))
    return given | {"positive": positive} | ({"negative": negative} if "cfg" in given else {})


VERBS: dict[str, Callable[..., Any]] = {
    "euler": lambda denoiser, **given: ki.invert(denoiser, images(3), SIGMAS, **given),
    "heun, one size": lambda denoiser, **given: ki.invert(
        denoiser, images(3), SIGMAS, sampler="heun", max_batch=2, fixed_batch=True, **given
    ),
    "dpmpp_2m": lambda denoiser, **given: ki.invert(
        denoiser, images(3), schedule(10), sampler="dpmpp_2m", tol=1e-7, **given
    ),
    "o_belm": lambda denoiser, **given: ki.invert(denoiser, images(3), SIGMAS, sampler="o_belm", tol=1e-6, **given),
    "extract_noise": lambda denoiser, **given: ki.extract_noise(
        denoiser, images(3), SIGMAS, noise=ki.noise.white(3), max_batch=2, **given
    ),
}


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masks"])
@pytest.mark.parametrize("guided", [{}, GUIDED], ids=["cfg 1", "cfg 1.1"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_host_is_called_with_the_rows_it_was_cut_to(verb: str, guided: dict[str, Any], mask: Tensor | None) -> None:
    """And finds what the same conditioning as keywords finds; the way back too, in parts."""
    host = Pipeline(SHIFT)
    found = VERBS[verb](host, mask=mask, **guided)
    assert found.converged.all() and max(host.calls) <= 3
    other = VERBS[verb](plain, mask=mask, **ordinary(guided))
    torch.testing.assert_close(found.latent, other.latent, rtol=1e-5, atol=1e-5)
    for most in (None, 2):
        torch.testing.assert_close(found.sample(host, max_batch=most), found.restored, rtol=0, atol=1e-9)


@pytest.mark.parametrize("max_batch", [None, 2, 1])
@pytest.mark.parametrize("guided", [{}, GUIDED], ids=["cfg 1", "cfg 1.1"])
def test_sampling_and_unsampling_a_host_in_parts(guided: dict[str, Any], max_batch: int | None) -> None:
    x = 10.0 * images(3)
    for verb in (ki.sample, ki.unsample):
        host = Pipeline(SHIFT)
        result = verb(host, x, SIGMAS, max_batch=max_batch, **guided)
        torch.testing.assert_close(result, verb(plain, x, SIGMAS, **ordinary(guided)), rtol=0, atol=1e-10)
        assert max(host.calls) == (max_batch or 3)
    trip = ki.round_trip(Pipeline(SHIFT), images(3), SIGMAS, max_batch=max_batch, method="invert", **guided)
    assert float(trip.max_error.max()) < 1e-7


def test_a_host_inside_a_mask_inside_guidance() -> None:
    x, sigma, index = images(3), torch.full((3,), 2.0, dtype=torch.float64), torch.tensor([2, 0, 2])
    inside = guide(Masked(Pipeline(SHIFT), MASK, images(3)), batch=3, **GUIDED)
    outside = Masked(guide(Pipeline(SHIFT), batch=3, **GUIDED), MASK, images(3))
    torch.testing.assert_close(inside(x, sigma), outside(x, sigma))
    torch.testing.assert_close(inside.take(index)(x[index], sigma), outside(x, sigma)[index])
    with pytest.raises(RuntimeError, match="prepared for 3 rows, got 2"):
        guide(Pipeline(SHIFT))(x[:2], sigma[:2])
