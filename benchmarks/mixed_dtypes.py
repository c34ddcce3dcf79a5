"""Try which dtypes of x, of the network and of its output go together, with and without autocast, for every verb.

    python benchmarks/mixed_dtypes.py

The network is a small module in one of four dtypes. It is called in four ways: through an adapter, which calls it in
its own dtype; by a function that converts x for it and returns the result in the network's dtype, or in x's dtype; and
without conversions. A cell is

* "right" if the verb's result equals its result in float64, up to the rounding of the coarsest dtype in use;
* "error" if a TypeError or ValueError of kinvert names a dtype and a fix;
* "not converged" if `invert` reports that;
* "wrong" or "crash" otherwise.

Written to `benchmarks/results/dtypes.json`, which the documentation shows and a test compares.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kinvert as ki
from kinvert.checks import FLOATS

RESULT = Path(__file__).parent / "results" / "dtypes.json"
LEVELS = ki.levels.stable_diffusion()
SIGMAS = ki.schedules.karras(4, 0.2, 8.0)[:-1]
WAYS = ("adapter", "its own dtype", "x's dtype", "as it is")
VERBS = ("sample", "unsample", "round_trip", "invert", "extract_noise", "run")


class Network(nn.Module):
    """A network that predicts eps, with a time embedding that does not convert anything."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix, self.time = nn.Linear(6, 6), nn.Linear(1, 6)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict eps for x (batch, 6) and t (batch,); t is converted to the sample's dtype, as in diffusers."""
        return torch.tanh(self.mix(x) + self.time((t / 1000)[:, None].to(x.dtype)))


def denoiser(network: Network, dtype: torch.dtype, way: str) -> Any:
    """Return a denoiser that calls the network in one of the four ways."""
    if way == "adapter":
        return ki.denoisers.from_eps(network, LEVELS)

    def plain(x: Tensor, sigma: Tensor) -> Tensor:
        given = x if way == "as it is" else x.to(dtype)
        s = sigma[:, None].to(given.dtype)
        out = given - s * network(given / (1 + s**2).sqrt(), LEVELS.timestep(sigma, quantize=True))
        return out.to(x.dtype) if way == "x's dtype" else out

    return plain


def verbs(x: Tensor) -> dict[str, Callable[[Any], Tensor]]:
    """Return the verbs, as functions of a denoiser, that start from x."""
    plan = ki.compile_plan("dpmpp_2m", SIGMAS)
    given = {"generator": torch.Generator().manual_seed(0)}
    return {
        "sample": lambda d: ki.sample(d, 8 * x, SIGMAS, sampler="dpmpp_2m"),
        "unsample": lambda d: ki.unsample(d, x, SIGMAS, sampler="dpmpp_2m", sigma_offset=0.0),
        "round_trip": lambda d: ki.round_trip(d, x, SIGMAS, sampler="heun", sigma_offset=0.0).reconstruction,
        "invert": lambda d: inverted(d, ki.invert(d, x, SIGMAS[1:], method="anderson")),
        "extract_noise": lambda d: again(d, ki.extract_noise(d, x, SIGMAS, sampler="ddpm", **given)),
        "run": lambda d: ki.run(plan, d, 8 * x),
    }


class NotConvergedError(Exception):
    """`invert` reports that it did not converge."""


def inverted(denoiser: Any, found: ki.Inversion) -> Tensor:
    """Sample the latent that `invert` found."""
    if not bool(found.converged.all()):
        raise NotConvergedError
    return ki.sample(denoiser, found.latent, SIGMAS[1:])


def again(denoiser: Any, found: ki.Inversion) -> Tensor:
    """Sample with the extracted noises."""
    return ki.sample(denoiser, found.latent, SIGMAS, sampler="ddpm", noise=ki.noise.replay(found.noises))


def verdict(verb: str, x: Tensor, dtype: torch.dtype, way: str, autocast: bool, wanted: Tensor) -> str:
    """Return the verdict on one cell."""
    network = Network().to(dtype)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = verbs(x)[verb](denoiser(network, dtype, way))
    except NotConvergedError:
        return "not converged"
    except (TypeError, ValueError) as error:
        return "error" if "dtype" in str(error) or "float32" in str(error) else f"crash: {error}"
    except RuntimeError as error:
        return f"crash: {error}"
    coarsest = torch.bfloat16 if autocast else max((x.dtype, dtype), key=lambda d: torch.finfo(d).eps)
    miss = float((got.detach().double() - wanted).abs().max() / wanted.abs().max())
    return "right" if got.dtype == x.dtype and miss <= max(8 * torch.finfo(coarsest).eps, 1e-5) else "wrong"


def measure(names: Sequence[str] = VERBS) -> Iterator[dict[str, Any]]:
    """Measure every cell of some verbs."""
    clean = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = denoiser(Network(), torch.float64, "adapter")
    for verb in names:
        wanted = verbs(clean)[verb](exact).detach() if verb not in ("invert", "extract_noise") else clean
        for x_dtype in FLOATS:
            for dtype in FLOATS:
                for way in WAYS:
                    for autocast in (False, True):
                        said = verdict(verb, clean.to(x_dtype), dtype, way, autocast, wanted)
                        key = {"verb": verb, "x": str(x_dtype)[6:], "network": str(dtype)[6:], "way": way}
                        yield {**key, "autocast": autocast, "verdict": said.partition(":")[0]}


def main() -> None:
    """Write the table."""
    rows = list(measure())
    RESULT.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=0) + "\n")
    for said in ("right", "error", "not converged", "wrong", "crash"):
        print(said, sum(row["verdict"] == said for row in rows))


if __name__ == "__main__":
    main()
