"""kinvert in the pipelines of diffusers: `import kinvert.adapters.diffusers as kd`.

The names are imported when they are used, and diffusers with them; without it, their use is an ImportError that says
what to install.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kinvert.adapters.diffusers.scheduler import KinvertScheduler as KinvertScheduler

__all__ = ["KinvertScheduler"]

_HOMES = {"KinvertScheduler": "scheduler"}
"""The module of each public name."""


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
