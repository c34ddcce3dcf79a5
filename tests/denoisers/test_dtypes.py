"""Every dtype of x with every dtype of a network: right, or an error that names the fix. And what an adapter calls."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import noise_like
from torch import Tensor, nn

import kinvert as ki
from kinvert.checks import FLOATS
from kinvert.denoisers.dtypes import explain

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LEVELS = ki.levels.stable_diffusion()
KARRAS = ki.schedules.karras(6, 0.1, 10.0)


@pytest.mark.parametrize("verb", ["sample", "unsample", "round_trip", "invert", "extract_noise", "run"])
def test_the_table_in_the_documentation(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what is measured here (`python benchmarks/mixed_dtypes.py` writes it), and nothing in it is wrong or crashes."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from mixed_dtypes import RESULT, measure

    found = list(measure([verb]))
    assert len(found) == 4 * 4 * 4 * 2
    assert found == [row for row in json.loads(RESULT.read_text())["rows"] if row["verb"] == verb]
    honest = {"not converged"} if verb == "invert" else set()  # where rounding is beyond the tolerance, it says so
    assert {row["verdict"] for row in found} == {"right", "error"} | honest


class Network(nn.Module):
    """A module that notes what it is called in, and does not convert anything."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.steps = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)  # not a floating one
        self.mix, self.time = (
            nn.Linear(6, 6, dtype=dtype),
            nn.Linear(1, 6, dtype=torch.promote_types(dtype, torch.float32)),
        )
        self.seen: list[tuple[torch.dtype, torch.dtype]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append((x.dtype, t.dtype))
        return torch.tanh(self.mix(x) + self.time(t[:, None] / 1000).to(x.dtype))


ADAPTERS: dict[str, Any] = {
    name: getattr(ki.denoisers, f"from_{name}") for name in ("eps", "v", "x0")
} | {"velocity": lambda network, levels, **kwargs: ki.denoisers.from_velocity(network, **kwargs)}  # fmt: skip


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_call_a_module_in_its_own_dtype(name: str, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    """t in float32 or float64, the result in x's; the same by `dtype=` for a function, of which nothing is known."""
    network = Network(dtype)
    x, sigma = noise_like((2, 6)).to(x_dtype), torch.ones(2, dtype=torch.promote_types(x_dtype, torch.float32))
    by_itself = ADAPTERS[name](network, LEVELS)(x, sigma)
    given = ADAPTERS[name](lambda x, t: network(x, t), LEVELS, dtype=dtype)(x, sigma)
    assert network.seen == [(dtype, torch.promote_types(dtype, torch.float32))] * 2
    assert by_itself.dtype == x_dtype and torch.equal(by_itself, given)
    exact = ADAPTERS[name](Network(dtype).double(), LEVELS)(x.double(), sigma.double())
    coarsest = max(torch.finfo(d).eps for d in (dtype, x_dtype))
    torch.testing.assert_close(by_itself.double(), exact, rtol=8 * coarsest, atol=8 * coarsest)


def test_dtype_of_an_adapter_is_checked() -> None:
    assert "dtype=torch.float16" in repr(ki.denoisers.from_eps(Network(torch.float16), LEVELS, dtype=torch.float16))
    for wrong in ("float16", torch.int64, torch.complex64):
        with pytest.raises(TypeError, match="dtype must be what the network is called in, one of torch.float16"):
            ki.denoisers.from_eps(Network(torch.float16), LEVELS, dtype=wrong)


def test_exact_inversion_with_a_float32_module() -> None:
    """x in float64: the network computes in float32, and what comes back is as exact as that, not more."""
    x = 0.5 * noise_like((2, 6))
    denoiser = ki.denoisers.from_eps(Network(torch.float32), LEVELS)
    sigmas = ki.schedule("karras", 6, LEVELS)[:-1]
    with pytest.warns(RuntimeWarning, match=r"computes in torch.float32.*tol is 1e-05.*instead of 1e-09.*in x's dtype"):
        default = ki.invert(denoiser, x, sigmas, sampler="dpmpp_2m")
    assert default.converged.all() and default.tolerance == 1e-5 and int(default.evaluations.max()) < 1000
    with pytest.warns(RuntimeWarning, match="tol=1e-09 is below|not inverted"):
        exact = ki.invert(denoiser, x, sigmas, sampler="dpmpp_2m", tol=1e-9, max_evals=50)
    assert not exact.converged.any()
    assert re.match(r"tol=1e-09 is below the rounding of torch.float32.*torch.float64, or leave", exact.warnings[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rounding decides whether both samples come to within 1e-6
        found = ki.invert(denoiser, x, sigmas, sampler="dpmpp_2m", tol=1e-6)
    back = ki.sample(denoiser, found.latent, sigmas, sampler="dpmpp_2m")
    assert x.dtype == found.latent.dtype == torch.float64
    assert float((back - x).abs().max()) < 1e-5


class Convolution(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 6), (2, 6)),
    "linear without bias": (nn.Linear(6, 6, bias=False), (2, 6)),
    "convolution": (nn.Conv2d(3, 3, 3, padding=1), (2, 3, 6, 6)),
    "convolution in 1-D": (nn.Conv1d(3, 3, 1), (2, 3, 6)),
    "layer norm": (nn.LayerNorm(6), (2, 6)),
    "group norm": (nn.GroupNorm(1, 3), (2, 3, 6, 6)),
    "attention": (nn.TransformerEncoderLayer(6, 1, 6), (2, 3, 6)),
}


@pytest.mark.parametrize("verb", ["sample", "unsample", "round_trip", "invert", "extract_noise", "run", "guided"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_failure_on_dtypes_names_x_and_the_fix(layer: str, verb: str) -> None:
    module, shape = LAYERS[layer]
    network, x = Convolution(module.half()), noise_like(shape).float()
    verbs: dict[str, Any] = {
        "sample": lambda: ki.sample(network, x, KARRAS),
        "unsample": lambda: ki.unsample(network, x, KARRAS, sampler="heun"),
        "round_trip": lambda: ki.round_trip(network, x, KARRAS),
        "invert": lambda: ki.invert(network, x, KARRAS[:-1], sampler="dpmpp_2m"),
        "extract_noise": lambda: ki.extract_noise(network, x, KARRAS[:-1], sampler="ddpm"),
        "run": lambda: ki.run(ki.compile_plan("euler", KARRAS), network, x),
        "guided": lambda: ki.sample(
            lambda x, s, **c: network(x, s), x, KARRAS, cfg=2.0, positive={"a": 1}, negative={}
        ),
    }
    with pytest.raises(TypeError, match=r"x in torch.float32.*dtype=torch.float16 of the adapter") as caught:
        verbs[verb]()
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_other_failures_are_left_as_they_are() -> None:
    x = noise_like((2, 6))
    for message in (
        "The size of tensor a (3) must match the size of tensor b (6)",
        "CUDA out of memory",
        "Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor) should be the same",
    ):
        assert explain(RuntimeError(message), x) is None

    def broken(x: Tensor, sigma: Tensor) -> Tensor:
        raise RuntimeError("out of cheese")

    with pytest.raises(RuntimeError, match="out of cheese"):
        ki.sample(broken, x, KARRAS)
    assert explain(RuntimeError("Input type (float) and bias type (c10::Half) should be the same"), x) is not None


@pytest.mark.filterwarnings("ignore:o_belm magnifies rounding")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "sampler, method", [("euler", "auto"), ("euler", "sweeps"), ("dpmpp_2m", "auto"), ("o_belm", "auto")]
)
def test_a_wider_result_is_refused_at_once(sampler: str, method: str, count: int) -> None:
    """By the first evaluation that sees it, whichever solver makes it."""
    calls = 0

    def wider(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 0.5 * x.double()

    with pytest.raises(TypeError, match="must return x's dtype torch.float32, got torch.float64"):
        ki.invert(wider, torch.ones(count, 6), KARRAS[:-1], sampler=sampler, method=method)
    assert calls == 1
