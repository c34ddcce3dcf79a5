"""`ki.edit`: exact answers, the verbs that it is made of, and what it refuses."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kinvert as ki
from kinvert.edits import METHODS

SIGMAS = ki.schedules.karras(8, 0.05, 20.0)[:-1]
MEANS = torch.tensor([[-1.0], [2.0], [0.0]], dtype=torch.float64)
A, B, NONE = ({"label": torch.tensor([k])} for k in range(3))
STD = 0.5


class Classes:
    """Normal data around a mean for each label; every run is affine. It counts its evaluations."""

    coordinates = "ve"

    def __init__(self) -> None:
        self.evaluations = 0

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        self.evaluations += 1
        mean = MEANS.to(x)[torch.tensor([2]) if label is None else label]
        s = sigma[:, None] ** 2
        return (STD**2 * x + s * mean) / (STD**2 + s)


class Nonlinear(Classes):
    """Images of one channel, a saturating denoiser."""

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        self.evaluations += 1
        mean = MEANS.to(x)[torch.tensor([2]) if label is None else label].reshape(-1, 1, 1, 1)
        return torch.tanh(x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2) + 0.3 * mean)


def data(*shape: int, seed: int = 0) -> Tensor:
    return 0.5 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gain(sigmas: Tensor) -> float:
    """The factor by which Euler's run contracts a distance to the mean."""
    return math.prod(1 + (t - u) / u * (1 - STD**2 / (STD**2 + u**2)) for u, t in pairwise(sigmas.tolist()))


# -- exact answers -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("end_at_step", [0, 3, 5])
def test_an_exact_edit_of_normal_data_moves_it_by_what_the_steps_do_not_keep(end_at_step: int) -> None:
    """With S_c(z) = m_c + g (z - m_c), the edit of x is x + (1 - g) (m_target - m_source)."""
    x = data(3, 1)
    done = ki.edit(Classes(), x, SIGMAS, source=A, target=B, end_at_step=end_at_step)
    shift = (1 - gain(SIGMAS[end_at_step:])) * 3.0
    torch.testing.assert_close(done.image, x + shift, rtol=0, atol=1e-7)
    assert done.sigmas == tuple(SIGMAS[end_at_step:].tolist())
    assert done.inversion is not None and bool(done.inversion.converged.all())


@settings(deadline=None, max_examples=10)
@given(cfg=st.floats(0.0, 4.0), source_cfg=st.floats(0.0, 4.0))
def test_the_two_scales_of_guidance_move_the_means(cfg: float, source_cfg: float) -> None:
    x, guided = data(2, 1), {"source": A, "target": B, "negative": NONE}
    done = ki.edit(Classes(), x, SIGMAS, cfg=cfg, source_cfg=source_cfg, **guided)
    shift = (1 - gain(SIGMAS)) * (cfg * 2.0 + source_cfg)
    torch.testing.assert_close(done.image, x + shift, rtol=0, atol=1e-6)


def test_a_scale_for_each_step_belongs_to_the_steps_that_are_left() -> None:
    x, scales = data(2, 1), [9.0, 9.0, 9.0, 2.0, 2.0, 2.0, 2.0]
    run: dict[str, Any] = {"source": A, "target": B, "negative": NONE, "end_at_step": 3}
    by_step = ki.edit(Classes(), x, SIGMAS, cfg=scales, source_cfg=scales, **run)
    torch.testing.assert_close(by_step.image, ki.edit(Classes(), x, SIGMAS, cfg=2.0, source_cfg=2.0, **run).image)


def test_an_edit_to_the_source_gives_the_image_back() -> None:
    x = data(2, 1, 4, 4)
    for sampler in ("euler", "dpmpp_2m", "reversible_heun"):
        done = ki.edit(Nonlinear(), x, SIGMAS, sampler=sampler, source=A, target=A, reconstruct=True)
        torch.testing.assert_close(done.image, x, rtol=0, atol=1e-7)
        assert torch.equal(done.image, done.reconstruction)


# -- the verbs ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_its_two_verbs(method: str) -> None:
    x, levels, seed = data(2, 1, 4, 4), SIGMAS[2:], ki.noise.white(3)
    sampler = "euler_ancestral" if method == "extract_noise" else "heun"
    run: dict[str, Any] = {"sampler": sampler, "negative": NONE}
    given = {"noise": seed} if method in ("extract_noise", "noise") else {}
    done = ki.edit(
        Nonlinear(), x, SIGMAS, method=method, end_at_step=2, source=A, target=B, cfg=2.0, source_cfg=1.5,
        reconstruct=True, **given, **run,
    )  # fmt: skip
    up: dict[str, Any] = {"positive": A, "cfg": 1.5, **run}
    down: dict[str, Any] = {"positive": B, "cfg": 2.0}
    if method in ("invert", "extract_noise"):
        verb = {"invert": ki.invert, "extract_noise": ki.extract_noise}[method]
        found = verb(Nonlinear(), x, levels, **up, **given)
        latent, want, back = found.latent, found.sample(Nonlinear(), **down), found.restored
    else:
        latent = done.latent if method == "noise" else ki.unsample(Nonlinear(), x, levels, **up)
        want = ki.sample(Nonlinear(), latent, levels, **run, **down)
        back = ki.sample(Nonlinear(), latent, levels, **up)
    assert torch.equal(done.latent, latent) and torch.equal(done.image, want)
    assert torch.equal(done.reconstruction, back)
    assert (done.inversion is not None) == (method in ("invert", "extract_noise"))


@pytest.mark.parametrize(("method", "runs"), [("unsample", 2), ("noise", 1)])
def test_evaluations_are_counted(method: str, runs: int) -> None:
    denoiser = Nonlinear()
    done = ki.edit(denoiser, data(2, 1, 4, 4), SIGMAS, method=method, source=A, target=B)
    assert done.evaluations == denoiser.evaluations == 7 * runs
    done = ki.edit(denoiser, data(2, 1, 4, 4), SIGMAS, method=method, source=A, target=B, reconstruct=True)
    assert done.evaluations == denoiser.evaluations - 7 * runs == 7 * (runs + 1)


# -- noising -----------------------------------------------------------------------------------------------------------
def test_noising_is_a_draw_of_the_forward_process() -> None:
    x = data(4000, 1)
    latent = ki.edit(
        Classes(), x, SIGMAS, method="noise", end_at_step=4, target=B, noise=ki.noise.white(0)
    ).latent  # fmt: skip
    added = (latent - x).flatten()
    assert added.mean().abs() < 4 * float(SIGMAS[4]) / 4000**0.5
    assert added.var() == pytest.approx(float(SIGMAS[4] ** 2 - SIGMAS[-1] ** 2), rel=0.1)
    assert abs(float(torch.corrcoef(torch.stack([added, x.flatten()]))[0, 1])) < 0.07


def test_noise_is_reproducible_and_each_item_has_its_own() -> None:
    x, run = data(3, 1, 4, 4), {"method": "noise", "target": B, "sampler": "euler_ancestral"}
    first, second = (ki.edit(Nonlinear(), x, SIGMAS, noise=ki.noise.white([4, 5, 6]), **run) for _ in range(2))
    assert torch.equal(first.image, second.image)
    alone = ki.edit(Nonlinear(), x[1:2], SIGMAS, noise=ki.noise.white([5]), **run)
    torch.testing.assert_close(first.image[1:2], alone.image)
    other = ki.edit(Nonlinear(), x, SIGMAS, noise=ki.noise.white([7, 8, 9]), **run)
    assert not torch.equal(first.image, other.image)


def test_the_start_is_independent_of_the_noise_of_the_sampler() -> None:
    x, source = data(1, 1, 64, 64), ki.noise.white(0)
    start = ki.edit(Nonlinear(), x, SIGMAS, method="noise", target=B, noise=source).latent - x
    drawn = source.bind(x)(1.0, 0.0)
    assert abs(float(torch.corrcoef(torch.stack([start.flatten(), drawn.flatten()]))[0, 1])) < 0.07


# -- masks -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_mask_keeps_is_kept_to_the_bit(method: str, dtype: torch.dtype) -> None:
    x, mask = data(2, 1, 4, 4).to(dtype), torch.zeros(4, 4)
    mask[:, 2:] = 1
    sampler = "euler_ancestral" if method == "extract_noise" else "euler"
    done = ki.edit(
        Nonlinear(), x, SIGMAS, method=method, sampler=sampler, source=A, target=B, mask=mask, reconstruct=True
    )
    assert done.reconstruction is not None
    for image in (done.image, done.reconstruction):
        assert torch.equal(image[..., :2], x[..., :2])
    assert (done.image[..., 2:] - x[..., 2:]).abs().min() > 1e-3


def test_a_soft_mask_blends_as_sample_does() -> None:
    x, mask = data(2, 1, 4, 4), torch.tensor([0.0, 0.3, 0.7, 1.0]).expand(4, 4)
    run: dict[str, Any] = {"mask": mask, "sampler": "heun"}
    done = ki.edit(Nonlinear(), x, SIGMAS, method="noise", target=B, noise=ki.noise.white(0), **run)
    want = ki.sample(Nonlinear(), done.latent, SIGMAS, positive=B, latent=x, **run)
    torch.testing.assert_close(done.image[..., 1:], want[..., 1:])
    assert torch.equal(done.image[..., 0], x[..., 0])
    with pytest.raises(ValueError, match="mask must be 0 or 1 everywhere"):
        ki.edit(Nonlinear(), x, SIGMAS, source=A, target=B, **run)


# -- flow time ---------------------------------------------------------------------------------------------------------
def test_edits_in_flow_time() -> None:
    class Flow(Nonlinear):
        coordinates = "flow"

    x, times = data(2, 1, 4, 4), ki.levels.FlowTimes([0.9, 0.7, 0.5, 0.3, 0.1, 0.02])
    done = ki.edit(Flow(), x, times, source=A, target=A, end_at_step=1)
    torch.testing.assert_close(done.image, x, rtol=0, atol=1e-7)
    assert done.sigmas == (0.7, 0.5, 0.3, 0.1, 0.02)
    noised = ki.edit(Flow(), torch.ones(4000, 1, 1, 1).double(), times, method="noise", target=B, end_at_step=1)
    signal = 0.3 / 0.98
    assert float(noised.latent.mean()) == pytest.approx(signal, abs=0.05)
    assert float(noised.latent.std()) == pytest.approx((0.7**2 - (signal * 0.02) ** 2) ** 0.5, rel=0.05)


# -- what is refused, before the first evaluation ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "wish"}, "unknown method 'wish'"),
        ({"cfg": 3.0}, "target, with cfg: .*negative"),
        ({"source_cfg": 3.0}, "source, with source_cfg: .*negative"),
        ({"target": None}, "target must be a mapping .* got None"),
        ({"target": 8}, "target, with cfg: .*mapping"),
        ({"source": "cat"}, "source, with source_cfg: .*mapping"),
        ({"method": "noise", "tol": 1e-3}, "tol is for method='invert' and 'extract_noise', got it for 'noise'"),
        ({"method": "unsample", "max_evals": 100}, "max_evals is for method='invert', got it for 'unsample'"),
        ({"noise": ki.noise.white(0)}, "noise is for samplers that draw noise, and euler draws none here"),
        (
            {"method": "unsample", "noise": ki.noise.white(0)},
            "noise is for method='invert', 'extract_noise' and 'noise', got it",
        ),
        ({"method": "noise", "noise": torch.randn}, "noise must be a source with a seed"),
        ({"method": "extract_noise"}, "euler draws no noise"),
        ({"sampler": "euler_ancestral"}, "use extract_noise"),
        ({"sampler": "euler_ancestral", "method": "unsample"}, "cannot unsample"),
        ({"sigmas": SIGMAS.flip(0)}, "sigmas must be the decreasing sampling schedule"),
        ({"sigmas": ki.schedules.karras(8, 0.05, 20.0)}, r"stop at sigma_min > 0, e.g. sigmas\[:-1\]"),
        ({"end_at_step": -1}, "end_at_step"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_right_is_refused_before_the_work(change: dict[str, Any], message: str) -> None:
    denoiser = Nonlinear()
    run: dict[str, Any] = {"sigmas": SIGMAS, "source": A, "target": B} | change
    with pytest.raises((TypeError, ValueError), match=message):
        ki.edit(denoiser, data(2, 1, 4, 4), **run)
    assert denoiser.evaluations == 0


def test_noising_needs_no_source_unless_it_is_asked_for() -> None:
    x = data(2, 1, 4, 4)
    done = ki.edit(Nonlinear(), x, SIGMAS, method="noise", target=B, source_cfg=3.0)
    assert done.reconstruction is None
    with pytest.raises(ValueError, match="source, with source_cfg: .*negative"):
        ki.edit(Nonlinear(), x, SIGMAS, method="noise", target=B, source_cfg=3.0, reconstruct=True)


def test_an_edit_says_what_it_did() -> None:
    done = ki.edit(Classes(), data(3, 1), SIGMAS, source=A, target=B, reconstruct=True)
    assert "edit of 3 samples by 'invert', through sigma 20 and back in 7 steps" in str(done)
    assert "converged        3 of 3" in str(done) and "with the source  rms" in str(done)
    assert repr(done) == f"Edited(float64 (3, 1), by 'invert', through sigma 20, {done.evaluations} evaluations)"


# -- slerp -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.zeros(2), r"t must be .* shape \(3,\), got shape \(2,\)"),
        ([0.5], r"t must be a number, .* got \[0.5\]"),
        (float("nan"), "t has 3 NaN or infinite values"),
    ],
)
def test_slerp_refuses_shares_that_do_not_fit(t: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ki.slerp(data(3, 4), data(3, 4, seed=1), t)


def test_slerp_refuses_what_is_no_latent() -> None:
    with pytest.raises(TypeError, match="b must be a floating point tensor of shape"):
        ki.slerp(data(3, 4), torch.ones(3, 4, dtype=torch.int64), 0.5)
