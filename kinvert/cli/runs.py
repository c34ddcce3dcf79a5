"""The commands that compute and write files: the demo, and a folder of images inverted."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from kinvert import bench
from kinvert import demo as demos
from kinvert.cli import completion
from kinvert.cli.options import check_matplotlib, device, imports, pairs, parse_pairs, threads, workers
from kinvert.cli.pipelines import call_options, invert_files, is_directory, wish_of
from kinvert.console import print_lines, print_notes, print_table
from kinvert.folder import MANIFEST, invert_folder
from kinvert.jobs import import_modules
from kinvert.jsontext import to_json
from kinvert.models import NAMES

__all__ = ["demo", "invert"]


def _names(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))


@click.command()
@click.option(
    "--model",
    type=click.Choice(NAMES),
    default="mnist",
    help="Embedded denoiser: digits of 8x8 or 28x28 pixels, or people and hands in colour.",
)
@click.option(
    "--samplers",
    default=",".join(demos.SAMPLERS),
    callback=_names,
    metavar="NAME,...",
    shell_complete=completion.samplers,
    help="See `kinvert samplers`.",
)
@click.option("--steps", type=int, default=20, help="Steps in each direction.")
@click.option(
    "--schedule", default="karras", metavar="NAME", shell_complete=completion.schedules, help="See `kinvert schedules`."
)
@click.option(
    "--cfg", type=float, default=1.0, help="Guidance towards the image's label, in both directions; 1 is none."
)
@click.option("--count", type=int, default=8, help="Number of images, one of each class in turn.")
@click.option("--normalize", is_flag=True, help="Give the latents mean 0 and standard deviation 1, as the node does.")
@click.option(
    "--invert/--no-invert",
    default=None,
    help="Also invert exactly. By default only without guidance, with which it may take minutes.",
)
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", help="Floating point format.")
@device
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="demo", help="Folder for the files.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON instead of a table; the files are written all the same."
)
def demo(out: Path, as_json: bool, **options: Any) -> None:
    """Take images to noise and back, edit them, and measure.

    An embedded denoiser takes images that it never saw to noise and back: unsampled with each sampler, and inverted
    exactly. Then it makes another digit, or another skin tone, of each latent. It prints a table, and writes to OUT the
    table (.json), the images and latents (.npz), a picture (.png), and an image for `kinvert edit`.
    """
    check_matplotlib()
    try:
        out.mkdir(parents=True, exist_ok=True)  # before the work, not after it
        outcome = demos.run(demos.Settings(**options), progress=True)
        paths = demos.save(outcome, out)
    except OSError as error:
        raise ValueError(f"cannot write to {str(out)!r}: {error.strerror}; choose another --out") from error
    if as_json:
        click.echo(to_json(outcome.report()), nl=False)
        return
    _print_demo(outcome)
    print_lines(*(f"wrote {path}" for path in paths.values()), *_next(outcome, paths["example"]))


def _next(outcome: demos.Demo, example: Path) -> list[str]:
    """Return what to type after the demo."""
    place, model = outcome.example, outcome.settings.model
    label, target = int(outcome.labels[place]), int(outcome.targets[place])
    which = "" if model == "mnist" else f" --model {model}"
    edited = example.with_name(f"edited-{model}-{target}.png")
    return [
        f"next: kinvert edit {shlex.quote(str(example))} --from label={label} --to label={target} --cfg 3{which} "
        f"--out {shlex.quote(str(edited))}"
    ]


def _print_demo(outcome: demos.Demo) -> None:
    rows = [
        [r["sampler"] if r["method"] == "unsample" else f"invert ({r['sampler']})", r["steps"], r["evaluations"],
         f"{r['mse']:.3g}", f"{r['psnr']:.1f}", f"{r['max_error']:.2g}", f"{r['latent_mean']:+.3f}",
         f"{r['latent_std']:.3f}", f"{r['edits_took']} of {outcome.settings.count}"]
        for r in outcome.table()
    ]  # fmt: skip
    columns = [
        "sampler",
        "steps",
        "evaluations",
        "MSE",
        "PSNR (dB)",
        "max error",
        "latent\nmean",
        "latent\nstd",
        "edits\ntook",
    ]
    s = outcome.settings
    print_table(
        f"round trip of {s.count} held-out images, {s.model}, {s.schedule}, cfg {s.cfg:g}", columns, rows, numbers=True
    )
    print_notes(
        "Errors are of the image sampled back, in [-1, 1]; PSNR is the mean over the images.",
        "Latents are divided by sigma: pure noise has mean 0 and standard deviation 1.",
        "invert is exact where it converges, on the schedule without its step to 0; the others go up approximately."
        if "invert" in outcome.trips
        else "Samplers go up approximately; --invert adds an exact inversion.",
        f"An edit samples the latent as the digit five further on, with cfg {demos.EDIT_CFG:g}; "
        "a classifier says whether it took."
        if outcome.truth is None
        else f"An edit samples the latent as the skin tone three further on, with cfg {demos.EDIT_CFG:g}; "
        "it took if it is closer to the real picture in that tone than the picture before.",
        *(["In the picture black is the larger value: ink in images."] if outcome.truth is None else []),
    )


OF_PIPELINES = ("prompt", "negative_prompt", "guidance_scale", "height", "width", "tol")
OF_OTHERS = ("cfg", "positives", "negatives", "seed", "shard_size", "workers", "threads", "imports")


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of the latents, or the file of one."
)
@click.option(
    "--model",
    default="mnist",
    metavar="NAME|DIR",
    shell_complete=completion.problems,
    help="An embedded model, an entry point module:function, or the directory of a pipeline of diffusers.",
)
@click.option(
    "--sampler", default="euler", metavar="NAME", shell_complete=completion.samplers, help="See `kinvert samplers`."
)
@pairs("option", "Option of the sampler, e.g. eta=0.5; repeatable.")
@click.option(
    "--method",
    default="invert",
    metavar="NAME",
    shell_complete=completion.methods,
    help="How to invert: " + ", ".join(bench.METHODS) + ".",
)
@click.option(
    "--schedule",
    default="karras",
    metavar="NAME",
    shell_complete=completion.schedules,
    help="See `kinvert schedules`; for a pipeline by default its own levels.",
)
@click.option("--steps", type=int, default=20, help="Number of steps.")
@click.option("--cfg", type=float, default=1.0, help="Guidance; 1 is none.")
@pairs("positive", "Conditioning of all files, e.g. label=3; repeatable.")
@pairs("negative", "Conditioning of the unconditional branch; repeatable.")
@call_options
@click.option("--tol", type=float, help="For pipelines: the error to reach, in parts of the latent's size.")
@click.option("--max-evals", type=int, help="Denoiser evaluations that one image may cost, at most.")
@click.option("--dtype", type=click.Choice(bench.DTYPES), default="float32", help="Floating point format.")
@click.option("--seed", type=int, default=0, help="Seed of the noises of stochastic samplers.")
@click.option("--shard-size", type=int, default=64, help="Files inverted as one batch and kept in one file.")
@workers
@threads
@imports
@click.pass_context
def invert(ctx: click.Context, source: Path, out: Path, imports: tuple[str, ...], **given: Any) -> None:
    """Invert a folder of images or latents.

    SOURCE holds PNG or JPEG images, or latents as .safetensors, .npy or .pt. Their latents go to OUT, in safetensors
    shards, with manifest.jsonl. A run that was stopped goes on where it was when the same command is given again.

    With the directory of a pipeline of diffusers as --model, SOURCE is an image or a folder of images. Every image has
    its latent in a file of its own, which `kinvert sample` takes.
    """
    pipeline = is_directory(given["model"])
    for name in OF_OTHERS if pipeline else OF_PIPELINES:
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            kinds = ("other models", "a pipeline of diffusers") if pipeline else ("pipelines", f"{given['model']!r}")
            flag = "--" + name.removesuffix("s" if name in ("positives", "negatives", "imports") else "")
            raise ValueError(f"{flag.replace('_', '-')} is for {kinds[0]}, and --model is {kinds[1]}; leave it out")
    if pipeline:
        if ctx.get_parameter_source("schedule") is not ParameterSource.COMMANDLINE:
            given["schedule"] = None
        _invert_by_pipeline(source, out, {key: value for key, value in given.items() if key not in OF_OTHERS})
        return
    import_modules(imports)
    options, positive, negative = (
        parse_pairs(f"--{name}", given.pop(f"{name}s")) for name in ("option", "positive", "negative")
    )
    how = {name: given.pop(name) for name in ("max_evals", "shard_size", "workers", "threads")}
    settings = {name: value for name, value in given.items() if name not in OF_PIPELINES}
    cell = bench.Cell(**settings, options=tuple(options.items()))
    rows = invert_folder(source, out, cell, positive=positive, negative=negative, imports=imports, progress=True, **how)
    claimed = [row["converged"] for row in rows if row["converged"] is not None]
    print_lines(
        f"{len(rows)} latents are in {out}" + (f", {sum(claimed)} of them converged" if claimed else ""),
        f"their files and rows are listed in {out / MANIFEST}",
        f"next: kinvert sample {out} --out images",
    )


def _invert_by_pipeline(source: Path, out: Path, given: dict[str, Any]) -> None:
    model, options = given.pop("model"), given.pop("options")
    rows = invert_files(wish_of(model, given, options), source, out)
    columns = ["image", "converged", "error", "evaluations", "reason"]
    cells = [
        [row["file"], row["converged"], f"{row['round_trip_error']:.2g}", row["evaluations"], row["reason"]]
        for row in rows
        if "converged" in row
    ]
    if cells:
        print_table("inversions", columns, cells)
    place = out if out.is_file() else out / rows[0]["latent"]
    print_lines(f"{len(rows)} latents are in {out}", f"next: kinvert sample {place} --out again.png")
