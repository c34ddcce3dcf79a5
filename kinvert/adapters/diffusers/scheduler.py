"""A scheduler of diffusers that runs any sampler of kinvert."""

from __future__ import annotations

from kinvert.adapters.diffusers.host import ConfigMixin, SchedulerMixin

__all__ = ["KinvertScheduler"]


class KinvertScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler of diffusers that runs any sampler of kinvert."""
