"""A pipeline in a directory and a folder of images, as a problem of the benchmark.

`kinvert bench --model DIR --images FOLDER` makes cells of it; their model is `entry_point(...)`.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kinvert.adapters.diffusers import host
from kinvert.adapters.diffusers.denoising import denoiser
from kinvert.adapters.diffusers.directory import levels_of, open_pipeline
from kinvert.adapters.diffusers.images import encode
from kinvert.bench import Problem
from kinvert.pictures import image_files, open_image

__all__ = ["entry_point", "problem"]

SIDES = ("height", "width")


def entry_point(options: Mapping[str, Any]) -> str:
    """Return the name of the problem for `Cell.model`: options of `problem`, without those that are None."""
    given = {name: str(value) for name, value in options.items() if value is not None}
    return f"{__name__}:problem?{urllib.parse.urlencode(given, quote_via=urllib.parse.quote, safe='/')}"


def problem(
    count: int,
    seed: int,
    dtype: torch.dtype,
    *,
    model: str,
    images: str,
    digest: str = "",
    device: str = "cpu",
    height: str | None = None,
    width: str | None = None,
    **call: str,
) -> Problem:
    """Return the problem of inverting images by a pipeline. All options are text, as they stand in a record.

    Args:
        count, seed, dtype: how many images, which, and the dtype of the states and of the networks.
        model, images: the directory of the pipeline, and the folder of the images.
        digest: of the images; it makes the records of other images others.
        device: where it computes.
        height, width: what the images are resized to; without them all must have the same size.
        **call: prompt, negative_prompt and guidance_scale of the pipeline's call.

    Raises:
        ValueError: as `open_pipeline`; fewer images than asked for, or images of several sizes.
    """
    pipe = open_pipeline(model, device=device, dtype=dtype)
    size = {name: int(value) for name, value in zip(SIDES, (height, width), strict=True) if value is not None}
    pictures = _pictures(Path(images), count, seed)
    sizes = {picture.size for picture in pictures}
    if len(size) < len(SIDES) and len(sizes) > 1:
        found = ", ".join(f"{w} x {h}" for w, h in sorted(sizes))
        raise ValueError(f"images of one size are needed, got {found}; give --height and --width")
    latents = encode(pipe, pictures, **size).to(dtype)
    known, (w, h) = host.parameters_of(pipe), pictures[0].size
    sized = {name: size.get(name, side) for name, side in zip(SIDES, (h, w), strict=True) if name in known}
    given: dict[str, Any] = {name: float(v) if name == "guidance_scale" else v for name, v in call.items()}
    made = denoiser(pipe, **given, **sized)
    spread = float(latents.max() - latents.min())
    return Problem(made, latents, levels_of(pipe.scheduler), data_range=spread)


def _pictures(folder: Path, count: int, seed: int) -> list[Any]:
    """Return some images of a folder."""
    files = image_files(folder)
    if count > len(files):
        raise ValueError(f"count must be at most {len(files)}, the images in {str(folder)!r}, got {count}")
    chosen = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed), device="cpu")[:count].tolist()
    return [open_image(files[index]) for index in chosen]
