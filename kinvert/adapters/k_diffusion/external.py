r"""Wrappers of networks with the interfaces of k-diffusion: thin modules over the denoisers of `kinvert.denoisers`.

Each is `model(x, sigma, **extra_args) -> denoised`, a denoiser of every verb of kinvert as well. Those of DDPM networks
have `sigmas`, `log_sigmas`, `get_sigmas(n)`, `sigma_to_t` and `t_to_sigma`. Their attribute `levels` is what
`ki.schedule` takes. Training losses are not offered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kinvert import levels as noise_levels
from kinvert.denoisers import Preconditioned
from kinvert.denoisers.dtypes import dtype_of
from kinvert.denoisers.parametrization import Prediction
from kinvert.levels import Levels

__all__ = [
    "CompVisDenoiser",
    "CompVisVDenoiser",
    "Denoiser",
    "DiscreteEpsDDPMDenoiser",
    "DiscreteSchedule",
    "DiscreteVDDPMDenoiser",
    "OpenAIDenoiser",
    "VDenoiser",
]


@dataclass(frozen=True)
class _SigmaAsTime:
    """The map of networks that are told sigma itself."""

    sigma_data: float

    def timestep(self, sigma: Tensor, quantize: bool = False) -> Tensor:
        """Return sigma."""
        return sigma


class _Wrapper(nn.Module, ABC):
    """A network as a denoiser."""

    prediction: ClassVar[Prediction]

    def __init__(self, inner_model: Any, levels: Levels, quantize: bool = False) -> None:
        super().__init__()
        self.inner_model = inner_model
        self.levels, self.quantize = levels, quantize
        self.sigma_data = levels.sigma_data

    @property
    def network_dtype(self) -> torch.dtype | None:
        """The dtype that the network is called in; None stands for x's dtype."""
        return dtype_of(self.inner_model)

    @property
    def times(self) -> Any:
        """The map from sigma to the network's time."""
        return self.levels

    def predict(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """Return what the network predicts."""
        return self.inner_model(x, t, **kwargs)

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """Return the denoised input, from input (batch, *event) and sigma (batch,)."""
        return Preconditioned(
            self._predict, self.times, self.prediction, quantize=self.quantize, dtype=self.network_dtype
        )(input, sigma, **kwargs)

    def _predict(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return self.predict(x, t.long() if self.quantize else t, **kwargs)

    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        """Return the network's time of a noise level; a whole index if `quantize`, else interpolated in log sigma."""
        quantize = self.quantize if quantize is None else quantize
        t = self.levels.timestep(sigma, quantize=quantize)
        return t.long() if quantize else t

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Return the noise level of a network's time."""
        return self.levels.sigma(t if t.is_floating_point() else t.float())


class Denoiser(_Wrapper):
    """A network F with the preconditioning of EDM, called with sigma itself as its time, as k-diffusion's networks are.

    `weighting` and `scales` are for training, and are not used.
    """

    prediction: ClassVar[Literal["edm"]] = "edm"

    def __init__(self, inner_model: Any, sigma_data: float = 1.0, weighting: Any = "karras", scales: int = 1) -> None:
        super().__init__(inner_model, noise_levels.edm(sigma_data=sigma_data))

    @property
    def times(self) -> _SigmaAsTime:
        """The map from sigma to the network's time."""
        return _SigmaAsTime(self.sigma_data)


class VDenoiser(_Wrapper):
    """A network of v-diffusion, which predicts v at `t = 2 / pi atan(sigma)`: `kinvert.denoisers.from_v`."""

    prediction: ClassVar[Literal["v"]] = "v"

    def __init__(self, inner_model: Any) -> None:
        super().__init__(inner_model, noise_levels.v_diffusion())


class DiscreteSchedule(_Wrapper):
    """What the wrappers of DDPM networks share: the table of noise levels, and its maps. Not to be made itself.

    Args:
        model: the network, called as `predict` of the wrapper says.
        alphas_cumprod: cumulative products abar, 1-D, falling in (0, 1).
        quantize: whether the network is told the index of the nearest level, a whole number, or the interpolated one.
    """

    sigmas: Tensor
    log_sigmas: Tensor

    @abstractmethod
    def __init__(self, model: Any, alphas_cumprod: Tensor, quantize: bool) -> None:
        super().__init__(model, noise_levels.from_alphas_cumprod(alphas_cumprod), bool(quantize))
        sigmas = self.levels.sigmas.to(alphas_cumprod.device, torch.get_default_dtype())
        self.register_buffer("sigmas", sigmas)
        self.register_buffer("log_sigmas", sigmas.log())

    @property
    def sigma_min(self) -> Tensor:
        """The lowest level."""
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        """The highest level."""
        return self.sigmas[-1]

    def get_sigmas(self, n: int | None = None) -> Tensor:
        """Return n levels at uniform times, from the highest to the lowest, and a 0; all of the table for None."""
        last = len(self.levels.sigmas) - 1
        count = last + 1 if n is None else n
        times = torch.linspace(last, 0, count, dtype=torch.float64, device="cpu")
        sigmas = self.levels.sigma(times).to(self.sigmas)
        return torch.cat([sigmas, sigmas.new_zeros(1)])


class DiscreteEpsDDPMDenoiser(DiscreteSchedule):
    """A DDPM network that predicts the noise, called as `model(x, t, **extra_args)`: `kinvert.denoisers.from_eps`."""

    prediction: ClassVar[Literal["eps"]] = "eps"

    def __init__(self, model: Any, alphas_cumprod: Tensor, quantize: bool) -> None:
        super().__init__(model, alphas_cumprod, quantize)


class DiscreteVDDPMDenoiser(DiscreteSchedule):
    """A DDPM network that predicts v, called as `model(x, t, **extra_args)`: `kinvert.denoisers.from_v`."""

    prediction: ClassVar[Literal["v"]] = "v"

    def __init__(self, model: Any, alphas_cumprod: Tensor, quantize: bool) -> None:
        super().__init__(model, alphas_cumprod, quantize)


class OpenAIDenoiser(DiscreteSchedule):
    """A network of OpenAI's guided-diffusion; with `has_learned_sigmas` the first half of its channels is the noise."""

    prediction: ClassVar[Literal["eps"]] = "eps"

    def __init__(
        self,
        model: Any,
        diffusion: Any,
        quantize: bool = False,
        has_learned_sigmas: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(model, torch.as_tensor(diffusion.alphas_cumprod, device=device), quantize)
        self.has_learned_sigmas = has_learned_sigmas

    def predict(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """Return the predicted noise, without the learned variance."""
        output = self.inner_model(x, t, **kwargs)
        return output.chunk(2, dim=1)[0] if self.has_learned_sigmas else output


class CompVisDenoiser(DiscreteSchedule):
    """A network of latent-diffusion (CompVis) that predicts the noise: `model.apply_model(x, t, **extra_args)`.

    Its levels are those of `model.alphas_cumprod`.
    """

    prediction: ClassVar[Literal["eps"]] = "eps"

    def __init__(self, model: Any, quantize: bool = False, device: torch.device | str = "cpu") -> None:
        super().__init__(model, model.alphas_cumprod, quantize)

    def predict(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """Return the predicted noise."""
        return self.inner_model.apply_model(x, t, **kwargs)


class CompVisVDenoiser(DiscreteSchedule):
    """A network of latent-diffusion (CompVis) that predicts v: `model.apply_model(x, t, **extra_args)`.

    Its levels are those of `model.alphas_cumprod`.
    """

    prediction: ClassVar[Literal["v"]] = "v"

    def __init__(self, model: Any, quantize: bool = False, device: torch.device | str = "cpu") -> None:
        super().__init__(model, model.alphas_cumprod, quantize)

    def predict(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """Return the predicted v."""
        return self.inner_model.apply_model(x, t, **kwargs)
