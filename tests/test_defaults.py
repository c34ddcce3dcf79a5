"""torch's defaults of the caller, for devices and dtypes, change no result."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import noise_like
from torch import Tensor

import kinvert as ki
from kinvert import metrics, reference
from kinvert.bench.grid import Cell
from kinvert.bench.measurement import measure
from kinvert.engine.eager import run_eager

PACKAGE = Path(__file__).parent.parent / "kinvert"
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "fftfreq", "full", "hann_window", "linspace",
    "logspace", "ones", "rand", "randint", "randn", "randperm", "rfftfreq", "scalar_tensor", "tensor", "tril_indices",
    "triu_indices", "zeros",
}  # fmt: skip
OWN_DEVICE = {"models/train.py", "models/train_classifier.py", "models/network.py"}
"""Networks that are built and trained where their caller wants them."""

SIGMAS = ki.schedules.karras(6, 0.1, 10.0)
X = noise_like((2, 1, 8, 8)).float()
FEW = noise_like((2, 3)).float()
MASK = torch.ones(8, 8)
LABEL = {"label": torch.tensor([1, 2])}, {"label": torch.tensor([10, 10])}


def shrink(x: Tensor, sigma: Tensor) -> Tensor:
    return 0.9 * x.tanh() / (1 + sigma.reshape(-1, *(1,) * (x.ndim - 1)) ** 2)


def scaled(x: Tensor, weight: float = 1.0) -> Tensor:
    return weight * 10 * x


VERBS: dict[str, Callable[[], Any]] = {
    "schedules": lambda: [ki.schedule(name, 8, ki.levels.stable_diffusion()) for name in ki.SCHEDULES],
    "levels": lambda: [
        (levels.sigmas, levels.timestep(0.5), levels.sigma(3.0), levels.percent_to_sigma(0.5))
        for levels in (ki.levels.stable_diffusion(zero_snr=True), ki.levels.edm(), ki.levels.flow(3.0), ki.levels.flux())
    ],
    "sample": lambda: [
        ki.sample(shrink, scaled(X), SIGMAS, sampler=name, noise=ki.noise.white(1)) for name in ("euler", "lms", "lcm")
    ],
    "sample, adaptive": lambda: ki.sample(shrink, scaled(X), SIGMAS, sampler="dpm_adaptive"),
    "sample, brownian": lambda: ki.sample(
        shrink, scaled(X), SIGMAS, sampler="dpmpp_sde", noise=ki.noise.brownian([1, 2])
    ),
    "sample, seeded": lambda: ki.sample(shrink, scaled(X), SIGMAS, sampler="dpmpp_sde"),
    "sample, masked": lambda: ki.sample(shrink, scaled(X), SIGMAS, mask=MASK, latent=X, max_batch=1),
    "sample, eager": lambda: run_eager(ki.sampler("heun"), shrink, scaled(X), SIGMAS),
    "sample, guided": lambda: ki.sample(
        ki.models.load("digits"), scaled(X), SIGMAS, cfg=2.0, positive=LABEL[0], negative=LABEL[1]
    ),
    "unsample": lambda: ki.unsample(shrink, X, SIGMAS, normalize=True),
    "gradients": lambda: ki.run(ki.compile_plan("dpmpp_2m", SIGMAS), shrink, scaled(X).requires_grad_()).detach(),
    "invert": lambda: [
        ki.invert(shrink, X, SIGMAS[:-1], sampler=name).latent for name in ("euler", "dpmpp_2m", "bdia")
    ],
    "invert, few values": lambda: [
        ki.invert(shrink, FEW, SIGMAS[:-1], method=method).latent for method in ("levenberg", "newton", "anderson")
    ],
    "extract_noise": lambda: ki.extract_noise(
        shrink, X, SIGMAS[:-1], sampler="euler_ancestral", generator=torch.Generator().manual_seed(0)
    ).latent,
    "round_trip": lambda: ki.round_trip(shrink, X, SIGMAS[:-1], method="renoise").latent,
    "metrics": lambda: [
        *metrics.latent_metrics(X, 1.0, X).values(), *metrics.reconstruction_metrics(X, X, 2.0).values(),
    ],
    "reference": lambda: reference.solve_ode(shrink, X.double(), 0.1, 10.0),
    "exact denoisers": lambda: ki.denoisers.Gaussian(0.0, 1.0)(X, SIGMAS[:2]),
    "benchmark": lambda: measure(Cell(model="digits", count=2, steps=3, sampler="dpmpp_2m"))[0]["metrics"],
}  # fmt: skip


@contextmanager
def defaults(device: str | None, dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def usual() -> dict[str, Any]:
    return {name: computed(verb) for name, verb in VERBS.items()}


def computed(verb: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return verb()


@pytest.mark.parametrize(
    ("device", "dtype"), [("meta", torch.float32), (None, torch.float64), (None, torch.float16)], ids=str
)
@pytest.mark.parametrize("name", VERBS)
def test_defaults_change_no_result(name: str, device: str | None, dtype: torch.dtype, usual: dict[str, Any]) -> None:
    with defaults(device, dtype):
        got = computed(VERBS[name])
    torch.testing.assert_close(got, usual[name], rtol=0, atol=0, equal_nan=True)


def test_every_new_tensor_has_a_device() -> None:
    """Of those that the code itself makes; the rest follow an argument."""
    bare = []
    for path in PACKAGE.rglob("*.py"):
        name = str(path.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES:
                owner = ast.unparse(node.func.value)
                given = {word.arg for word in node.keywords}
                if owner in ("torch", "torch.fft") and "device" not in given and name not in OWN_DEVICE:
                    bare.append(f"{name}:{node.lineno} {ast.unparse(node)}")
    assert not bare, "\n".join(bare)
