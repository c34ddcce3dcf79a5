"""k-diffusion code, unchanged but for the import: `import kinvert.adapters.k_diffusion as K`.

`K.sampling` has the functions `sample_*` and the schedules, `K.external` the wrappers of networks, `K.utils` a helper.
Their names are here as well. k-diffusion itself is not needed.
"""

from __future__ import annotations

from kinvert.adapters.k_diffusion import external as external
from kinvert.adapters.k_diffusion import sampling as sampling
from kinvert.adapters.k_diffusion import utils as utils
from kinvert.adapters.k_diffusion.external import CompVisDenoiser as CompVisDenoiser
from kinvert.adapters.k_diffusion.external import CompVisVDenoiser as CompVisVDenoiser
from kinvert.adapters.k_diffusion.external import Denoiser as Denoiser
from kinvert.adapters.k_diffusion.external import DiscreteEpsDDPMDenoiser as DiscreteEpsDDPMDenoiser
from kinvert.adapters.k_diffusion.external import DiscreteSchedule as DiscreteSchedule
from kinvert.adapters.k_diffusion.external import DiscreteVDDPMDenoiser as DiscreteVDDPMDenoiser
from kinvert.adapters.k_diffusion.external import OpenAIDenoiser as OpenAIDenoiser
from kinvert.adapters.k_diffusion.external import VDenoiser as VDenoiser
from kinvert.adapters.k_diffusion.sampling import BatchedBrownianTree as BatchedBrownianTree
from kinvert.adapters.k_diffusion.sampling import BrownianTreeNoiseSampler as BrownianTreeNoiseSampler
from kinvert.adapters.k_diffusion.sampling import append_dims as append_dims
from kinvert.adapters.k_diffusion.sampling import append_zero as append_zero
from kinvert.adapters.k_diffusion.sampling import default_noise_sampler as default_noise_sampler
from kinvert.adapters.k_diffusion.sampling import get_ancestral_step as get_ancestral_step
from kinvert.adapters.k_diffusion.sampling import get_sigmas_exponential as get_sigmas_exponential
from kinvert.adapters.k_diffusion.sampling import get_sigmas_karras as get_sigmas_karras
from kinvert.adapters.k_diffusion.sampling import get_sigmas_polyexponential as get_sigmas_polyexponential
from kinvert.adapters.k_diffusion.sampling import get_sigmas_vp as get_sigmas_vp
from kinvert.adapters.k_diffusion.sampling import sample_dpm_2 as sample_dpm_2
from kinvert.adapters.k_diffusion.sampling import sample_dpm_2_ancestral as sample_dpm_2_ancestral
from kinvert.adapters.k_diffusion.sampling import sample_dpm_adaptive as sample_dpm_adaptive
from kinvert.adapters.k_diffusion.sampling import sample_dpm_fast as sample_dpm_fast
from kinvert.adapters.k_diffusion.sampling import sample_dpmpp_2m as sample_dpmpp_2m
from kinvert.adapters.k_diffusion.sampling import sample_dpmpp_2m_sde as sample_dpmpp_2m_sde
from kinvert.adapters.k_diffusion.sampling import sample_dpmpp_2s_ancestral as sample_dpmpp_2s_ancestral
from kinvert.adapters.k_diffusion.sampling import sample_dpmpp_3m_sde as sample_dpmpp_3m_sde
from kinvert.adapters.k_diffusion.sampling import sample_dpmpp_sde as sample_dpmpp_sde
from kinvert.adapters.k_diffusion.sampling import sample_euler as sample_euler
from kinvert.adapters.k_diffusion.sampling import sample_euler_ancestral as sample_euler_ancestral
from kinvert.adapters.k_diffusion.sampling import sample_heun as sample_heun
from kinvert.adapters.k_diffusion.sampling import sample_lms as sample_lms
from kinvert.adapters.k_diffusion.sampling import to_d as to_d

__all__ = [
    "BatchedBrownianTree",
    "BrownianTreeNoiseSampler",
    "CompVisDenoiser",
    "CompVisVDenoiser",
    "Denoiser",
    "DiscreteEpsDDPMDenoiser",
    "DiscreteSchedule",
    "DiscreteVDDPMDenoiser",
    "OpenAIDenoiser",
    "VDenoiser",
    "append_dims",
    "append_zero",
    "default_noise_sampler",
    "external",
    "get_ancestral_step",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_adaptive",
    "sample_dpm_fast",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
    "sampling",
    "to_d",
    "utils",
]


def __getattr__(name: str) -> object:
    if not name.startswith("sample_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(sampling, name)
