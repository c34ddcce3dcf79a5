r"""Scalar mathematics that the rules share, in float64.

Notation: `lambda = -log sigma`, `h = lambda(sigma_next) - lambda(sigma) = log(sigma / sigma_next)`, positive when
denoising. `l_j` is the `j`-th Lagrange polynomial on given nodes: 1 at node `j`, 0 at the others.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = [
    "ROUNDING",
    "UNIFORM_ADAMS",
    "adams",
    "ancestral_split",
    "deis_time",
    "deis_weights",
    "exponential_adams",
    "flow_ancestral_split",
    "ipndm_v_weights",
    "lagrange",
    "left_sums",
    "log_step",
    "phi",
    "phi1",
    "sde_noise_scale",
]


def log_step(sigma: float, sigma_next: float) -> float:
    """Return the step `h = log(sigma / sigma_next)` in `lambda = -log sigma`."""
    return math.log(sigma / sigma_next)


def ancestral_split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    r"""Split a step into a deterministic move to `down` and fresh noise `up`, with `down^2 + up^2 = sigma_next^2`.

    `up = min(sigma_next, eta * sqrt(sigma_next^2 (sigma^2 - sigma_next^2) / sigma^2))`. At `eta = 1` the step has the
    marginals of the DDPM posterior. Both variances are computed as products, with `q = sigma_next / sigma`:
    `up = sigma_next eta sqrt((1 - q)(1 + q))`, `down = sigma_next sqrt((1 - eta)(1 + eta) + (eta q)^2)`. So neither
    loses digits by cancellation.

    On a rising step the variance under the root is negative, and on a step from infinity it is not defined. The public
    implementations take `min(sigma_next, nan)` as `sigma_next`, so the result is `(0, sigma_next)`: the step forgets x.
    Verbs whose result must depend on x refuse it.

    Source: Ho et al., Denoising Diffusion Probabilistic Models (2020), arXiv 2006.11239.

    Returns:
        `(down, up)`.
    """
    if not eta:
        return sigma_next, 0.0
    if sigma_next > sigma or math.isinf(sigma):
        return 0.0, sigma_next
    q = sigma_next / sigma
    up = abs(eta) * math.sqrt((1.0 - q) * (1.0 + q))
    down = (1.0 - eta) * (1.0 + eta) + (eta * q) ** 2
    return (sigma_next * math.sqrt(min(down, 1.0)), sigma_next * up) if down > 0 else (0.0, sigma_next)


def flow_ancestral_split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float, float]:
    r"""Split a step of a rectified flow, `x = (1 - sigma) x0 + sigma eps` with sigma in [0, 1], like `ancestral_split`.

    After a deterministic move to `down = sigma_next (1 + (sigma_next / sigma - 1) eta)`, the state is rescaled to the
    signal level of `sigma_next`, and noise makes up the rest of the variance: `x' = scale * x + up * n` with
    `scale = (1 - sigma_next) / (1 - down)`, `up = sqrt(sigma_next^2 - (down * scale)^2)`. The variance is computed as a
    product: `down scale = sigma_next r` with `1 - r = eta (1 - sigma_next / sigma) / (1 - down)`.

    Returns:
        `(down, scale, up)`.

    Raises:
        ValueError: a rising step with `eta > 0`, whose variance is negative.
    """
    if not eta:
        return sigma_next, 1.0, 0.0
    share = eta * (sigma - sigma_next) / sigma
    down = sigma_next * (1.0 - share)
    signal = (1.0 - sigma_next) + sigma_next * share  # 1 - down
    scale = (1.0 - sigma_next) / signal
    lost = share / signal  # 1 - r
    variance = lost * (2.0 - lost)  # in units of sigma_next^2
    if variance < 0:
        raise ValueError(
            f"the noise of a rising step has negative variance ({variance:.3g}) for eta={eta:g}; use eta=0"
        )
    return down, scale, sigma_next * math.sqrt(variance)


ROUNDING = 1e-12
"""The longest step in log sigma that is rounding: both its ends are the same level."""


def sde_noise_scale(h: float, eta: float) -> float:
    r"""Return the factor `sqrt(1 - exp(-2 eta h))` of `sigma_next * noise` in one exact step of the reverse SDE.

    It is 0 if `|h| <= ROUNDING`: the levels of two stages that coincide, such as the last stage and the end of a step,
    may differ by rounding in both directions.

    Raises:
        ValueError: a rising step (`h < 0`) with `eta > 0`, whose variance is negative.
    """
    if abs(h) <= ROUNDING:
        return 0.0
    variance = -math.expm1(-2.0 * eta * h)
    if variance < 0:
        raise ValueError(
            f"the noise of a rising step has negative variance ({variance:.3g}) for eta={eta:g}; use eta=0"
        )
    return math.sqrt(variance)


def phi1(z: float) -> float:
    """Return `phi_1(z) = (e^z - 1) / z`, 1 at 0."""
    return math.expm1(z) / z if z else 1.0


@functools.lru_cache(maxsize=32)
def _gauss_legendre(n: int) -> tuple[tuple[float, float], ...]:
    """Return the nodes and weights of Gauss-Legendre quadrature on [-1, 1], in pairs."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return tuple((float(u), float(w)) for u, w in zip(nodes, weights, strict=True))


def lagrange(nodes: Sequence[float], j: int, t: float) -> float:
    """Return the value at `t` of the Lagrange polynomial that is 1 at `nodes[j]` and 0 at the other nodes."""
    value = 1.0
    for k, node in enumerate(nodes):
        if k != j:
            value *= (t - node) / (nodes[j] - node)
    return value


def _lagrange_sums(nodes: Sequence[float], t: np.ndarray, weights: np.ndarray) -> list[float]:
    """Return `sum_i weights_i l_j(t_i)` for every node."""
    if len(nodes) == 1:
        return [float(weights.sum())]
    n, places = len(nodes), np.array(nodes)[:, None]
    gaps = places - places.T
    gaps.flat[:: n + 1] = 1.0
    factors = (t - places) / gaps[..., None]
    factors.reshape(n * n, -1)[:: n + 1] = 1.0
    return [float(value) for value in factors.prod(1) @ weights]


def adams(nodes: Sequence[float], a: float, b: float) -> list[float]:
    r"""Return Adams weights on a non-uniform grid: `c_j = int_a^b l_j(t) dt` for every node, exact up to rounding.

    The integrand is a polynomial of degree `len(nodes) - 1`. Gauss-Legendre quadrature with `(len(nodes) + 1) // 2`
    points is exact for it.
    """
    rule = _gauss_legendre((len(nodes) + 1) // 2)
    centre, half = (a + b) / 2, (b - a) / 2
    return [half * sum(w * lagrange(nodes, j, centre + half * u) for u, w in rule) for j in range(len(nodes))]


def _unit_quadrature(z: float = 60.0) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights on [0, 1], exact to rounding for `e^{z t}` times a low polynomial, `|z| <= 60`."""
    return _unit_gauss(16 if abs(z) <= 1 else 64)


@functools.lru_cache(maxsize=2)
def _unit_gauss(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the nodes and weights of Gauss-Legendre quadrature on [0, 1]."""
    u, w = np.polynomial.legendre.leggauss(points)
    return (1.0 + u) / 2, w / 2


_INVERSE_FACTORIALS = tuple([1.0 / math.factorial(n) for n in range(40)])


def phi(k: int, z: float) -> float:
    r"""Return `phi_k(z) = int_0^1 e^{(1 - t) z} t^{k-1} / (k-1)! dt` for k >= 1, or `phi_0(z) = e^z`.

    `phi_{k+1}(z) = (phi_k(z) - 1/k!) / z` and `phi_k(0) = 1/k!`. The recurrence loses digits near z = 0, so there the
    series `sum_n z^n / (n + k)!` is used. The result is accurate for every z.
    """
    if k <= 1:
        return phi1(z) if k else math.exp(z)
    if abs(z) > 1:
        return (phi(k - 1, z) - 1.0 / math.factorial(k - 1)) / z
    value = 0.0
    for c in _INVERSE_FACTORIALS[k + 17 : k - 1 : -1]:
        value = value * z + c
    return value


def exponential_adams(nodes: Sequence[float], sigma: float, sigma_next: float, rate: float = 1.0) -> list[float]:
    r"""Return the exponential Adams weights of a step in lambda, for denoised images at the noise levels `nodes`.

    `W_j = rate int_0^h e^{rate (u - h)} l_j(u) du`, where u is lambda counted from sigma. The step
    `x' = e^{-rate h} x + sum_j W_j D_j` solves `dx/dlambda = rate (D - x)` exactly if D is a polynomial in lambda.
    With sigma_next among the nodes it is the corrector (Adams-Moulton), otherwise the predictor (Adams-Bashforth).

    Each weight is one quadrature of `l_j` itself. No linear system is solved, so short and long steps keep their
    digits. The part of the interval where the exponential is below 1e-26 of its maximum is left out.
    """
    h = log_step(sigma, sigma_next)
    reach = 60.0 / rate
    start, end = (max(0.0, h - reach), h) if h > 0 else (0.0, max(h, -reach))
    t, w = _unit_quadrature(rate * (end - start))
    u = start + (end - start) * t
    kernel = rate * (end - start) * w * np.exp(rate * (u - h))
    return _lagrange_sums([log_step(sigma, node) for node in nodes], u, kernel)


def left_sums(f: Callable[[Any], Any], a: float, b: float, points: int = 200) -> tuple[float, float]:
    """Return `int_a^b dv / f(v)` and `int_a^b (v - b) / f(v) dv` as left Riemann sums, with v = a and without v = b."""
    width = (b - a) / points
    v = a + width * np.arange(points)
    return float(np.sum(width / f(v))), float(np.sum(width * (v - b) / f(v)))


UNIFORM_ADAMS = (
    (1.0,),
    (3.0 / 2, -1.0 / 2),
    (23.0 / 12, -16.0 / 12, 5.0 / 12),
    (55.0 / 24, -59.0 / 24, 37.0 / 24, -9.0 / 24),
)
"""Adams-Bashforth weights on a uniform grid of width 1, newest slope first, for 1 to 4 slopes."""


def ipndm_v_weights(levels: Sequence[float]) -> list[float]:
    r"""Return the weights of `ipndm_v`, newest slope first.

    With the signed widths `H = sigma_{i+1} - sigma_i`, `a`, `b`, `c` (from new to old), terms T and V for the third and
    fourth slope are added to the exact two-slope weights `H (1 + H/(2a), -H/(2a))`. The weights differ from
    `adams(...)` in three places: the exact T is `(2H + 3a) H / (6 a (a + b))`, the exact V has a minus before
    `H (H + 2a)`, and the exact last weight has a factor `b/c` in place of `a/b`.

    Args:
        levels: sigma_{i-k+1}, ..., sigma_i, sigma_{i+1} for k slopes.
    """
    widths = [b - a for a, b in itertools.pairwise(levels)][::-1]
    w = [1.0]
    if len(widths) > 1:
        H, a = widths[:2]
        w = [1.0 + H / (2 * a), -H / (2 * a)]
    if len(widths) > 2:
        b = widths[2]
        T = (1.0 - H**2 / (3 * a * (a + b))) / 2
        w = [w[0] + T, w[1] - (1.0 + a / b) * T, T * a / b]
    if len(widths) > 3:
        c = widths[3]
        V = H * (2 * (2 * H + 3 * a) * (H + a + b) + H * (H + 2 * a)) / (12 * a * (a + b) * (a + b + c))
        Q = a * (a + b) / (b * (b + c))
        w = [w[0] + V, w[1] - (1.0 + a / b + Q) * V, w[2] + (a / b + Q * (1.0 + b / c)) * V, -V * Q * a / b]
    return [widths[0] * weight for weight in w]


# The variance-preserving process with linear beta(t), sigma = 0.002 at t = 0.001, and sigma = 80 at t = 1.
_LOG_MIN, _LOG_MAX = math.log1p(0.002**2), math.log1p(80.0**2)
_BETA_D = 2.0 * (_LOG_MIN / 1e-3 - _LOG_MAX) / (1e-3 - 1.0)
_BETA_MIN = _LOG_MAX - _BETA_D / 2


def deis_time(sigma: np.ndarray) -> np.ndarray:
    r"""Return the time t of DEIS at noise level sigma: `log(1 + sigma^2) = beta_d t^2 / 2 + beta_min t`."""
    return (np.sqrt(_BETA_MIN**2 + 2 * _BETA_D * np.log1p(sigma**2)) - _BETA_MIN) / _BETA_D


@functools.lru_cache(maxsize=4096)
def deis_weights(levels: tuple[float, ...], quadrature: str) -> tuple[float, ...]:
    r"""Return the weights of DEIS, newest slope first.

    `c_j = int l_j(t(sigma)) dsigma` from sigma_i to sigma_{i+1}, with Lagrange polynomials in `t = deis_time(sigma)`.

    Args:
        levels: sigma_{i-k+1}, ..., sigma_i, sigma_{i+1}, all positive.
        quadrature: "exact" is Gauss-Legendre in log sigma, where the integrand is analytic in a strip of half-width
            pi/2. "upstream" takes 10,000 points in t with both ends, each of weight 1/10,000, which overcounts the ends
            by 1e-4 of the interval. "log_sigma" is "exact" with `t = log(sigma)`.
    """
    sigma, sigma_next = levels[-2:]
    if len(levels) == 2:
        return (sigma_next - sigma,)
    time = np.log if quadrature == "log_sigma" else deis_time
    times = time(np.array(levels))[::-1].tolist()
    if quadrature in ("exact", "log_sigma"):
        u, w = _unit_quadrature()
        h = math.log(sigma_next / sigma)
        points = sigma * np.exp(h * u)
        t, weights = time(points), h * points * w
    else:
        t, equal = _points_in_a_row(times[1], times[0])
        square = np.expm1(_BETA_D / 2 * t**2 + _BETA_MIN * t)  # sigma^2
        dsigma_dt = (_BETA_D * t + _BETA_MIN) * (1 + square) / (2 * np.sqrt(square))
        weights = dsigma_dt * (times[0] - times[1]) / 10_000 * equal
    return tuple(_lagrange_sums(times[1:], t, weights))


def _points_in_a_row(a: float, b: float) -> tuple[np.ndarray, np.ndarray]:
    """Return points and weights of a sum over 10,000 equal steps from a to b, with both ends.

    For functions that are smooth away from 0, a Gauss quadrature of 64 points gives the same sum up to rounding, if the
    interval is not many times longer than its distance from 0.
    """
    if max(a, b) > 20 * min(a, b):
        return np.linspace(a, b, 10_000), np.ones(10_000)
    places, weights = _discrete_gauss(10_000, 64)
    return a + (b - a) * places, weights


@functools.lru_cache(maxsize=1)
def _discrete_gauss(count: int, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a Gauss quadrature of the sum over `count` equally spaced points in [0, 1].

    It is exact for polynomials of degree up to `2 points - 1`. The nodes are the eigenvalues of the Jacobi matrix of
    the discrete Chebyshev polynomials, the weights the squared first components of its eigenvectors.

    Source: Gautschi, Orthogonal Polynomials: Computation and Approximation (2004), section 1.5.3.
    """
    k = np.arange(1, points)
    beside = k / 2 * np.sqrt((count**2 - k**2) / (4.0 * k**2 - 1))  # for the points 0, ..., count - 1
    places, vectors = np.linalg.eigh(np.diag(beside, 1) + np.diag(beside, -1))
    return 0.5 + places / (count - 1), count * vectors[0] ** 2
