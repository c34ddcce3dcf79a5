"""`kinvert bench`: run a grid, compare two folders of results, write a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from kinvert import bench
from kinvert.bench.grid import describe, unique
from kinvert.bench.problems import most_images
from kinvert.cli import completion
from kinvert.cli.groups import WithDefault
from kinvert.cli.options import check_matplotlib, imports, pairs, parse_pairs, parse_where, threads, wheres, workers
from kinvert.cli.pipelines import call_options, is_directory
from kinvert.console import print_lines, print_table
from kinvert.jobs import import_modules
from kinvert.pictures import image_files

__all__ = ["bench_group"]


@click.group("bench", cls=WithDefault)
def bench_group() -> None:
    """Measure how well samplers run backwards, on a grid of settings.

    `kinvert bench [GRID.toml]` runs a grid, or a preset, as `kinvert bench run` does; `kinvert bench run
    --help` lists its options. A run that was stopped goes on where it was when the same command is given again.
    """


OF_CALLS = ("prompt", "negative_prompt", "guidance_scale", "height", "width")
OF_GRIDS = ("samplers", "methods", "schedule", "steps")
OF_PIPELINES = ("images", *OF_CALLS, *OF_GRIDS, "count")


@bench_group.command("run")
@click.argument("grid", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--preset",
    metavar="NAME",
    shell_complete=completion.presets,
    help="A grid that comes with kinvert: quick (a minute), inversion (12 minutes), budgets, standard or full.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default="bench", help="Folder of the results, one file for each cell."
)
@workers
@threads
@imports
@click.option(
    "--model",
    metavar="NAME",
    help="Measure this model, instead of those of GRID or --preset if one is given: a name, module:function, or the "
    "directory of a pipeline of diffusers, on --images.",
)
@click.option("--images", type=click.Path(path_type=Path), help="Folder of the images for a pipeline.")
@wheres("Measure only")
@call_options
@click.option(
    "--samplers",
    default="euler,dpmpp_2m",
    metavar="NAME,...",
    shell_complete=completion.samplers,
    help="For --model: see `kinvert samplers`.",
)
@click.option(
    "--methods",
    default="unsample,invert",
    metavar="NAME,...",
    shell_complete=completion.methods,
    help=f"For --model: {', '.join(bench.METHODS)}.",
)
@click.option(
    "--schedule",
    default="karras",
    metavar="NAME",
    shell_complete=completion.schedules,
    help="For --model: see `kinvert schedules`.",
)
@click.option("--steps", default="20", metavar="N,...", help="For --model: numbers of steps.")
@click.option(
    "--count", type=int, show_default="4 for --model, otherwise that of the grid", help="For --model: number of images."
)
@click.option(
    "--dtype",
    type=click.Choice(bench.DTYPES),
    show_default="float32 for --model, otherwise that of the grid",
    help="Floating point format of all cells.",
)
@pairs("slurm", "Submit --workers jobs to Slurm, with this parameter of submitit, e.g. timeout_min=60; repeatable.")
@click.pass_context
def run(
    ctx: click.Context,
    grid: Path | None,
    preset: str | None,
    out: Path,
    workers: int,
    threads: int | None,
    imports: tuple[str, ...],
    slurms: Sequence[str],
    model: str | None,
    wheres: tuple[str, ...],
    **given: Any,
) -> None:
    """Measure the cells of a grid that have no result yet.

    GRID is a TOML file. Without GRID and --preset, the preset quick is measured. With --model and neither, the model is
    measured with the samplers, methods and steps that the options name. A pipeline of diffusers inverts the images of a
    folder on kinvert's schedules; errors are those of its latents.
    """
    if grid is not None and preset is not None:
        raise ValueError("a GRID and a --preset were given; choose one")
    import_modules(imports)
    more: tuple[str, ...] = ()
    if model is not None and grid is None and preset is None:
        cells = _cells_of(model, given)
    else:
        if model is None:
            _check_ungiven(ctx, OF_PIPELINES, "--model")
        _check_ungiven(ctx, OF_GRIDS, "--model without a grid")
        cells, more = (bench.preset(preset or "quick"), ()) if grid is None else bench.read_grid(grid)
        instead = {name: given[name] for name in ("device", "dtype", "count") if _is_given(ctx, name)}
        if model is not None:
            import_modules(more)
            instead["model"] = _problem_of(model, given)
            most = most_images(instead["model"]) or _images_there(given)
            cells = [replace(cell, count=min(cell.count, most or cell.count)) for cell in cells]
        cells = unique(replace(cell, **instead) for cell in cells)
    cells = _chosen(cells, parse_where(wheres))
    how: dict[str, Any] = {"workers": workers, "threads": threads, "imports": (*imports, *more)}
    if slurms:
        jobs = bench.submit_cells(cells, out, **how, **parse_pairs("--slurm", slurms))
        print_lines(*(f"submitted job {job.job_id}" for job in jobs), f"their results go to {out}")
        return
    records = bench.run(cells, out, **how, progress=True)
    refused = sum(record["error"] is not None for record in records)
    print_lines(
        f"{len(records)} of {len(cells)} cells are in {out}, {refused} of them with an error",
        f"next: kinvert bench report {out}",
    )


def _chosen(cells: list[bench.Cell], where: dict[str, list[str]]) -> list[bench.Cell]:
    """Return the cells whose settings have one of the given values."""
    if not where:
        return cells
    from kinvert.bench.report.rows import choose  # here, because most commands need no report

    kept = choose([{"cell": cell.settings, "place": place} for place, cell in enumerate(cells)], where)
    return [cells[one["place"]] for one in kept]


def _images_there(given: dict[str, Any]) -> int | None:
    """Return how many images a pipeline has; None for other models."""
    return None if given["images"] is None else len(image_files(given["images"]))


def _problem_of(model: str, given: dict[str, Any]) -> str:
    """Return the name of the problem of a model, which may be a pipeline in a directory."""
    if not is_directory(model):
        for name in (*OF_CALLS, "images"):
            if given[name] is not None:
                raise ValueError(f"--{name.replace('_', '-')} is for a pipeline in a directory, and {model} is none")
        return model
    if given["images"] is None:
        raise ValueError("--model needs --images FOLDER, the images to invert")
    from kinvert.adapters.diffusers.problem import entry_point  # here, because importing diffusers takes seconds

    files = image_files(given["images"])
    if (given["count"] or 0) > len(files):
        raise ValueError(f"count must be at most {len(files)}, the images in {str(given['images'])!r}")
    digest = sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    where = {"model": Path(model).resolve(), "images": given["images"].resolve(), "digest": digest}
    return entry_point({**where, "device": given["device"], **{name: given[name] for name in OF_CALLS}})


def _cells_of(model: str, given: dict[str, Any]) -> list[bench.Cell]:
    """Return the cells of a model, with the settings that the options name."""
    given = {**given, "count": 4 if given["count"] is None else given["count"]}
    listed = {key: [word.strip() for word in given[key].split(",")] for key in ("samplers", "methods", "steps")}
    grid = bench.Grid(
        model=_problem_of(model, given),
        sampler=listed["samplers"],
        method=listed["methods"],
        schedule=given["schedule"],
        steps=[int(steps) if steps.isdigit() else steps for steps in listed["steps"]],
        dtype=given["dtype"] or "float32",
        count=given["count"],
    )
    return list(grid)


def _check_ungiven(ctx: click.Context, names: Sequence[str], use: str) -> None:
    for name in names:
        if _is_given(ctx, name):
            raise ValueError(f"--{name.replace('_', '-')} is for {use}; a grid has its own settings")


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


@bench_group.command("compare")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--rtol", type=float, default=0.0, help="Relative difference up to which numbers count as equal.")
@click.pass_context
def compare(ctx: click.Context, a: Path, b: Path, rtol: float) -> None:
    """Compare two folders of results.

    A and B may be results.jsonl files too. The exit status is 1 if they differ.
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
@click.option("--columns", metavar="NAME,...", help="Numbers of the leaderboard, e.g. evaluations,nmse_db,psnr.")
@wheres("Report only")
@click.option("--top", type=int, metavar="N", help="Rows of the leaderboard for each model and question, the best.")
def report(folders: tuple[Path, ...], out: Path, columns: str | None, wheres: tuple[str, ...], top: int | None) -> None:
    """Write the report of FOLDERS of results.

    The report is one HTML file, with figures (PNG, SVG) and tables (Markdown, LaTeX) beside it. --where chooses what
    all of it is about: model, question, method, sampler, schedule, steps, cfg, dtype. --columns and --top choose what
    the leaderboard shows.
    """
    check_matplotlib()
    from kinvert.bench.report import read, write
    from kinvert.bench.report.headline import headline
    from kinvert.bench.report.rows import choose, rows

    names = None if columns is None else [name.strip() for name in columns.split(",")]
    where = parse_where(wheres)
    records = read(folders)
    path = write(records, out, columns=names, where=where, top=top)
    chosen = choose(records, where)
    print_lines(f"wrote {path}", *headline(rows(chosen), chosen))
    first, *_ = (out / "leaderboard.tex").read_text().splitlines() if (out / "leaderboard.tex").exists() else [""]
    if first.startswith("%"):
        print_lines(f"leaderboard.tex: {first.removeprefix('% ')}")


def _brief(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
