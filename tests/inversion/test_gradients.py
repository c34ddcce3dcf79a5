"""The gradient of an inverted latent is the exact one, or an error says why there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import guided_mixture, mixture, noise_like
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kinvert as ki
from kinvert.inversion.gradients import pieces

DIM, TOL = 5, 1e-12
SIGMAS = ki.schedules.karras(6, 0.1, 8.0)[:-1]
X = 0.8 * noise_like((2, DIM), seed=5)
DIRECTION = noise_like((2, DIM), seed=9)
FEW = ("euler", "heun", "dpmpp_2m", "uni_pc", "fireflow", "euler_cfg_pp", "cfgpp_ud10_ab")
MASK = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
PLANS = [name for name in ki.SAMPLERS if name != "dpm_adaptive"]
SOLVED = [name for name in PLANS if ki.analysis.properties(name).invertibility in ("stepwise", "two-point")]


class Network(torch.nn.Module):
    """A smooth denoiser with parameters and conditioning, float64."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(noise_like((DIM, DIM), seed=7) / DIM**0.5)

    def forward(self, x: Tensor, sigma: Tensor, c: Tensor | float = 0.0) -> Tensor:
        s = sigma[:, None]
        size = (1 + s**2).sqrt()
        seen = x / size
        return (seen / size + 0.4 * s / size * torch.tanh(seen @ self.weight.to(seen.dtype) + c)).to(x.dtype)


class Linear(torch.nn.Module):
    """A denoiser whose result does not depend on x in its graph."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x.detach() / (1 + sigma[:, None] ** 2)


def gradient_of(found: ki.Inversion, denoiser: Any, x: Tensor, direction: Tensor, **options: Any) -> Tensor:
    """Return the gradient of `<direction, latent>` with respect to the image."""
    image = x.clone().requires_grad_()
    latent = found.differentiable(denoiser, image, **options)
    torch.testing.assert_close(latent.detach(), found.latent)
    return torch.autograd.grad((latent * direction).sum(), image)[0]


@pytest.mark.parametrize(
    "sampler", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in SOLVED]
)
def test_the_gradient_solves_with_the_derivative_of_the_run(sampler: str) -> None:
    """A latent is sampled, so that it is known without an inversion."""
    plan, latent = ki.compile_plan(sampler, SIGMAS), 8 * noise_like((2, DIM), seed=5)
    denoiser = guided_mixture(DIM) if plan.is_guided else mixture(DIM)
    image = ki.run(plan, denoiser, latent)
    found = ki.invert(mixture(DIM), X, SIGMAS, tol=TOL)
    assert found.back is not None
    found = replace(found, latent=latent, back=replace(found.back, sampler=plan.rule, image=image))
    got = gradient_of(found, denoiser, image, DIRECTION)
    jacobian = torch.autograd.functional.jacobian(lambda z: ki.run(plan, denoiser, z).sum(0), latent)
    want = torch.linalg.solve(jacobian.permute(1, 2, 0), DIRECTION)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8 * float(want.abs().max()))


def moved(t: float) -> tuple[Network, dict[str, Any], Tensor]:
    """Return the network, the conditioning and the image, all moved along directions of their own."""
    network = Network()
    with torch.no_grad():
        network.weight += t * noise_like((DIM, DIM), seed=11)
    positive = noise_like((2, DIM), seed=12) + t * noise_like((2, DIM), seed=13)
    negative = noise_like((1, DIM), seed=14) + t * noise_like((1, DIM), seed=15)
    return network, {"positive": {"c": positive}, "negative": {"c": negative}}, X + t * noise_like((2, DIM), seed=16)


EACH_STEP = [1.0, 1.2, 1.5, 1.2, 1.0]
RUNS = ["euler", "heun", "dpmpp_2m", "euler_cfg_pp", "edict", "o_belm", "reversible_heun"]


@pytest.mark.parametrize(
    ("sampler", "cfg", "mask"),
    [*((name, 1.5, MASK) for name in RUNS), ("heun", EACH_STEP, None), ("dpmpp_2m", 1.0, None), ("edict", 1.0, None)],
)
def test_gradients_agree_with_finite_differences(sampler: str, cfg: Any, mask: Tensor | None) -> None:
    def latent(t: float) -> Tensor:
        network, conditioning, x = moved(t)
        found = ki.invert(network, x, SIGMAS, sampler=sampler, cfg=cfg, mask=mask, tol=1e-13, **conditioning)
        assert (found.round_trip_error < 1e-11).all()
        return found.latent

    step = 1e-4
    want = float(((latent(step) - latent(-step)) * DIRECTION).sum()) / (2 * step)

    network, conditioning, x = moved(0.0)
    inputs = [network.weight, conditioning["positive"]["c"], conditioning["negative"]["c"], x]
    for value in inputs[1:]:
        value.requires_grad_()
    found = ki.invert(network, x.detach(), SIGMAS, sampler=sampler, cfg=cfg, mask=mask, tol=TOL, **conditioning)
    result = found.differentiable(network, x, **conditioning)
    grads = torch.autograd.grad((result * DIRECTION).sum(), inputs, allow_unused=True)
    ways = [noise_like((DIM, DIM), 11), noise_like((2, DIM), 13), noise_like((1, DIM), 15), noise_like((2, DIM), 16)]
    got = sum(float((g * way).sum()) for g, way in zip(grads, ways, strict=True) if g is not None)
    assert got == pytest.approx(want, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "deis"])
def test_gradients_for_gaussian_data_are_those_of_the_closed_form(sampler: str) -> None:
    """A run is `x - m = a(s) (z - m)` for values N(m, s^2), so that `z = m + (x - m) / a(s)`."""
    plan = ki.compile_plan(sampler, SIGMAS)
    mean, std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 0.7))

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return mean + std**2 / (std**2 + sigma[:, None] ** 2) * (x - mean)

    image = X.clone().requires_grad_()
    latent = ki.invert(denoiser, X, SIGMAS, sampler=sampler, tol=TOL).differentiable(denoiser, image)
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    low, high = ki.run(plan, denoiser, ends)
    exact = mean + (image - mean) / (high - low)
    torch.testing.assert_close(latent, exact, rtol=1e-9, atol=1e-9)
    got, want = (torch.autograd.grad((z * DIRECTION).sum(), (image, mean, std)) for z in (latent, exact))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_the_kept_region_has_the_gradient_of_the_image() -> None:
    """Outside the mask the latent is the image, whatever the network."""
    found = ki.invert(Network(), X, SIGMAS, sampler="heun", mask=MASK, tol=TOL)
    got = gradient_of(found, Network(), X, (1 - MASK).double().expand_as(X))
    torch.testing.assert_close(got[:, 2], torch.ones(2, dtype=torch.float64))


def test_flow_time() -> None:
    network = Network()

    def flow(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t)

    flow.coordinates = "flow"  # type: ignore[attr-defined]
    times = torch.tensor([0.95, 0.7, 0.4, 0.1])
    found = ki.invert(flow, X, times, sampler="heun", tol=TOL, mask=MASK)
    step = 1e-4 * noise_like((2, DIM), seed=3)
    ends = [ki.invert(flow, X + s * step, times, sampler="heun", tol=1e-13, mask=MASK).latent for s in (1, -1)]
    got = (gradient_of(found, flow, X, DIRECTION) * step).sum()
    torch.testing.assert_close(2 * got, ((ends[0] - ends[1]) * DIRECTION).sum(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_other_dtypes_have_the_gradient_of_float64_to_their_precision(sampler: str, dtype: torch.dtype) -> None:
    network, x = Network(), X.to(dtype)
    want = gradient_of(ki.invert(network, x.double(), SIGMAS, sampler=sampler), network, x.double(), DIRECTION)
    got = gradient_of(ki.invert(network, x, SIGMAS, sampler=sampler), network, x, DIRECTION.to(dtype))
    assert got.dtype == dtype
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


def test_the_gradient_does_not_depend_on_how_the_latent_was_found(tmp_path: Path) -> None:
    network = Network()
    found = [ki.invert(network, X, SIGMAS, method=method, tol=TOL) for method in ("auto", "newton", "continuation")]
    found[0].save(tmp_path / "found.safetensors")
    loaded = ki.load(tmp_path / "found.safetensors")
    grads = [gradient_of(f, network, X, DIRECTION) for f in (*found, loaded)]
    for got in grads[1:]:
        torch.testing.assert_close(got, grads[0], rtol=1e-8, atol=1e-8)


def test_the_image_of_the_inversion_is_taken_if_none_is_given() -> None:
    network = Network()
    latent = ki.invert(network, X, SIGMAS, tol=TOL).differentiable(network)
    assert torch.autograd.grad(latent.sum(), network.weight)[0].abs().max() > 0


def test_a_denoiser_may_be_checkpointed() -> None:
    network = Network()
    found = ki.invert(network, X, SIGMAS, sampler="heun", tol=TOL)

    def frugal(x: Tensor, sigma: Tensor) -> Tensor:
        result: Tensor = checkpoint(network, x, sigma, use_reentrant=False)
        return result

    torch.testing.assert_close(gradient_of(found, frugal, X, DIRECTION), gradient_of(found, network, X, DIRECTION))


def test_a_latent_can_be_trained() -> None:
    """A few steps of descent bring the latent of an image to another one, through the image."""
    network, target = Network(), ki.invert(Network(), X + 0.1, SIGMAS, sampler="heun").latent
    x = X.clone().requires_grad_()
    losses = []
    for _ in range(4):
        found = ki.invert(network, x.detach(), SIGMAS, sampler="heun")
        residual = found.differentiable(network, x) - target
        losses.append(float(residual.detach().square().sum()))
        step = torch.autograd.grad(residual.square().sum(), x)[0]
        with torch.no_grad():
            x -= losses[-1] * step / step.square().sum() / 2
    assert losses[-1] < 0.3 * losses[0]


def test_invert_says_where_its_gradient_is() -> None:
    with pytest.warns(UserWarning, match=r"invert keeps no graph: for gradients use found\.differentiable"):
        ki.invert(Network(), X.clone().requires_grad_(), SIGMAS)


def test_the_backward_pass_can_be_made_twice_but_not_differentiated() -> None:
    network, x = Network(), X.clone().requires_grad_()
    latent = ki.invert(network, X, SIGMAS, tol=TOL).differentiable(network, x)
    first, second = (torch.autograd.grad(latent.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(latent.sum(), x, create_graph=True)


def cubic(x: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser whose Euler step from 2 to 1 is `x^3`, which is flat at 0."""
    return 2 * x**3 - x


def test_a_latent_at_a_fold_has_no_gradient() -> None:
    x = torch.zeros(1, 1, dtype=torch.float64)
    found = ki.invert(cubic, x, [2.0, 1.0], tol=TOL)
    assert found.converged.all()
    latent = found.differentiable(cubic, x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"gradient of sample 0 were solved to .*nearly singular"):
        latent.sum().backward()


def test_a_gradient_that_is_not_finite_is_an_error() -> None:
    network, x = Network(), X.clone().requires_grad_()
    latent = ki.invert(network, X, SIGMAS, tol=TOL).differentiable(network, x)
    with pytest.raises(RuntimeError, match="not finite"):
        latent.backward(torch.full_like(latent, torch.nan))


def test_samples_that_are_no_solution_have_no_gradient() -> None:
    network = Network()
    found = ki.invert(network, X, SIGMAS, tol=TOL)
    error = torch.stack([found.round_trip_error[0], 1 + found.round_trip_error[1]])
    lost = replace(found, converged=torch.tensor([True, False]), round_trip_error=error)
    with pytest.raises(ValueError, match="an equation that sample 1 does not solve.*1 of 2 samples"):
        lost.differentiable(network, X)
    with pytest.raises(ValueError, match="not checked.*check=False"):
        ki.invert(network, X, SIGMAS, check=False).differentiable(network, X)


@pytest.mark.parametrize("sampler", ["heun", "o_belm"])
def test_another_image_network_or_conditioning_is_refused(sampler: str) -> None:
    network, other = Network(), Network()
    with torch.no_grad():
        other.weight += 0.1
    found = ki.invert(network, X, SIGMAS, sampler=sampler, tol=1e-9)
    for wrong, x, options in ((network, X + 0.01, {}), (other, X, {}), (network, X, {"positive": {"c": 0.1}})):
        with pytest.raises(ValueError, match="not the one of this image and this denoiser"):
            found.differentiable(wrong, x, **options)


def test_what_has_no_gradient_is_refused() -> None:
    network = Network()
    noisy = ki.extract_noise(network, X, SIGMAS, sampler="euler_ancestral")
    with pytest.raises(ValueError, match="belongs to its noises.*deterministic sampler"):
        noisy.differentiable(network, X)
    with pytest.raises(ValueError, match="one of many.*stop above 0"):
        pieces(ki.compile_plan("euler", [2.0, 1.0, 0.0]))
    null = ki.inversion.baselines.null_text(network, X, SIGMAS, cfg=2.0, positive={"c": 0.1}, negative={"c": X * 0})
    with pytest.raises(ValueError, match="embeddings or steering"):
        null.differentiable(network, X)
    found = ki.invert(network, X, SIGMAS)
    with pytest.raises(ValueError, match="does not know its sampler"):
        replace(found, back=None).differentiable(network, X)
    for wrong in (X[:1], X.float(), "x"):
        with pytest.raises(ValueError, match="x must be the image"):
            found.differentiable(network, wrong)  # type: ignore[arg-type]


def test_a_denoiser_without_a_graph_is_refused() -> None:
    found = ki.invert(Linear(), X, SIGMAS)
    with pytest.raises(ValueError, match="no graph that leads to x"):
        found.differentiable(Linear(), X)
    shift = torch.nn.Parameter(torch.zeros(DIM, dtype=torch.float64))
    latent = found.differentiable(lambda x, sigma: Linear()(x, sigma) + shift, X.clone().requires_grad_())
    with pytest.raises(ValueError, match="does not depend on x in its graph"):
        latent.sum().backward()
