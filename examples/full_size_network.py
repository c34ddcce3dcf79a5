"""Invert one step of a network of full size, the UNet of Stable Diffusion 1.5 with random weights, on the CPU.

    pip install diffusers
    python examples/full_size_network.py                    # 860 million parameters, float32
    python examples/full_size_network.py --dtype bfloat16   # half the memory

It needs 5 GB of memory in float32 and minutes of time, and no download: the weights are random, so that the image means
nothing, but cost, memory and precision are those of a real network. It prints the certificate, the evaluations, their
time, and the peak of the memory.
"""

from __future__ import annotations

import argparse
import resource
import time

import diffusers
import torch
from torch import Tensor

import kinvert as ki


def network(dtype: torch.dtype) -> torch.nn.Module:
    """Return the UNet, with its 860 million weights drawn from seed 0."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # so that the weights are never there in float32 too
    try:
        return diffusers.UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8,
            block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
        ).eval()  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)


def main() -> None:
    """Invert the step and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--sigmas", default="2,1.5", help="the two noise levels of the step")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    unet = network(dtype)
    print(f"{sum(p.numel() for p in unet.parameters()) / 1e6:.0f} million parameters in {args.dtype}", flush=True)
    text = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(1)).to(dtype)
    times: list[float] = []

    def eps(x: Tensor, t: Tensor) -> Tensor:
        start = time.perf_counter()
        out: Tensor = unet(x, t, encoder_hidden_states=text.expand(len(x), -1, -1)).sample
        times.append(time.perf_counter() - start)
        return out

    sigmas = [float(sigma) for sigma in args.sigmas.split(",")]
    x = sigmas[-1] * torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(2))
    denoiser = ki.denoisers.from_eps(eps, ki.levels.stable_diffusion(), dtype=dtype)
    start = time.perf_counter()
    found = ki.invert(denoiser, x, sigmas, progress=True)
    print(found)
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{len(times)} evaluations of {sum(times) / len(times):.1f} s; {time.perf_counter() - start:.0f} s in all, "
        f"of which {time.perf_counter() - start - sum(times):.2f} s outside of the network; peak {gib:.1f} GiB"
    )


if __name__ == "__main__":
    main()
