"""Everything of diffusers that the adapter uses, in one place.

Of diffusers itself:

| name | what for |
| --- | --- |
| `SchedulerMixin`, `ConfigMixin` | the base classes of `KinvertScheduler` |
"""

from __future__ import annotations

try:
    import diffusers
except ImportError as error:
    raise ImportError(
        "kinvert.adapters.diffusers needs diffusers, which is not installed: pip install 'kinvert[diffusers]'"
    ) from error

from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

__all__ = ["ConfigMixin", "SchedulerMixin", "diffusers"]
