"""The registry of samplers: public name -> rule and its defaults. One file per family.

A sampler of one's own enters the registry, and with it every test, benchmark and listing, by `register`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from kinvert.rules.ancestral import DPMpp2SAncestral, EulerAncestral
from kinvert.rules.base import Rule, StepBuilder, interpolate, one_of, slope
from kinvert.rules.dpmpp import DPMpp2M, DPMpp2MSDE, DPMppSDE
from kinvert.rules.flow import Flow
from kinvert.rules.multistep import LMS
from kinvert.rules.runge_kutta import DPM2, Euler, Heun

__all__ = [
    "DPM2",
    "LMS",
    "SAMPLERS",
    "DPMpp2M",
    "DPMpp2MSDE",
    "DPMpp2SAncestral",
    "DPMppSDE",
    "Euler",
    "EulerAncestral",
    "Flow",
    "Heun",
    "Rule",
    "SamplerEntry",
    "StepBuilder",
    "interpolate",
    "register",
    "sampler",
    "slope",
]


@dataclass(frozen=True)
class SamplerEntry:
    """A registered sampler: `rule(**(defaults | options))` builds it."""

    name: str
    rule: type[Rule]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """The options and their default values."""
        return {f.name: self.defaults.get(f.name, f.default) for f in fields(self.rule)}

    @property
    def summary(self) -> str:
        """The first sentence of the rule's docstring."""
        return (self.rule.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")


SAMPLERS: dict[str, SamplerEntry] = {}


def register(rule: type[Rule], name: str | None = None, **defaults: Any) -> type[Rule]:
    """Enter a rule into the registry under `name` (default: the rule's own), with other defaults if given.

    Usable as a decorator. Raises ValueError if the name is taken by another rule.
    """
    name = name or rule.name
    if name in SAMPLERS and SAMPLERS[name].rule is not rule:
        raise ValueError(f"the sampler name {name!r} is taken by {SAMPLERS[name].rule.__name__}; choose another")
    SAMPLERS[name] = SamplerEntry(name, rule, defaults)
    return rule


for _rule in (Euler, Heun, DPM2, LMS, EulerAncestral, DPMpp2SAncestral, DPMppSDE, DPMpp2M, DPMpp2MSDE):
    register(_rule)


def sampler(name: str | Rule, **options: Any) -> Rule:
    """Build a sampler by its public name, with the options that k-diffusion and ComfyUI use.

    Args:
        name: a name of `SAMPLERS`, or a rule, which is returned as it is.
        **options: e.g. `eta`, `s_noise`, `s_churn`, `order`, `r`, `solver_type`; those of the rule's fields.

    Raises:
        ValueError: unknown name, or an option out of its range; the nearest match is offered.
        TypeError: an option that the sampler does not have, or of the wrong type.
    """
    if isinstance(name, Rule):
        if options:
            raise TypeError(f"options {', '.join(options)} were given with a finished rule, {name!r}; set them there")
        return name
    if not isinstance(name, str):
        raise TypeError(f"sampler must be a name or a Rule, got {name!r}; names: {', '.join(SAMPLERS)}")
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler: it must be {one_of(name, SAMPLERS)}")
    entry = SAMPLERS[name]
    for key in options:
        if key not in entry.options:
            raise TypeError(f"{name} has no option {key!r}: it must be {one_of(key, entry.options) if entry.options else 'left out, there are none'}")
    return entry.rule(**{**entry.defaults, **options})
