"""The registry of samplers: it maps each public name to a rule and its defaults. Each family of rules is one file.

`register` adds a sampler of your own. All tests, benchmarks and listings of the registry then include it. Every file of
this package is imported, so a new one that calls `register` needs no entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kinvert._discover import import_all
from kinvert.checks import suggestion
from kinvert.rules.adaptive import DPMAdaptive
from kinvert.rules.ancestral import LCM, DPM2Ancestral, DPMpp2SAncestral, EulerAncestral
from kinvert.rules.base import Rule, StepBuilder, interpolate, options_of, slope, weighted_sum
from kinvert.rules.dpm_solver import DPMFast
from kinvert.rules.dpmpp import DPMpp2M, DPMpp2MSDE, DPMpp3MSDE, DPMppSDE
from kinvert.rules.er_sde import ERSDE
from kinvert.rules.exponential import RES2S, RES3S, ExponentialAdams, HochbruckOstermann5, Krogstad4, PhiRungeKutta
from kinvert.rules.flow import Flow
from kinvert.rules.guided import (
    CFGppUD10AB,
    DPMpp2MCFGpp,
    DPMpp2SAncestralCFGpp,
    EulerAncestralCFGpp,
    GradientEstimationCFGpp,
    ResMultistepCFGpp,
)
from kinvert.rules.inverse import DDIMInverse, DirectInversion
from kinvert.rules.multistep import DEIS, IPNDM, IPNDMV, LMS, GradientEstimation
from kinvert.rules.names import REGISTRIES, unknown_sampler
from kinvert.rules.phi_tableau import PhiTableau
from kinvert.rules.predictor_corrector import SASolver, UniPC
from kinvert.rules.rectified import FireFlow, RFSolver, UniInv
from kinvert.rules.res import ResMultistep
from kinvert.rules.restart import Restart
from kinvert.rules.reversible import BDIA, EDICT, OBELM, Leapfrog, McCallumFoster, ReversibleHeun
from kinvert.rules.runge_kutta import DPM2, Euler, Heun, HeunPP2
from kinvert.rules.seeds import Seeds2, Seeds3
from kinvert.rules.shark import ShARK
from kinvert.rules.tableau import LawsonRungeKutta, RungeKutta, Tableau
from kinvert.rules.tables import PHI_TABLEAUS, TABLEAUS
from kinvert.showing.registry import Registry

__all__ = [
    "BDIA",
    "DEIS",
    "DPM2",
    "EDICT",
    "ERSDE",
    "IPNDM",
    "IPNDMV",
    "LCM",
    "LMS",
    "OBELM",
    "RES2S",
    "RES3S",
    "SAMPLERS",
    "CFGppUD10AB",
    "DDIMInverse",
    "DPM2Ancestral",
    "DPMAdaptive",
    "DPMFast",
    "DPMpp2M",
    "DPMpp2MCFGpp",
    "DPMpp2MSDE",
    "DPMpp2SAncestral",
    "DPMpp2SAncestralCFGpp",
    "DPMpp3MSDE",
    "DPMppSDE",
    "DirectInversion",
    "Euler",
    "EulerAncestral",
    "EulerAncestralCFGpp",
    "ExponentialAdams",
    "FireFlow",
    "Flow",
    "GradientEstimation",
    "GradientEstimationCFGpp",
    "Heun",
    "HeunPP2",
    "HochbruckOstermann5",
    "Krogstad4",
    "LawsonRungeKutta",
    "Leapfrog",
    "McCallumFoster",
    "PhiRungeKutta",
    "PhiTableau",
    "RFSolver",
    "ResMultistep",
    "ResMultistepCFGpp",
    "Restart",
    "ReversibleHeun",
    "Rule",
    "RungeKutta",
    "SASolver",
    "SamplerEntry",
    "Seeds2",
    "Seeds3",
    "ShARK",
    "StepBuilder",
    "Tableau",
    "UniInv",
    "UniPC",
    "interpolate",
    "register",
    "sampler",
    "slope",
    "weighted_sum",
]


@dataclass(frozen=True)
class SamplerEntry:
    """A registered sampler; `rule(**(defaults | options))` builds it.

    Attributes:
        name: the public name.
        rule: the class of the rule.
        defaults: the options that differ from the defaults of the class.
    """

    name: str
    rule: type[Rule]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """The options with their default values."""
        return {f.name: self.defaults.get(f.name, f.default) for f in options_of(self.rule)}

    @property
    def summary(self) -> str:
        """The first sentence of the rule's docstring."""
        return (self.rule.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")

    @property
    def source(self) -> str:
        """The first paper that the rule's docstring names, or ""."""
        after = (self.rule.__doc__ or "").partition("Source: ")[2]
        return " ".join(after.partition("\n\n")[0].partition("Source: ")[0].split())


SAMPLERS: Registry[SamplerEntry] = Registry(what="samplers", place="ki.SAMPLERS")
REGISTRIES["sampler"] = SAMPLERS


def register(rule: type[Rule], /, name: str | None = None, **defaults: Any) -> type[Rule]:
    """Add a rule to the registry; usable as a decorator.

    Args:
        rule: the class of the rule.
        name: the public name; None takes the rule's own.
        **defaults: defaults of options that differ from the defaults of the class.

    Returns:
        The rule.

    Raises:
        ValueError: another rule has the name.
        TypeError: the name is not given, and the rule computes its own from its options.
    """
    own: object = rule.name
    name = name or (own if isinstance(own, str) else None)
    if name is None:
        raise TypeError(f"{rule.__name__} has no name of its own; give one, e.g. register({rule.__name__}, 'my_name')")
    if name in SAMPLERS and SAMPLERS[name].rule is not rule:
        raise ValueError(f"the sampler name {name!r} is taken by {SAMPLERS[name].rule.__name__}; choose another")
    SAMPLERS[name] = SamplerEntry(name, rule, defaults)
    return rule


for _rule in (
    *(Euler, Heun, DPM2, HeunPP2, LMS, IPNDM, IPNDMV, DEIS, GradientEstimation, DPMFast, DPMAdaptive),
    *(EulerAncestral, DPM2Ancestral, DPMpp2SAncestral, LCM, DPMpp2M, DPMppSDE, DPMpp2MSDE, DPMpp3MSDE),
    *(ResMultistep, Seeds2, Seeds3, ShARK, ERSDE, SASolver, UniPC),
    *(EulerAncestralCFGpp, DPMpp2SAncestralCFGpp, DPMpp2MCFGpp, ResMultistepCFGpp, GradientEstimationCFGpp),
    CFGppUD10AB,
    *(RES2S, RES3S, Krogstad4, HochbruckOstermann5, ExponentialAdams, RFSolver, FireFlow),
    *(EDICT, BDIA, OBELM, ReversibleHeun, Leapfrog, DDIMInverse),
):
    register(_rule)
register(EulerAncestral, "ddim", eta=0.0)
register(EulerAncestral, "ddpm")
register(ResMultistep, "res_multistep_ancestral", eta=1.0)
register(EulerAncestralCFGpp, "euler_cfg_pp", eta=0.0)
register(ResMultistepCFGpp, "res_multistep_ancestral_cfg_pp", eta=1.0)
register(ExponentialAdams, "res_3m", order=3)
register(DPMpp3MSDE, "dpmpp_3m", eta=0.0, solver_type="midpoint")
register(RES2S, "exp_heun_2_x0", c2=1.0)
register(Seeds2, "exp_heun_2_x0_sde", r=1.0, solver_type="phi_2")
register(DPMpp2MSDE, "dpmpp_2m_sde_heun", solver_type="heun")
register(UniPC, "uni_pc_bh2", variant="bh2")
register(SASolver, "sa_solver_pece", use_pece=True)
register(McCallumFoster, rule=Heun())
register(Restart, rule=Heun())
register(McCallumFoster, "rex_sde", rule=ShARK(), coupling="data")
for _tableau in TABLEAUS:
    register(RungeKutta, _tableau.name, tableau=_tableau)
for _phi_tableau in PHI_TABLEAUS:
    register(PhiRungeKutta, _phi_tableau.name, tableau=_phi_tableau)
for _name in ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"):  # in hosts the ending names a device
    register(SAMPLERS[_name].rule, f"{_name}_gpu", **SAMPLERS[_name].defaults)


def sampler(name: str | Rule, **options: Any) -> Rule:
    """Build a sampler by its public name, with the options that k-diffusion and ComfyUI use.

    Args:
        name: a name of `SAMPLERS`, or a rule, which is returned unchanged.
        **options: options of the rule, e.g. `eta`, `s_noise`, `s_churn`, `order`, `r`, `solver_type`.

    Returns:
        The rule. Its `name` is the name that was asked for, in copies too.

    Raises:
        ValueError: an unknown name (the message suggests the nearest), or an option out of its range.
        TypeError: an option that the sampler does not have, or a value of the wrong type.
    """
    if isinstance(name, Rule):
        if options:
            raise TypeError(f"options {', '.join(options)} were given with a finished rule, {name!r}; set them there")
        return name
    if not isinstance(name, str):
        raise TypeError(f"sampler must be a name or a Rule, got {name!r}; e.g. 'euler', ki.SAMPLERS has all names")
    if name not in SAMPLERS:
        raise ValueError(unknown_sampler(name))
    entry = SAMPLERS[name]
    for key in options.keys() - entry.options.keys():
        raise TypeError(f"{name} has no option {key!r}; {suggestion(key, entry.options)}")
    rule = entry.rule(**{**entry.defaults, **options})
    return rule if rule.name == name else replace(rule, named=name)


import_all(__name__, __path__)
