r"""Adapters: turn a network into a denoiser.

A network `F(x_scaled, t)` predicts the noise, the data or a mixture of both from a scaled input and a timestep. All
parametrisations have the same form (Karras et al., Eq. 7),

    D(x, sigma) = c_skip x + c_out F(c_in x, t(sigma))

with `sd = sigma_data` (1 for DDPM levels):

    prediction   c_in                       c_skip                    c_out
    eps          1 / sqrt(sigma² + sd²)     1                         -sigma
    v            1 / sqrt(sigma² + sd²)     sd² / (sigma² + sd²)      -sigma sd / sqrt(sigma² + sd²)
    edm          1 / sqrt(sigma² + sd²)     sd² / (sigma² + sd²)      +sigma sd / sqrt(sigma² + sd²)
    x0           1 / sqrt(sigma² + sd²)     0                         1
    velocity     1 / (1 + sigma)            1 / (1 + sigma)           -sigma / (1 + sigma)

Below the lowest level of a table, x0 keeps the slope `(x - D) / sigma` of that level: with w = sigma / sigma_min,
c_skip = 1 - w and c_out = w. An image denoised for sigma_min would be 1 / w times too far from x.

The last line of the table is a rectified flow `x_t = (1 - t) x0 + t eps` seen in variance-exploding coordinates,
`t = sigma / (1 + sigma)` and `x_t = x / (1 + sigma)`; in its own coordinates it is `1, 1, -sigma` with `sigma = t`.

The network gets `c_in x` in `dtype`: by default the dtype of its first floating point parameter if it is a module, else
x's. The scaling and the combination are computed in float64 for float64 x and in float32 otherwise, and rounded once to
x's dtype; t is float64 for networks in float64, float32 for all others, never half precision.

Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models (2022), arXiv 2206.00364.
Source: Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models (2022), arXiv 2202.00512 (v).
Source: Liu et al., Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow (2022), arXiv
2209.03003 (velocity).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from kinvert.denoisers.dtypes import checked_dtype, dtype_of
from kinvert.denoisers.protocol import check_output, expand, working_dtype
from kinvert.tensors import wide_dtype

__all__ = [
    "Coordinates",
    "Preconditioned",
    "Prediction",
    "from_edm",
    "from_eps",
    "from_v",
    "from_velocity",
    "from_x0",
]

if TYPE_CHECKING:
    from kinvert.levels import Levels

Prediction = Literal["eps", "v", "edm", "x0", "velocity"]
Coordinates = Literal["ve", "flow"]


@dataclass(frozen=True, repr=False)
class Preconditioned:
    """A network as a denoiser: `D = c_skip x + c_out model(c_in x, t, **conditioning)`.

    Built by `from_eps`, `from_v`, `from_edm`, `from_x0` and `from_velocity`.

    Raises:
        TypeError: `model` is not callable, `levels` has no `timestep`, `dtype` is not a dtype of networks; in a call,
            the model returns no tensor.
        ValueError: unknown `coordinates`, `levels` of another kind of model; in a call, the model's output does not
            have its input's shape.
    """

    model: Callable[..., Tensor]
    levels: Levels | None
    prediction: Prediction
    quantize: bool = True
    coordinates: Coordinates | None = None
    dtype: torch.dtype | None = None
    _lowest: float | None = field(default=None, init=False, repr=False, compare=False)
    """The level below which the network is told the end of its table; None if its times have no end."""

    def __post_init__(self) -> None:
        checked_dtype(self.dtype)
        if self.coordinates is None:
            object.__setattr__(self, "coordinates", getattr(self.levels, "coordinates", "ve"))
        if not callable(self.model):
            got = type(self.model).__name__
            raise TypeError(f"model must be callable as model(x, t, **conditioning), got {got}")
        if self.coordinates not in ("ve", "flow"):
            raise ValueError(f"coordinates must be 've' or 'flow', got {self.coordinates!r}")
        flow = self.prediction == "velocity"
        if self.coordinates == "flow" and not flow and getattr(self.levels, "kind", None) != "flow":
            raise ValueError(f"coordinates='flow' is for from_velocity, not for from_{self.prediction}; leave it out")
        if flow and self.levels is None:
            return
        if not callable(getattr(self.levels, "timestep", None)):
            example = "flow" if flow else "stable_diffusion"
            raise TypeError(
                "levels must map noise levels to the model's timesteps, "
                f"e.g. kinvert.levels.{example}(), got {type(self.levels).__name__}"
            )
        kind = getattr(self.levels, "kind", None)
        if kind is not None and flow != (kind == "flow"):
            fix = "pass kinvert.levels.flow() or None" if flow else "use from_velocity"
            raise ValueError(f"levels of a {kind} model do not fit from_{self.prediction}; {fix}")
        if kind in ("discrete", "table"):
            object.__setattr__(self, "_lowest", cast("Levels", self.levels).sigma_min)  # read here, not in a run

    def __repr__(self) -> str:
        option = "coordinates" if self.prediction == "velocity" else "quantize"
        name = getattr(self.model, "__name__", type(self.model).__name__)
        value = getattr(self, option)
        dtype = "" if self.dtype is None else f", dtype={self.dtype}"
        return f"from_{self.prediction}({name}, levels={self.levels!r}, {option}={value!r}{dtype})"

    @property
    def network_dtype(self) -> torch.dtype | None:
        """The dtype that the network is called in; None stands for x's dtype."""
        return self.dtype or dtype_of(self.model)

    def __call__(self, x: Tensor, sigma: Tensor, **conditioning: Any) -> Tensor:
        """Return the denoised x, from x (batch, *event) and sigma (batch,)."""
        c_in, c_skip, c_out = self._scales(expand(sigma, x))
        wide = x.to(working_dtype(x))
        # The nearest training level is found in the full precision of sigma.
        t = self._timestep(sigma.to(torch.promote_types(sigma.dtype, wide.dtype)))
        dtype = self.network_dtype or x.dtype
        t = t.to(wide_dtype(dtype))
        output = self.model((c_in * wide).to(dtype), t, **conditioning)
        output = check_output(output, x, "model", "x, t, **c").to(wide.dtype)
        return (c_skip * wide + c_out * output).to(x.dtype)

    def _scales(self, sigma: Tensor) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """Return (c_in, c_skip, c_out), each a float or of sigma's shape."""
        if self.prediction == "velocity":
            if self.coordinates == "flow":
                return 1.0, 1.0, -sigma
            return 1 / (1 + sigma), 1 / (1 + sigma), -sigma / (1 + sigma)
        data = cast("Levels", self.levels).sigma_data  # `__post_init__` demands levels
        variance = sigma**2 + data**2
        c_in = variance.rsqrt()
        if self.prediction == "eps":
            return c_in, 1.0, -sigma
        if self.prediction == "v":
            return c_in, data**2 / variance, -sigma * data * c_in
        if self.prediction == "edm":
            return c_in, data**2 / variance, sigma * data * c_in
        known = 1.0 if self._lowest is None else (sigma / self._lowest).clamp(max=1)
        return c_in, 1 - known, known

    def _timestep(self, sigma: Tensor) -> Tensor:
        """Return the network's time, shape (batch,)."""
        if self.prediction == "velocity":
            t = sigma if self.coordinates == "flow" else sigma / (1 + sigma)
            return t if self.levels is None else self.levels.timestep(t)
        return cast("Levels", self.levels).timestep(sigma, quantize=self.quantize)


def from_eps(
    model: Callable[..., Tensor], levels: Levels, quantize: bool = True, *, dtype: torch.dtype | None = None
) -> Preconditioned:
    """Make a denoiser from a network that predicts the noise.

    `D = x - sigma model(x / sqrt(sigma² + sd²), t)`.

    Args:
        model: `model(x_scaled, t, **conditioning)`, x_scaled of shape (batch, *event), t of shape (batch,).
        levels: the noise levels it was trained on.
        quantize: pass the nearest training timestep instead of an interpolated one.
        dtype: what the network is called in, for x of any dtype; None takes the dtype of its first floating point
            parameter if it is a module, else x's.

    Raises:
        TypeError, ValueError: as `Preconditioned`.
    """
    return Preconditioned(model, levels, "eps", quantize, dtype=dtype)


def from_v(
    model: Callable[..., Tensor], levels: Levels, quantize: bool = True, *, dtype: torch.dtype | None = None
) -> Preconditioned:
    """Make a denoiser from a network that predicts `v`, the noise and the data rotated by the noise level.

    `D = x sd² / (sigma² + sd²) - model(x / sqrt(sigma² + sd²), t) sigma sd / sqrt(sigma² + sd²)`. Arguments and errors
    as in `from_eps`.
    """
    return Preconditioned(model, levels, "v", quantize, dtype=dtype)


def from_edm(
    model: Callable[..., Tensor], levels: Levels, quantize: bool = True, *, dtype: torch.dtype | None = None
) -> Preconditioned:
    """Make a denoiser from a network of EDM: `D = c_skip x + c_out model(c_in x, c_noise)`.

    `c_skip = sd² / (sigma² + sd²)`, `c_out = sigma sd / sqrt(sigma² + sd²)`, `c_in = 1 / sqrt(sigma² + sd²)` and, with
    `kinvert.levels.edm`, `c_noise = ln(sigma) / 4`. It is `from_v` with the other sign of the network's output.
    diffusers' EDM schedulers call this prediction type "epsilon", although the network predicts no noise (`from_eps`
    would be silently wrong); their "v_prediction" is `from_v`.

    Args:
        model: `model(x_scaled, c_noise, **conditioning)`.
        levels: e.g. `kinvert.levels.edm(0.002, 80.0, sigma_data=0.5)`; sd is its `sigma_data`.
        quantize: as in `from_eps`; it means nothing to EDM levels.
        dtype: as in `from_eps`.

    Raises:
        TypeError, ValueError: as `Preconditioned`.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models (2022), arXiv 2206.00364,
    Eq. 7 and Table 1.
    """
    return Preconditioned(model, levels, "edm", quantize, dtype=dtype)


def from_x0(
    model: Callable[..., Tensor], levels: Levels, quantize: bool = True, *, dtype: torch.dtype | None = None
) -> Preconditioned:
    """Make a denoiser from a network that predicts the data: `D = model(x / sqrt(sigma² + sd²), t)`.

    Below the lowest level of a table (where a run upwards starts) the slope is that of the lowest level.

    Arguments and errors as in `from_eps`.
    """
    return Preconditioned(model, levels, "x0", quantize, dtype=dtype)


def from_velocity(
    model: Callable[..., Tensor],
    levels: Levels | None = None,
    coordinates: Coordinates | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Preconditioned:
    """Make a denoiser from a rectified flow: a network that predicts `eps - x0`.

    `D = x_t - t model(x_t, t)` at `x_t = (1 - t) x0 + t eps`. In `"ve"` coordinates `t = sigma / (1 + sigma)` and
    `x_t = x / (1 + sigma)`; pure noise, t = 1, is an infinite sigma there, so start just below it. In `"flow"`
    coordinates x is x_t and sigma is t itself.

    Args:
        model: `model(x_t, t, **conditioning)`, x_t of shape (batch, *event), t of shape (batch,).
        levels: maps t to the network's time, e.g. `1000 t`; None hands it t.
        coordinates: what x and sigma mean, `"ve"` or `"flow"`; None takes those of the levels, `"flow"` for
            `levels.flow()`, and `"ve"` without levels. The denoiser's attribute `coordinates` says it, so that no verb
            takes a schedule of the other kind.
        dtype: as in `from_eps`.

    Raises:
        TypeError, ValueError: as `Preconditioned`.
    """
    return Preconditioned(model, levels, "velocity", coordinates=coordinates, dtype=dtype)
