"""Denoisers: the protocol, adapters, guidance, masks, and exact denoisers to test with."""

from kinvert.denoisers.analytic import Dataset, Gaussian, GaussianMixture
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
from kinvert.denoisers.protocol import Denoiser, Guided, expand

__all__ = [
    "Dataset",
    "Denoiser",
    "Gaussian",
    "GaussianMixture",
    "Guidance",
    "Guided",
    "Masked",
    "Preconditioned",
    "expand",
    "from_edm",
    "from_eps",
    "from_v",
    "from_velocity",
    "from_x0",
    "guide",
    "resize_mask",
]
