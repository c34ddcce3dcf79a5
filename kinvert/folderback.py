"""The way back from the shards that `invert_folder` wrote: the images, with the same conditioning or another.

A shard knows the model, the sampler, the levels and the conditioning, and which row belongs to which file. Those that
kinvert 0.1.0 wrote have all that in the files beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kinvert.bench.grid import Cell
from kinvert.bench.measurement import isolated, problem_of, setup_of
from kinvert.bench.methods import MethodResult, restore
from kinvert.folder import SETTINGS, as_conditioning, try_conditioning
from kinvert.packing import from_tree, moved
from kinvert.pictures import write
from kinvert.records import check_kind, header_of, known_entries, read_tree
from kinvert.resultfiles import check_data, read_result
from kinvert.rules import Rule

__all__ = ["StoredShard", "find_shards", "image_name", "open_shard", "sample_shards", "write_images"]

FIX = "the `kinvert invert` that wrote it computes it again"
ENTRIES = {"latents": True, "memory": False, "noises": False, "settings": True, "sampler": False, "rows": True}


@dataclass(frozen=True, eq=False)
class StoredShard:
    """Latents of a folder, as they lie in a file.

    Attributes:
        latents: shape (n, *event).
        settings: how they were made: the fields of a `Cell`, positive, negative, max_evals.
        rows: of the manifest, one for each latent.
        memory, noises: what belongs to the latents.
        sampler: the rule that takes them to images; None is that of the settings.
    """

    latents: Tensor
    settings: Mapping[str, Any]
    rows: list[dict[str, Any]]
    memory: Mapping[str, Tensor]
    noises: list[Tensor]
    sampler: Rule | None = None

    @property
    def cell(self) -> Cell:
        """The settings as a `Cell`, on the CPU: another machine may not have the device that they name."""
        known = {f.name for f in fields(Cell)} - {"device"}
        given = {name: value for name, value in self.settings.items() if name in known}
        return Cell(**{**given, "options": tuple(given["options"].items())})


def find_shards(source: Path | str) -> list[Path]:
    """Return the shard, or the finished shards of a folder, in the order of their files; empty if there are none."""
    source = Path(source)
    if source.is_file():
        return [source]
    if not (source / SETTINGS).is_file():
        return []
    found = [path for path in source.glob("*.safetensors") if path.with_suffix(".json").is_file()]
    return sorted(found, key=lambda path: str(_rows_beside(path)[0]["file"]))


def _record_beside(path: Path) -> dict[str, Any]:
    """Read the record of a shard."""
    place = path.with_suffix(".json")
    try:
        record = read_result(place)
        _ = record["rows"][0]["file"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"cannot read {str(place)!r}: it is damaged, {error}; {FIX}") from error
    return record


def open_shard(path: Path) -> StoredShard:
    """Read a shard.

    Raises:
        ValueError: another file; a file that is damaged.
    """
    if path.with_suffix(".json").is_file():
        record = _record_beside(path)
        try:
            check_data(path, record)
        except ValueError as error:
            raise ValueError(f"cannot read {str(path)!r}: {error}; {FIX}") from error
    header = header_of(path)
    if header is None:
        return _of_version_0(path)
    tree = known_entries(repr(str(path)), read_tree(path, check_kind(path, header, "shard")), ENTRIES)
    rule = from_tree(tree.get("sampler"), repr(str(path)))
    return StoredShard(
        tree["latents"], tree["settings"], tree["rows"], tree.get("memory", {}), tree.get("noises", []), rule
    )


def _of_version_0(path: Path) -> StoredShard:
    """Read a shard without metadata, whose settings and rows lie beside it."""
    settings = path.parent / SETTINGS
    if not settings.is_file() or not path.with_suffix(".json").is_file():
        raise ValueError(
            f"{str(path)!r} does not say how its latents were made: it was written neither by `kinvert invert` nor by "
            "`kinvert unsample`, or it was taken away from the files beside it"
        )
    try:
        tensors = load_file(path)
        noises = sorted((name for name in tensors if name.startswith("noises/")), key=lambda name: int(name[7:]))
        memory = {name[7:]: value for name, value in tensors.items() if name.startswith("memory/")}
        return StoredShard(
            tensors["latents"],
            json.loads(settings.read_text()),
            _rows_beside(path),
            memory,
            [tensors[name] for name in noises],
        )
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {str(path)!r}: it is damaged, {error}") from error


def _rows_beside(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = _record_beside(path)["rows"]
    return rows


def sample_shards(
    shard: StoredShard,
    *,
    model: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    cfg: float | None = None,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
) -> Tensor:
    """Sample the latents of a shard.

    Args:
        shard: the latents.
        model, dtype: None takes those that they were made with.
        device: where to compute.
        cfg: guidance; None takes that of the inversion.
        positive, negative: values for keywords of the denoiser that are to be others than in the inversion.

    Returns:
        The images, shape (n, *event).

    Raises:
        ValueError, TypeError: as in `ki.sample`; a device that is not here.
    """
    cell = shard.cell
    changed = {name: value for name, value in (("model", model), ("dtype", dtype), ("cfg", cfg)) if value is not None}
    cell = Cell(**{**vars(cell), **changed, "device": device})
    problem = problem_of(cell.model, 1, 0, cell.dtype, cell.device)
    conditioning = {}
    for name, given in (("positive", positive), ("negative", negative)):
        values = {**shard.settings.get(name, {}), **(given or {})}
        if given:
            try_conditioning(problem, name, tuple(given.items()))
        conditioning[name] = as_conditioning(values, device) or None
    setup = setup_of(cell, problem)
    setup = replace(setup, guidance={"cfg": cell.cfg, **conditioning})
    wanted = getattr(torch, cell.dtype)
    latents, memory, noises = moved([shard.latents, dict(shard.memory), tuple(shard.noises)], device, wanted)
    found = MethodResult(latents, [], memory=memory, noises=noises, sampler=shard.sampler)
    with isolated(cell):
        return restore(setup, found)[0].cpu()


def image_name(file: str, index: int = 0, ending: str = ".png") -> str:
    """Return the name of the image that is made of a latent again: that of the file it came from, as a PNG.

    Raises:
        ValueError: a name that leads out of the folder; a file of someone else may say anything.
    """
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise ValueError(f"the latents say that they came from {file!r}, which is a place outside of --out")
    name = f"{file}-{index}" if index else file
    return name if name.lower().endswith(ending) else f"{name}{ending}"


def write_images(images: Tensor, names: list[tuple[str, int]], out: Path) -> list[Path]:
    """Write samples to files of their own: grey and RGB images as PNG, others as safetensors.

    Args:
        images: shape (n, *event).
        names: of each, the file that it came from, and its place in it.
        out: the folder.

    Returns:
        The files.
    """
    shown = images.ndim == 4 and images.shape[1] in (1, 3)
    paths = [out / image_name(file, index, ".png" if shown else ".safetensors") for file, index in names]
    for image, path in zip(images, paths, strict=True):
        write(image, path)
    return paths
