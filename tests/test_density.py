"""Densities: closed forms, the order with which a sampler's tends to the ODE's, and what has none."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import mixture, noise_like, order_slope
from torch import Tensor

import kinvert as ki
from kinvert.density import _Augmented, dequantize, latent_log_prob, log_prob

STD = 0.7
GAUSS = ki.denoisers.Gaussian(0.0, STD)
X = noise_like((3, 2, 3))


def levels(steps: int, top: float = 80.0, last: float = 0.02) -> Tensor:
    return ki.schedules.karras(steps, last, top)[:-1]


def normal(z: Tensor, std: float) -> Tensor:
    flat = z.flatten(1) / std
    return -0.5 * flat.square().sum(1) - flat.shape[1] * math.log(std * math.sqrt(2 * math.pi))


def of_the_ode(x: Tensor, top: float, last: float) -> Tensor:
    """The ODE moves normal data by a factor; its latents are taken to be N(0, top^2)."""
    growth = math.sqrt((STD**2 + top**2) / (STD**2 + last**2))
    return normal(x * growth, top) + x[0].numel() * math.log(growth)


SAMPLERS = ["euler", "heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_2m", "dpmpp_3m_sde", "lms", "ipndm", "uni_pc"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_density_of_a_sampler_is_its_own_for_normal_data(name: str) -> None:
    """Each run multiplies x by a number, which a run on one value tells."""
    options = {"eta": 0.0} if "eta" in ki.sampler(name).noise_options else {}
    rule, sigmas = ki.sampler(name, **options), levels(12)
    factor = float(ki.sample(GAUSS, torch.ones(1, 1, dtype=torch.float64), sigmas, sampler=rule))
    want = normal(X / factor, float(sigmas[0])) - X[0].numel() * math.log(abs(factor))
    found = log_prob(GAUSS, X, sigmas, sampler=rule, tol=1e-13)
    assert (found.log_prob - want).abs().max() < 1e-10
    assert (found.latent - X / factor).abs().max() < 1e-8 and not found.std_error.any()


@pytest.mark.parametrize("of", ["sampler", "ode"])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("ralston", 2)])
def test_densities_tend_to_that_of_the_ode(of: str, name: str, order: int) -> None:
    errors, steps = [], [40, 80, 160]
    for n in steps:
        sigmas = levels(n, 10.0, 0.1)
        found = log_prob(GAUSS, X, sigmas, sampler=name, of=of)
        errors.append(float((found.log_prob - of_the_ode(X, 10.0, 0.1)).abs().max()))
    assert order_slope(errors, steps) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(("steps", "name"), [(6, "euler"), (7, "heun"), (20, "heun"), (41, "dpmpp_2m")])
def test_too_few_steps_for_the_ode_are_told(steps: int, name: str) -> None:
    sigmas = levels(steps, 10.0, 0.1)
    found = log_prob(GAUSS, X, sigmas, sampler=name, of="ode")
    off = (found.log_prob - of_the_ode(X, 10.0, 0.1)).abs()
    assert (found.step_error > 0.5 * off).all() and (found.step_error < 50 * off).all()
    assert "steps: +-" in str(found)
    assert "(steps: +- 1)" in str(replace(found, step_error=torch.ones_like(found.step_error)))
    assert not log_prob(GAUSS, X, sigmas, sampler=name).step_error.any()
    assert log_prob(GAUSS, X, sigmas[[0, -1]], sampler=name, of="ode").step_error.isnan().all()


def test_densities_of_a_mixture_agree() -> None:
    """Of the sampler, of the ODE, and of the data: a mixture whose density is a formula."""
    target = mixture(2)
    x = target.means[[0, 1]] + 0.1
    sigmas = ki.schedules.karras(120, 0.1, 2000.0)[:-1]
    variance = torch.as_tensor(target.std) ** 2 + 0.1**2
    parts = -0.5 * (x[:, None] - target.means).square().sum(2) / variance - (2 * math.pi * variance).log()
    true = parts.logsumexp(1) - math.log(len(target.means))
    for of in ("sampler", "ode"):
        assert (log_prob(target, x, sigmas, of=of).log_prob - true).abs().max() < 0.01


def test_random_traces_are_unbiased_within_their_error() -> None:
    target, sigmas = mixture(6), levels(6, 10.0, 0.1)
    x = target.means + 0.3
    exact = log_prob(target, x, sigmas, of="ode")
    score = []
    for seed in range(12):
        found = log_prob(target, x, sigmas, of="ode", probes=16, seed=seed)
        score.append((found.log_prob - exact.log_prob) / found.std_error)
        assert (found.latent - exact.latent).abs().max() < 1e-12
    scores = torch.stack(score)
    assert scores.mean().abs() < 3 / scores.numel() ** 0.5 * 1.5 and 0.5 < scores.square().mean() < 2.0


def test_the_trace_is_the_derivative() -> None:
    target, x = mixture(4), noise_like((3, 4))
    sigma = torch.full((3,), 0.6, dtype=torch.float64)
    whole = torch.stack(
        [torch.autograd.functional.jacobian(lambda v: target(v, sigma[:1]), r[None])[0, :, 0] for r in x]
    )
    seen = _Augmented(target, x.shape[1:], torch.eye(4).double(), True, torch.ones(3).double(), "ve")
    own = seen(torch.cat([x, torch.zeros(3, 1)], 1), sigma)[:, -1]
    assert (own - (whole.diagonal(dim1=1, dim2=2).sum(1) - 4 / 1.36)).abs().max() < 1e-12


def test_a_multistep_run_is_differentiated_as_a_whole() -> None:
    target, x, sigmas = mixture(4), mixture(4).means + 0.2, levels(5, 5.0, 0.1)
    found = log_prob(target, x, sigmas, sampler="dpmpp_2m")
    plan = ki.compile_plan("dpmpp_2m", sigmas)
    for i in range(len(x)):
        matrix = torch.autograd.functional.jacobian(lambda z: ki.run(plan, target, z), found.latent[i : i + 1])
        assert found.log_det[i] == pytest.approx(float(torch.linalg.slogdet(matrix[0, :, 0]).logabsdet), abs=1e-9)


@pytest.mark.parametrize("of", ["sampler", "ode"])
def test_each_image_has_its_own_density(of: str) -> None:
    target, sigmas = mixture(4), levels(5, 5.0, 0.1)
    x = target.means + 0.2
    together = log_prob(target, x, sigmas, of=of).log_prob
    alone = torch.cat([log_prob(target, row[None], sigmas, of=of).log_prob for row in x])
    assert (together - alone).abs().max() < 1e-8


@pytest.mark.parametrize("of", ["sampler", "ode"])
def test_flow_models_have_densities_too(of: str) -> None:
    """In flow time the run of a normal distribution ends as N(0, 1), and the density is that of the data."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        level = t.reshape(-1, *(1,) * (x.ndim - 1))
        kept = (1 - level) * STD**2
        return x * kept / (kept * (1 - level) + level**2)

    denoiser.coordinates = "flow"  # type: ignore[attr-defined]
    times = torch.linspace(1, 0.02, 120, dtype=torch.float64)
    want = normal(X, math.sqrt(0.98**2 * STD**2 + 0.02**2))
    assert (log_prob(denoiser, X, times, of=of).log_prob - want).abs().max() < 2e-3
    with pytest.raises(ValueError, match="must start at flow time 1, where x is normal, got 0.89"):
        log_prob(denoiser, X, times[times < 0.9].clamp(max=0.9), of=of)


def test_a_guided_sampler_has_a_density_of_its_own() -> None:
    images, labels = (t[:2] for t in ki.models.held_out("digits"))
    net, sigmas = ki.models.load("digits"), levels(6, 80.0, 0.05)
    null = torch.full_like(labels, net.null_label)
    plain, guided = (
        log_prob(net, images, sigmas, of="ode", cfg=cfg, positive={"label": labels}, negative={"label": null})
        for cfg in (1.0, 2.0)
    )
    assert plain.log_prob.isfinite().all() and (plain.log_prob - guided.log_prob).abs().min() > 1e-2


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 1.0), st.integers(0, 5))
def test_dequantized_values_stay_in_their_intervals(width: float, seed: int) -> None:
    x = width * torch.randint(0, 17, (4, 1, 3, 3), generator=torch.Generator().manual_seed(seed)).double()
    spread = dequantize(x, width, seed=seed)
    assert (spread - x).abs().max() <= width / 2 * (1 + 1e-9) and spread.unique().numel() > 30
    assert torch.equal(spread, dequantize(x, width, seed=seed))


def test_bits_of_a_value() -> None:
    found = log_prob(GAUSS, X, levels(20), tol=1e-12)
    bits = found.bits_per_dim(0.25)
    assert torch.allclose(bits, -(found.log_prob / 6 + math.log(0.25)) / math.log(2))
    assert "log p of 3 images of 6 values" in str(found) and "steps" not in str(found)  # which are not off
    assert repr(found).startswith("LogProb(")
    with pytest.raises(ValueError, match="bin_width"):
        found.bits_per_dim(0.0)


def folded(x: Tensor, sigma: Tensor) -> Tensor:
    return 40 * torch.sin(40 * x) + 0 * sigma[:, None]


def test_an_image_that_is_not_inverted_has_no_density() -> None:
    with pytest.warns(RuntimeWarning, match="not inverted"):
        found = log_prob(folded, torch.full((1, 2), 1.0, dtype=torch.float64), [2.0, 0.1], sampler="euler", max_evals=8)
    assert found.log_prob.isnan().all() and not found.inversion.converged.any()  # type: ignore[union-attr]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"of": "data"}, "unknown of 'data'; it must be one of sampler, ode"),
    ({"sampler": "edict"}, "edict maps pairs of states to pairs"),
    ({"probes": 4}, "probes estimate the trace in of='ode', got probes=4"),
    ({"of": "ode", "probes": 1}, "probes must be at least 2, got 1; two or more random vectors"),
    ({"of": "ode", "sampler": "euler_cfg_pp"}, "does not solve the ODE"),
    ({"of": "ode", "sampler": "euler_ancestral"}, "cannot run upwards"),
    ({"sampler": "euler_ancestral"}, "cannot invert euler_ancestral: it draws noise"),
    ({"sigmas": [2.0, 1.0, 0.0]}, "sigmas end at 0, where data has no density in general"),
    ({"x": torch.zeros(1, 4097)}, "events of 4097 values, and of='sampler' needs the whole derivative, at most 4096"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_what_has_no_density_is_refused(change: dict[str, Any], message: str) -> None:
    given = {"x": X, "sigmas": levels(4), **change}
    with pytest.raises(ValueError, match=message):
        log_prob(GAUSS, given.pop("x"), given.pop("sigmas"), **given)


@pytest.mark.parametrize("of", ["sampler", "ode"])
def test_a_denoiser_without_a_graph_is_refused(of: str) -> None:
    def frozen(x: Tensor, sigma: Tensor) -> Tensor:
        return GAUSS(x, sigma).detach()

    with pytest.raises(ValueError, match=r"has to be differentiable: no torch.no_grad\(\)"):
        log_prob(frozen, X, levels(4), of=of)


def test_the_density_of_a_known_latent_is_that_of_its_image() -> None:
    """Exact against the closed form: the images that Euler makes of Gaussian data are normal."""
    denoiser = ki.denoisers.Gaussian(0.0, 0.5)
    sigmas = ki.schedules.karras(7, 0.03, 15.0)[:-1].double()
    latent = 15 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = ki.sample(denoiser, latent, sigmas, sampler="euler")
    scale = float((x / latent).mean())
    found = latent_log_prob(denoiser, latent, sigmas, sampler="euler")
    assert found.tolist() == pytest.approx(normal(x, 15 * scale).tolist(), abs=1e-10)
    with pytest.raises(ValueError, match="draws noise"):
        latent_log_prob(denoiser, latent, sigmas, sampler="euler_ancestral")
