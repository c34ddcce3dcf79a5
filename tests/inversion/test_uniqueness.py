"""`preimages`: all roots of a step that has three, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from inverting import problem_of
from problems import mixture, noise_like
from torch import Tensor

import kinvert as ki
from kinvert.inversion import Continuation, preimages
from kinvert.inversion.solvers.further import follow_on

IMAGE = torch.tensor([[0.1]], dtype=torch.float64)
ROOTS = (-2.776851107901529, -0.10050557937702495, 3.1898432964371266)
"""Of `u - 3 tanh(u) = 0.2`."""


def folding(x: Tensor, sigma: Tensor) -> Tensor:
    """Euler's step from sigma 2 to 1 is `(u - 3 tanh(u)) / 2`."""
    return -3 * torch.tanh(x)


def test_all_three_latents_of_a_folded_step_are_found() -> None:
    found = preimages(folding, IMAGE, [2.0, 1.0], count=5, curves=4)
    assert found.converged.all() and sorted(found.latents[:, 0].tolist()) == pytest.approx(ROOTS, abs=1e-8)
    first = found.latents[0]
    torch.testing.assert_close(found.distances[0], (found.latents - first).norm(dim=1) / first.norm())
    exact = torch.distributions.Normal(0.0, 1.0).log_prob(found.latents / 2.0).sum(1)
    torch.testing.assert_close(found.log_densities, exact)
    torch.testing.assert_close(found.norms, found.latents.abs()[:, 0] / 2.0)
    for one in found.inversions:
        assert (one.sample(folding) - IMAGE).abs().item() <= float(one.allowed)
    assert str(found).startswith(f"3 latents of one image, {found.evaluations} evaluations\n")


def test_the_search_stops_at_the_count_and_starts_from_a_known_latent() -> None:
    known = preimages(folding, IMAGE, [2.0, 1.0]).latents[:1]
    for count in (1, 2):
        found = preimages(folding, IMAGE, [2.0, 1.0], count=count, latent=known)
        assert len(found.inversions) == count and torch.equal(found.latents[:1], known)


def test_every_evaluation_is_counted_and_the_limit_is_kept() -> None:
    rows = 0

    def counting(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return folding(x, sigma)

    levels = [4.0, 2.0, 1.0]
    free = preimages(counting, IMAGE, levels)
    assert rows == free.evaluations
    least = preimages(folding, IMAGE, levels, count=1).evaluations
    assert preimages(folding, IMAGE, levels, max_evals=20).evaluations <= least + 20 + 10 < free.evaluations


def test_an_exact_denoiser_has_one_latent() -> None:
    """The step is the gradient of a strongly convex function."""
    x = 0.8 * noise_like((1, 6), seed=5)
    found = preimages(mixture(), x, ki.schedules.karras(4, 0.1, 10.0)[:-1], starts=3)
    assert len(found.inversions) == 1 and found.converged.all()


def test_a_curve_leads_from_one_root_to_the_next() -> None:
    """`u - 3 tanh(u)` from the largest root: t falls to the fold and comes back at the middle root."""
    problem = problem_of(lambda u, index: u - 3 * torch.tanh(u), torch.full((1, 1), 0.2, dtype=torch.float64))
    root = torch.tensor([[ROOTS[2]]], dtype=torch.float64)
    end = follow_on(problem, root, torch.full_like(root, -1.0), torch.tensor([False]), Continuation())
    assert end.residual.item() <= 1e-12 and end.u.item() == pytest.approx(ROOTS[1], abs=1e-8)


def test_a_curve_of_several_values_ends_where_that_of_one_does() -> None:
    """Beside it, `2 v = 1` has one root."""
    target = torch.tensor([[0.2, 1.0, 1.0]], dtype=torch.float64)
    problem = problem_of(lambda u, index: torch.cat([u[:, :1] - 3 * torch.tanh(u[:, :1]), 2 * u[:, 1:]], 1), target)
    root = torch.tensor([[ROOTS[2], 0.5, 0.5]], dtype=torch.float64)
    end = follow_on(problem, root, torch.full_like(root, -1.0), torch.tensor([False]), Continuation())
    assert end.residual.item() <= 1e-12 and end.u[0].tolist() == pytest.approx([ROOTS[1], 0.5, 0.5], abs=1e-8)


def test_it_refuses_what_it_cannot_search() -> None:
    with pytest.raises(ValueError, match="x must be one image"):
        preimages(folding, IMAGE.repeat(2, 1), [2.0, 1.0])
    with pytest.raises(ValueError, match="sampler must be one whose steps remember nothing, .* got dpmpp_2m"):
        preimages(folding, IMAGE, [4.0, 2.0, 1.0], sampler="dpmpp_2m")
