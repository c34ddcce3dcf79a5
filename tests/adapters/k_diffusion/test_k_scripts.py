"""Scripts as users of k-diffusion have them, which run here with another import."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from test_k_wrappers import Network
from torch import Tensor, nn

import kinvert.adapters.k_diffusion as K

SAMPLERS = [
    ("DPM++ 2M", "sample_dpmpp_2m", {"scheduler": "karras"}),
    ("DPM++ SDE", "sample_dpmpp_sde", {"scheduler": "karras", "second_order": True, "brownian_noise": True}),
    ("DPM++ 2M SDE", "sample_dpmpp_2m_sde", {"scheduler": "exponential", "brownian_noise": True}),
    ("DPM++ 2M SDE Heun", "sample_dpmpp_2m_sde", {"brownian_noise": True, "solver_type": "heun"}),
    ("DPM++ 2S a", "sample_dpmpp_2s_ancestral", {"scheduler": "karras", "uses_ensd": True}),
    ("DPM++ 3M SDE", "sample_dpmpp_3m_sde", {"scheduler": "exponential", "discard_next_to_last_sigma": True}),
    ("Euler a", "sample_euler_ancestral", {"uses_ensd": True}),
    ("Euler", "sample_euler", {}),
    ("LMS", "sample_lms", {}),
    ("Heun", "sample_heun", {"second_order": True}),
    ("DPM2", "sample_dpm_2", {"scheduler": "karras", "discard_next_to_last_sigma": True}),
    ("DPM2 a", "sample_dpm_2_ancestral", {"discard_next_to_last_sigma": True}),
    ("DPM fast", "sample_dpm_fast", {"uses_ensd": True}),
    ("DPM adaptive", "sample_dpm_adaptive", {"uses_ensd": True}),
]
"""Label, function, options: a program offers those samplers whose function is there."""


class CFGDenoiser(nn.Module):
    """Guidance around a wrapper, with both branches in one batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner_model = model
        self.step = 0

    def forward(self, x: Tensor, sigma: Tensor, uncond: Tensor, cond: Tensor, cond_scale: float) -> Tensor:
        both = self.inner_model(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=torch.cat([uncond, cond]))
        first, second = both.chunk(2)
        self.step += 1
        return first + (second - first) * cond_scale


class Job:
    """Text to image as a user interface does it: functions by name, arguments by their signatures."""

    def __init__(self, function: str, options: dict[str, Any], settings: dict[str, float]) -> None:
        self.func, self.options, self.settings = getattr(K.sampling, function), options, settings
        self.wrap = K.external.CompVisDenoiser(Network(), quantize=False)
        self.model = CFGDenoiser(self.wrap)
        self.steps_seen: list[int] = []
        self.last: Tensor | None = None

    def sigmas(self, steps: int) -> Tensor:
        steps += bool(self.options.get("discard_next_to_last_sigma"))
        low, high = self.wrap.sigmas[0].item(), self.wrap.sigmas[-1].item()
        scheduler = self.options.get("scheduler")
        if scheduler:
            sigmas = getattr(K.sampling, f"get_sigmas_{scheduler}")(
                n=steps, sigma_min=low, sigma_max=high, device="cpu"
            )
        else:
            sigmas = self.wrap.get_sigmas(steps)
        if self.options.get("discard_next_to_last_sigma"):
            sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
        return sigmas

    def callback_state(self, d: dict[str, Any]) -> None:
        self.steps_seen.append(d["i"])
        self.last = d["denoised"]

    def arguments(self, x: Tensor, sigmas: Tensor, steps: int, seeds: list[int]) -> dict[str, Any]:
        parameters = inspect.signature(self.func).parameters
        kwargs = {name: value for name, value in self.settings.items() if name in parameters}
        positive = sigmas[sigmas > 0]
        if "sigma_min" in parameters:
            kwargs |= {"sigma_min": self.wrap.sigmas[0].item(), "sigma_max": self.wrap.sigmas[-1].item()}
        if "n" in parameters:
            kwargs["n"] = steps
        if "sigmas" in parameters:
            kwargs["sigmas"] = sigmas
        if self.options.get("brownian_noise"):
            kwargs["noise_sampler"] = K.sampling.BrownianTreeNoiseSampler(x, positive.min(), sigmas.max(), seed=seeds)
        if self.options.get("solver_type", "midpoint") == "heun":
            kwargs["solver_type"] = "heun"
        return kwargs

    def sample(self, steps: int, seeds: list[int]) -> Tensor:
        sigmas = self.sigmas(steps)
        x = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        x = x * sigmas[0]
        cond = torch.full((len(seeds), 1, 1, 1), 0.1)
        extra = {"cond": cond, "uncond": 0 * cond, "cond_scale": 2.0}
        kwargs = self.arguments(x, sigmas, steps, seeds)
        return self.func(self.model, x, extra_args=extra, disable=False, callback=self.callback_state, **kwargs)


@pytest.mark.parametrize(("label", "function", "options"), SAMPLERS, ids=[label for label, _, _ in SAMPLERS])
def test_a_user_interface_runs_unchanged(label: str, function: str, options: dict[str, Any]) -> None:
    assert hasattr(K.sampling, function), label
    job = Job(function, options, {"eta": 0.8, "s_churn": 2.0, "s_tmin": 0.1, "s_noise": 1.0})
    torch.manual_seed(0)
    image = job.sample(9, [1, 2])
    assert image.shape == (2, 4, 8, 8) and bool(torch.isfinite(image).all())
    assert job.steps_seen == list(range(len(job.steps_seen))) and job.last is not None
    if "sigmas" in inspect.signature(job.func).parameters:
        assert len(job.steps_seen) == 9
        assert job.model.step == 9 or (job.model.step == 17 and ("2" in label or options.get("second_order")))
        if function != "sample_lms":  # the last step goes to sigma = 0
            torch.testing.assert_close(image, job.last, rtol=1e-4, atol=1e-4)


def test_the_sampling_script_of_k_diffusion() -> None:
    """A network with EDM's preconditioning, a schedule, `sample_lms`."""
    inner = Network().eval()
    model = K.Denoiser(inner, sigma_data=0.5)
    sigma_min, sigma_max = 1e-2, 80.0
    torch.manual_seed(0)

    @torch.no_grad()
    def run() -> Tensor:
        sigmas = K.sampling.get_sigmas_karras(10, sigma_min, sigma_max, rho=7.0, device="cpu")
        x = torch.randn([3, 4, 8, 8]) * sigma_max
        return K.sampling.sample_lms(model, x, sigmas, disable=True)

    assert bool(torch.isfinite(run()).all())


def test_the_clip_guided_script_of_k_diffusion() -> None:
    """A model with a gradient in it, and static thresholding."""

    def make_cond_model_fn(model: Any, cond_fn: Any) -> Any:
        def model_fn(x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                denoised = model(x, sigma, **kwargs)
                cond_grad = cond_fn(x, sigma, denoised=denoised, **kwargs).detach()
                return denoised.detach() + cond_grad * K.utils.append_dims(sigma**2, x.ndim)

        return model_fn

    def make_static_thresh_model_fn(model: Any, value: float = 1.0) -> Any:
        return lambda x, sigma, **kwargs: model(x, sigma, **kwargs).clamp(-value, value)

    def cond_fn(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
        return -torch.autograd.grad((denoised - 0.5).square().sum() * 0.1, x)[0]

    model = make_static_thresh_model_fn(make_cond_model_fn(K.Denoiser(Network(), sigma_data=0.5), cond_fn))
    sigmas = K.sampling.get_sigmas_karras(6, 1e-2, 80.0)
    x = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0)) * sigmas[0]
    image = K.sampling.sample_dpmpp_2s_ancestral(model, x, sigmas, eta=1.0, disable=True)
    assert float(image.abs().max()) <= 1 and not image.requires_grad
