"""`ki.run` with conditioning and masks is `sample` and `unsample` with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import mixture, noise_like
from torch import Tensor

import kinvert as ki

DIM = 6
SIGMAS = ki.schedules.karras(6, 0.05, 8.0)
MIXTURE = mixture(DIM)
MASK = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
SOFT = torch.tensor([1.0, 0.5, 0.0, 1.0, 0.2, 1.0], dtype=torch.float64)


def shifted(x: Tensor, sigma: Tensor, c: Tensor | float = 0.0) -> Tensor:
    return MIXTURE(x - c, sigma) + c


shifted.coordinates = "ve"  # type: ignore[attr-defined]


def start(seed: int = 0) -> Tensor:
    return 8.0 * noise_like((3, DIM), seed)


def conditioning() -> dict[str, Any]:
    return {"positive": {"c": noise_like((3, DIM), seed=1)}, "negative": {"c": noise_like((3, DIM), seed=2)}}


PER_STEP = [1.0, 2.0, 3.0, 2.0, 1.0, 0.5]


@pytest.mark.parametrize(
    "cfg", [1.0, 2, 2.5, PER_STEP, torch.tensor(PER_STEP), ki.guidance.Rescale(3.0, 0.5, space="x0")]
)
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_cfg_pp", "euler_ancestral"])
def test_a_run_with_cfg_is_sample(sampler: str, cfg: Any) -> None:
    if sampler == "euler_cfg_pp" and isinstance(cfg, ki.guidance.Rescale):
        pytest.skip("it does not go with CFG++")
    x, noise = start(), ki.noise.white(0)
    want = ki.sample(shifted, x, SIGMAS, sampler=sampler, cfg=cfg, noise=noise, **conditioning())
    plan = ki.compile_plan(sampler, SIGMAS)
    got = ki.run(plan, shifted, x, ki.noise.white(0), cfg=cfg, **conditioning())
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mask", [MASK, SOFT, MASK.bool()])
@pytest.mark.parametrize("mask_noise", [None, noise_like((3, DIM), seed=4)])
def test_a_run_with_a_mask_is_sample(mask: Tensor, mask_noise: Tensor | None) -> None:
    x, kept = start(), {"mask": mask, "latent": noise_like((3, DIM), seed=3), "mask_noise": mask_noise}
    want = ki.sample(shifted, x, SIGMAS, sampler="heun", cfg=2.0, **conditioning(), **kept)
    got = ki.run(ki.compile_plan("heun", SIGMAS), shifted, x, cfg=2.0, **conditioning(), **kept)
    torch.testing.assert_close(got, want)


def test_a_run_with_a_mask_is_sample_in_flow_time() -> None:
    def flow(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) / (1 + t[:, None])

    flow.coordinates = "flow"  # type: ignore[attr-defined]
    times, kept = torch.linspace(0.9, 0.0, 6), {"mask": MASK, "latent": noise_like((3, DIM), seed=3)}
    x = noise_like((3, DIM))
    want = ki.sample(flow, x, times, sampler="heun", **kept)
    torch.testing.assert_close(ki.run(ki.compile_plan("heun", times), flow, x, **kept), want)


def test_a_run_upwards_is_unsample_with_its_cfg_and_its_mask() -> None:
    x, options = noise_like((3, DIM), seed=3), {"cfg": PER_STEP[1:], **conditioning(), "mask": MASK}
    want = ki.unsample(shifted, x, SIGMAS[:-1], sampler="heun", sigma_offset=0.0, **options)
    plan = ki.compile_plan("heun", SIGMAS[:-1].flip(0))
    torch.testing.assert_close(ki.run(plan, shifted, x, latent=x, **options), want)


def test_a_run_upwards_refuses_a_sampler_that_loses_the_kept_region() -> None:
    plan, x = ki.compile_plan("euler_cfg_pp", SIGMAS[:-1].flip(0)), noise_like((3, DIM))
    with pytest.raises(ValueError, match="its unconditional image is not masked"):
        ki.run(plan, shifted, x, mask=MASK, latent=x, **conditioning())


def test_gradients_reach_x_the_conditioning_and_the_latent_of_the_mask() -> None:
    plan = ki.compile_plan("heun", SIGMAS[:3])

    def run(x: Tensor, positive: Tensor, negative: Tensor, latent: Tensor) -> Tensor:
        return ki.run(
            plan, shifted, x, cfg=2.0, positive={"c": positive}, negative={"c": negative}, mask=SOFT, latent=latent
        )

    inputs = [noise_like((1, DIM), seed).requires_grad_() for seed in range(4)]
    assert torch.autograd.gradcheck(run, inputs)


def test_what_does_not_go_together_is_said() -> None:
    plan, x = ki.compile_plan("heun", SIGMAS), start()
    with pytest.raises(ValueError, match="mask was given without latent"):
        ki.run(plan, shifted, x, mask=MASK)
    with pytest.raises(ValueError, match="latent was given without mask"):
        ki.run(plan, shifted, x, latent=x)
    with pytest.raises(ValueError, match="negative= is missing"):
        ki.run(plan, shifted, x, cfg=2.0)
    with pytest.raises(ValueError, match="one for each of the 6 steps"):
        ki.run(plan, shifted, x, cfg=[1.0, 2.0], **conditioning())
    with pytest.raises(TypeError, match="plan must be"):
        ki.run("heun", shifted, x, cfg=2.0, **conditioning())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x must be"):
        ki.run(plan, shifted, x.long(), cfg=2.0, **conditioning())
