"""`kinvert edit`: images with another label, by their latents."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import kinvert as ki
from kinvert import models
from kinvert.bench import DTYPES
from kinvert.bench.measurement import problem_of
from kinvert.bench.problems import Problem, is_built_in
from kinvert.checks import check_count
from kinvert.cli import completion
from kinvert.cli.options import device, imports, pairs, parse_pairs
from kinvert.cli.pipelines import is_directory
from kinvert.cli.sampling import is_one_file
from kinvert.console import print_lines
from kinvert.devices import check_device
from kinvert.edits import METHODS
from kinvert.folder import as_conditioning, read_states, try_conditioning
from kinvert.folderback import image_name, write_images
from kinvert.jobs import import_modules
from kinvert.pictures import IMAGES, image_files, read, write
from kinvert.stops import keeping
from kinvert.tasks import computing_with
from kinvert.telling import warn_user

__all__ = ["edit"]

BATCH = 64  # images that are edited together


@click.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "--from", "source", multiple=True, metavar="KEY=VALUE", help="What the image shows, e.g. label=3; repeatable."
)
@click.option(
    "--to", "target", multiple=True, required=True, metavar="KEY=VALUE",
    help="What it is to show, e.g. label=8; repeatable.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The edited image, or a folder of them.")
@click.option(
    "--model",
    default="mnist",
    metavar="NAME",
    shell_complete=completion.problems,
    help="An embedded model, or an entry point module:function.",
)
@click.option(
    "--end-at-step", type=int, default=0, help="Steps at the noisy end to leave out: keeps more of the image."
)
@click.option("--cfg", type=float, default=1.0, help="Guidance towards --to; 1 is none.")
@pairs("negative", "Conditioning of the unconditional branch, by default the model's own; repeatable.")
@click.option("--method", type=click.Choice(METHODS), default="invert", help="The way up; noise is SDEdit.")
@click.option("--mask", type=click.Path(path_type=Path), help="Image, white where to edit and black where to keep.")
@click.option(
    "--sampler", default="euler", metavar="NAME", shell_complete=completion.samplers, help="See `kinvert samplers`."
)
@pairs("option", "Option of the sampler, e.g. eta=0.5; repeatable.")
@click.option(
    "--schedule", default="karras", metavar="NAME", shell_complete=completion.schedules, help="See `kinvert schedules`."
)
@click.option("--steps", type=int, default=20, help="Number of steps.")
@click.option("--max-evals", type=int, help="Denoiser evaluations that one inversion may cost, at most.")
@click.option("--seed", type=int, default=0, help="Seed of the noises; the next image has the next.")
@device
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", help="Floating point format.")
@imports
def edit(image: Path, out: Path, imports: tuple[str, ...], **given: Any) -> None:
    """Edit IMAGE, or a folder of them: another label, the rest kept.

    The way up, with what the image shows, finds its latent; the way down samples it with what it is to show. For a
    pipeline of diffusers use `kinvert invert` and `kinvert sample --prompt`.
    """
    import_modules(imports)
    job = _job_of(given)
    places = _places(image, job)
    alone = is_one_file(out, len(places))
    _check_out(places, out, alone)
    written, converged, changed = list[Path](), list[bool](), list[Tensor]()
    again = "the same command starts again"
    with (
        computing_with(1 if is_built_in(job.model) else None),
        keeping(lambda: f"{len(written)} of {len(places)} edited images are in {out}; {again}"),
    ):
        for start in range(0, len(places), BATCH):
            part = places[start : start + BATCH]
            done = job.run(torch.stack([place.image for place in part]), start)
            if done.inversion is not None:
                converged += done.inversion.converged.tolist()
            changed.append(ki.metrics.mse(done.image, done.original).sqrt().cpu())
            written += _write(done.image.cpu(), part, out, alone)
    print_lines(
        f"wrote {out}" if alone else f"{len(written)} edited images are in {out}",
        f"changed by {float(torch.cat(changed).median()):.2g} (root mean square in the median, values from -1 to 1)",
    )
    if missed := converged.count(False):
        print_lines(
            f"{missed} of {len(converged)} latents had not converged: not all that changed is the edit; more --steps, "
            "a larger --end-at-step or more --max-evals may help"
        )


def _write(images: Tensor, places: list[_Place], out: Path, alone: bool) -> list[Path]:
    if not alone:
        return write_images(images, [(place.file, place.index) for place in places], out)
    write(images[0], out)
    return [out]


@dataclass(frozen=True)
class _Job:
    """How to edit: the model, and the arguments of `ki.edit`."""

    model: str
    problem: Problem
    sigmas: tuple[float, ...]
    seed: int
    how: Mapping[str, Any]

    def run(self, images: Tensor, start: int) -> ki.Edited:
        """Edit images, the first of which is number `start` of all."""
        noise = None
        if self.how["method"] in ("extract_noise", "noise"):
            noise = ki.noise.white([self.seed + start + i for i in range(len(images))])
        x = images.to(self.problem.images)
        bars = sys.stderr.isatty()
        return ki.edit(self.problem.denoiser, x, self.sigmas, noise=noise, progress=bars, **self.how)


@dataclass(frozen=True)
class _Place:
    """An image, and where it came from."""

    image: Tensor
    path: Path
    file: str
    index: int


def _job_of(given: dict[str, Any]) -> _Job:
    """Return what the options ask for; raise ValueError before the first image if it cannot be."""
    model, options = given["model"], parse_pairs("--option", given["options"])
    if is_directory(model):
        raise ValueError(
            f"--model {model} is a directory, and kinvert edit has labels, no prompts; for a pipeline of diffusers: "
            "kinvert invert IMAGE --model DIR --prompt ... --out LATENT, then kinvert sample LATENT --prompt ..."
        )
    device = check_device(given["device"])
    check_count("steps", given["steps"])
    problem = problem_of(model, 1, 0, given["dtype"], given["device"])
    conditioning: dict[str, Any] = {}
    for name, texts in (("from", given["source"]), ("to", given["target"]), ("negative", given["negatives"])):
        values = parse_pairs(f"--{name}", texts)
        try_conditioning(problem, f"--{name}", tuple(values.items()))
        conditioning[name] = as_conditioning(values, device)
    if not conditioning["negative"] and problem.negative is not None:
        conditioning["negative"] = _first_row(problem.negative)
    if not conditioning["from"] and given["method"] != "noise":
        raise ValueError(f"--method {given['method']} needs --from, what the image shows, e.g. --from label=3")
    levels = ki.schedule(given["schedule"], given["steps"] + 1, problem.levels)
    kept = ("method", "end_at_step", "cfg", "max_evals")
    how = {name: given[name] for name in kept} | {
        "sampler": ki.sampler(given["sampler"], **options),
        "source": conditioning["from"] or None,
        "target": conditioning["to"],
        "negative": conditioning["negative"] or None,
        "mask": None if given["mask"] is None else _mask_of(given["mask"]).to(device),
    }
    return _Job(model, problem, tuple(sigma for sigma in levels.tolist() if sigma > 0), given["seed"], how)


def _first_row(conditioning: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value[:1] if isinstance(value, Tensor) else value for name, value in conditioning.items()}


def _mask_of(path: Path) -> Tensor:
    """Return a mask of 0 and 1, shape (H, W): an image is 1 where it is lighter than middle grey."""
    found = read(path, channels=1) if path.suffix.lower() in IMAGES else read(path)
    return (found[0] > 0).to(found.dtype) if path.suffix.lower() in IMAGES else found


def _places(source: Path, job: _Job) -> list[_Place]:
    """Read the images before the work."""
    places = []
    for path in image_files(source):
        states = read_states(path, job.problem)
        if job.model in models.NAMES and float(states.mean()) > 0:
            warn_user(f"{path} is mostly light, and the digits of {job.model!r} are light strokes on black; invert it")
        name = path.name if source.is_file() else path.relative_to(source).as_posix()
        places += [_Place(state, path, name, i) for i, state in enumerate(states)]
    return places


def _check_out(places: list[_Place], out: Path, alone: bool) -> None:
    """Raise ValueError if an edited image would replace one that is read."""
    read_from = {place.path.resolve() for place in places}
    for place in places:
        target = out if alone else out / image_name(place.file, place.index)
        if target.resolve() in read_from:
            raise ValueError(f"--out {out} would replace {target}, an image before the edit; choose another --out")
