"""`kinvert bench`: run a grid, compare two folders of results, write a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from kinvert import bench
from kinvert.bench.grid import describe
from kinvert.cli.groups import WithDefault
from kinvert.cli.options import check_matplotlib, imports, pairs, parse_pairs, threads, workers
from kinvert.console import print_lines, print_table
from kinvert.jobs import import_modules

__all__ = ["bench_group"]


@click.group("bench", cls=WithDefault)
def bench_group() -> None:
    """Measure how well samplers run backwards, on a grid of settings.

    `kinvert bench [GRID.toml]` runs a grid, or a preset, as `kinvert bench run` does. A run that was stopped goes on
    where it was when the same command is given again.
    """


@bench_group.command("run")
@click.argument("grid", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--preset", metavar="NAME", help="A grid that comes with kinvert: quick (a minute), budgets, standard or full."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default="bench", help="Folder of the results, one file for each cell."
)
@workers
@threads
@imports
@pairs("slurm", "Submit --workers jobs to Slurm, with this parameter of submitit, e.g. timeout_min=60; repeatable.")
def run(
    grid: Path | None,
    preset: str | None,
    out: Path,
    workers: int,
    threads: int | None,
    imports: tuple[str, ...],
    slurms: Sequence[str],
) -> None:
    """Measure the cells of a grid that have no result yet.

    GRID is a TOML file. Without GRID and --preset, the preset quick is measured.
    """
    if grid is not None and preset is not None:
        raise ValueError("a GRID and a --preset were given; choose one")
    import_modules(imports)
    cells, more = (bench.preset(preset or "quick"), ()) if grid is None else bench.read_grid(grid)
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
def report(folders: tuple[Path, ...], out: Path) -> None:
    """Write the report of FOLDERS of results.

    The report is one HTML file, with figures (PNG, SVG) and tables (Markdown, LaTeX) beside it.
    """
    check_matplotlib()
    from kinvert.bench.report import write

    print_lines(f"wrote {write(folders, out)}")


def _brief(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
