r"""A model's training noise levels: the sigmas it was trained on, and the maps sigma <-> time.

A network is not told sigma but a *time* t, and every family of models has its own map between them:

* discrete (DDPM, Ho et al. 2020, arXiv 2006.11239): M levels `T_j = sqrt((1 - abar_j) / abar_j)`
  with `abar_j = prod_{i <= j} (1 - beta_i)`; t is the index j, and ln sigma is linear in t between
  two levels;
* edm (Karras et al. 2022, arXiv 2206.00364): `t = ln(sigma) / 4`;
* v (Salimans and Ho 2022, arXiv 2202.00512, as in v-diffusion): the cosine process
  `x_t = cos(pi t / 2) x0 + sin(pi t / 2) eps`, so `t = 2 / pi atan(sigma)`;
* table: pairs of sigma and t as they come, e.g. those of a host's scheduler;
* flow (Esser et al. 2024, arXiv 2403.03206): `x = (1 - s) x0 + s eps`; the noise level is the *flow
  time* s in [0, 1] itself, with the shift `Sh(u) = a u / (1 + (a - 1) u)` and t = multiplier * s.

A `Levels` holds the table (ascending, float64) and both maps. Discrete and edm levels are sigmas of
the variance-exploding (VE) coordinates `x = x0 + sigma * eps`. Flow levels are flow times s;
`flow_to_ve` and `ve_to_flow` convert by sigma = s / (1 - s); schedules of flow times are `FlowTimes`.

Tables are kept in float64 and never rounded. Hosts round them to float32: every schedule picks the
same entries from both, and the tables differ by float32 rounding alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

import numpy as np
import torch
from torch import Tensor

from kinvert.checks import check_number
from kinvert.devices import widest
from kinvert.flowtimes import FlowTimes

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
    "stable_diffusion",
    "v_diffusion",
    "ve_to_flow",
]

# What the hosts use for the infinite sigma at 0 percent of sampling.
INFINITE_SIGMA = 999999999.9
# abar of the last level after rescaling to zero terminal SNR: exactly 0 would make sigma infinite.
ZERO_SNR_ALPHA = 4.8973451890853435e-08
# An abar this small, sigma above 1000, is one of zero terminal SNR.
NEAR_ZERO_SNR = 1e-6
# A sigma this close, in ln sigma, to the middle of two levels is a tie: float32 knows it no better.
TIE = 1e-6


def _widen(name: str, value: Tensor | float) -> tuple[Tensor, torch.dtype]:
    """The argument in the dtype to compute in, and the dtype to return."""
    if not isinstance(value, Tensor):
        value = torch.tensor(check_number(name, value), dtype=torch.float64, device="cpu")
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be real, got {value.dtype}; convert it to float64")
    wide = widest(value.device)
    narrow = value.is_floating_point() and value.dtype != torch.float64
    return value.to(wide), torch.float32 if narrow else wide


@dataclass(frozen=True, eq=False)
class Levels(ABC):
    """The noise levels of one model (abstract; the functions of this module build one).

    `timestep` and `sigma` take a tensor of any shape on any device, or a number. They compute in
    float64 and return float64 for float64, integers and numbers, float32 for the rest (bfloat16
    could not hold the index 999). They never wait for the device, so a negative sigma, or a NaN,
    gives NaN instead of an error.

    Attributes:
        sigmas: the table, float64 1-D on the CPU, positive, strictly ascending.
        kind: "discrete", "edm", "v", "table" or "flow".
        coordinates: what the table holds, "ve" (sigmas) or "flow" (flow times, a `FlowTimes`).
        sigma_data: standard deviation of the data that the network's preconditioning assumes.
    """

    sigmas: Tensor = field(repr=False)
    sigma_data: float = 1.0
    kind: ClassVar[str]
    coordinates: ClassVar[Literal["ve", "flow"]] = "ve"

    def __post_init__(self) -> None:
        s = self.sigmas
        if s.dtype != torch.float64 or s.device.type != "cpu" or s.ndim != 1 or len(s) < 2:
            got = f"{s.dtype} {tuple(s.shape)} on {s.device}"
            raise ValueError(f"sigmas must be 2 or more float64 values on the CPU, 1-D, got {got}")
        if not bool((s > 0).all() & (s.diff() > 0).all() & s.isfinite().all()):
            raise ValueError("sigmas must be finite, positive and strictly ascending; sort them")

    @property
    def sigma_min(self) -> float:
        """First entry of the table."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """Last entry of the table."""
        return float(self.sigmas[-1])

    @abstractmethod
    def timestep(self, sigma: Tensor | float, quantize: bool = True) -> Tensor:
        """The time the network is given at `sigma`; `quantize` matters to discrete levels only."""

    @abstractmethod
    def sigma(self, t: Tensor | float) -> Tensor:
        """The noise level at network time `t`."""

    @abstractmethod
    def percent_to_sigma(self, p: float) -> float:
        """The noise level after a fraction p of the training times, from the noisiest down.

        p <= 0 gives the hosts' stand-in for infinity, 999999999.9 (flow: 1), and p >= 1 gives 0.
        """


@final
@dataclass(frozen=True, eq=False)
class DiscreteLevels(Levels):
    """M discrete levels; network time is the index in the table (0 = least noise)."""

    kind: ClassVar[str] = "discrete"
    _buffers: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def _on(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The table, its ln, and the upper edge of each level's cell; copied to a device once."""
        if like.device not in self._buffers:
            log = self.sigmas.log()
            edges = (log[1:] + log[:-1]) / 2 + TIE
            with torch.inference_mode(False):  # what is cached must serve autograd later
                table, log, edges = (b.to(like, copy=True) for b in (self.sigmas, log, edges))
            self._buffers[like.device] = (table, log, edges)
        return self._buffers[like.device]

    def timestep(self, sigma: Tensor | float, quantize: bool = True) -> Tensor:
        """Index of the level nearest in ln sigma; a tie (to within 1e-6) goes to the lower index.

        With `quantize=False`: the index interpolated linearly in ln sigma, clamped to [0, M - 1],
        as k-diffusion does.
        """
        wide, dtype = _widen("sigma", sigma)
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
        """exp of ln sigma interpolated linearly at index t, which is clamped to [0, M - 1].

        At a whole t this is the table's entry, to the last bit.
        """
        wide, dtype = _widen("t", t)
        table, log, _ = self._on(wide)
        index = wide.clamp(0, len(table) - 1)[..., None]  # as in `timestep`
        low = index.nan_to_num().long()
        high = (low + 1).clamp(max=len(table) - 1)
        return (table[low] * ((index - low) * (log[high] - log[low])).exp())[..., 0].to(dtype)

    def percent_to_sigma(self, p: float) -> float:
        """sigma((1 - p) (M - 1)) for 0 < p < 1."""
        p = check_number("p", p)
        if p <= 0:
            return INFINITE_SIGMA
        return 0.0 if p >= 1 else float(self.sigma((1 - p) * (len(self.sigmas) - 1)))


@final
@dataclass(frozen=True, eq=False)
class EDMLevels(Levels):
    """Continuous levels with network time ln(sigma) / 4."""

    kind: ClassVar[str] = "edm"

    def timestep(self, sigma: Tensor | float, quantize: bool = True) -> Tensor:
        """t = ln(sigma) / 4; `quantize` is accepted and means nothing."""
        wide, dtype = _widen("sigma", sigma)
        return (wide.log() / 4).to(dtype)

    def sigma(self, t: Tensor | float) -> Tensor:
        """sigma = exp(4 t), not clamped."""
        wide, dtype = _widen("t", t)
        return (wide * 4).exp().to(dtype)

    def percent_to_sigma(self, p: float) -> float:
        """sigma_max^(1 - p) sigma_min^p for 0 < p < 1."""
        p = check_number("p", p)
        if p <= 0:
            return INFINITE_SIGMA
        return 0.0 if p >= 1 else self.sigma_max * (self.sigma_min / self.sigma_max) ** p


@final
@dataclass(frozen=True, eq=False)
class FlowLevels(Levels):
    """Rectified-flow levels: flow times s in (0, 1], with `Sh(u) = a u / (1 + (a - 1) u)`.

    `sigma(t) = Sh(t / multiplier)` applies the shift a and `timestep(s) = multiplier * s` does not
    undo it: the network is told the shifted time. So the maps are inverse only for a = 1, as in the
    hosts.

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
        """t = multiplier * sigma (a flow time); `quantize` is accepted and means nothing."""
        wide, dtype = _widen("sigma", sigma)
        return (wide * self.multiplier).to(dtype)

    def sigma(self, t: Tensor | float) -> Tensor:
        """Sh(t / multiplier), not clamped."""
        wide, dtype = _widen("t", t)
        return _shifted(wide / self.multiplier, self.shift).to(dtype)

    def percent_to_sigma(self, p: float) -> float:
        """Sh(1 - p) for 0 < p < 1."""
        remaining = 1 - min(max(check_number("p", p), 0.0), 1.0)
        return float(self.sigma(remaining * self.multiplier))


def _shifted(u: Tensor, shift: float) -> Tensor:
    return shift * u / (shift * u + (1 - u))  # in this form Sh(1) is exactly 1


def stable_diffusion(zero_snr: bool = False) -> DiscreteLevels:
    """Stable Diffusion 1, 2 and XL: 1000 betas from 0.00085 to 0.012, uniform in sqrt(beta).

    `zero_snr` rescales to zero terminal SNR, see `from_alphas_cumprod`. Source: High-Resolution
    Image Synthesis with Latent Diffusion Models, Rombach et al. 2022, arXiv 2112.10752.
    """
    return from_betas(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, zero_snr=zero_snr)


def from_betas(betas: Tensor | np.ndarray | Sequence[float], zero_snr: bool = False) -> DiscreteLevels:
    """Levels of a DDPM with forward variances `betas`: abar_j = prod_{i <= j} (1 - beta_i).

    Raises:
        ValueError: not 1-D with two values or more, or a beta outside (0, 1); with zero_snr the
            last may be 1.
    """
    return from_alphas_cumprod(np.cumprod(1 - _array("betas", betas)), zero_snr=zero_snr)


def from_alphas_cumprod(
    alphas_cumprod: Tensor | np.ndarray | Sequence[float], zero_snr: bool = False
) -> DiscreteLevels:
    """Levels `sqrt((1 - abar) / abar)` of cumulative products abar, read in float64.

    `zero_snr` shifts and scales sqrt(abar) so that its first value stays and its last becomes 0,
    and then sets the last abar to 4.9e-8, so that sigma_max is finite (4518.76). Source: Common
    Diffusion Noise Schedules and Sample Steps are Flawed, Lin et al. 2023, arXiv 2305.08891.

    Raises:
        ValueError: not 1-D with two values or more, or not strictly descending in (0, 1); with
            zero_snr the last may be 0, but not next to 0: such levels are rescaled already.
    """
    abar = _array("alphas_cumprod", alphas_cumprod)
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


def _array(name: str, values: Tensor | np.ndarray | Sequence[float]) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"{name} must be 1-D with 2 values or more, got shape {array.shape}")
    return array


def edm(sigma_min: float = 0.002, sigma_max: float = 120.0, sigma_data: float = 1.0) -> EDMLevels:
    """Continuous EDM levels; the table is 1000 sigmas, uniform in ln sigma.

    Stable Video Diffusion has sigma_max = 700; Playground 2.5 has sigma_max = 80, sigma_data = 0.5.
    Source: Elucidating the Design Space of Diffusion-Based Generative Models, Karras et al. 2022,
    arXiv 2206.00364.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max and sigma_data > 0.
    """
    low = check_number("sigma_min", sigma_min, above=0)
    high = check_number("sigma_max", sigma_max, above=low)
    table = torch.linspace(math.log(low), math.log(high), 1000, dtype=torch.float64, device="cpu").exp()
    table[0], table[-1] = low, high
    return EDMLevels(table, check_number("sigma_data", sigma_data, above=0))


def flow(shift: float = 1.0, multiplier: float = 1000.0) -> FlowLevels:
    """Rectified-flow levels: the table is Sh(j / 1000), j = 1 ... 1000 (Stable Diffusion 3: a = 3).

    Values are flow times, and a denoiser that is built from these levels takes them as they are.
    Source: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, Esser et al.
    2024, arXiv 2403.03206.

    Raises:
        ValueError: unless shift > 0 and multiplier > 0.
    """
    return _flow_levels(check_number("shift", shift, above=0), check_number("multiplier", multiplier, above=0), 1000)


def flux(mu: float = 1.15) -> FlowLevels:
    """Flux levels: s(t) = e^mu / (e^mu + 1/t - 1), i.e. the shift e^mu; 10000 levels, time t = s.

    mu is linear in the number of tokens (16 x 16 pixels each): 0.5 at 256 and 1.15 at 4096.

    Raises:
        ValueError: mu is not finite.
    """
    return _flow_levels(math.exp(check_number("mu", mu)), 1.0, 10000)


def _flow_levels(shift: float, multiplier: float, count: int) -> FlowLevels:
    u = torch.arange(1, count + 1, dtype=torch.float64, device="cpu") / count
    return FlowLevels(_shifted(u, shift), shift=shift, multiplier=multiplier)


def flow_to_ve(t: Tensor | float) -> Tensor:
    """sigma = t / (1 - t), the VE sigma of a flow time in [0, 1); x_ve = x_t / (1 - t).

    For schedules: it looks at the values, and so waits for their device.

    Raises:
        ValueError: a t outside [0, 1), or NaN.
    """
    wide, dtype = _widen("t", t)
    if bool((wide >= 1).any()):
        raise ValueError(
            f"t must be below 1, got {float(wide.max())}: sigma = t / (1 - t) is infinite at t = 1; "
            "start at t = 1 - eps, e.g. t.clamp(max=1 - 1e-4)"
        )
    if not bool((wide >= 0).all()):
        raise ValueError(f"t must be in [0, 1), got {float(wide.min())}; clamp it to [0, 1 - 1e-4]")
    return (wide / (1 - wide)).to(dtype)


def ve_to_flow(sigma: Tensor | float) -> Tensor:
    """t = sigma / (1 + sigma), the flow time of a VE sigma; x_t = x_ve (1 - t).

    For schedules: it looks at the values, and so waits for their device.

    Returns:
        A `FlowTimes` for a schedule (1-D), a plain tensor for anything else.

    Raises:
        ValueError: a sigma that is negative, infinite or NaN.
    """
    wide, dtype = _widen("sigma", sigma)
    if not bool(((wide >= 0) & wide.isfinite()).all()):
        raise ValueError("sigma must be finite and >= 0, got values that are not; remove them")
    t = (wide / (1 + wide)).to(dtype)
    return FlowTimes(t) if t.ndim == 1 else t


# They are levels like the others; they need what is above.
from kinvert.timetables import TableLevels, VDiffusionLevels, from_table, v_diffusion  # noqa: E402
