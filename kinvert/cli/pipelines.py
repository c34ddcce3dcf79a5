"""Images through a pipeline in a directory of this machine: unsampled, inverted, and sampled again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import kinvert as ki
from kinvert.bench import DTYPES
from kinvert.checks import check_choice, check_count
from kinvert.cli import completion
from kinvert.cli.latents import LatentFile, Record
from kinvert.cli.options import device, pairs, parse_pairs
from kinvert.console import print_lines
from kinvert.coordinates import settle
from kinvert.files import is_without_room, remove_leftovers, write_file
from kinvert.folder import MANIFEST
from kinvert.inversion import METHODS
from kinvert.inversion.back import WayBack
from kinvert.jobs import UnfinishedError
from kinvert.jsontext import canonical_json
from kinvert.levels import FlowTimes
from kinvert.pictures import image_files, open_image
from kinvert.records import DamagedError
from kinvert.resultfiles import set_aside
from kinvert.rules import Rule
from kinvert.rules.names import unknown_schedule
from kinvert.stops import keeping
from kinvert.tasks import tell_of_damage
from kinvert.tensors import wide_dtype

__all__ = ["Opened", "Wish", "call_options", "image_of", "invert_files", "is_directory", "unsample", "wish_of"]

CALL = ("prompt", "negative_prompt", "guidance_scale", "height", "width")
SUFFIX = ".safetensors"
LIMIT = 50  # evaluations a step, if nothing else is asked for


def is_directory(model: str) -> bool:
    """Tell whether the name of a model is the path of a directory."""
    return Path(model).is_dir() or (":" not in model and ("/" in model or "\\" in model))


def call_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a pipeline's call, and of where it runs, to a command."""
    for option in reversed(
        (
            click.option("--prompt", help="What the image shows."),
            click.option("--negative-prompt", help="What guidance leads away from."),
            click.option("--guidance-scale", type=float, help="Guidance by the pipeline; by default as it has it."),
            click.option("--height", type=int, help="Resize to this height, in pixels."),
            click.option("--width", type=int, help="Resize to this width, in pixels."),
            device,
        )
    ):
        command = option(command)
    return command


@dataclass(frozen=True)
class Wish:
    """What a command is to do with an image.

    Attributes:
        model: the directory of the pipeline.
        call: arguments of the pipeline's call, those that were given.
        device, dtype: where and in what its networks compute.
        sampler, options: the sampler.
        steps: their number.
        schedule: a name of `ki.SCHEDULES`; None takes the pipeline's own levels.
        method: "unsample", "invert", or a root finder of `ki.invert`.
        tol: as in `ki.invert`.
        max_evals: as in `ki.invert`; None is 50 a step.
    """

    model: str
    call: Mapping[str, Any]
    device: str = "cpu"
    dtype: str = "float32"
    sampler: str = "euler"
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 30
    schedule: str | None = None
    method: str = "unsample"
    tol: float | None = None
    max_evals: int | None = None

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("method", self.method, ("unsample", "invert", *METHODS))
        if self.schedule is not None and self.schedule not in ki.SCHEDULES:
            raise ValueError(unknown_schedule(self.schedule))
        _ = self.rule

    @property
    def rule(self) -> Rule:
        """The sampler."""
        return ki.sampler(self.sampler, **self.options)


class Opened:
    """A pipeline that was loaded for a command."""

    def __init__(self, model: str, device: str, dtype: str) -> None:
        # Here, because importing diffusers takes seconds, and it may be missing.
        import kinvert.adapters.diffusers as kd
        from kinvert.adapters.diffusers import directory, host

        self.kd, self._levels_of, self._host = kd, directory.levels_of, host
        self.pipe = directory.open_pipeline(model, device=device, dtype=getattr(torch, dtype))

    def denoiser(self, call: Mapping[str, Any], steps: int) -> Any:
        """Return the pipeline as a denoiser."""
        if "prompt" in self._host.parameters_of(self.pipe) and "prompt" not in call:
            raise ValueError("the model takes a prompt; give --prompt, which may be empty: --prompt ''")
        return self.kd.denoiser(self.pipe, num_inference_steps=steps, **call)

    def encode(self, path: Path, call: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any], tuple[int, int]]:
        """Return the latents of an image, the arguments of a call for its size, and the size, height first."""
        image, given = open_image(path), {name: call[name] for name in ("height", "width") if name in call}
        size = given.get("height", image.height), given.get("width", image.width)
        latents = self.kd.encode(self.pipe, image, **given)
        known = self._host.parameters_of(self.pipe)
        sized = {name: value for name, value in zip(("height", "width"), size, strict=True) if name in known}
        return latents, {**{name: value for name, value in call.items() if name not in given}, **sized}, size

    def schedule(self, wish: Wish, denoiser: Any) -> Tensor:
        """Return the levels of the way down."""
        if wish.schedule is None:
            found: Tensor = denoiser.sigmas
            return found
        return ki.schedule(wish.schedule, wish.steps, self._levels_of(self.pipe.scheduler), sampler=wish.rule)


def latent_of(opened: Opened, wish: Wish, path: Path) -> LatentFile:
    """Unsample or invert an image."""
    latents, call, size = opened.encode(path, wish.call)
    denoiser = opened.denoiser(call, wish.steps)
    sigmas = opened.schedule(wish, denoiser)
    result: dict[str, Any] = {}
    belongs: dict[str, Any] = {}
    if wish.method == "unsample":
        latent = ki.unsample(denoiser, _state(latents, denoiser, sigmas), sigmas, sampler=wish.rule, progress=True)
    else:
        sigmas = sigmas[:-1] if sigmas[-1] == 0 else sigmas
        found = ki.invert(
            denoiser, _state(latents, denoiser, sigmas), sigmas, sampler=wish.rule, progress=True, tol=wish.tol,
            max_evals=wish.max_evals or LIMIT * wish.steps, method="auto" if wish.method == "invert" else wish.method,
        )  # fmt: skip
        latent, belongs = found.latent, {"memory": found.memory, "noises": found.noises}
        result = {
            "converged": bool(found.converged[0]),
            "round_trip_error": float(found.round_trip_error[0]),
            "evaluations": int(found.evaluations[0]),
            "reason": found.reasons[0].name,
        }
    record = Record(
        verb="unsample" if wish.method == "unsample" else "invert",
        sigmas=tuple(sigmas.tolist()),
        coordinates=denoiser.coordinates,
        size=size,
        result=result,
        **_asked(wish, path, call),
    )
    return LatentFile(latent, record, **belongs)


def _asked(wish: Wish, path: Path, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a record that is known before the work."""
    return {
        "model": str(Path(wish.model).resolve()),
        "call": dict(call),
        "steps": wish.steps,
        "sampler": wish.sampler,
        "options": dict(wish.options),
        "dtype": wish.dtype,
        "schedule": wish.schedule,
        "method": wish.method,
        "limits": (wish.tol, wish.max_evals),
        "image": (path.name, sha256(path.read_bytes()).hexdigest()[:16]),
    }


def _state(latents: Tensor, denoiser: Any, sigmas: Tensor) -> Tensor:
    """Return an image's latents as the state at the last level, in float32 at least."""
    return latents.to(wide_dtype(latents.dtype)) * denoiser.timetable.to_x(float(sigmas[-1]))


def image_of(opened: Opened, file: LatentFile, call: Mapping[str, Any]) -> Any:
    """Sample a latent, and return the image."""
    record = file.record
    denoiser = opened.denoiser(call, record.steps)
    if denoiser.coordinates != record.coordinates:
        raise ValueError(
            f"the latent belongs to {record.model}, with {_LEVELS[record.coordinates]}, and this model has "
            f"{_LEVELS[denoiser.coordinates]}; give the --model that it was made with"
        )
    levels = FlowTimes(record.sigmas) if record.coordinates == "flow" else record.sigmas
    rule = settle(denoiser, ki.sampler(record.sampler, **record.options), levels).rule
    way = WayBack(rule, record.sigmas, record.coordinates)
    device = opened.pipe.device
    with torch.no_grad():
        x = way.sample(
            denoiser, file.latent.to(device), memory={name: v.to(device) for name, v in file.memory.items()},
            noises=[noise.to(device) for noise in file.noises], embeddings={}, progress=True,
        )  # fmt: skip
    height, width = record.size
    latents = x / denoiser.timetable.to_x(record.sigmas[-1])
    return opened.kd.decode(opened.pipe, latents.to(denoiser.network_dtype), height=height, width=width)[0]


_LEVELS = {"ve": "sigmas", "flow": "flow times"}


# -- files -------------------------------------------------------------------------------------------------------------
def invert_files(wish: Wish, source: Path, out: Path) -> list[dict[str, Any]]:
    """Invert an image to a file, or the images of a folder to files in a folder of the same names, and a manifest.

    Images whose file is there, with the same settings, are not done again.

    Returns:
        A row for each image: file, latent, and what the inversion says of itself.

    Raises:
        ValueError: nothing to invert; a file of the same name with other settings.
        UnfinishedError: images that cannot be inverted; the others are done.
    """
    paths, alone = image_files(source), source.is_file() and out.suffix == SUFFIX
    opened, rows, failures = None, list[dict[str, Any]](), list[str]()

    def kept() -> str:
        return f"{len(rows)} of {len(paths)} latents are kept in {out}; the same command goes on"

    with keeping(kept):
        for path in paths:
            name = path.name if source.is_file() else path.relative_to(source).as_posix()
            place = out if alone else out / f"{name}{SUFFIX}"
            remove_leftovers(place.parent)
            try:
                record = _done(place, wish, path)
                if record is None:
                    opened = opened or Opened(wish.model, wish.device, wish.dtype)
                    file = latent_of(opened, wish, path)
                    file.save(place)
                    record = file.record
            except (OSError, ValueError) as error:  # OSError: an image that is gone since its latent was made
                if is_without_room(error):
                    raise UnfinishedError(f"no room is left on the disk: {kept()} once there is some") from error
                if len(paths) == 1 or (opened is None and isinstance(error, ValueError)):
                    raise
                failures.append(f"  {name}: {error}")
                continue
            rows.append({"file": name, "latent": place.name if alone else f"{name}{SUFFIX}", **record.result})
    if not alone:
        write_file(out / MANIFEST, "".join(canonical_json(row) + "\n" for row in rows).encode())
    if failures:
        complaint = f"{len(failures)} of {len(paths)} images are not done; the others are, and in {MANIFEST}:"
        raise UnfinishedError("\n".join([complaint, *failures]))
    return rows


def _done(place: Path, wish: Wish, path: Path) -> Record | None:
    """Return the record of a latent that is there already, and whole; raise ValueError if it was made otherwise."""
    if not place.exists():
        return None
    try:
        record, asked = LatentFile.load(place).record, _asked(wish, path, wish.call)
    except DamagedError as error:
        tell_of_damage([f"{error}; see {set_aside(place)}"], "and computed again")
        return None
    known = {name: value for name, value in record.settings.items() if name in asked}
    wanted = json.loads(canonical_json(asked))
    for name in ("height", "width"):  # without them, those of the image
        if name not in wish.call:
            known["call"].pop(name, None)
    for name, value in wanted.items():
        if known[name] != value:
            raise ValueError(
                f"{str(place)!r} was made with {name} {known[name]!r}, and now it is {value!r}; choose another --out, "
                "or remove it"
            )
    return record


# -- commands ----------------------------------------------------------------------------------------------------------
def wish_of(model: str, given: Mapping[str, Any], options: Sequence[str]) -> Wish:
    """Return what the options of a command ask for."""
    call = {name: given[name] for name in CALL if given.get(name) is not None}
    rest = {name: value for name, value in given.items() if name not in CALL}
    return Wish(model, call, options=parse_pairs("--option", options), **rest)


@click.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--model", required=True, metavar="DIR", help="Directory of a pipeline of diffusers.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File of the latent, .safetensors.")
@call_options
@click.option(
    "--sampler", default="euler", metavar="NAME", shell_complete=completion.samplers, help="See `kinvert samplers`."
)
@pairs("option", "Option of the sampler, e.g. eta=0; repeatable.")
@click.option(
    "--schedule",
    metavar="NAME",
    shell_complete=completion.schedules,
    help="See `kinvert schedules`; by default the pipeline's own levels.",
)
@click.option("--steps", type=int, default=30, help="Number of steps.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", help="Floating point format of the networks.")
def unsample(image: Path, model: str, out: Path, options: Sequence[str], **given: Any) -> None:
    """Run a sampler from an IMAGE up to noise.

    The model is a pipeline of diffusers in a directory.

    The latent goes to OUT, with everything that `kinvert sample` needs to go back. It is approximate: `kinvert invert`
    is exact.
    """
    if not image.is_file():
        raise ValueError(f"there is no image {str(image)!r}; for a folder use kinvert invert")
    wish = wish_of(model, given, options)
    latent_of(Opened(model, wish.device, wish.dtype), wish, image).save(out)
    print_lines(f"wrote {out}", f"next: kinvert sample {out} --out again.png")
