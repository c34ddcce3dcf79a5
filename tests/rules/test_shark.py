"""ShARK and Rex for SDEs: the published steps, and their weak and strong orders on Gaussian data."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from problems import mixture, noise_like, order_slope
from torch import Tensor

import kinvert as ki
from kinvert.rules import LawsonRungeKutta, McCallumFoster, ShARK, Tableau

MIXTURE = mixture()
SIGMAS = (4.0, 2.5, 1.0)
STD = 0.5


def denoised(y: Tensor, rho: float) -> Tensor:
    """D of the mixture in the coordinates of the SDE at eta = 1: `y = x / sigma^2`, `rho = 1 / sigma^2`."""
    return MIXTURE(y / rho, torch.full((len(y),), rho**-0.5, dtype=y.dtype))


def published_shark(y: Tensor, rho: float, h: float, W: Tensor, H: Tensor) -> Tensor:
    """Foster, dos Reis and Strange, equation 6.1, for `dy = D drho + dW`."""
    first = denoised(y + H, rho)
    second = denoised(y + 5 / 6 * (h * first + W) + H, rho + 5 / 6 * h)
    return y + h * (0.4 * first + 0.6 * second) + W


def increments(h: float, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """W and H of a step, of the two noises that it draws."""
    return math.sqrt(h / 2) * (before + after), math.sqrt(h / 24) * (before - after)


def test_shark_is_as_published() -> None:
    x, noises = noise_like((3, 6)), [noise_like((3, 6), seed) for seed in range(4)]
    got = ki.run(ki.compile_plan("shark", SIGMAS), MIXTURE, x, ki.noise.replay(noises))
    y, rho = x / SIGMAS[0] ** 2, SIGMAS[0] ** -2
    for i, sigma_next in enumerate(SIGMAS[1:]):
        h = sigma_next**-2 - rho
        y = published_shark(y, rho, h, *increments(h, *noises[2 * i : 2 * i + 2]))
        rho = sigma_next**-2
    torch.testing.assert_close(got, y / rho, rtol=1e-12, atol=1e-12)


def test_rex_for_sdes_is_as_published() -> None:
    """The coupling of McCallum and Foster around the step, with W and H down, and -W and H up."""
    x, noises, lam = noise_like((3, 6)), [noise_like((3, 6), seed) for seed in range(4)], 0.999
    got = ki.run(ki.compile_plan("rex_sde", SIGMAS), MIXTURE, x, ki.noise.replay(noises))
    rho = SIGMAS[0] ** -2
    y = z = x * rho
    for i, sigma_next in enumerate(SIGMAS[1:]):
        h, after = sigma_next**-2 - rho, sigma_next**-2
        W, H = increments(h, *noises[2 * i : 2 * i + 2])
        y = lam * y + (1 - lam) * z + published_shark(z, rho, h, W, H) - z
        z = z - (published_shark(y, after, -h, -W, H) - y)
        rho = after
    torch.testing.assert_close(got, y / rho, rtol=1e-12, atol=1e-12)


def test_without_noise_shark_is_a_lawson_method() -> None:
    lawson = LawsonRungeKutta(Tableau.parse("shark", 2, "5/6", "2/5 3/5"))
    x = 4 * noise_like((3, 6))
    one, other = (ki.run(ki.compile_plan(rule, SIGMAS), MIXTURE, x) for rule in (ShARK(eta=0.0), lawson))
    torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
    rex = ki.compile_plan(ki.sampler("rex_sde").quiet(), SIGMAS)
    same = ki.compile_plan(McCallumFoster(lawson, coupling="data"), SIGMAS)
    torch.testing.assert_close(ki.run(rex, MIXTURE, x), ki.run(same, MIXTURE, x), rtol=1e-13, atol=1e-13)


def test_a_rising_step_with_noise_is_refused() -> None:
    for name in ("shark", "rex_sde"):
        with pytest.raises(ValueError, match=f"{name} cannot step from sigma 1 to 4.*negative variance"):
            ki.compile_plan(name, (1.0, 4.0))
        assert not ki.compile_plan(ki.sampler(name).quiet(), (1.0, 4.0)).is_stochastic


@pytest.mark.parametrize("eta", [0.3, 1.0, 1.5])
@pytest.mark.parametrize("reversible", [False, True])
def test_weak_order_2_at_every_eta(eta: float, reversible: bool) -> None:
    rule: ki.Rule = McCallumFoster(ShARK(eta=eta), coupling="data") if reversible else ShARK(eta=eta)
    for covariance in ("white", "brownian"):
        assert ki.analysis.weak_order(rule, steps=(60, 120), covariance=covariance) == pytest.approx(2.0, abs=0.15)


# -- strong order ------------------------------------------------------------------------------------------------------
FINE = 512
RHO = torch.linspace(0.25, 4.0, FINE + 1, dtype=torch.float64)  # sigma from 2 to 1/2


class Path:
    """A Brownian motion in rho on a fine grid, with the exact integrals of its pieces, for many runs at once."""

    def __init__(self, runs: int) -> None:
        self.h = float(RHO[1] - RHO[0])
        generator = torch.Generator().manual_seed(1)
        normal = torch.randn(2, FINE, runs, generator=generator, dtype=torch.float64)
        self.W = math.sqrt(self.h) * normal[0]
        self.H = math.sqrt(self.h / 12) * normal[1]

    def piece(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """W, and H = the mean of the path above its straight line, of a step over some fine ones."""
        W, H = self.W[first:last], self.H[first:last]
        mean = (W.cumsum(0) - W / 2 + H).mean(0)  # of the path from the start of the step
        total = W.sum(0)
        return total, mean - total / 2

    def noise(self, stride: int, true_area: bool) -> Callable[[float, float], Tensor]:
        """A source for steps of `stride` fine ones. The halves of a step give its W and H, or the path at its middle."""
        calls = iter(range(2 * FINE // stride))

        def draw(sigma_from: float, sigma_to: float) -> Tensor:
            step, half = divmod(next(calls), 2)
            first, h = step * stride, stride * self.h
            if true_area:
                W, H = self.piece(first, first + stride)
                H = math.sqrt(12) * H
                return (((W + H) if half == 0 else (W - H)) / math.sqrt(2 * h))[:, None]
            start = first + half * stride // 2
            return (self.W[start : start + stride // 2].sum(0) / math.sqrt(h / 2))[:, None]

        return draw


@pytest.mark.parametrize(("name", "true_area"), [("shark", True), ("rex_sde", True), ("shark", False)])
def test_strong_order(name: str, true_area: bool) -> None:
    """Against the same method on the finest grid: along one path, with its area 3/2, with the area by halves 1."""
    runs, path = 200, Path(200)
    start = 2.0 * noise_like((runs, 1))
    denoiser = ki.denoisers.GaussianMixture(torch.tensor([[-1.0], [0.5]]).double(), STD)

    def end(stride: int) -> Tensor:
        sigmas = (RHO[::stride] ** -0.5).tolist()
        return ki.run(ki.compile_plan(name, sigmas), denoiser, start, path.noise(stride, true_area))

    fine, strides = end(2), [32, 16, 8]
    errors = [float((end(stride) - fine).square().mean().sqrt()) for stride in strides]
    slope = order_slope(errors, [FINE // stride for stride in strides])
    assert slope > 1.35 if true_area else slope == pytest.approx(1.0, abs=0.2)
