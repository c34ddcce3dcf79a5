"""A host for the nodes: exactly the names of `host.CALLS`, with the meaning that ComfyUI gives them.

Its conditioning belongs to the whole batch: a call of the model for other rows than those of the batch is an error, and
so are two noise levels in one call.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

TABLE = torch.linspace(-3.5, 2.7, 1000).exp()
SCALE = 0.2


class StoppedError(Exception):
    """What the host raises when the user stops a workflow."""


class Eps:
    """Noise levels of a model in variance-exploding coordinates."""

    sigmas = TABLE
    sigma_max = TABLE[-1]

    def percent_to_sigma(self, p: float) -> float:
        return float(self.sigmas[round((1 - p) * 999)])

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, most: bool) -> Tensor:
        return latent + noise * ((1 + sigma**2).sqrt() if most else sigma)

    def undo(self, sigma: float, x: Tensor) -> Tensor:
        return x


class CONST:
    """Noise levels of a flow model."""

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, most: bool) -> Tensor:
        return sigma * noise + (1 - sigma) * latent


class Flow(CONST):
    sigmas = torch.linspace(0.001, 1, 1000)
    sigma_max = torch.tensor(1.0)
    noise_scale = 1.0

    def percent_to_sigma(self, p: float) -> float:
        return 1 - p

    def undo(self, sigma: float, x: Tensor) -> Tensor:
        return x / (1 - sigma)


class IMG_TO_IMG(Eps):  # noqa: N801
    pass


class IMG_TO_IMG_FLOW(CONST):  # noqa: N801
    pass


@dataclass(eq=False)
class Nested:
    """A latent of parts."""

    parts: list[Tensor]
    is_nested: bool = True

    def unbind(self) -> list[Tensor]:
        return self.parts

    def float(self) -> Nested:
        return Nested([part.float() for part in self.parts])


@dataclass(eq=False)
class Base:
    """The model inside a MODEL. Its network is exact for a host; `calls` has the rows of each evaluation."""

    model_sampling: Any
    manual_cast_dtype: torch.dtype | None = None
    calls: list[int] = field(default_factory=list)

    def process_latent_in(self, latent: Tensor) -> Tensor:
        return latent * SCALE

    def process_latent_out(self, x: Tensor) -> Tensor:
        return x / SCALE

    def denoised(self, x: Tensor, sigma: Tensor, shift: Tensor) -> Tensor:
        """A smooth denoiser, moved by the prompt of each row."""
        s, shift = (value.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) for value in (sigma, shift))
        a = 1 - s if isinstance(self.model_sampling, CONST) else torch.ones_like(s)
        return a * x / (a * a + 4 * s * s) + 0.4 * torch.tanh(x + shift) * s / (1 + s)


@dataclass(eq=False)
class Model:
    """A MODEL."""

    model: Base
    model_options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def get_model_object(self, name: str) -> Any:
        channels = SimpleNamespace(process_in=self.model.process_latent_in, latent_channels=4)
        return {"model_sampling": self.model.model_sampling, "latent_format": channels}[name]

    def model_dtype(self) -> torch.dtype:
        return self.dtype


def model(kind: str = "eps", **more: Any) -> Model:
    return Model(Base({"eps": Eps, "flow": Flow, "image": IMG_TO_IMG}[kind]()), **more)


@dataclass(eq=False)
class KSAMPLER:
    sampler_function: Any

    def max_denoise(self, guider: Any, sigmas: Tensor) -> bool:
        return float(sigmas[0]) >= 0.99999 * float(guider.inner_model.model_sampling.sigma_max)


@dataclass(eq=False)
class Inner:
    """What the host hands to a sampler as its model: guidance and mask, for the whole batch."""

    inner_model: Any
    positive: Tensor
    negative: Tensor
    cfg: float
    image: Tensor

    def __call__(
        self, x: Tensor, sigma: Tensor, denoise_mask: Tensor | None, model_options: Any, seed: int | None
    ) -> Tensor:
        base = self.inner_model.inner_model
        if len(x) != len(self.image) or sigma.dtype != torch.float32 or len(set(sigma.tolist())) != 1:
            raise RuntimeError(f"prepared for {len(self.image)} rows and one level, got {len(x)} and {sigma}")
        base.calls.append(len(x))
        if denoise_mask is not None:
            kept = base.model_sampling.noise_scaling(sigma[0], 0 * x, self.image, False)
            x = denoise_mask * x + (1 - denoise_mask) * kept
        cond, uncond = (base.denoised(x, sigma, shift) for shift in (self.positive, self.negative))
        out = uncond + self.cfg * (cond - uncond)
        for function in model_options.get("sampler_post_cfg_function", []):
            out = function({"denoised": out, "uncond_denoised": uncond, "cond_denoised": cond})
        return out if denoise_mask is None else denoise_mask * out + (1 - denoise_mask) * self.image


def sample_custom(
    model: Model, noise: Any, cfg: float, sampler: KSAMPLER, sigmas: Tensor, positive: Tensor, negative: Tensor,
    latent_image: Any, noise_mask: Tensor | None = None, callback: Any = None, disable_pbar: bool = False,
    seed: int | None = None,
) -> Any:  # fmt: skip
    base, nested = model.model, getattr(latent_image, "is_nested", False)
    shapes = [part.shape for part in latent_image.unbind()] if nested else []
    latent = pack(latent_image.parts) if nested else latent_image
    noise = pack(noise.parts) if nested else noise
    if latent.dtype != torch.float32:
        raise RuntimeError(f"old hosts sample in the dtype of the latent, which is {latent.dtype}")
    image = base.process_latent_in(latent)
    mask = None
    if noise_mask is not None:
        mask = noise_mask.reshape(-1, 1, *noise_mask.shape[-2:])
        mask = interpolate(mask, latent.shape[-2:], mode="bilinear").expand(-1, latent.shape[1], -1, -1)
        mask = mask[torch.arange(len(latent)) % len(mask)]
    guider = SimpleNamespace(inner_model=base, model_patcher=model)
    inner = Inner(guider, positive, negative, cfg, image)
    x = base.model_sampling.noise_scaling(sigmas[0], noise, image, sampler.max_denoise(guider, sigmas))
    steps = len(sigmas) - 1
    told = None if callback is None else (lambda d: callback(d["i"], d["denoised"], d["x"], steps))
    arguments = {"model_options": model.model_options, "seed": seed, "denoise_mask": mask}
    x = sampler.sampler_function(inner, x, sigmas, extra_args=arguments, callback=told, disable=disable_pbar)
    out = base.process_latent_out(base.model_sampling.undo(float(sigmas[-1]), x))
    return Nested(unpack_latents(out, shapes)) if nested else out


def pack(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.reshape(len(part), 1, -1) for part in parts], -1)


def unpack_latents(x: Tensor, shapes: list[Any]) -> list[Tensor]:
    sizes = [shape[1:].numel() for shape in shapes]
    return [part.reshape(shape) for part, shape in zip(x.split(sizes, -1), shapes, strict=True)]


def calculate_sigmas(sampling: Any, name: str, steps: int) -> Tensor:
    """A falling schedule; "long" has two steps more than asked for, "twice" has a level twice."""
    if name == "long":
        steps += 2
    levels = sampling.sigmas[torch.linspace(999, 0 if steps == 1 else 999 // steps, steps).long()]
    levels = torch.cat([levels, torch.zeros(1)])
    return torch.cat([levels[:2], levels[1:]]) if name == "twice" else levels


class Host:
    """The modules, and what happened in them."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, int]] = []
        self.stop_after: int | None = None
        self.checks = 0

    def check(self) -> None:
        self.checks += 1
        if self.stop_after is not None and self.checks > self.stop_after:
            raise StoppedError

    def prepare_callback(self, model: Model, steps: int) -> Any:
        return lambda step, denoised, x, total: self.shown.append((step + 1, total))

    def names(self) -> dict[str, Any]:
        def post_cfg(options: Any, function: Any, disable_cfg1_optimization: bool = False) -> Any:
            functions = [*options.get("sampler_post_cfg_function", []), function]
            return {**options, "sampler_post_cfg_function": functions, "disable_cfg1_optimization": True}

        def zeros(latent: Any) -> Any:
            return Nested([0 * p for p in latent.parts]) if isinstance(latent, Nested) else torch.zeros_like(latent)

        return {
            "comfy.sample.sample_custom": sample_custom,
            "comfy.sample.fix_empty_latent_channels": lambda model, latent: latent,
            "comfy.sample.prepare_empty_noise": zeros,
            "comfy.samplers.KSAMPLER": KSAMPLER,
            "comfy.samplers.KSampler": SimpleNamespace(DISCARD_PENULTIMATE_SIGMA_SAMPLERS={"dpm_2", "uni_pc"}),
            "comfy.samplers.calculate_sigmas": calculate_sigmas,
            "comfy.samplers.SCHEDULER_NAMES": ["even", "long", "twice"],
            "comfy.model_patcher.set_model_options_post_cfg_function": post_cfg,
            "comfy.model_sampling.CONST": CONST,
            "comfy.model_sampling.IMG_TO_IMG": IMG_TO_IMG,
            "comfy.model_sampling.IMG_TO_IMG_FLOW": IMG_TO_IMG_FLOW,
            "comfy.model_management.throw_exception_if_processing_interrupted": self.check,
            "comfy.model_management.get_torch_device": lambda: torch.device("cpu"),
            "comfy.utils.unpack_latents": unpack_latents,
            "comfy.nested_tensor.NestedTensor": Nested,
            "latent_preview.prepare_callback": self.prepare_callback,
        }

    def install(self, monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...] = ()) -> None:
        """Put the modules where the nodes look for them."""
        modules: dict[str, ModuleType] = {"comfy": ModuleType("comfy")}
        for name, value in self.names().items():
            module, _, attribute = name.rpartition(".")
            if name not in without:
                setattr(modules.setdefault(module, ModuleType(module)), attribute, value)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)


def latent(batch: int = 2, seed: int = 0, channels: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"samples": torch.randn(batch, channels, 6, 8, generator=generator) / SCALE}


def run(key: str, **inputs: Any) -> tuple[Any, ...]:
    """Run a node as the host does."""
    from kinvert.adapters.comfyui import NODE_CLASS_MAPPINGS

    cls = NODE_CLASS_MAPPINGS[key]
    return getattr(cls(), cls.FUNCTION)(**inputs)


POSITIVE, NEGATIVE = torch.tensor([0.3, 1.5]), torch.tensor([-0.5, -1.0])
"""Prompts: one number for each row of a batch of two."""


def back(patcher: Model, sampler: Any, sigmas: Tensor, samples: Any, cfg: float = 1.0, noise: Any = None) -> Any:
    """Sample in the host without noise, by a sampler of kinvert or its name."""
    sampler = run("KinvertSampler", sampler_name=sampler)[0] if isinstance(sampler, str) else sampler
    noise = torch.zeros_like(samples) if noise is None else noise
    return sample_custom(patcher, noise, cfg, sampler, sigmas, POSITIVE, NEGATIVE, samples, seed=4)


def error(result: Tensor, wanted: Tensor) -> float:
    """Rms of the difference, in parts of the rms of what is wanted."""
    return float(((result - wanted).double().square().mean() / wanted.double().square().mean()).sqrt())
