"""The embedded denoisers: how they may be called, and that they were really trained."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kinvert import models
from kinvert.models import EmbeddedDenoiser, held_out, load

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "emoji": (3, 32, 32)}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=models.NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> EmbeddedDenoiser:
    return load(name)


@pytest.fixture(scope="module")
def exact(name: str) -> EmbeddedDenoiser:
    return load(name, dtype=torch.float64)


def noisy(
    name: str, sigma: float, dtype: torch.dtype = torch.float32, count: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Held-out `x0`, `x0 + sigma eps`, `sigma` and labels; all images, or `count` evenly chosen."""
    x0, label = held_out(name)
    if count is not None:
        x0, label = (t[:: len(t) // count][:count] for t in (x0, label))
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    return x0.to(dtype), (x0 + sigma * eps).to(dtype), torch.full((len(x0),), sigma, dtype=dtype), label


def test_attributes(name: str, model: EmbeddedDenoiser) -> None:
    assert model.name == name and model.shape == SHAPES[name]
    assert model.num_classes == model.null_label == {"digits": 10, "mnist": 10, "emoji": 6}[name]
    assert (model.sigma_min, model.sigma_max) == (0.002, 80.0)
    rms = held_out(name)[0].square().mean().sqrt().item()
    assert model.sigma_data == pytest.approx(rms, rel=0.05)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_output_has_the_shape_and_dtype_of_x(name: str, dtype: torch.dtype) -> None:
    _, x, sigma, label = noisy(name, 1.0, dtype, count=5)
    for batch in (1, 3):
        out = load(name, dtype=dtype)(x[:batch], sigma[:batch], label[:batch])
        assert out.shape == x[:batch].shape and out.dtype == dtype and out.isfinite().all()


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_float64_is_float64_all_through(
    name: str, sigma: float, model: EmbeddedDenoiser, exact: EmbeddedDenoiser
) -> None:
    _, x, s, label = noisy(name, sigma, torch.float64, count=5)
    out, rounded = exact(x, s, label), model(x.float(), s, label)
    assert (out - rounded).norm() <= 1e-4 * out.norm()
    # A change of x at the 13th digit shows up in the output: nothing was rounded to float32 on the way.
    nudge = 1e-13 * max(sigma, 1.0)
    assert 0 < (exact(x + nudge, s, label) - out).abs().max() < 1e3 * nudge


def test_null_label_is_no_label(name: str, exact: EmbeddedDenoiser) -> None:
    _, x, sigma, label = noisy(name, 2.0, torch.float64, count=5)
    null = torch.full_like(label, exact.null_label)
    assert torch.equal(exact(x, sigma), exact(x, sigma, null))
    both = exact(torch.cat((x, x)), torch.cat((sigma, sigma)), label=torch.cat((label, null)))
    torch.testing.assert_close(both, torch.cat((exact(x, sigma, label), exact(x, sigma))), rtol=0, atol=1e-12)


def test_items_of_a_batch_do_not_see_each_other(name: str, exact: EmbeddedDenoiser) -> None:
    _, x, _, label = noisy(name, 1.0, torch.float64, count=5)
    sigma = torch.tensor([0.01, 0.3, 1.0, 7.0, 60.0], dtype=torch.float64)
    together = exact(x, sigma, label)
    alone = torch.cat([exact(x[i : i + 1], sigma[i : i + 1], label[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


# Mean squared error over the held-out images, with the label, at each sigma. For scale: x itself is off by sigma**2,
# the mean image by 0.276 (digits), 0.265 (mnist) and 0.247 (emoji). The bounds are about a tenth above what the weights reach.
BOUNDS = {
    "digits": {0.1: 0.0044, 0.5: 0.038, 1.0: 0.089, 2.0: 0.154},
    "mnist": {0.1: 0.00127, 0.5: 0.0137, 1.0: 0.0353, 2.0: 0.0887},
    "emoji": {0.1: 0.0021, 0.5: 0.0172, 1.0: 0.0376, 2.0: 0.0718},
}


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_denoises_images_it_never_saw(name: str, sigma: float, model: EmbeddedDenoiser) -> None:
    x0, x, s, label = noisy(name, sigma)
    assert (model(x, s, label) - x0).square().mean() < BOUNDS[name][sigma]


@pytest.mark.parametrize("sigma", [5.0, 20.0, 80.0])
def test_the_label_helps(name: str, sigma: float, model: EmbeddedDenoiser) -> None:
    x0, x, s, label = noisy(name, sigma)
    errors = [(model(x, s, y) - x0).square().mean() for y in (label, None, (label + 1) % model.num_classes)]
    assert errors[0] < {"digits": 0.9, "mnist": 0.9, "emoji": 0.96}[name] * errors[1] and errors[1] < errors[2]


def test_at_sigma_max_only_the_mean_is_left(name: str, model: EmbeddedDenoiser) -> None:
    x0, x, s, label = noisy(name, model.sigma_max)
    mean = x0.mean(dim=0, keepdim=True)
    class_means = torch.stack([x0[label == c].mean(dim=0) for c in range(model.num_classes)])[label]
    # The means of 40 and of 4 images are themselves off by 1/40 and 1/4 of the variance around them. The 72 of emoji
    # show twelve things, which is off by 1/12, in each class too.
    assert (model(x, s) - mean).square().mean() < (0.15 if name == "emoji" else 0.1) * (x0 - mean).square().mean()
    assert (model(x, s, label) - class_means).square().mean() < 0.6 * (x0 - class_means).square().mean()


def test_at_sigma_zero_nothing_changes(name: str, exact: EmbeddedDenoiser) -> None:
    x0, _, _, label = noisy(name, 1.0, torch.float64, count=5)
    torch.testing.assert_close(exact(x0, x0.new_zeros(len(x0)), label), x0, rtol=1e-15, atol=0)
    barely = x0.new_full((len(x0),), exact.sigma_min)
    assert (exact(x0, barely, label) - x0).square().mean().sqrt() < exact.sigma_min


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, at the first jvp
def test_jvp_and_vmap(name: str, exact: EmbeddedDenoiser) -> None:
    _, x, sigma, label = noisy(name, 0.7, torch.float64, count=2)
    v = torch.randn(2, *x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))

    def denoise(x: Tensor) -> Tensor:
        return exact(x, sigma, label)

    products = torch.func.vmap(lambda v: torch.func.jvp(denoise, (x,), (v,))[1])(v)
    h = 1e-5
    for product, direction in zip(products, v, strict=True):
        difference = (denoise(x + h * direction) - denoise(x - h * direction)) / (2 * h)
        torch.testing.assert_close(product, difference, rtol=1e-6, atol=1e-7)
    # For an exact denoiser D' is a covariance, hence symmetric; the adjoint product must at least be defined.
    adjoint = torch.func.vjp(denoise, x)[1]
    torch.testing.assert_close((adjoint(v[0])[0] * v[1]).sum(), (v[0] * products[1]).sum(), rtol=1e-10, atol=1e-10)


def test_bad_calls_name_the_argument(name: str, model: EmbeddedDenoiser) -> None:
    _, x, sigma, label = noisy(name, 1.0)
    bad: list[tuple[str, tuple[Tensor, Tensor, Tensor | None]]] = [
        ("x must have shape", (x[:, :, 1:], sigma, label)),
        ("x is torch.float64", (x.double(), sigma, label)),
        ("sigma must have shape", (x, sigma[:1], label)),
        ("label must be int64", (x, sigma, label.float())),
        ("label must be int64", (x, sigma, label[:1])),
        ("label must lie in", (x, sigma, label + 2)),
    ]
    for message, arguments in bad:
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    with pytest.raises(ValueError, match="dtype must be floating point"):
        load(name, dtype=torch.int64)
