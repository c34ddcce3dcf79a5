"""The problems that come with the benchmark, and how those of users are checked."""

from __future__ import annotations

import pytest
import torch

from kinvert.bench import PROBLEMS
from kinvert.bench.measurement import problem_of
from kinvert.bench.problems import make_problem


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_problems(name: str, dtype: torch.dtype) -> None:
    problem = make_problem(name, 3, 0, dtype)
    again, other = make_problem(name, 3, 0, dtype), make_problem(name, 3, 1, dtype)
    assert torch.equal(problem.images, again.images) and not torch.equal(problem.images, other.images)
    sigma = torch.full((3,), 2.0, dtype=dtype)
    for conditioning in (problem.positive, problem.negative or {}):
        assert problem.denoiser(problem.images, sigma, **conditioning).dtype == dtype


def test_a_problem_moves_to_a_device() -> None:
    problem = problem_of("digits", 2, 0, "float32", "meta")
    assert problem.images.is_meta and problem.positive["label"].is_meta and problem.negative["label"].is_meta
    assert all(parameter.is_meta for parameter in problem.denoiser.parameters())
    assert not problem_of("digits", 2, 0, "float32").images.is_meta
    assert problem_of("gaussian", 2, 0, "float32", "meta").negative is None


def test_labels_choose_the_denoiser() -> None:
    problem = make_problem("mixture", 4, 0, torch.float64)
    x, sigma = torch.randn(4, 16, dtype=torch.float64), torch.full((4,), 2.0, dtype=torch.float64)
    every = [problem.denoiser(x, sigma, label=torch.full((4,), k)) for k in range(3)]
    mixed = problem.denoiser(x, sigma, label=torch.tensor([0, 1, 2, 0]))
    assert torch.equal(mixed, torch.stack([every[0][0], every[1][1], every[2][2], every[0][3]]))
    assert torch.equal(problem.denoiser(x, sigma), every[2])
    assert problem.positive["label"].tolist() == [0, 1, 0, 1] and problem.negative["label"].tolist() == [2] * 4


def test_user_problems_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    good = make_problem("gaussian", 2, 0, torch.float64)
    monkeypatch.setitem(PROBLEMS, "own", lambda count, seed, dtype: "nothing")
    with pytest.raises(TypeError, match=r"must return a kinvert\.bench\.Problem, got str"):
        make_problem("own", 2, 0, torch.float64)
    monkeypatch.setitem(PROBLEMS, "own", lambda count, seed, dtype: good)
    with pytest.raises(ValueError, match=r"must return 3 images of torch\.float64, got shape \(2, 16\)"):
        make_problem("own", 3, 0, torch.float64)
