"""`kinvert sample`: the way back from the files of `kinvert invert` and `kinvert unsample`, and of `Inversion.save`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

import kinvert as ki
from kinvert.bench import DTYPES
from kinvert.bench.measurement import problem_of
from kinvert.cli.latents import KIND, LatentFile
from kinvert.cli.options import device, imports, pairs, parse_pairs
from kinvert.cli.pipelines import Opened, image_of, is_directory
from kinvert.console import print_lines
from kinvert.devices import check_device
from kinvert.folder import SETTINGS, as_conditioning, try_conditioning
from kinvert.folderback import find_shards, image_name, open_shard, sample_shards, write_images
from kinvert.jobs import import_modules
from kinvert.pictures import IMAGES, TENSORS, save_image, write
from kinvert.records import header_of
from kinvert.stops import keeping

__all__ = ["is_one_file", "sample"]

OF_PIPELINES = ("prompt", "negative_prompt", "guidance_scale")
OF_OTHERS = ("cfg", "positives", "negatives")


@dataclass(frozen=True)
class Change:
    """What is to be other than in the inversion; None is not.

    Attributes:
        model: the name or the directory of the model.
        device: where to compute.
        dtype: of the network.
        cfg, positive, negative: for models that are no pipelines.
        call: for pipelines: prompt, negative_prompt, guidance_scale.
    """

    model: str | None
    device: str
    dtype: str | None
    cfg: float | None
    positive: Mapping[str, Any]
    negative: Mapping[str, Any]
    call: Mapping[str, Any]


@click.command()
@click.argument("latents", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the images; for one latent a file, e.g. edited.png.",
)
@pairs("positive", "Another value of the conditioning, to edit, e.g. label=8; repeatable.")
@pairs("negative", "Another value of the unconditional branch; repeatable.")
@click.option("--cfg", type=float, help="Another guidance; 1 is none.")
@click.option("--prompt", help="For pipelines: another prompt, to edit.")
@click.option("--negative-prompt", help="For pipelines: another negative prompt.")
@click.option("--guidance-scale", type=float, help="For pipelines: another guidance scale.")
@click.option("--model", metavar="NAME|DIR", help="The model, if it was moved; for a file of Inversion.save.")
@device
@click.option("--dtype", type=click.Choice(DTYPES), help="Floating point format; by default that of the latents.")
@imports
@click.pass_context
def sample(ctx: click.Context, latents: Path, out: Path, imports: tuple[str, ...], **given: Any) -> None:
    """Sample LATENTS down to images.

    LATENTS is what `kinvert invert` or `kinvert unsample` wrote, a file or the folder, or a file of `Inversion.save`.
    The files know model, sampler, schedule and conditioning. With nothing else given the images come back; with another
    label or prompt they are edited.
    """
    import_modules(imports)
    kind = _kind_of(latents)
    _check_options(ctx, kind)
    conditioning: dict[str, Any] = {
        name: parse_pairs(f"--{name}", given.pop(f"{name}s")) for name in ("positive", "negative")
    }
    call = {name: value for name in OF_PIPELINES if (value := given.pop(name)) is not None}
    change = Change(**given, **conditioning, call=call)
    paths = list[Path]()
    way_back = {KIND: _by_pipeline, "shard": _by_shards, "inversion": _by_inversion}[kind]
    with keeping(lambda: f"{len(paths)} images are in {out}; the same command makes all of them again"):
        missed = way_back(latents, out, change, paths)
    print_lines(f"wrote {paths[0]}" if len(paths) == 1 else f"{len(paths)} images are in {out}")
    if missed:
        print_lines(
            f"{missed} of {len(paths)} latents had not converged when they were inverted: their images are not exact"
        )


def _kind_of(source: Path) -> str:
    """Return what kind of latents a file or a folder holds."""
    if source.is_dir():
        if (source / SETTINGS).is_file():
            return "shard"
        if not any(source.rglob("*.safetensors")):
            raise ValueError(f"there are no latents in {str(source)!r}; give what kinvert invert or unsample wrote")
        return KIND
    header = header_of(source)
    if header is None:  # of kinvert 0.1.0, or of another program, which opening it will tell
        return "shard" if (source.parent / SETTINGS).is_file() else KIND
    if header.kind not in (KIND, "shard", "inversion"):
        raise ValueError(f"{str(source)!r} is of the kind {header.kind!r}, which holds no latent to sample")
    return header.kind


def _check_options(ctx: click.Context, kind: str) -> None:
    for name in OF_OTHERS if kind == KIND else OF_PIPELINES:
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            flag = "--" + name.removesuffix("s" if name in ("positives", "negatives") else "").replace("_", "-")
            instead = "--prompt and --guidance-scale" if kind == KIND else "--positive and --cfg"
            wrong, right = ("other models", "a pipeline") if kind == KIND else ("pipelines", "no pipeline")
            raise ValueError(f"{flag} is for {wrong}, and these latents are of {right}; use {instead}")


def _by_pipeline(source: Path, out: Path, change: Change, paths: list[Path]) -> int:
    """Sample latents of a pipeline of diffusers, each from a file of its own."""
    files = [source] if source.is_file() else sorted(source.rglob("*.safetensors"))
    alone = is_one_file(out, len(files))
    opened: dict[tuple[str, str], Opened] = {}
    missed = 0
    for path in files:
        file = LatentFile.load(path)
        record = file.record
        where = change.model or record.model, change.dtype or record.dtype
        if where not in opened:
            opened = {where: Opened(where[0], change.device, where[1])}  # one at a time fits into memory
        image = image_of(opened[where], file, {**record.call, **change.call})
        name = record.image[0] if source.is_file() else path.relative_to(source).as_posix().removesuffix(".safetensors")
        target = out if alone else out / image_name(name)
        save_image(image, target)
        paths.append(target)
        missed += record.result.get("converged") is False
    return missed


def _by_shards(source: Path, out: Path, change: Change, paths: list[Path]) -> int:
    """Sample latents of any other model, shard by shard."""
    if change.model is not None and is_directory(change.model):
        raise ValueError(f"these latents are of no pipeline, and --model {change.model} is a directory")
    found = find_shards(source)
    if not found:
        raise ValueError(f"there are no finished shards in {str(source)!r}; give the kinvert invert command again")
    alone = is_one_file(out, len(open_shard(found[0]).latents) if len(found) == 1 else 2)  # before the work
    missed = 0
    for path in found:
        shard = open_shard(path)
        images = sample_shards(
            shard, model=change.model, dtype=change.dtype, device=change.device, cfg=change.cfg,
            positive=change.positive, negative=change.negative,
        )  # fmt: skip
        missed += sum(row["converged"] is False for row in shard.rows)
        if alone:
            write(images, out)
        names = [(row["file"], row["index"]) for row in shard.rows]
        paths += [out] if alone else write_images(images, names, out)
    return missed


def _by_inversion(source: Path, out: Path, change: Change, paths: list[Path]) -> int:
    """Sample an `Inversion` of a file."""
    if change.model is None or is_directory(change.model):
        raise ValueError(
            f"{str(source)!r} does not say its model; give --model, a name or an entry point module:function. Latents "
            "of a pipeline are sampled in Python"
        )
    check_device(change.device)
    found: Any = ki.load(source)
    dtype = getattr(torch, change.dtype) if change.dtype else found.latent.dtype
    found = found.to(change.device, dtype)
    alone = is_one_file(out, len(found.latent))
    problem = problem_of(change.model, 1, 0, str(dtype).removeprefix("torch."), change.device)
    kept = {name: dict(getattr(found.back, name, None) or {}) for name in ("positive", "negative")}
    for name, given in (("positive", change.positive), ("negative", change.negative)):
        try_conditioning(problem, name, tuple(given.items()))
        kept[name] |= as_conditioning(given, change.device)
    images = found.sample(
        problem.denoiser, cfg=change.cfg, progress=True,
        positive=kept["positive"] if change.positive else None, negative=kept["negative"] if change.negative else None,
    )  # fmt: skip
    if alone:
        write(images, out)
    names = [(source.stem, i) for i in range(len(images))]
    paths += [out] if alone else write_images(images.cpu(), names, out)
    return int((~found.converged).sum())


def is_one_file(out: Path, count: int) -> bool:
    """Tell whether `out` is the name of a file.

    Raises:
        ValueError: it is, and there are several images.
    """
    named = out.suffix.lower() in (*IMAGES, *TENSORS) and not out.is_dir()
    if named and count > 1:
        raise ValueError(f"--out {out} is one file, and there are {count} images; give a folder")
    return named
