"""The command line, `kinvert`: a demo on real images, and what there is to choose from.

Tables go to stdout and everything else to stderr; with `--json` stdout is JSON alone, with null for infinite numbers.
An input that cannot work ends with one line that says why and with exit status 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import kinvert as ki
from kinvert import analysis, bench, models
from kinvert import demo as demos
from kinvert.bench.grid import describe
from kinvert.folder import invert_folder
from kinvert.jsontext import to_json
from kinvert.sampling import rising_schedule

try:
    import click

    from kinvert.console import print_lines, print_notes, print_table
except ModuleNotFoundError as error:
    raise SystemExit(f"the command line needs {error.name}, which is not here: pip install 'kinvert[cli]'") from error

LEVELS: dict[str, Callable[[], ki.levels.Levels]] = {
    "sd15": ki.levels.stable_diffusion,
    "sdxl": ki.levels.stable_diffusion,
    "svd": lambda: ki.levels.edm(sigma_max=700.0),
    "edm": ki.levels.edm,
    "sd3": lambda: ki.levels.flow(shift=3.0),
    "flux": ki.levels.flux,
}
model_levels = click.option(
    "--model", type=click.Choice(list(LEVELS)), default="sd15", help="Whose noise levels; sd3 and flux have flow times."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


class Commands(click.Group):
    """A group in which the library's complaints about an input are usage errors, without a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run as a program, unless there is nowhere to print."""
        if sys.stdout is None:  # as Python has it for `>&-`
            if sys.stderr is not None:
                sys.stderr.write("Error: stdout is closed, so that nothing can be printed; use > /dev/null instead\n")
            sys.exit(2)
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except (TypeError, ValueError, ModuleNotFoundError) as error:
            raise click.UsageError(str(error)) from error
        except bench.UnfinishedError as error:
            raise click.ClickException(str(error)) from error
        except BrokenPipeError:  # whoever reads the output has enough
            raise
        except OSError as error:
            raise click.UsageError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error


class WithDefault(click.Group):
    """A group whose command "run" is meant where no other is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the name in front of its arguments."""
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(ki.__version__, prog_name="kinvert")
def main() -> None:
    """The noise behind an image: diffusion samplers, noise schedules, and both run backwards.

    Start with `kinvert demo`, which needs no model and no GPU.
    """


def _names(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))


@main.command()
@click.option(
    "--model",
    type=click.Choice(models.NAMES),
    default="mnist",
    help="Embedded denoiser; its images have 8x8 or 28x28 pixels.",
)
@click.option(
    "--samplers", default=",".join(demos.SAMPLERS), callback=_names, metavar="NAME,...", help="See `kinvert samplers`."
)
@click.option("--steps", type=int, default=20, help="Steps in each direction.")
@click.option("--schedule", default="karras", metavar="NAME", help="See `kinvert schedules`.")
@click.option(
    "--cfg", type=float, default=1.0, help="Guidance towards the image's label, in both directions; 1 is none."
)
@click.option("--count", type=int, default=8, help="Number of images, one of each class in turn.")
@click.option("--normalize", is_flag=True, help="Give the latents mean 0 and standard deviation 1, as the node does.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", help="Floating point format.")
@click.option("--device", default="cpu", help="Where to compute, e.g. cuda.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default="demo", help="Folder for the three files."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON instead of a table; the files are written all the same."
)
def demo(out: Path, as_json: bool, **options: Any) -> None:
    """Unsample images, sample them back, and measure.

    An embedded denoiser takes handwritten digits that it never saw to noise and back, once with each sampler. The
    figures are printed and written to OUT/demo-MODEL.json, the images to demo-MODEL.npz, a picture to demo-MODEL.png.
    """
    _check_matplotlib()
    try:
        out.mkdir(parents=True, exist_ok=True)  # before the work, not after it
        outcome = demos.run(demos.Settings(**options), progress=True)
        paths = demos.save(outcome, out)
    except OSError as error:
        raise ValueError(f"cannot write to {str(out)!r}: {error.strerror}; choose another --out") from error
    if as_json:
        click.echo(to_json(outcome.report()), nl=False)
        return
    rows = [
        [r["sampler"], r["steps"], r["evaluations"], f"{r['mse']:.3g}", f"{r['psnr']:.1f}", f"{r['max_error']:.2g}",
         f"{r['latent_mean']:+.3f}", f"{r['latent_std']:.3f}"]
        for r in outcome.table()
    ]  # fmt: skip
    columns = ["sampler", "steps", "evaluations", "MSE", "PSNR (dB)", "max error", "latent\nmean", "latent\nstd"]
    s = outcome.settings
    print_table(
        f"round trip of {s.count} held-out images, {s.model}, {s.schedule}, cfg {s.cfg:g}", columns, rows, numbers=True
    )
    print_notes(
        "Errors are of the image sampled back, in [-1, 1]; PSNR is the mean over the images.",
        "Latents are divided by sigma: pure noise has mean 0 and standard deviation 1.",
    )
    print_lines(*(f"wrote {path}" for path in paths.values()))


@main.command()
@as_json
def samplers(as_json: bool) -> None:
    """List the samplers and what they are.

    Cost, order, noise and memory are read off a plan, and so is which way the sampler can be run backwards.
    """
    entries = [(entry, _properties(name)) for name, entry in ki.SAMPLERS.items()]
    if as_json:
        found = [{"name": e.name, "plan": p, "options": e.options, "summary": e.summary} for e, p in entries]
        click.echo(to_json(found), nl=False)
        return
    rows = [[e.name, ki.sampler(e.name).ode_order, *_cells(p), _options(e.options)] for e, p in entries]
    columns = ["sampler", "order", "evals/\nstep", "noises/\nstep", "unsamples", "invertible", "memory", "CFG++"]
    print_table("samplers", [*columns, "options"], rows, needed=6)
    print_notes(
        "memory: values that a step hands on besides x. unsamples: runs up a schedule and keeps the image.",
        "invertible:",
        *(f"  {word:<10} {meaning}" for word, meaning in analysis.INVERTIBILITY.items()),
        "  no plan    the sampler chooses its steps on the way, so there is nothing to read off",
    )


@main.command()
@click.option("--steps", type=int, default=10, help="Number of steps.")
@model_levels
@as_json
def schedules(steps: int, model: str, as_json: bool) -> None:
    """List the noise schedules.

    Each with what it is built from, and the noise levels that it visits for a model.
    """
    levels = LEVELS[model]()
    entries = [(entry, ki.schedule(name, steps, levels).tolist()) for name, entry in ki.SCHEDULES.items()]
    if as_json:
        found = [
            {
                "name": e.name,
                "needs": e.needs,
                "options": e.options,
                "summary": e.summary,
                "source": e.source,
                "sigmas": v,
            }
            for e, v in entries
        ]
        click.echo(to_json(found), nl=False)
        return
    rows = [[e.name, e.needs, len(v) - 1, _shortened(v), _options(e.options), e.summary] for e, v in entries]
    columns = ["schedule", "needs", "steps", "noise levels", "options", "summary"]
    print_table(f"noise schedules for {model}, {steps} steps", columns, rows, needed=4)


@main.command()
@click.argument("sampler")
@click.option("--schedule", default="karras", metavar="NAME", help="See `kinvert schedules`.")
@click.option("--steps", type=int, default=5, help="Number of steps.")
@model_levels
@click.option("--rising", is_flag=True, help="Up the schedule, as unsampling runs.")
@click.option(
    "--option", "options", multiple=True, metavar="KEY=VALUE", help="Option of the sampler, e.g. eta=0.5; repeatable."
)
def plan(sampler: str, schedule: str, steps: int, model: str, rising: bool, options: Sequence[str]) -> None:
    """Print a sampler's coefficients.

    That is all that SAMPLER computes on a schedule: each evaluation of the denoiser and each linear combination.
    """
    rule = ki.sampler(sampler, **dict(map(_key_value, options)))
    levels = LEVELS[model]()
    if levels.kind == "flow":
        raise ValueError(f"{model} has flow times, and samplers run on sigmas; choose another --model, e.g. sd15")
    sigmas: Any = ki.schedule(schedule, steps, levels, sampler=rule)
    click.echo(str(ki.compile_plan(rule, rising_schedule(sigmas) if rising else sigmas)))


# -- the benchmark -----------------------------------------------------------------------------------------------------
workers = click.option("--workers", type=int, default=1, help="Processes on this machine; or start it with torchrun.")
threads = click.option(
    "--threads",
    type=int,
    help="torch's threads in each process, for a model of your own. By default torch's, shared among the workers.",
)
imports = click.option(
    "--import", "imports", multiple=True, metavar="MODULE", help="Module that registers what is your own; repeatable."
)


def pairs(name: str, text: str) -> Callable[[Any], Any]:
    """An option that takes KEY=VALUE, several times."""
    return click.option(f"--{name}", f"{name}s", multiple=True, metavar="KEY=VALUE", help=text)


@main.group("bench", cls=WithDefault)
def bench_group() -> None:
    """Measure how well samplers run backwards, on a grid of settings.

    `kinvert bench [GRID.toml]` runs a grid, or a preset, as `kinvert bench run` does. A run that was stopped goes on
    where it was when the same command is given again.
    """


@bench_group.command("run")
@click.argument("grid", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--preset", metavar="NAME", help="A grid that comes along: quick (a minute), standard or full.")
@click.option("--out", type=click.Path(path_type=Path), default="bench", help="Folder of the results, a file a cell.")
@workers
@threads
@imports
@pairs("slurm", "Submit --workers jobs to Slurm, with this parameter of submitit, e.g. timeout_min=60; repeatable.")
def bench_run(
    grid: Path | None,
    preset: str | None,
    out: Path,
    workers: int,
    threads: int | None,
    imports: tuple[str, ...],
    slurms: Sequence[str],
) -> None:
    """Measure the cells of a grid that are not there yet.

    GRID is a TOML file; without one, and without --preset, it is the preset quick.
    """
    if grid is not None and preset is not None:
        raise ValueError("a GRID and a --preset were given; choose one")
    bench.import_modules(imports)
    cells, more = (bench.preset(preset or "quick"), ()) if grid is None else bench.read_grid(grid)
    imports = (*imports, *more)
    if slurms:
        parameters = _options_of("--slurm", slurms)
        jobs = bench.submit_cells(cells, out, workers=workers, threads=threads, imports=imports, **parameters)
        print_lines(*(f"submitted job {job.job_id}" for job in jobs), f"their results go to {out}")
        return
    records = bench.run(cells, out, workers=workers, threads=threads, imports=imports, progress=True)
    refused = sum(record["error"] is not None for record in records)
    print_lines(
        f"{len(records)} of {len(cells)} cells are in {out}, {refused} of them with an error",
        f"next: kinvert bench report {out}",
    )


@bench_group.command("compare")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--rtol", type=float, default=0.0, help="Relative difference up to which numbers are the same.")
@click.pass_context
def bench_compare(ctx: click.Context, a: Path, b: Path, rtol: float) -> None:
    """Tell two folders of results apart.

    A and B may be results.jsonl files too. The exit status is 1 where they differ.
    """
    found = bench.compare(a, b, rtol=rtol)
    rows = [[describe(d.cell), d.what, _brief(d.a), _brief(d.b)] for d in found.differences]
    if rows:
        print_table("differences (of metrics, the medians)", ["cell", "what", str(a), str(b)], rows)
    for place, cells in ((a, found.only_a), (b, found.only_b)):
        print_lines(*(f"only in {place}: {describe(cell)}" for cell in cells))
    print_lines(*(f"{name} differs: {left} and {right}" for name, (left, right) in found.versions.items()))
    print_lines(f"{found.equal} cells are equal")
    ctx.exit(0 if found.same else 1)


@bench_group.command("report")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="report", help="Folder of the report.")
def bench_report(folders: tuple[Path, ...], out: Path) -> None:
    """Write the report of FOLDERS of results.

    It is one HTML file, with figures as PNG and SVG and tables in Markdown and LaTeX beside it.
    """
    _check_matplotlib()
    from kinvert.bench import report

    print_lines(f"wrote {report.write(folders, out)}")


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the latents.")
@click.option("--model", default="mnist", metavar="NAME", help="An embedded model, or an entry point module:function.")
@click.option("--sampler", default="euler", metavar="NAME", help="See `kinvert samplers`.")
@pairs("option", "Option of the sampler, e.g. eta=0.5; repeatable.")
@click.option("--method", default="invert", metavar="NAME", help="How to invert: " + ", ".join(bench.METHODS) + ".")
@click.option("--schedule", default="karras", metavar="NAME", help="See `kinvert schedules`.")
@click.option("--steps", type=int, default=20, help="Number of steps.")
@click.option("--cfg", type=float, default=1.0, help="Guidance; 1 is none.")
@pairs("positive", "Conditioning of all files, e.g. label=3; repeatable.")
@pairs("negative", "Conditioning of the unconditional branch; repeatable.")
@click.option("--max-evals", type=int, help="Denoiser evaluations that one image may cost, at most.")
@click.option("--dtype", type=click.Choice(bench.DTYPES), default="float32", help="Floating point format.")
@click.option("--seed", type=int, default=0, help="Seed of the noises of stochastic samplers.")
@click.option("--shard-size", type=int, default=64, help="Files inverted as one batch and kept in one file.")
@workers
@threads
@imports
def invert(source: Path, out: Path, imports: tuple[str, ...], **given: Any) -> None:
    """Invert a folder of images or latents.

    SOURCE holds PNG or JPEG images, or latents as .safetensors, .npy or .pt. Their latents go to OUT, in safetensors
    shards, with manifest.jsonl. A run that was stopped goes on where it was when the same command is given again.
    """
    bench.import_modules(imports)
    options = tuple(_options_of("--option", given.pop("options")).items())
    placed: dict[str, Any] = {
        name: _options_of(f"--{name}", given.pop(f"{name}s")) for name in ("positive", "negative")
    }
    machinery: dict[str, Any] = {name: given.pop(name) for name in ("max_evals", "shard_size", "workers", "threads")}
    cell = bench.Cell(**given, options=options)
    rows = invert_folder(source, out, cell, **placed, **machinery, imports=imports, progress=True)
    claimed = [row["converged"] for row in rows if row["converged"] is not None]
    print_lines(
        f"{len(rows)} latents are in {out}" + (f", {sum(claimed)} of them converged" if claimed else ""),
        f"which is where: {out / 'manifest.jsonl'}",
    )


def _check_matplotlib() -> None:
    """Raise ValueError where pictures cannot be drawn, before the work and not after it."""
    try:
        import matplotlib.figure  # noqa: F401 - not at the top: it takes half as long as torch
    except ModuleNotFoundError as error:
        raise ValueError(f"pictures need {error.name}, which is not here: pip install 'kinvert[cli]'") from error
    except ValueError as error:
        raise ValueError(f"matplotlib does not start: {error}; is the variable MPLBACKEND right?") from error


def _options_of(flag: str, texts: Sequence[str]) -> dict[str, Any]:
    return dict(_key_value(text, flag) for text in texts)


def _brief(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _key_value(text: str, flag: str = "--option") -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{flag} must be KEY=VALUE, e.g. eta=0.5, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


# -- output ------------------------------------------------------------------------------------------------------------
def _properties(name: str) -> dict[str, Any] | None:
    """What a sampler's Plan says; None for one that chooses its steps and so has no Plan."""
    try:
        found = analysis.properties(name)
    except ValueError:
        return None
    return asdict(found) | {"stochastic": found.stochastic, "multistep": found.multistep}


def _cells(properties: dict[str, Any] | None) -> list[Any]:
    if properties is None:
        return ["", "", "", "no plan", "", ""]
    evaluations, draws, memory = (properties[key] or "-" for key in ("evaluations_per_step", "draws", "memory"))
    ways = _yes(properties["unsamples"]), properties["invertibility"]
    return [evaluations, draws, *ways, memory, _yes(properties["guided"])]


def _yes(value: bool) -> str:
    return "yes" if value else "-"


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={getattr(value, 'name', value)}" for key, value in options.items())


def _shortened(levels: list[float]) -> str:
    words = [f"{level:.4g}" for level in levels]
    return ", ".join(words if len(words) <= 5 else [*words[:2], "...", *words[-2:]])


if __name__ == "__main__":
    main()
