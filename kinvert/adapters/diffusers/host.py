"""Everything of diffusers that the adapter uses, in one place.

Of the library:

| name | what for |
| --- | --- |
| `SchedulerMixin`, `ConfigMixin` | the base classes of `KinvertScheduler`: `config`, saving and loading |
| `BaseOutput` | what `step` returns |
| `randn_tensor` | noise from one generator, or from a list of them, on any device |
| `getattr(diffusers, name)` | the class of a saved scheduler |

Of the user's scheduler:

| attribute | what for |
| --- | --- |
| `set_timesteps(...)` | makes its levels and timesteps; called with the arguments that the pipeline gave |
| `timesteps` | the time that the network is given in each evaluation |
| `sigmas` | the noise levels of the run, one more than steps (schedulers that have them) |
| `alphas_cumprod`, `final_alpha_cumprod`, `initial_alpha_cumprod` | the levels of all others |
| `init_noise_sigma` | what the pipeline multiplies unit noise by |
| `config` | the options: prediction type, spacing, order, clipping |
| `tau_func(t)` | the noise of SA-Solver |
| `add_noise(x, noise, timesteps)` | noise for timesteps that are not of the run |
| `from_config(config)` | builds it again from what was saved |
| those of `SHARED` | read by some pipelines, handed on as they are |

All of them are public, and pipelines depend on them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

try:
    import diffusers
except ImportError as error:
    raise ImportError(
        "kinvert.adapters.diffusers needs diffusers, which is not installed: pip install 'kinvert[diffusers]'"
    ) from error

from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

__all__ = [
    "SHARED",
    "BaseOutput",
    "ConfigMixin",
    "SchedulerMixin",
    "alphas_of",
    "built",
    "class_name",
    "diffusers",
    "final_alphas",
    "first_noise",
    "noise_scales",
    "numbers",
    "option",
    "options_of",
    "randn_tensor",
]

SHARED = frozenset({"alphas", "alphas_cumprod", "betas", "set_shift", "shift", "sigma_max", "sigma_min"})
"""What pipelines read of a scheduler beside its interface."""


def class_name(scheduler: object) -> str:
    """Return the name of a scheduler's class in diffusers, or a name with its module for a class from elsewhere."""
    kind = type(scheduler)
    return kind.__name__ if kind.__module__.startswith("diffusers.") else f"{kind.__module__}.{kind.__name__}"


def built(name: str, config: Mapping[str, Any]) -> Any:
    """Build a scheduler again from the name of its class and its config."""
    return getattr(diffusers, name).from_config(dict(config))


def options_of(scheduler: Any) -> dict[str, Any]:
    """Return the options that a scheduler's class has; `config` may hold those of earlier classes as well."""
    names = inspect.signature(type(scheduler).__init__).parameters
    return {name: value for name, value in scheduler.config.items() if name in names}


def option(scheduler: Any, name: str, default: Any = None) -> Any:
    """Return one option of a scheduler, or the default if its class does not have it."""
    return options_of(scheduler).get(name, default)


def numbers(values: Any) -> list[float]:
    """Return the values of a tensor, an array or a list as floats on the host."""
    return [float(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]


def alphas_of(scheduler: Any) -> Tensor:
    """Return the cumulative products abar of the training levels, float64, on the CPU."""
    alphas: Tensor = scheduler.alphas_cumprod
    return alphas.detach().cpu().double()


def final_alphas(scheduler: Any) -> float:
    """Return abar of the level that a run ends at, or starts from if it rises, beyond its timesteps."""
    for name in ("final_alpha_cumprod", "initial_alpha_cumprod", "one"):
        if hasattr(scheduler, name):
            return float(getattr(scheduler, name))
    return 1.0


def noise_scales(scheduler: Any, timesteps: Iterable[float]) -> list[float]:
    """Return SA-Solver's noise scale tau at timesteps."""
    return [float(scheduler.tau_func(t)) for t in timesteps]


def first_noise(scheduler: Any) -> float:
    """Return what the pipeline multiplies unit noise by; 1 for the schedulers of flow models, which have none."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))
