"""Tiny models made of ComfyUI's own classes, for `comfyui.py`; the host is imported by `load_host`.

The network is exact: each pixel of the data, its channels together, is a mixture of Gaussians of standard deviation s,
whose centres m_k the prompt moves. With `x = a x0 + sigma eps` and w_k the posterior weights of the centres,

    D = sum_k w_k (m_k + a s^2 / v (x - a m_k)),   eps = sum_k w_k sigma / v (x - a m_k),   v = a^2 s^2 + sigma^2
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

STUBBED = ("torchvision", "torchaudio", "kornia", "spandrel", "comfy_angle")
SPREAD = 0.5


class _Nothing:
    """Something of a package that is not installed: it may be named, called and inherited from."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> Any:
        return _Nothing()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()


class _Stub(ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Nothing,), {})


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an empty module for packages that the host imports and a run of these models does not use."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] not in STUBBED or _asked_by("transformers"):
            return None
        return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def _asked_by(package: str) -> bool:
    """Tell whether a package asks, which would take a stub for the real thing."""
    frame = sys._getframe(2)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] == package:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def load_host(checkout: Path) -> str:
    """Make the host importable, on the CPU and without a server; return its version."""
    missing = [name for name in STUBBED if importlib.util.find_spec(name) is None]
    sys.meta_path.append(_Stubs())
    for name in missing:
        importlib.import_module(name)
    sys.path.insert(0, str(checkout))
    given, sys.argv = sys.argv, [str(checkout / "main.py"), "--cpu"]
    if importlib.util.find_spec("utils.install_util"):
        importlib.import_module("utils.install_util")
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.samplers
    import comfyui_version

    sys.argv = given
    return str(comfyui_version.__version__)


class Network(torch.nn.Module):
    """The exact network of a kind of model: it returns eps, v or a velocity."""

    def __init__(self, owner: Any, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.dtype, self.owner = kind, dtype, [owner]
        generator = torch.Generator().manual_seed(0)
        self.centres = torch.nn.Parameter(torch.randn(3, 16, generator=generator).to(dtype), requires_grad=False)

    def forward(self, x: Any, t: Tensor, context: Tensor | None = None, control: Any = None, **_: Any) -> Any:
        if not isinstance(x, Tensor):
            return [self._one(part, t, context, control) for part in x]
        return self._one(x, t, context, control)

    def _one(self, x: Tensor, t: Tensor, context: Tensor | None, control: Any) -> Tensor:
        sampling = self.owner[0].model_sampling
        sigma = sampling.sigma(t).to(x.device).reshape(-1, *[1] * (x.ndim - 1))
        x, sigma = x.float(), sigma.float()
        a = 1 - sigma if self.kind == "flow" else torch.ones_like(sigma)
        if self.kind != "flow":
            x = x * (sigma**2 + 1) ** 0.5
        shape = [1, 3, x.shape[1], *[1] * (x.ndim - 2)]
        centres = self.centres[:, : x.shape[1]].float().reshape(shape)
        if context is not None:
            moved = context.float().mean(1)[:, : x.shape[1]]
            centres = centres + moved.reshape(len(moved), 1, -1, *[1] * (x.ndim - 2))
        if control is not None:
            centres = centres + control["middle"][0].float().reshape(-1, 1, *[1] * (x.ndim - 1))[:, :1]
        a1, s1 = a[:, None], sigma[:, None]
        variance = a1**2 * SPREAD**2 + s1**2
        gap = x[:, None] - a1 * centres
        weights = torch.softmax(-(gap**2).sum(2, keepdim=True) / (2 * variance), 1)
        eps = (weights * s1 / variance * gap).sum(1)
        denoised = (weights * (centres + a1 * SPREAD**2 / variance * gap)).sum(1)
        if self.kind == "flow":
            out = eps - denoised
        elif self.kind == "v":
            out = (eps - sigma * denoised) / (sigma**2 + 1) ** 0.5
        else:
            out = eps
        return out.to(self.dtype)


def model(kind: str = "eps", dtype: torch.dtype = torch.float32) -> Any:
    """Return a MODEL: "eps", "v" or "flow" (with the shift 3 of Stable Diffusion 3)."""
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models_base

    types = comfy.model_base.ModelType
    formats = comfy.latent_formats

    class Config(comfy.supported_models_base.BASE):
        latent_format = formats.SD3 if kind == "flow" else formats.SD15
        sampling_settings = {"shift": 3.0} if kind == "flow" else {}

    config = Config({"disable_unet_model_creation": True})
    kinds = {"eps": types.EPS, "v": types.V_PREDICTION, "flow": types.FLOW}
    base = comfy.model_base.BaseModel(config, kinds[kind])
    base.diffusion_model = Network(base, kind, dtype)
    return comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


def conditioning(value: float, **more: Any) -> list[Any]:
    """Return a CONDITIONING whose prompt moves the centres."""
    generator = torch.Generator().manual_seed(int(100 * value) + 7)
    return [[value * torch.randn(1, 4, 16, generator=generator), dict(more)]]


def image(patcher: Any, batch: int = 2, side: int = 8, seed: int = 1) -> dict[str, Any]:
    """Return a LATENT drawn from the data of the network, without prompt."""
    base = patcher.model
    channels = base.latent_format.latent_channels
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(3, (batch, side, side), generator=generator)
    centres = base.diffusion_model.centres[:, :channels].float()[which].movedim(-1, 1)
    x = centres + SPREAD * torch.randn(centres.shape, generator=generator)
    return {"samples": base.process_latent_out(x)}
