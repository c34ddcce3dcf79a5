r"""A model's training noise levels: the sigmas it was trained on, and the maps sigma <-> time.

A network is not told sigma but a *time* t. Each family of models has its own map between them:

* discrete (DDPM): M levels `T_j = sqrt((1 - abar_j) / abar_j)` with `abar_j = prod_{i <= j} (1 - beta_i)`; t is the
  index j, and ln sigma is linear in t between two levels;
* edm: `t = ln(sigma) / 4`;
* v (as in v-diffusion): the cosine process `x_t = cos(pi t / 2) x0 + sin(pi t / 2) eps`, so `t = 2 / pi atan(sigma)`;
* table: given pairs of sigma and t, e.g. those of a host's scheduler;
* flow: `x = (1 - s) x0 + s eps`; the noise level is the *flow time* s in [0, 1] itself, with the shift
  `Sh(u) = a u / (1 + (a - 1) u)` and t = multiplier * s.

A `Levels` holds the table (ascending, float64) and both maps. Discrete and edm levels are sigmas of the
variance-exploding (VE) coordinates `x = x0 + sigma * eps`. Flow levels are flow times s; `flow_to_ve` and `ve_to_flow`
convert by sigma = s / (1 - s); schedules of flow times are `FlowTimes`.

Tables are kept in float64 and never rounded. Hosts round them to float32. Each schedule picks the same entries from
both, and the tables differ by float32 rounding alone.

Source: Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models (2020), arXiv 2006.11239 (discrete).
Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models (2022), arXiv 2206.00364 (edm).
Source: Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models (2022), arXiv 2202.00512 (v).
Source: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (2024), arXiv 2403.03206
(flow).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

import numpy as np
import torch
from torch import Tensor

from kinvert._moved import moved_names
from kinvert.checks import check_choice, check_integer, check_number
from kinvert.flowtimes import FlowTimes
from kinvert.levelbase import INFINITE_SIGMA, Levels, as_array, log_uniform, widen
from kinvert.timetables import TableLevels, VDiffusionLevels, from_table, v_diffusion

__all__ = [
    "DiscreteLevels",
    "EDMLevels",
    "FlowLevels",
    "FlowTimes",
    "Levels",
    "TableLevels",
    "VDiffusionLevels",
    "edm",
    "flow",
    "flow_to_ve",
    "flux",
    "from_alphas_cumprod",
    "from_betas",
    "from_table",
    "resolution_mu",
    "stable_diffusion",
    "v_diffusion",
    "ve_to_flow",
]

# abar of the last level after rescaling to zero terminal SNR: exactly 0 would make sigma infinite.
ZERO_SNR_ALPHA = 4.8973451890853435e-08
# A last abar up to this value, sigma above 1000, means zero terminal SNR.
NEAR_ZERO_SNR = 1e-6
# A sigma this close, in ln sigma, to the middle of two levels is a tie: float32 is no more precise.
TIE = 1e-6


@final
@dataclass(frozen=True, eq=False)
class DiscreteLevels(Levels):
    """M discrete levels; the network's time is the index in the table (0 = least noise)."""

    kind: ClassVar[str] = "discrete"
    _buffers: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def _on(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the table, its ln, and the upper edge of each level's cell; they are copied to a device once."""
        if like.device not in self._buffers:
            log = self.sigmas.log()
            edges = (log[1:] + log[:-1]) / 2 + TIE
            with torch.inference_mode(False):  # the cache must also serve autograd later
                table, log, edges = (b.to(like, copy=True) for b in (self.sigmas, log, edges))
            self._buffers[like.device] = (table, log, edges)
        return self._buffers[like.device]

    def timestep(self, sigma: Tensor | float, quantize: bool = True) -> Tensor:
        """Return the index of the level nearest in ln sigma; a tie (to within 1e-6) goes to the lower index.

        With `quantize=False` the index is interpolated linearly in ln sigma and clamped to [0, M - 1], as in
        k-diffusion.
        """
        wide, dtype = widen("sigma", sigma)
        _, log, edges = self._on(wide)
        value = wide.log().contiguous()
        if quantize:
            nearest = torch.bucketize(value, edges).to(wide.dtype)
            return torch.where(value.isnan(), value, nearest).to(dtype)
        value = value[..., None]  # under vmap a single number cannot index a table before torch 2.5
        low = (torch.bucketize(value, log, right=True) - 1).clamp(0, len(log) - 2)
        weight = ((value - log[low]) / (log[low + 1] - log[low])).clamp(0, 1)
        return (low + weight)[..., 0].to(dtype)

    def sigma(self, t: Tensor | float) -> Tensor:
        """Interpolate ln sigma linearly at index t, clamped to [0, M - 1]; return sigma.

        At an integer t this is exactly the table's entry.
        """
        wide, dtype = widen("t", t)
        table, log, _ = self._on(wide)
        index = wide.clamp(0, len(table) - 1)[..., None]  # as in `timestep`
        low = index.nan_to_num().long()
        high = (low + 1).clamp(max=len(table) - 1)
        return (table[low] * ((index - low) * (log[high] - log[low])).exp())[..., 0].to(dtype)

    def percent_to_sigma(self, p: float) -> float:
        """Return sigma((1 - p) (M - 1)) for 0 < p < 1."""
        p = check_number("p", p)
        if p <= 0:
            return INFINITE_SIGMA
        return 0.0 if p >= 1 else float(self.sigma((1 - p) * (len(self.sigmas) - 1)))


@final
@dataclass(frozen=True, eq=False)
class EDMLevels(Levels):
    """Continuous levels; the network's time is ln(sigma) / 4."""

    kind: ClassVar[str] = "edm"

    def timestep(self, sigma: Tensor | float, quantize: bool = True) -> Tensor:
        """Return t = ln(sigma) / 4; `quantize` has no effect."""
        wide, dtype = widen("sigma", sigma)
        return (wide.log() / 4).to(dtype)

    def sigma(self, t: Tensor | float) -> Tensor:
        """Return sigma = exp(4 t), not clamped."""
        wide, dtype = widen("t", t)
        return (wide * 4).exp().to(dtype)

    def percent_to_sigma(self, p: float) -> float:
        """Return sigma_max^(1 - p) sigma_min^p for 0 < p < 1."""
        p = check_number("p", p)
        if p <= 0:
            return INFINITE_SIGMA
        return 0.0 if p >= 1 else self.sigma_max * (self.sigma_min / self.sigma_max) ** p


@final
@dataclass(frozen=True, eq=False)
class FlowLevels(Levels):
    """Rectified-flow levels: flow times s in (0, 1], with `Sh(u) = a u / (1 + (a - 1) u)`.

    `sigma(t) = Sh(t / multiplier)` applies the shift a, and `timestep(s) = multiplier * s` does not undo it: the
    network is told the shifted time. As in the hosts, the two maps are inverse only for a = 1.

    Attributes:
        shift: a.
        multiplier: scale of the network's time.
    """

    kind: ClassVar[str] = "flow"
    coordinates: ClassVar[Literal["ve", "flow"]] = "flow"
    shift: float = 1.0
    multiplier: float = 1000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sigmas", FlowTimes(self.sigmas))

    def timestep(self, sigma: Tensor | float, quantize: bool = True) -> Tensor:
        """Return t = multiplier * sigma (a flow time); `quantize` has no effect."""
        wide, dtype = widen("sigma", sigma)
        return (wide * self.multiplier).to(dtype)

    def sigma(self, t: Tensor | float) -> Tensor:
        """Return Sh(t / multiplier), not clamped."""
        wide, dtype = widen("t", t)
        return _shifted(wide / self.multiplier, self.shift).to(dtype)

    def percent_to_sigma(self, p: float) -> float:
        """Return Sh(1 - p) for 0 < p < 1."""
        remaining = 1 - min(max(check_number("p", p), 0.0), 1.0)
        return float(self.sigma(remaining * self.multiplier))


def _shifted(u: Tensor, shift: float) -> Tensor:
    return shift * u / (shift * u + (1 - u))  # in this form Sh(1) is exactly 1


def stable_diffusion(zero_snr: bool = False) -> DiscreteLevels:
    """Return the levels of Stable Diffusion 1, 2 and XL: 1000 betas from 0.00085 to 0.012, uniform in sqrt(beta).

    `zero_snr` rescales to zero terminal SNR, see `from_alphas_cumprod`.

    Source: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (2022), arXiv 2112.10752.
    """
    return from_betas(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, zero_snr=zero_snr)


def from_betas(betas: Tensor | np.ndarray | Sequence[float], zero_snr: bool = False) -> DiscreteLevels:
    """Return the levels of a DDPM with forward variances `betas`: abar_j = prod_{i <= j} (1 - beta_i).

    Raises:
        ValueError: not 1-D with two or more values, or a beta outside (0, 1); with zero_snr the last may be 1.
    """
    return from_alphas_cumprod(np.cumprod(1 - as_array("betas", betas)), zero_snr=zero_snr)


def from_alphas_cumprod(
    alphas_cumprod: Tensor | np.ndarray | Sequence[float], zero_snr: bool = False
) -> DiscreteLevels:
    """Return the levels `sqrt((1 - abar) / abar)` of cumulative products abar, read in float64.

    `zero_snr` shifts and scales sqrt(abar): its first value stays and its last becomes 0. Then the last abar is set to
    4.9e-8, so that sigma_max is finite (4518.76).

    Source: Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed (2023), arXiv 2305.08891.

    Raises:
        ValueError: not 1-D with two or more values, or not strictly descending in (0, 1). With zero_snr the last may be
            0 but not nearly 0: such levels are rescaled already.
    """
    abar = as_array("alphas_cumprod", alphas_cumprod)
    positive = abar[-1] >= 0 if zero_snr else abar[-1] > 0
    if not (positive and abar[0] < 1 and (np.diff(abar) < 0).all()):
        raise ValueError(
            "alphas_cumprod must descend strictly in (0, 1), i.e. betas must be in (0, 1), "
            f"got {abar[0]} ... {abar[-1]}; if only the last is 0, pass zero_snr=True"
        )
    if zero_snr and 0 < abar[-1] <= NEAR_ZERO_SNR:
        raise ValueError(
            f"alphas_cumprod ends at {abar[-1]:.3g}, so it has zero terminal SNR already, and rescaling it again would "
            "change its levels; leave zero_snr out"
        )
    if zero_snr:
        root = np.sqrt(abar)
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        abar[-1] = ZERO_SNR_ALPHA
    return DiscreteLevels(torch.from_numpy(np.sqrt((1 - abar) / abar)))


def edm(sigma_min: float = 0.002, sigma_max: float = 120.0, sigma_data: float = 1.0) -> EDMLevels:
    """Return continuous EDM levels; the table is 1000 sigmas, uniform in ln sigma.

    Stable Video Diffusion has sigma_max = 700; Playground 2.5 has sigma_max = 80, sigma_data = 0.5.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models (2022), arXiv 2206.00364.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max and sigma_data > 0.
    """
    return EDMLevels(log_uniform(sigma_min, sigma_max), check_number("sigma_data", sigma_data, above=0))


def flow(shift: float = 1.0, multiplier: float = 1000.0) -> FlowLevels:
    """Return rectified-flow levels: the table is Sh(j / 1000), j = 1 ... 1000 (Stable Diffusion 3: a = 3).

    The values are flow times, and a denoiser built from these levels takes flow times.

    Source: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (2024), arXiv
    2403.03206.

    Raises:
        ValueError: unless shift > 0 and multiplier > 0.
    """
    return _flow_levels(check_number("shift", shift, above=0), check_number("multiplier", multiplier, above=0), 1000)


def flux(mu: float = 1.15) -> FlowLevels:
    """Return Flux levels: s(t) = e^mu / (e^mu + 1/t - 1), i.e. the shift e^mu; 10000 levels, time t = s.

    mu is linear in the number of tokens (16 x 16 pixels each): 0.5 at 256 tokens and 1.15 at 4096; see `resolution_mu`.

    Raises:
        ValueError: mu is not finite.
    """
    return _flow_levels(math.exp(check_number("mu", mu)), 1.0, 10000)


def resolution_mu(model: str, tokens: int, steps: int | None = None) -> float:
    """Return the `mu` of `flux` for the resolution of an image or a video, as its model's own pipeline has it.

    Args:
        model: "flux": a line through 0.5 at 256 tokens and 1.15 at 4096. "ltxv" (LTX-Video): a line through 0.95 at
            1024 and 2.05 at 4096. "flux2": `m_10 = 8.73809524e-5 tokens + 1.89833333` at 10 steps, `m_200 = 1.6927e-4
            tokens + 0.45666666` at 200, and linear in the steps; `m_200` for more than 4300 tokens.
        tokens: patches of the image: 16 x 16 pixels each for Flux; frames times height times width of the latent for
            LTX-Video.
        steps: number of steps, for "flux2".

    Raises:
        ValueError: an unknown model, or "flux2" without steps.
    """
    check_choice("model", model, ("flux", "flux2", "ltxv"))
    tokens = check_integer("tokens", tokens, fix="pass e.g. 4096")
    if model != "flux2":
        (low, first), (high, last) = {"flux": ((256, 0.5), (4096, 1.15)), "ltxv": ((1024, 0.95), (4096, 2.05))}[model]
        return first + (last - first) * (tokens - low) / (high - low)
    if steps is None:
        raise ValueError("flux2 needs the number of steps: resolution_mu('flux2', tokens, steps=20)")
    few, many = 8.73809524e-5 * tokens + 1.89833333, 1.6927e-4 * tokens + 0.45666666
    if tokens > 4300:
        return many
    return few + (many - few) * (check_integer("steps", steps, fix="pass e.g. 20") - 10) / 190


def _flow_levels(shift: float, multiplier: float, count: int) -> FlowLevels:
    u = torch.arange(1, count + 1, dtype=torch.float64, device="cpu") / count
    return FlowLevels(_shifted(u, shift), shift=shift, multiplier=multiplier)


def flow_to_ve(t: Tensor | float) -> Tensor:
    """Return sigma = t / (1 - t), the VE sigma of a flow time in [0, 1); x_ve = x_t / (1 - t).

    It is meant for schedules: it reads the values, so it waits for their device.

    Raises:
        ValueError: a t outside [0, 1), or NaN.
    """
    wide, dtype = widen("t", t)
    if bool((wide >= 1).any()):
        raise ValueError(
            f"t must be below 1, got {float(wide.max())}: sigma = t / (1 - t) is infinite at t = 1; "
            "start at t = 1 - eps, e.g. t.clamp(max=1 - 1e-4)"
        )
    if not bool((wide >= 0).all()):
        raise ValueError(f"t must be in [0, 1), got {float(wide.min())}; clamp it to [0, 1 - 1e-4]")
    return (wide / (1 - wide)).to(dtype)


def ve_to_flow(sigma: Tensor | float) -> Tensor:
    """Return t = sigma / (1 + sigma), the flow time of a VE sigma; x_t = x_ve (1 - t).

    It is meant for schedules: it reads the values, so it waits for their device.

    Returns:
        A `FlowTimes` for a schedule (1-D), a plain tensor for anything else.

    Raises:
        ValueError: a sigma that is negative, infinite or NaN.
    """
    wide, dtype = widen("sigma", sigma)
    if not bool(((wide >= 0) & wide.isfinite()).all()):
        raise ValueError("sigma must be finite and >= 0, got values that are not; remove them")
    t = (wide / (1 + wide)).to(dtype)
    return FlowTimes(t) if t.ndim == 1 else t


__getattr__ = moved_names(__name__, {"real": "kinvert.checks.check_number"})
