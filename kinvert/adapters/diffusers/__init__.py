"""kinvert in the pipelines of diffusers: `import kinvert.adapters.diffusers as kd`.

The names are imported when they are used, and diffusers with them; without it, their use is an ImportError that says
what to install.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kinvert.adapters.diffusers.denoising import PipelineDenoiser as PipelineDenoiser
    from kinvert.adapters.diffusers.denoising import denoiser as denoiser
    from kinvert.adapters.diffusers.images import decode as decode
    from kinvert.adapters.diffusers.images import encode as encode
    from kinvert.adapters.diffusers.jobs import Inverted as Inverted
    from kinvert.adapters.diffusers.jobs import Unsampled as Unsampled
    from kinvert.adapters.diffusers.jobs import extract_noise as extract_noise
    from kinvert.adapters.diffusers.jobs import invert as invert
    from kinvert.adapters.diffusers.jobs import round_trip as round_trip
    from kinvert.adapters.diffusers.jobs import unsample as unsample
    from kinvert.adapters.diffusers.scheduler import KinvertScheduler as KinvertScheduler

__all__ = [
    "Inverted",
    "KinvertScheduler",
    "PipelineDenoiser",
    "Unsampled",
    "decode",
    "denoiser",
    "encode",
    "extract_noise",
    "invert",
    "round_trip",
    "unsample",
]

_HOMES = {
    "Inverted": "jobs",
    "KinvertScheduler": "scheduler",
    "PipelineDenoiser": "denoising",
    "Unsampled": "jobs",
    "decode": "images",
    "denoiser": "denoising",
    "encode": "images",
    "extract_noise": "jobs",
    "invert": "jobs",
    "round_trip": "jobs",
    "unsample": "jobs",
}
"""The module of each public name."""


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
