"""`kinvert show`: what a file or a folder is, whoever wrote it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import kinvert as ki
from kinvert import bench
from kinvert.bench.grid import describe
from kinvert.bench.results import MERGED
from kinvert.cli.latents import KIND, LatentFile
from kinvert.console import print_lines, print_table
from kinvert.folder import MANIFEST, SETTINGS
from kinvert.folderback import open_shard
from kinvert.pictures import IMAGES, MARK, SAMPLES, pillow, read
from kinvert.records import KEY, Header, header_of

__all__ = ["show"]


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
def show(file: Path) -> None:
    """Print what a FILE is.

    FILE is anything that kinvert reads or writes: a result of `save`, a Plan, a schedule, latents and their folder, a
    folder of benchmark results, an image, an array, a tensor, a latent of ComfyUI.
    """
    if not file.exists():
        raise ValueError(f"there is no file or folder {str(file)!r}")
    if file.is_dir() or file.name in (MERGED, MANIFEST):
        _show_folder(file)
    elif file.suffix.lower() in IMAGES:
        _show_image(file)
    elif file.suffix.lower() in (".npy", ".npz", ".pt"):
        print_lines(f"{file}: {'an array of NumPy' if file.suffix != '.pt' else 'a tensor of torch'}")
        _show_tensors({"": read(file)} if file.suffix != ".npz" else _archive(file))
    else:
        _show_stored(file)


# -- files of kinvert --------------------------------------------------------------------------------------------------
def _show_stored(file: Path) -> None:
    """Show a safetensors or JSON file."""
    header = header_of(file)
    if header is None and file.suffix.lower() == ".json":
        raise ValueError(f"{str(file)!r} is a JSON file of another program")
    if header is None:
        _show_foreign(file)
        return
    by = f"kinvert {header.versions.get(KEY, '?')} with torch {header.versions.get('torch', '?')}"
    version = ".".join(map(str, header.version))
    print_lines(f"{file}: {header.kind.replace('_', ' ')} (file version {version}, written by {by})")
    if header.kind == KIND:
        _show_latent(LatentFile.load(file))
    elif header.kind == "shard":
        shard = open_shard(file)
        _show_settings(shard.settings)
        _show_rows(shard.rows)
        _show_tensors({"latents": shard.latents, **_inside(shard.memory, shard.noises)})
    else:
        _show_result(file, header)


def _show_result(file: Path, header: Header) -> None:
    found = ki.load(file, sampler=None)
    if isinstance(found, ki.Schedule):
        levels = "not known" if found.levels is None else f"{found.levels.kind}, {_levels_text(found.levels)}"
        print_lines(f"  name    {found.name}", f"  levels  {levels}")
        print_lines("  sigmas  " + ", ".join(f"{sigma:.6g}" for sigma in found.sigmas.tolist()))
        return
    print_lines(str(found))
    if isinstance(found, ki.Inversion) and found.back is not None:
        back = found.back
        print_lines(
            f"  sampler          {back.sampler!r}, in {'flow time' if back.coordinates == 'flow' else 'sigmas'}"
        )
        print_lines(f"  cfg              {back.cfg!r}")
        for name in ("positive", "negative"):
            print_lines(
                *(f"  {name:<16} {key}: {_described(value)}" for key, value in (getattr(back, name) or {}).items())
            )
        if back.mask is not None:
            print_lines("  mask             yes")


def _levels_text(levels: ki.levels.Levels) -> str:
    return f"{levels.sigma_min:.4g} to {levels.sigma_max:.4g}"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        few = value.flatten().tolist() if value.numel() <= 8 else None
        return f"tensor of shape {tuple(value.shape)}, {value.dtype}" + (f", {few}" if few is not None else "")
    return getattr(value, "description", None) or repr(value)


def _show_latent(file: LatentFile) -> None:
    record = file.record
    call = ", ".join(f"{name} {value!r}" for name, value in record.call.items())
    sigmas = f"{record.sigmas[0]:.4g} to {record.sigmas[-1]:.4g}"
    print_lines(
        f"  made by   kinvert {record.verb}, method {record.method}",
        f"  model     {record.model}, {record.dtype}",
        f"  call      {call}",
        f"  sampler   {record.sampler} {record.options or ''}, {len(record.sigmas) - 1} steps, {sigmas}",
        f"  image     {record.image[0]}, {record.size[1]} x {record.size[0]}",
    )
    if record.result:
        print_lines("  result    " + ", ".join(f"{name} {value}" for name, value in record.result.items()))
    _show_tensors({"latents": file.latent, **_inside(file.memory, file.noises)})


def _inside(memory: Mapping[str, Tensor], noises: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return what belongs to a latent by the names that it has in the file; of the noises the first."""
    first = {f"noises/0 (of {len(noises)})": noises[0]} if noises else {}
    return {f"memory/{name}": value for name, value in memory.items()} | first


# -- folders -----------------------------------------------------------------------------------------------------------
def _show_folder(place: Path) -> None:
    folder = place if place.is_dir() else place.parent
    if (folder / SETTINGS).is_file():
        print_lines(f"{folder}: latents of `kinvert invert`")
        _show_settings(json.loads((folder / SETTINGS).read_text()))
        _show_rows(_lines(folder / MANIFEST))
    elif (folder / MANIFEST).is_file():
        rows = _lines(folder / MANIFEST)
        print_lines(f"{folder}: latents of a pipeline, by `kinvert invert --model DIR`")
        _show_rows(rows)
        if rows:
            _show_latent(LatentFile.load(folder / rows[0]["latent"]))
    elif records := bench.load(place):
        failed = sum(record["error"] is not None for record in records)
        print_lines(f"{place}: benchmark results, {len(records)} cells, {failed} of them with an error")
        names = ("model", "method", "sampler", "schedule", "steps", "cfg", "dtype")
        for name in names:
            counted = Counter(str(record["cell"][name]) for record in records)
            print_lines(f"  {name:<9} " + ", ".join(f"{value} ({count})" for value, count in counted.most_common(12)))
        print_lines(f"next: kinvert bench report {place}")
    else:
        raise ValueError(f"{str(place)!r} holds nothing that kinvert wrote")


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a manifest; a run that was stopped has none yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _show_settings(settings: Mapping[str, Any]) -> None:
    cell = {"question": "", "seed": 0, "count": ""} | dict(settings)
    print_lines("  " + " ".join(describe(cell).partition(" seed")[0].split()))
    for name in ("positive", "negative"):
        if settings.get(name):
            print_lines(f"  {name}: " + ", ".join(f"{key}={value}" for key, value in settings[name].items()))


def _show_rows(rows: list[dict[str, Any]]) -> None:
    claimed = [row["converged"] for row in rows if row.get("converged") is not None]
    errors = [row["round_trip_error"] for row in rows if "round_trip_error" in row]
    files = len({row["file"] for row in rows})
    said = [f"{len(rows)} latents of {files} files"]
    said += [f"{sum(claimed)} of {len(claimed)} converged"] if claimed else []
    said += [f"worst round-trip error {max(errors):.3g}"] if errors else []
    print_lines("  " + ", ".join(said))


# -- files of others ---------------------------------------------------------------------------------------------------
def _show_image(file: Path) -> None:
    try:
        with pillow().open(file) as image:
            frames, (width, height) = getattr(image, "n_frames", 1), image.size
            turned = image.getexif().get(0x0112, 1) != 1
            print_lines(f"{file}: {image.format} image, {width} x {height}, mode {image.mode}")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    print_lines(*[f"  {frames} frames, of which kinvert takes the first"] * (frames > 1))
    print_lines(*["  turned as its camera says"] * turned)


def _show_foreign(file: Path) -> None:
    """Show a safetensors file of another program, or of kinvert 0.1.0."""
    tensors = load_file(file)
    if SAMPLES in tensors:
        kind = "with its format's mark, version 0" if MARK in tensors else "of the old format, multiplied by 0.18215"
        print_lines(f"{file}: latent of ComfyUI, {kind}")
    elif (file.parent / SETTINGS).is_file() and file.with_suffix(".json").is_file():
        print_lines(f"{file}: shard of kinvert 0.1.0")
    else:
        print_lines(f"{file}: safetensors")
    _show_tensors(tensors)


def _archive(file: Path) -> dict[str, Tensor]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: torch.from_numpy(np.asarray(archive[name])) for name in archive}
    except Exception as error:  # whatever NumPy raises
        raise ValueError(f"cannot read {file}: {error}") from error


def _show_tensors(tensors: Mapping[str, Tensor]) -> None:
    print_table("tensors", ["name", "shape", "dtype", "min", "max", "mean", "std"], _described_rows(tensors))


def _described_rows(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    for name, value in tensors.items():
        dtype = str(value.dtype).removeprefix("torch.")
        numbers = value.double() if value.numel() and not value.is_complex() else None
        if numbers is None:
            yield [name or "-", str(tuple(value.shape)), dtype, "", "", "", ""]
            continue
        spread = numbers.std(correction=0)
        found = (numbers.min(), numbers.max(), numbers.mean(), spread)
        yield [name or "-", str(tuple(value.shape)), dtype, *(f"{float(number):.4g}" for number in found)]
