r"""Scalar mathematics shared by the rules, in float64.

Notation: `lambda = -log sigma`, `h = lambda(sigma_next) - lambda(sigma) = log(sigma / sigma_next)`, positive when
denoising. `l_j` is the `j`-th Lagrange polynomial on given nodes: 1 at node `j`, 0 at the others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np


def log_step(sigma: float, sigma_next: float) -> float:
    """The step `h = log(sigma / sigma_next)` in `lambda = -log sigma`."""
    return math.log(sigma / sigma_next)


def ancestral_split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    r"""Split a step into a deterministic move to `down` and fresh noise `up`, with `down^2 + up^2 = sigma_next^2`.

    `up = min(sigma_next, eta * sqrt(sigma_next^2 (sigma^2 - sigma_next^2) / sigma^2))`. At `eta = 1` the step has the
    marginals of the DDPM posterior (Ho et al. 2020, arXiv 2006.11239).

    A rising step has a negative variance under the root. The public implementations take `min(sigma_next, nan)` as
    `sigma_next` there, so `(0, sigma_next)` is returned: the step forgets x. Verbs that must not forget refuse it.
    """
    if not eta:
        return sigma_next, 0.0
    if sigma_next > sigma:
        return 0.0, sigma_next
    up = min(sigma_next, eta * math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
    return math.sqrt(sigma_next**2 - up**2), up


def flow_ancestral_split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float, float]:
    r"""The ancestral split of a rectified flow, `x = (1 - sigma) x0 + sigma eps` with sigma in [0, 1].

    After a deterministic move to `down = sigma_next (1 + (sigma_next / sigma - 1) eta)`, the state is rescaled to the
    signal level of `sigma_next` and noise fills up its variance: `x' = scale * x + up * n` with
    `scale = (1 - sigma_next) / (1 - down)`, `up = sqrt(sigma_next^2 - (down * scale)^2)`. Returns (down, scale, up).

    Raises:
        ValueError: on a rising step with `eta > 0`, where the variance is negative.
    """
    if not eta:
        return sigma_next, 1.0, 0.0
    down = sigma_next * (1.0 + (sigma_next / sigma - 1.0) * eta)
    scale = (1.0 - sigma_next) / (1.0 - down)
    variance = sigma_next**2 - (down * scale) ** 2
    if variance < 0:
        raise ValueError(f"the noise of a rising step has negative variance ({variance:.3g}) for eta={eta:g}; use eta=0")
    return down, scale, math.sqrt(variance)


def sde_noise_scale(h: float, eta: float) -> float:
    r"""The factor `sqrt(1 - exp(-2 eta h))` of `sigma_next * noise` in one exact step of the reverse SDE.

    Raises:
        ValueError: on a rising step (`h < 0`) with `eta > 0`, where the variance is negative.
    """
    variance = -math.expm1(-2.0 * eta * h)
    if variance < 0:
        raise ValueError(
            f"the noise of a rising step has negative variance ({variance:.3g}) for eta={eta:g}; use eta=0"
        )
    return math.sqrt(variance)


def phi1(z: float) -> float:
    """`phi_1(z) = (e^z - 1) / z`, 1 at 0."""
    return math.expm1(z) / z if z else 1.0


@functools.lru_cache(maxsize=32)
def _gauss_legendre(n: int) -> tuple[tuple[float, float], ...]:
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return tuple((float(u), float(w)) for u, w in zip(nodes, weights, strict=True))


def lagrange(nodes: Sequence[float], j: int, t: float) -> float:
    """The value at `t` of the Lagrange polynomial that is 1 at `nodes[j]` and 0 at the other nodes."""
    value = 1.0
    for k, node in enumerate(nodes):
        if k != j:
            value *= (t - node) / (nodes[j] - node)
    return value


def adams(nodes: Sequence[float], a: float, b: float) -> list[float]:
    r"""Adams weights on a non-uniform grid: `c_j = int_a^b l_j(t) dt` for every node, exact up to rounding.

    The integrand is a polynomial of degree `len(nodes) - 1`, for which Gauss-Legendre quadrature with
    `(len(nodes) + 1) // 2` points is exact.
    """
    rule = _gauss_legendre((len(nodes) + 1) // 2)
    centre, half = (a + b) / 2, (b - a) / 2
    return [half * sum(w * lagrange(nodes, j, centre + half * u) for u, w in rule) for j in range(len(nodes))]
