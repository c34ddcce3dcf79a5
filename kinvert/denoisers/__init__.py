"""Denoisers: the protocol, adapters, guidance, masks, and exact denoisers to test with."""

from kinvert.denoisers.analytic import Dataset, Gaussian, GaussianMixture
from kinvert.denoisers.cfg import Cfg, StepCfg, kept_cfg, refuse_history, step_cfg
from kinvert.denoisers.guidance import Guidance, guide
from kinvert.denoisers.mask import Masked, resize_mask
from kinvert.denoisers.parametrization import (
    Preconditioned,
    from_edm,
    from_eps,
    from_v,
    from_velocity,
    from_x0,
)
from kinvert.denoisers.protocol import BoundDenoiser, Denoiser, Guided, expand

__all__ = [
    "BoundDenoiser",
    "Cfg",
    "Dataset",
    "Denoiser",
    "Gaussian",
    "GaussianMixture",
    "Guidance",
    "Guided",
    "Masked",
    "Preconditioned",
    "StepCfg",
    "expand",
    "from_edm",
    "from_eps",
    "from_v",
    "from_velocity",
    "from_x0",
    "guide",
    "kept_cfg",
    "refuse_history",
    "resize_mask",
    "step_cfg",
]
