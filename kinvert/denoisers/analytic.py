r"""Denoisers with exact answers, for distributions whose posterior mean is a closed formula.

With `x = x0 + sigma eps`, `D(x, sigma) = E[x0 | x]` and `p_sigma` the density of x,

    D = x + sigma² ∇ log p_sigma(x)  (Tweedie's formula),      ∂D/∂x = Cov[x0 | x] / sigma²

Gaussian data N(mean, std²), each coordinate on its own:

    D = mean + std² / (std² + sigma²) (x - mean)

A mixture of K isotropic Gaussians on R^d, means m_k, stds s_k, weights w_k, v_k = s_k² + sigma²:

    r   = softmax_k( log w_k - d/2 log v_k - |x - m_k|² / (2 v_k) )
    D   = Σ_k r_k [ m_k + s_k² / v_k (x - m_k) ]

A finite data set is the mixture with every s_k = 0.

At sigma = 0 the denoisers take their limits: x itself if std > 0, the mean (of a data set: the nearest point) if std is
0. They compute in float64 for float64 x and in float32 otherwise, and round once to x's dtype.

Source: Efron, Tweedie's Formula and Selection Bias (2011), doi 10.1198/jasa.2011.tm11181.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kinvert import torch_hooks
from kinvert.denoisers.protocol import broadcasts, expand, working_dtype
from kinvert.showing.brief import brief_repr

__all__ = ["Dataset", "Gaussian", "GaussianMixture"]

_Cache = dict[tuple[torch.dtype, torch.device], tuple[tuple[int | None, ...], tuple[Tensor, ...]]]


def _cast(parameters: tuple[Tensor, ...], x: Tensor, cache: _Cache) -> tuple[Tensor, ...]:
    """Return the parameters in x's working dtype, on its device.

    They are cached, since moving them waits for the device. Parameters that are differentiated are not cached; those
    that were changed in place are cast again.
    """
    key = (working_dtype(x), x.device)
    if all((p.dtype, p.device) == key for p in parameters):
        return parameters
    if torch.compiler.is_compiling() or any(p.requires_grad for p in parameters):
        return tuple(p.to(dtype=key[0], device=key[1]) for p in parameters)
    state = tuple([torch_hooks.version(p) for p in parameters])
    if None in state:  # nobody can tell whether they were changed
        return tuple(p.to(dtype=key[0], device=key[1]) for p in parameters)
    if key not in cache or cache[key][0] != state:
        with torch.inference_mode(False):  # what is cached must serve autograd later
            cache[key] = state, tuple(p.to(dtype=key[0], device=key[1]) for p in parameters)
    return cache[key][1]


def _variance(std: Tensor, sigma: Tensor) -> Tensor:
    """Return std² + sigma², kept above zero so that the limits at std = sigma = 0 are finite.

    The floor is sqrt(tiny), not tiny: squared distances are divided by it and must not overflow.
    """
    variance = std**2 + sigma**2
    return variance.clamp_min(math.sqrt(torch.finfo(variance.dtype).tiny))


def _parameter(name: str, value: Tensor | float, low: float = -math.inf) -> Tensor:
    """Return a finite parameter >= low as a tensor; Python numbers become float64."""
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64, device="cpu")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a float or a floating-point tensor, got {tensor.dtype}; use .float()")
    if not tensor.numel():
        raise ValueError(f"{name} is empty, of shape {tuple(tensor.shape)}; pass at least one value")
    bad = int((~(tensor.isfinite() & (tensor >= low))).sum())
    if bad:
        bound = "" if low == -math.inf else f" and >= {low:g}"
        got = float(tensor) if tensor.ndim == 0 else f"{bad} of {tensor.numel()} values that are not"
        raise ValueError(f"{name} must be finite{bound}, got {got}")
    return tensor


@dataclass(frozen=True, eq=False)
class Gaussian:
    """The exact denoiser of N(mean, std²): `D = mean + std² / (std² + sigma²) (x - mean)`.

    Args:
        mean, std: floats or tensors that broadcast to x's event shape; std >= 0, 0 for a Dirac.

    Raises:
        TypeError: a parameter is a tensor of integers.
        ValueError: a parameter is not finite or std is negative; in a call, they do not broadcast to x's event shape.
    """

    coordinates: ClassVar[Literal["ve"]] = "ve"
    mean: Tensor | float
    std: Tensor | float
    _parameters: tuple[Tensor, Tensor] = field(init=False, repr=False)
    _cache: _Cache = field(init=False, repr=False, default_factory=dict)

    __repr__ = brief_repr

    def __post_init__(self) -> None:
        parameters = _parameter("mean", self.mean), _parameter("std", self.std, low=0.0)
        object.__setattr__(self, "_parameters", parameters)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return E[x0 | x], from x (batch, *event) and sigma (batch,)."""
        mean, std = self._cast(x)
        gain = std**2 / _variance(std, expand(sigma, x))
        return (mean + gain * (x.to(mean.dtype) - mean)).to(x.dtype)

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the score, `∇ log p_sigma(x) = (D - x) / sigma² = (mean - x) / (std² + sigma²)`."""
        mean, std = self._cast(x)
        return ((mean - x.to(mean.dtype)) / _variance(std, expand(sigma, x))).to(x.dtype)

    def ode(self, x: Tensor, sigma_from: float, sigma_to: float) -> Tensor:
        """Return the exact solution of the probability-flow ODE `dx/dsigma = (x - D) / sigma`.

        `x' = mean + (x - mean) sqrt((std² + sigma_to²) / (std² + sigma_from²))`, up or down.

        Raises:
            ValueError: a sigma is negative or not finite, or sigma_from is 0 and std is 0 somewhere.
        """
        for name, value in (("sigma_from", sigma_from), ("sigma_to", sigma_to)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        if sigma_from == 0 and bool((self._parameters[1] == 0).any()):
            raise ValueError("sigma_from must be > 0 if std is 0: every path starts at the mean")
        mean, std = self._cast(x)
        spread_to, spread_from = (
            torch.hypot(std, torch.full_like(std, float(sigma))) for sigma in (sigma_to, sigma_from)
        )
        return (mean + (x.to(mean.dtype) - mean) * (spread_to / spread_from)).to(x.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n samples of x0, shape (n, *event), with the event shape and dtype of mean and std."""
        mean, std = self._parameters
        event = torch.broadcast_shapes(mean.shape, std.shape)
        dtype = torch.promote_types(mean.dtype, std.dtype)
        noise = torch.randn(n, *event, generator=generator, dtype=dtype, device=mean.device)
        return mean + std * noise

    def _cast(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = _cast(self._parameters, x, self._cache)
        for name, value in (("mean", mean), ("std", std)):
            if not broadcasts(value.shape, x.shape[1:]):
                got, event = tuple(value.shape), tuple(x.shape[1:])
                raise ValueError(f"{name} has shape {got}, which does not broadcast to x's event shape {event}")
        return mean, std


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """The exact denoiser of a mixture of isotropic Gaussians; the module docstring has the formula.

    A call holds `batch * K * d` numbers.

    Args:
        means: (K, *event).
        std: a float, or one per component, (K,); >= 0.
        weights: (K,), >= 0, of any positive sum; None for equal weights.

    Raises:
        TypeError: a parameter is a tensor of integers.
        ValueError: a parameter is not finite, negative or of the wrong shape, the weights sum to 0; in a call, x's
            event shape is not that of the means.
    """

    coordinates: ClassVar[Literal["ve"]] = "ve"
    means: Tensor
    std: Tensor | float
    weights: Tensor | None = None
    _parameters: tuple[Tensor, Tensor, Tensor] = field(init=False, repr=False)
    _cache: _Cache = field(init=False, repr=False, default_factory=dict)

    __repr__ = brief_repr

    def __post_init__(self) -> None:
        means, std = _parameter("means", self.means), _parameter("std", self.std, low=0.0)
        if means.ndim < 1:
            raise ValueError("means must have shape (K, *event), got one number; use Gaussian")
        one_each = means.shape[:1]
        if self.weights is None:
            weights = torch.ones(one_each, dtype=means.dtype, device=means.device)
        else:
            weights = _parameter("weights", self.weights, low=0.0)
        for name, value in (("std", std), ("weights", weights)):
            if value.shape != one_each and not (name == "std" and value.ndim == 0):
                got = tuple(value.shape)
                raise ValueError(f"{name} must have shape {tuple(one_each)}, one per mean, got {got}")
        if not bool(weights.sum() > 0):
            raise ValueError("weights sum to 0; at least one must be positive")
        object.__setattr__(self, "_parameters", (means, std, weights))

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return E[x0 | x], from x (batch, *event) and sigma (batch,)."""
        flat, means, std, variance, share = self._posterior(x, sigma)
        gain = std**2 / variance
        denoised = (share * (1 - gain)) @ means + (share * gain).sum(1, keepdim=True) * flat
        return denoised.reshape(x.shape).to(x.dtype)

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the score, `∇ log p_sigma(x) = (D - x) / sigma² = Σ_k r_k (m_k - x) / v_k`."""
        flat, means, _, variance, share = self._posterior(x, sigma)
        pull = share / variance
        return (pull @ means - pull.sum(1, keepdim=True) * flat).reshape(x.shape).to(x.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n samples of x0, shape (n, *event), in the dtype of the means."""
        means, std, weights = self._parameters
        index = torch.multinomial(weights, n, replacement=True, generator=generator)
        drawn, scale = means[index], std.to(means).expand(len(means))[index]
        noise = torch.empty_like(drawn).normal_(generator=generator)
        return drawn + expand(scale, drawn) * noise

    def _posterior(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        """Return x (batch, d), means (K, d), std () or (K,), v_k (batch, K or 1), r_k (batch, K)."""
        means, std, weights = _cast(self._parameters, x, self._cache)
        if x.shape[1:] != means.shape[1:]:
            got, event = tuple(x.shape), tuple(means.shape[1:])
            raise ValueError(f"x must have the event shape of the means, {event}, got shape {got}")
        flat, means = x.to(means.dtype).reshape(len(x), -1), means.reshape(len(means), -1)
        variance = _variance(std, expand(sigma, x).reshape(-1, 1))
        distance = (flat[:, None] - means).square().sum(-1)
        logits = weights.log() - means.shape[1] / 2 * variance.log() - distance / (2 * variance)
        return flat, means, std, variance, logits.softmax(1)


@dataclass(frozen=True, eq=False)
class Dataset:
    """The exact denoiser of a finite data set, which puts the mass 1/N on each of its points.

    `D = Σ_n r_n x_n, r = softmax_n( -|x - x_n|² / (2 sigma²) )`, and the nearest point at sigma = 0. A network that had
    memorised its training set would compute this. A call holds `batch * N * d` numbers.

    Args:
        points: (N, *event).

    Raises:
        TypeError, ValueError: as `GaussianMixture`.
    """

    coordinates: ClassVar[Literal["ve"]] = "ve"
    points: Tensor = field(repr=False)
    _mixture: GaussianMixture = field(init=False, repr=False)

    __repr__ = brief_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "_mixture", GaussianMixture(self.points, 0.0))

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return E[x0 | x], from x (batch, *event) and sigma (batch,)."""
        return self._mixture(x, sigma)

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the score, `∇ log p_sigma(x) = (D - x) / sigma²`."""
        return self._mixture.score(x, sigma)
