"""The abstract `Levels`, and how arguments and tables of levels are read. Public in `kinvert.levels`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from kinvert.checks import check_number
from kinvert.devices import widest
from kinvert.showing.brief import brief, never_fails
from kinvert.showing.charts import curve
from kinvert.showing.html import card, html_never_fails, paragraph, table

__all__ = ["INFINITE_SIGMA", "Levels", "as_array", "check_levels", "log_uniform", "widen"]

# The value that hosts use for the infinite sigma at 0 percent of sampling.
INFINITE_SIGMA = 999999999.9


def widen(name: str, value: Tensor | float) -> tuple[Tensor, torch.dtype]:
    """Return the argument in the dtype to compute in, and the dtype of the result."""
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

    `timestep` and `sigma` take a tensor of any shape on any device, or a number. They compute in float64. They return
    float64 for float64, integers and numbers, and float32 for all others (bfloat16 could not hold the index 999). They
    never wait for the device; therefore a negative or NaN sigma gives NaN instead of an error.

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

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "__repr__" not in vars(cls):  # else each dataclass gets one with its fields alone
            cls.__repr__ = Levels.__repr__  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        s = self.sigmas
        if s.dtype != torch.float64 or s.device.type != "cpu" or s.ndim != 1 or len(s) < 2:
            got = f"{s.dtype} {tuple(s.shape)} on {s.device}"
            raise ValueError(f"sigmas must be 2 or more float64 values on the CPU, 1-D, got {got}")
        if not bool((s > 0).all() & (s.diff() > 0).all() & s.isfinite().all()):
            raise ValueError("sigmas must be finite, positive and strictly ascending; sort them")

    @property
    def sigma_min(self) -> float:
        """The first entry of the table."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """The last entry of the table."""
        return float(self.sigmas[-1])

    @never_fails
    def __repr__(self) -> str:
        """Return the number of levels, their range and what is not at its default, in one line."""
        options = [f"{name}={brief(value)}" for name, value in self._options()]
        return f"{type(self).__name__}({', '.join([f'{len(self.sigmas)} levels', self._span(), *options])})"

    @html_never_fails
    def _repr_html_(self) -> str:
        first, last = (brief(float(self.timestep(sigma))) for sigma in (self.sigma_min, self.sigma_max))
        rows = [
            ("kind", self.kind),
            ("levels", len(self.sigmas)),
            ("range", self._span()),
            ("time of the network", f"{first} to {last}"),
            *((name, brief(getattr(self, name))) for name in ("sigma_data", *dict(self._options()))),
        ]
        places = [round(k * (len(self.sigmas) - 1) / 49) for k in range(50)]
        table_of_levels = self.sigmas.detach()[places].tolist()
        drawn = curve(table_of_levels, [f"level {place}" for place in places], x_label="50 of the levels: place")
        return card(repr(self), table((), dict(rows).items()), paragraph("the levels"), drawn)

    def _span(self) -> str:
        unit = "flow time" if self.coordinates == "flow" else "sigma"
        return f"{unit} {self.sigma_min:.4g} to {self.sigma_max:.4g}"

    def _options(self) -> list[tuple[str, object]]:
        """Return the fields that a repr shows and that are not at their default, by name."""
        shown = [(f.name, getattr(self, f.name), f.default) for f in fields(self) if f.repr]
        return [(name, value) for name, value, default in shown if value != default]

    @abstractmethod
    def timestep(self, sigma: Tensor | float, quantize: bool = True) -> Tensor:
        """Return the time that the network is given at `sigma`; only discrete levels use `quantize`."""

    @abstractmethod
    def sigma(self, t: Tensor | float) -> Tensor:
        """Return the noise level at network time `t`."""

    @abstractmethod
    def percent_to_sigma(self, p: float) -> float:
        """Return the noise level after a fraction p of the training times, from the noisiest down.

        p <= 0 gives the hosts' stand-in for infinity, 999999999.9 (flow: 1), and p >= 1 gives 0.
        """


def as_array(name: str, values: Tensor | np.ndarray | Sequence[float]) -> np.ndarray:
    """Return a 1-D float64 array of at least two values.

    Raises:
        ValueError: another shape.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"{name} must be 1-D with 2 values or more, got shape {array.shape}")
    return array


def check_levels(levels: object) -> Levels:
    """Return `levels`, or say what to pass.

    Raises:
        TypeError: it is not a `Levels`.
    """
    if not isinstance(levels, Levels):
        raise TypeError(
            f"levels must be the network's levels, got {type(levels).__name__}; pass ki.levels.stable_diffusion(), "
            "from_alphas_cumprod(...) or from_betas(...) for eps, v and x0, edm(0.002, 80, 0.5) for EDM, flow(3.0) for "
            "flow models; schedules by bounds need none in ki.schedules, e.g. karras(20, sigma_min, sigma_max)"
        )
    return levels


def log_uniform(sigma_min: float, sigma_max: float) -> Tensor:
    """Return a table of 1000 sigmas, uniform in ln sigma.

    Raises:
        TypeError, ValueError: unless 0 < sigma_min < sigma_max.
    """
    low = check_number("sigma_min", sigma_min, above=0)
    high = check_number("sigma_max", sigma_max, above=low)
    table = torch.linspace(math.log(low), math.log(high), 1000, dtype=torch.float64, device="cpu").exp()
    table[0], table[-1] = low, high
    return table
