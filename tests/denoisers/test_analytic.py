"""The exact denoisers against what defines them: Tweedie's formula, the posterior covariance, the ODE, the limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from kinvert.denoisers import Dataset, Gaussian, GaussianMixture

EVENTS = [(), (3,), (2, 3), (2, 2, 2), (2, 1, 2, 2)]
sigmas = st.floats(0.05, 50.0)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def full(x: Tensor, sigma: float) -> Tensor:
    return torch.full((len(x),), sigma, dtype=torch.float64)


def mixture(event: tuple[int, ...], std: float | Tensor, count: int = 4) -> GaussianMixture:
    weights = torch.arange(1, count + 1, dtype=torch.float64)
    return GaussianMixture(2 * randn(count, *event, seed=7), std, weights)


STDS = [0.5, torch.tensor([0.1, 0.4, 1.0, 2.0], dtype=torch.float64), torch.tensor([0.0, 0.4, 0.0, 2.0])]


def log_density(model: GaussianMixture, x: Tensor, sigma: float) -> Tensor:
    """log p_sigma by torch.distributions, which knows nothing of the denoiser."""
    means = model.means.reshape(len(model.means), -1)
    std = torch.as_tensor(model.std, dtype=torch.float64).expand(len(means))
    scale = (std**2 + sigma**2).sqrt()[:, None].expand_as(means)
    components = Independent(Normal(means, scale), 1)
    assert model.weights is not None
    return MixtureSameFamily(Categorical(model.weights / model.weights.sum()), components).log_prob(
        x.reshape(len(x), -1)
    )


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("sigma", [0.05, 0.7, 5.0, 80.0])
def test_mixture_satisfies_tweedie(event: tuple[int, ...], std: float | Tensor, sigma: float) -> None:
    model = mixture(event, std)
    x = (model.means[:3] + sigma * randn(3, *event)).requires_grad_()
    (score,) = torch.autograd.grad(log_density(model, x, sigma).sum(), x)
    x = x.detach()
    torch.testing.assert_close(model(x, full(x, sigma)), x + sigma**2 * score, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.score(x, full(x, sigma)), score, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("sigma", [0.1, 0.7, 5.0])
def test_jacobian_is_the_posterior_covariance(std: float | Tensor, sigma: float) -> None:
    model = mixture((3,), std)
    x = model.means[:1] + sigma * randn(1, 3)
    level = full(x, sigma)
    jacobian = torch.autograd.functional.jacobian(lambda z: model(z, level), x)[0, :, 0]
    torch.testing.assert_close(jacobian, jacobian.T, rtol=0, atol=1e-10)
    assert float(torch.linalg.eigvalsh(jacobian).min()) > -1e-10

    means, scale = model.means, torch.as_tensor(std, dtype=torch.float64).expand(4)
    assert model.weights is not None
    variance = scale**2 + sigma**2
    logits = model.weights.log() - 1.5 * variance.log() - (x - means).square().sum(1) / (2 * variance)
    share, gain = logits.softmax(0), scale**2 / variance
    posterior = means + gain[:, None] * (x - means)
    offset = posterior - (share[:, None] * posterior).sum(0)
    between = torch.einsum("k,ki,kj->ij", share, offset, offset)
    within = (share * gain * sigma**2).sum() * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(jacobian, (between + within) / sigma**2, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=50)
@given(std=st.floats(0, 3), sigma=sigmas, event=st.sampled_from(EVENTS))
def test_a_mixture_of_one_is_the_gaussian(std: float, sigma: float, event: tuple[int, ...]) -> None:
    mean = randn(*event, seed=3)
    x = mean + sigma * randn(2, *event)
    one, gaussian = GaussianMixture(mean[None], std), Gaussian(mean, std)
    level = full(x, sigma)
    torch.testing.assert_close(one(x, level), gaussian(x, level), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.score(x, level), gaussian.score(x, level), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gaussian.score(x, level), (gaussian(x, level) - x) / sigma**2, rtol=1e-9, atol=1e-9 / sigma**2
    )


def test_every_item_has_its_own_sigma_and_components_their_weights() -> None:
    model = mixture((2, 3), STDS[1])
    x, sigma = 3 * randn(4, 2, 3), torch.tensor([0.1, 1.0, 5.0, 0.5], dtype=torch.float64)
    for denoiser in (model, Gaussian(randn(2, 3), 0.5), Dataset(model.means)):
        alone = torch.cat([denoiser(x[i : i + 1], sigma[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(denoiser(x, sigma), alone, rtol=0, atol=1e-14)
    padded = GaussianMixture(torch.cat([model.means, x[:1]]), 0.5, torch.tensor([1.0, 2, 3, 4, 0]))
    torch.testing.assert_close(padded(x, sigma), mixture((2, 3), 0.5)(x, sigma), rtol=0, atol=1e-14)


@pytest.mark.parametrize("std", [0.5, torch.tensor([0.0, 0.4, 1.3], dtype=torch.float64)])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 10.0])
def test_gaussian_ode_solves_the_probability_flow(std: float | Tensor, sigma: float) -> None:
    model = Gaussian(randn(3, seed=3), std)
    start = model.mean + 2 * randn(5, 3)
    x = model.ode(start, 2.0, sigma)
    slope = (x - model(x, full(x, sigma))) / sigma
    h = 1e-3 * sigma
    steps = {k: model.ode(start, 2.0, sigma + k * h) for k in (-2, -1, 1, 2)}
    difference = (8 * (steps[1] - steps[-1]) - (steps[2] - steps[-2])) / (12 * h)
    torch.testing.assert_close(slope, difference, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(a=sigmas, b=sigmas, c=sigmas, std=st.floats(0, 3))
def test_gaussian_ode_is_a_flow(a: float, b: float, c: float, std: float) -> None:
    model = Gaussian(0.3, std)
    x = 0.3 + a * randn(4, 2)
    torch.testing.assert_close(model.ode(model.ode(x, a, b), b, c), model.ode(x, a, c), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.ode(x, a, a), x, rtol=1e-14, atol=1e-14)


def test_gaussian_ode_reaches_the_data_and_a_dirac_its_mean() -> None:
    x = randn(4, 3)
    torch.testing.assert_close(Gaussian(0.0, 2.0).ode(x, 0.0, 0.0), x, rtol=0, atol=0)
    assert torch.equal(Gaussian(1.5, 0.0).ode(x, 3.0, 0.0), torch.full_like(x, 1.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dataset_at_small_sigma_gives_the_nearest_point(dtype: torch.dtype) -> None:
    points = randn(50, 2, 4, 4, seed=5).to(dtype)
    x = points[[3, 17, 40]] + 0.01 * randn(3, 2, 4, 4).to(dtype)
    for sigma in (0.0, 1e-30, 1e-8, 1e-3, 0.05):
        torch.testing.assert_close(
            Dataset(points)(x, full(x, sigma).to(dtype)), points[[3, 17, 40]], rtol=0, atol=torch.finfo(dtype).eps * 8
        )


def test_a_dataset_at_large_sigma_gives_the_mean() -> None:
    points = randn(50, 6, seed=5)
    x = randn(2, 6)
    torch.testing.assert_close(Dataset(points)(x, full(x, 1e8)), points.mean(0).expand(2, 6), rtol=0, atol=1e-12)


def test_a_dataset_is_the_mixture_without_width() -> None:
    points, x = randn(6, 3, seed=5), randn(4, 3)
    for sigma in (0.2, 1.0, 9.0):
        share = (-(torch.cdist(x, points) ** 2) / (2 * sigma**2)).softmax(1)
        torch.testing.assert_close(Dataset(points)(x, full(x, sigma)), share @ points, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            Dataset(points).score(x, full(x, sigma)), (share @ points - x) / sigma**2, rtol=1e-11, atol=1e-11
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_limits_at_sigma_0(dtype: torch.dtype) -> None:
    x = randn(3, 4).to(dtype)
    zero = torch.zeros(3, dtype=dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(Gaussian(0.4, 1.7)(x, zero), x, rtol=2 * eps, atol=2 * eps)
    assert torch.equal(Gaussian(0.4, 0.0)(x, zero), torch.full_like(x, 0.4))
    partly = Gaussian(0.4, torch.tensor([0.0, 1.0, 0.0, 1.0]))(x, zero)
    assert torch.equal(partly[:, ::2], torch.full_like(x[:, ::2], 0.4))
    torch.testing.assert_close(partly[:, 1::2], x[:, 1::2], rtol=2 * eps, atol=2 * eps)
    torch.testing.assert_close(mixture((4,), 0.5)(x, zero), x, rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(mixture((4,), STDS[2])(x, zero), x, rtol=4 * eps, atol=4 * eps)


@settings(deadline=None, max_examples=80)
@given(
    sigma=st.sampled_from([0.0, 1e-30, 1e-12, 1e-4, 1.0, 1e4, 1e9]),
    std=st.sampled_from([0.0, 1e-30, 1e-12, 1e-3, 1.0, 1e6]),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_never_a_nan(sigma: float, std: float, scale: float, dtype: torch.dtype) -> None:
    x = (scale * randn(2, 3)).to(dtype)
    level = torch.full((2,), sigma, dtype=dtype)
    for denoiser in (Gaussian(0.2, std), GaussianMixture(randn(4, 3), std), Dataset(x), Dataset(randn(4, 3))):
        assert bool(denoiser(x, level).isfinite().all())
        assert not bool(denoiser.score(x, level).isnan().any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    x = (3 * randn(4, 5)).to(dtype)
    sigma = torch.tensor([0.25, 0.5, 2.0, 8.0])
    for denoiser in (Gaussian(0.3, 0.7), mixture((5,), 0.5), Dataset(randn(9, 5, seed=5))):
        exact, half = denoiser(x.double(), sigma), denoiser(x, sigma)
        assert half.dtype == dtype
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5
        assert bool(((half - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_of_any_dtype_follow_x(dtype: torch.dtype) -> None:
    x = randn(2, 3).to(dtype)
    sigma = torch.ones(2, dtype=dtype)
    for parameters in (torch.float16, torch.float32, torch.float64):
        mean = torch.tensor([0.5, 0.25, -1.0], dtype=parameters)
        for denoiser in (Gaussian(mean, 0.5), GaussianMixture(mean[None], 0.5), Dataset(mean[None])):
            assert denoiser(x, sigma).dtype == denoiser.score(x, sigma).dtype == dtype
    assert Gaussian(0.5, 0.5).ode(x, 1.0, 2.0).dtype == dtype


def test_samples_have_the_right_moments_and_repeat() -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    n = 40_000
    mean, std = randn(2, 3, seed=3), torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64)
    gaussian = Gaussian(mean, std)
    draws = gaussian.sample(n, generator())
    assert draws.shape == (n, 2, 3)
    assert torch.equal(draws, gaussian.sample(n, generator()))
    error = std / math.sqrt(n)
    assert bool(((draws.mean(0) - mean).abs() <= 5 * error).all())
    assert bool(((draws.std(0) - std).abs() <= 5 * error).all())

    model = mixture((2,), STDS[1])
    draws = model.sample(n, generator())
    assert draws.shape == (n, 2)
    assert torch.equal(draws, model.sample(n, generator()))
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    centre = weights @ model.means
    torch.testing.assert_close(draws.mean(0), centre, rtol=0, atol=5 * float(draws.std()) / math.sqrt(n))
    assert Gaussian(0.0, 1.0).sample(3).shape == (3,)


def test_the_denoiser_is_the_mean_of_the_posterior() -> None:
    """The denoiser minimises the squared error: its residual does not correlate with any function of x."""
    generator = torch.Generator().manual_seed(0)
    model = mixture((2,), STDS[1])
    x0 = model.sample(40_000, generator)
    x = x0 + 0.8 * torch.randn(x0.shape, dtype=x0.dtype, generator=generator)
    residual = x0 - model(x, full(x, 0.8))
    for test in (torch.ones_like(x), x, x.cos(), model.means[0] - x):
        product = (residual * test).sum(1)
        assert abs(float(product.mean())) <= 5 * float(product.std()) / math.sqrt(len(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at its first forward-mode call
def test_gradients_are_right() -> None:
    x = randn(2, 3).requires_grad_()
    sigma = torch.tensor([0.5, 1.5], dtype=torch.float64)
    for denoiser in (Gaussian(0.3, 0.7), mixture((3,), STDS[1]), Dataset(randn(5, 3, seed=5))):
        assert torch.autograd.gradcheck(lambda z, f=denoiser: f(z, sigma), x)
        tangent = randn(2, 3, seed=9)
        _, forward = torch.func.jvp(lambda z, f=denoiser: f(z, sigma), (x.detach(),), (tangent,))
        _, backward = torch.autograd.functional.jvp(lambda z, f=denoiser: f(z, sigma), x.detach(), tangent)
        torch.testing.assert_close(forward, backward, rtol=1e-12, atol=1e-12)


def test_inputs_are_not_modified() -> None:
    x, means, sigma = randn(2, 3), randn(4, 3, seed=1), torch.ones(2, dtype=torch.float64)
    before = x.clone(), means.clone(), sigma.clone()
    for denoiser in (Gaussian(means[0], 0.5), GaussianMixture(means, 0.5), Dataset(means)):
        denoiser(x, sigma)
        denoiser.score(x, sigma)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, means, sigma), strict=True))


NAN = float("nan")
POINTS = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Gaussian(0.0, -1.0), ValueError, r"std must be finite and >= 0, got -1.0"),
        (lambda: Gaussian(NAN, 1.0), ValueError, r"mean must be finite, got nan"),
        (lambda: Gaussian(0.0, math.inf), ValueError, r"std must be finite and >= 0, got inf"),
        (lambda: Gaussian(torch.tensor([0.0, NAN, 1.0]), 1.0), ValueError, r"mean .*got 1 of 3 values that are not"),
        (lambda: Gaussian(torch.tensor([1, 2]), 1.0), TypeError, r"mean must be .*got torch.int64; use .float\(\)"),
        (lambda: Gaussian(torch.zeros(0), 1.0), ValueError, r"mean is empty, of shape \(0,\)"),
        (lambda: GaussianMixture(torch.tensor(1.0), 1.0), ValueError, r"means must have shape \(K, \*event\)"),
        (lambda: GaussianMixture(POINTS, torch.ones(2)), ValueError, r"std must have shape \(3,\), one per mean, got"),
        (lambda: GaussianMixture(POINTS, 1.0, torch.ones(2)), ValueError, r"weights must have .*\(3,\), .*got \(2,"),
        (lambda: GaussianMixture(POINTS, 1.0, torch.tensor(1.0)), ValueError, r"weights must have .*got \(\)"),
        (lambda: GaussianMixture(POINTS, 1.0, -torch.ones(3)), ValueError, r"weights must be finite .*got 3 of 3"),
        (lambda: GaussianMixture(POINTS, 1.0, torch.zeros(3)), ValueError, r"weights sum to 0"),
        (lambda: GaussianMixture(POINTS, -1.0), ValueError, r"std must be finite and >= 0"),
        (lambda: Dataset(torch.zeros(0, 2)), ValueError, r"means is empty"),
        (lambda: Gaussian(0.0, 0.0).ode(POINTS, 0.0, 1.0), ValueError, r"sigma_from must be > 0 if std is 0"),
        (lambda: Gaussian(0.0, 1.0).ode(POINTS, -1.0, 1.0), ValueError, r"sigma_from must be finite and >= 0, got -1"),
        (lambda: Gaussian(0.0, 1.0).ode(POINTS, 1.0, NAN), ValueError, r"sigma_to must be finite and >= 0, got nan"),
    ],
)  # fmt: skip
def test_wrong_parameters_are_refused_with_the_fix(build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_wrong_shapes_are_refused_with_the_fix() -> None:
    sigma = torch.ones(2)
    with pytest.raises(ValueError, match=r"mean has shape \(2,\), which does not broadcast to x's event shape \(1,\)"):
        Gaussian(torch.zeros(2), 1.0)(torch.zeros(2, 1), sigma)
    with pytest.raises(ValueError, match=r"std has shape \(2, 3\), which does not broadcast to x's event shape \(3,\)"):
        Gaussian(0.0, torch.ones(2, 3))(torch.zeros(2, 3), sigma)
    for denoiser in (GaussianMixture(POINTS, 1.0), Dataset(POINTS)):
        with pytest.raises(ValueError, match=r"x must have the event shape of the means, \(2,\), got shape \(2, 3\)"):
            denoiser(torch.zeros(2, 3), sigma)
    with pytest.raises(ValueError, match=r"sigma must have shape \(2,\), got \(3,\)"):
        GaussianMixture(POINTS, 1.0)(torch.zeros(2, 2), torch.ones(3))


def test_parameters_of_another_dtype_follow_changes_and_gradients() -> None:
    """They are cast once and kept; not so that autograd, or a change in place, would miss it."""
    x, sigma = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.ones(4)
    means = torch.nn.Parameter(torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    for make in (lambda m: GaussianMixture(m, 0.4), lambda m: Gaussian(m[0], 0.4)):
        with torch.inference_mode():
            frozen = make(means.detach().clone())
            frozen(x, sigma)
        y = x.clone().requires_grad_()
        frozen(y, sigma).sum().backward()
        assert y.grad is not None
        moved = means.detach().clone()
        mixture = make(moved)
        before = mixture(x, sigma)
        moved.add_(5.0)
        assert not torch.equal(before, mixture(x, sigma))
    learned = GaussianMixture(means, 0.4)
    with torch.no_grad():
        learned(x, sigma)
    learned(x, sigma).sum().backward()
    assert means.grad is not None
