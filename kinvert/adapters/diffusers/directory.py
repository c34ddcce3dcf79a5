"""A pipeline in a directory of this machine, and the noise levels of its scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kinvert import levels
from kinvert.adapters.diffusers import host
from kinvert.adapters.diffusers.timetable import space_of
from kinvert.checks import describe
from kinvert.levels import Levels

__all__ = ["levels_of", "open_pipeline"]

INDEX = "model_index.json"


def open_pipeline(directory: Path | str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Load a pipeline that was saved to a directory; nothing is downloaded, and no code of the directory is run.

    Args:
        directory: what `pipe.save_pretrained(directory)` wrote, or all files of a published model.
        device: where it computes.
        dtype: of its networks.

    Raises:
        ValueError: there is no such directory, it holds no pipeline, or diffusers cannot load it; a device that cannot
            be used.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ValueError(
            f"model: there is no directory {str(path)!r}; give one that pipe.save_pretrained(DIR) wrote, or into which "
            "all files of a model were downloaded"
        )
    if not (path / INDEX).is_file():
        files = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
        raise ValueError(
            f"model: {str(path)!r} is no pipeline of diffusers: it has no {INDEX}, but {files}. A single checkpoint "
            "becomes one by StableDiffusionPipeline.from_single_file(file).save_pretrained(DIR), or the class of its "
            "family"
        )
    try:
        pipe = host.loaded(str(path), dtype)
    except Exception as error:  # whatever its parts raise
        raise ValueError(f"model: diffusers cannot load {str(path)!r}: {type(error).__name__}: {error}") from error
    try:
        pipe.to(device)
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {error}; use 'cpu'") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def levels_of(scheduler: Any) -> Levels:
    """Return the noise levels that a scheduler's model was trained on, for kinvert's own schedules.

    Raises:
        TypeError: a class that is not known.
        ValueError: levels that no schedule can be made of.
    """
    if space_of(scheduler) == "flow":
        if host.option(scheduler, "use_dynamic_shifting"):
            raise ValueError(
                f"{host.class_name(scheduler)} shifts its times by the size of the image, which kinvert's schedules do "
                "not; use the levels of the pipeline"
            )
        shift = host.option(scheduler, "shift") or host.option(scheduler, "flow_shift") or 1.0
        return levels.flow(shift=float(shift))
    if hasattr(scheduler, "alphas_cumprod"):
        return levels.from_alphas_cumprod(host.alphas_of(scheduler))
    low, high, data = (host.option(scheduler, name) for name in ("sigma_min", "sigma_max", "sigma_data"))
    if low is None or high is None:
        raise ValueError(f"the levels of {host.class_name(scheduler)} are not known, got {describe(scheduler)}")
    return levels.edm(float(low), float(high), sigma_data=float(data or 1.0))
