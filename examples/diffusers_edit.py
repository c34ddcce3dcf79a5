"""Invert a photo in a pipeline of diffusers, edit it by another prompt, and report.

    python examples/diffusers_edit.py photo.png --model stabilityai/stable-diffusion-xl-base-1.0 \
        --prompt "a cat on a sofa" --edit "a dog on a sofa" --dtype float16 --device cuda

It needs: `pip install 'kinvert[diffusers]'`; a checkpoint of diffusers, as a folder or by its name on the
hub (several GB); a GPU with the memory of one call of the pipeline (10 GB for Stable Diffusion XL in float16, 24 GB or
`--offload` for Flux). On a CPU it works as well, in minutes for each step.

It writes to `--out`: `restored.png` (what the latents give with the same prompt), `edited.png`, `latents.safetensors`,
`scheduler`, a folder for `KinvertScheduler.from_pretrained` with what belongs to the latents, and `report.txt`.

What to try if the report says "not converged": `--guidance 1`, which inverts without guidance; more `--steps`; a higher
`--tol` in half precision, or `--dtype float32`; `--max-evals`. For an edit that keeps more of the photo: `--noises`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

import kinvert as ki
import kinvert.adapters.diffusers as kd


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--model", required=True, help="a folder, or a name on the hub")
    parser.add_argument("--prompt", required=True, help="what the photo shows")
    parser.add_argument("--edit", required=True, help="what it shall show")
    parser.add_argument("--out", type=Path, default=Path("edited"))
    parser.add_argument("--size", type=int, default=0, help="side in pixels to crop and resize to; 0 keeps the photo")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance_scale of both directions")
    parser.add_argument("--tol", type=float, help="error to reach, in parts of the image's size")
    parser.add_argument("--max-evals", type=int, help="calls of the network for the inversion at most")
    parser.add_argument("--noises", action="store_true", help="extract noises of a stochastic sampler instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--offload", action="store_true", help="keep idle parts of the model in main memory")
    return parser.parse_args()


def read_photo(path: Path, side: int) -> Image.Image:
    """Return the photo, cropped to a square of `side` pixels if that is not 0."""
    photo = Image.open(path).convert("RGB")
    if not side:
        return photo
    short = min(photo.size)
    left, top = ((length - short) // 2 for length in photo.size)
    return photo.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.LANCZOS)


def load(options: argparse.Namespace) -> Any:
    """Return the pipeline."""
    pipe = DiffusionPipeline.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    if options.offload:
        pipe.enable_model_cpu_offload(device=options.device)
        return pipe
    return pipe.to(options.device)


def main() -> None:
    """Invert, restore, edit, and report."""
    options = arguments()
    pipe, photo = load(options), read_photo(options.photo, options.size)
    size = {"height": photo.height, "width": photo.width}
    call = {"num_inference_steps": options.steps, "guidance_scale": options.guidance, **size}
    latents = kd.encode(pipe, photo)
    start = time.monotonic()
    if options.noises:
        found = kd.extract_noise(pipe, latents, sampler="dpmpp_2m_sde", prompt=options.prompt, progress=True, **call)
    else:
        found = kd.invert(
            pipe, latents, sampler=options.sampler, tol=options.tol, max_evals=options.max_evals, prompt=options.prompt,
            progress=True, **call,
        )  # fmt: skip
    seconds = time.monotonic() - start
    pipe.scheduler = found.scheduler
    images = {}
    for name, prompt in (("restored", options.prompt), ("edited", options.edit)):
        made = pipe(prompt=prompt, latents=found.latents, output_type="latent", **call).images
        images[name] = kd.decode(pipe, made, **size, output_type="pt").cpu()
        if name == "restored":
            error = float((made - latents).float().square().mean().sqrt() / latents.float().square().mean().sqrt())
    vae = kd.decode(pipe, latents, **size, output_type="pt").cpu()
    lines = [
        f"{options.model}, {options.steps} steps, guidance {options.guidance:g}, {seconds:.1f} s to invert",
        str(found.inversion),
        f"the pipeline itself: error of the latents {error:.2g} of their size",
        f"PSNR of the restored image beside the photo as the VAE has it: "
        f"{float(ki.metrics.psnr(images['restored'], vae, 1.0)):.1f} dB; of the edit: "
        f"{float(ki.metrics.psnr(images['edited'], vae, 1.0)):.1f} dB",
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        pixels = (255 * image[0].movedim(0, -1)).round().byte().numpy()
        Image.fromarray(pixels).save(options.out / f"{name}.png")
    save_file({"latents": found.latents.cpu().contiguous()}, options.out / "latents.safetensors")
    found.scheduler.save_pretrained(options.out / "scheduler")
    (options.out / "report.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
