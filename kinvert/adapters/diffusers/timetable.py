r"""The noise levels of a scheduler of diffusers, and the time that its network is given at each of them.

Both are taken from the scheduler after `set_timesteps`, and never derived again. Between them, where a sampler of more
than one stage evaluates, the time follows from the training levels: the index of the level, linear in ln sigma
(`kinvert.levels.DiscreteLevels`), `1000 t` for flow models, `ln(sigma) / 4` for EDM, `2 atan(sigma) / pi` for Stable
Audio.

A scheduler keeps its state in one of three *spaces*, which decide what the latents of a pipeline are:

    "ve"    x = x0 + sigma eps                        Euler, Heun, LMS, KDPM2, EDM, Stable Audio
    "vp"    x / sqrt(1 + sigma^2)                     DDIM, DDPM, PNDM, DPM-Solver, UniPC, DEIS, SA-Solver
    "flow"  x_t = (1 - t) x0 + t eps                  flow matching, and DPM-Solver, UniPC, ... with use_flow_sigmas
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kinvert.adapters.diffusers.host import alphas_of, class_name, final_alphas, numbers, option
from kinvert.levels import DiscreteLevels, FlowTimes

__all__ = ["KNOWN", "Space", "Timetable", "check_known", "read_timetable", "space_of"]

Space = Literal["ve", "vp", "flow"]
Reader = Literal["sigmas", "interleaved", "alphas", "rising sigmas", "rising alphas"]

KNOWN: dict[str, tuple[Space, Reader]] = {
    "CosineDPMSolverMultistepScheduler": ("ve", "sigmas"),
    "DDIMInverseScheduler": ("vp", "rising alphas"),
    "DDIMScheduler": ("vp", "alphas"),
    "DDPMScheduler": ("vp", "alphas"),
    "DEISMultistepScheduler": ("vp", "sigmas"),
    "DPMSolverMultistepInverseScheduler": ("vp", "rising sigmas"),
    "DPMSolverMultistepScheduler": ("vp", "sigmas"),
    "DPMSolverSinglestepScheduler": ("vp", "sigmas"),
    "EDMDPMSolverMultistepScheduler": ("ve", "sigmas"),
    "EDMEulerScheduler": ("ve", "sigmas"),
    "EulerAncestralDiscreteScheduler": ("ve", "sigmas"),
    "EulerDiscreteScheduler": ("ve", "sigmas"),
    "FlowMatchEulerDiscreteScheduler": ("flow", "sigmas"),
    "FlowMatchHeunDiscreteScheduler": ("flow", "interleaved"),
    "HeunDiscreteScheduler": ("ve", "interleaved"),
    "KDPM2AncestralDiscreteScheduler": ("ve", "interleaved"),
    "KDPM2DiscreteScheduler": ("ve", "interleaved"),
    "LCMScheduler": ("vp", "alphas"),
    "LMSDiscreteScheduler": ("ve", "sigmas"),
    "PNDMScheduler": ("vp", "alphas"),
    "SASolverScheduler": ("vp", "sigmas"),
    "UniPCMultistepScheduler": ("vp", "sigmas"),
}
"""The schedulers that can be a base: the space of their states, and how their levels are read."""

# The sigma that stands for the infinite one of zero terminal SNR, abar = 0.
LARGEST = 1e6
# Two levels this close, in parts of them, are one: a rule may return a level with rounding.
SAME = 1e-7
# The same for levels of a scheduler, which computes the last one twice in float32.
REPEATED = 1e-5


@dataclass(frozen=True)
class Timetable:
    """The levels of one run of a scheduler.

    Attributes:
        space: of the scheduler's states.
        levels: sigmas, or flow times, strictly decreasing; the last may be 0.
        known: pairs of a level and the scheduler's own timestep there.
        between: the network's time at any other level.
        integral: whether all timesteps of the scheduler are integers.
        rising: whether the scheduler itself runs upwards.
    """

    space: Space
    levels: tuple[float, ...]
    known: tuple[tuple[float, float], ...]
    between: Callable[[float], float]
    integral: bool
    rising: bool = False

    @property
    def schedule(self) -> Tensor:
        """The levels as kinvert's verbs take them, float64: `FlowTimes` for flow models."""
        levels = torch.tensor(self.levels, dtype=torch.float64, device="cpu")
        return FlowTimes(levels) if self.space == "flow" else levels

    def timestep(self, level: float) -> float:
        """Return the network's time at a level: the scheduler's own where it has one."""
        for known, t in self.known:
            if math.isclose(known, level, rel_tol=SAME):
                return t
        return self.between(level)

    def to_x(self, level: float) -> float:
        """Return the factor from a latent of the pipeline to the state x of kinvert: VE, or x_t for flow models."""
        return math.hypot(1.0, level) if self.space == "vp" else 1.0

    def coefficients(self, level: float) -> tuple[float, float]:
        """Return the factors of the data and of the noise in a latent at a level."""
        if self.space == "flow":
            return 1.0 - level, level
        return 1.0 / self.to_x(level), level / self.to_x(level)

    def noisy(self, x0: Tensor, noise: Tensor, levels: list[float]) -> Tensor:
        """Return noisy latents of images, each at its level; one level serves all."""
        factors = torch.tensor([self.coefficients(level) for level in levels], dtype=torch.float64, device="cpu")
        kept, added = factors.to(x0).T.reshape(2, -1, *[1] * (x0.ndim - 1))
        return kept * x0 + added * noise


def check_known(scheduler: Any) -> str:
    """Return the class name of a scheduler that can be a base.

    Raises:
        TypeError: anything else, with the names of those that can.
    """
    if isinstance(scheduler, type):
        raise TypeError(f"scheduler must be an object, got the class {scheduler.__name__}; pass pipe.scheduler")
    name = class_name(scheduler)
    if name not in KNOWN:
        raise TypeError(
            f"scheduler: {name} is none of those whose noise levels are known; these are {', '.join(KNOWN)}. "
            "Build one of them for the model, e.g. EulerDiscreteScheduler.from_config(pipe.scheduler.config)"
        )
    return name


def space_of(scheduler: Any) -> Space:
    """Return the space of a scheduler's states."""
    return "flow" if option(scheduler, "use_flow_sigmas") else KNOWN[check_known(scheduler)][0]


def read_timetable(scheduler: Any) -> Timetable:
    """Read the levels and timesteps of a scheduler after its `set_timesteps`.

    Raises:
        TypeError: a class that is not known.
        ValueError: levels that no run can have, with the option that makes them.
    """
    name = check_known(scheduler)
    space, reader = space_of(scheduler), KNOWN[name][1]
    if option(scheduler, "invert_sigmas"):
        raise ValueError(f"{name}: invert_sigmas=True means times of the data, not of the noise; build it without")
    if name == "PNDMScheduler" and not option(scheduler, "skip_prk_steps"):
        raise ValueError("PNDMScheduler: its Runge-Kutta timesteps are no schedule; build it with skip_prk_steps=True")
    times = numbers(scheduler.timesteps)
    integral = all(t.is_integer() for t in times) and not scheduler.timesteps.is_floating_point()
    if reader in ("sigmas", "rising sigmas"):
        levels = numbers(scheduler.sigmas)
    elif reader == "interleaved":
        levels, times = _unique(numbers(scheduler.sigmas)), times[::2]
    else:
        times = _unique(times)
        levels = _of_alphas(scheduler, times, first=reader == "rising alphas")
    upper = reader == "rising alphas"  # its timesteps belong to the upper ends of the steps
    known = tuple(zip(levels[1:] if upper else levels, times, strict=False))
    levels = _unique(levels)
    rising = reader.startswith("rising")
    decreasing = tuple(levels[::-1] if rising else levels)
    if any(a <= b for a, b in itertools.pairwise(decreasing)) or len(decreasing) < 2:
        raise ValueError(
            f"{name}: its noise levels must decrease, got {', '.join(f'{v:g}' for v in decreasing)}; "
            "check num_inference_steps, sigmas and timesteps"
        )
    return Timetable(space, decreasing, known, _between(scheduler, space), integral, rising)


def _of_alphas(scheduler: Any, times: list[float], first: bool) -> list[float]:
    """Return the levels at integer timesteps, with the level beyond them at the end, or first."""
    alphas = alphas_of(scheduler)
    levels = [_sigma(float(alphas[int(t)])) for t in times]
    if not first:
        return [*levels, _sigma(final_alphas(scheduler))]
    before = times[0] - option(scheduler, "num_train_timesteps") // len(times)
    return [_sigma(float(alphas[int(before)]) if before >= 0 else final_alphas(scheduler)), *levels]


def _sigma(alpha: float) -> float:
    """Return the noise level of a cumulative product abar."""
    return min(math.sqrt((1.0 - alpha) / alpha), LARGEST) if alpha > 0 else LARGEST


def _unique(values: list[float]) -> list[float]:
    """Drop values that repeat the one before: stages of a step, or a last step of no length."""
    return [
        value for i, value in enumerate(values) if i == 0 or not math.isclose(value, values[i - 1], rel_tol=REPEATED)
    ]


def _between(scheduler: Any, space: Space) -> Callable[[float], float]:
    """Return the network's time as a function of the level."""
    count = option(scheduler, "num_train_timesteps")
    if space == "flow":
        return lambda level: level * count
    if class_name(scheduler) == "CosineDPMSolverMultistepScheduler":
        return lambda level: 2 * math.atan(level) / math.pi
    if not hasattr(scheduler, "alphas_cumprod") or option(scheduler, "timestep_type") == "continuous":
        return lambda level: math.log(max(level, 1e-12)) / 4
    sigmas = torch.tensor([_sigma(a) for a in alphas_of(scheduler).tolist()], dtype=torch.float64, device="cpu")
    table = DiscreteLevels(sigmas)
    return lambda level: float(table.timestep(max(level, 1e-12), quantize=False))
