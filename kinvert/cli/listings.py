"""The commands that print what there is: samplers, schedules, and the Plan of a sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

import kinvert as ki
from kinvert import analysis
from kinvert.cli import completion
from kinvert.cli.options import LEVELS, as_json, model_levels, pairs, parse_pairs
from kinvert.console import print_notes, print_table
from kinvert.jsontext import to_json
from kinvert.sampling import rising_schedule

__all__ = ["plan", "samplers", "schedules"]

MOST_LINES = 10_000  # steps of a printed plan


@click.command()
@as_json
def samplers(as_json: bool) -> None:
    """List the samplers and what they are.

    Cost, order, noise, memory and the ways to run the sampler backwards are read off a plan.
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
        "memory: values that a step passes on besides x. unsamples: runs up a schedule and keeps the image.",
        "invertible:",
        *(f"  {word:<10} {meaning}" for word, meaning in analysis.INVERTIBILITY.items()),
        "  no plan    the sampler chooses its steps while it runs, so it has no plan to read",
    )


@click.command()
@click.option("--steps", type=int, default=10, help="Number of steps.")
@model_levels
@as_json
def schedules(steps: int, model: str, as_json: bool) -> None:
    """List the noise schedules.

    For each: what it is built from, and the noise levels that it visits for a model.
    """
    levels = LEVELS[model]()
    entries = [(entry, ki.schedule(name, steps, levels).tolist()) for name, entry in ki.SCHEDULES.items()]
    if as_json:
        fields = ("name", "needs", "options", "summary", "source")
        found = [{field: getattr(entry, field) for field in fields} | {"sigmas": v} for entry, v in entries]
        click.echo(to_json(found), nl=False)
        return
    rows = [[e.name, e.needs, len(v) - 1, _shortened(v), _options(e.options), e.summary] for e, v in entries]
    columns = ["schedule", "needs", "steps", "noise levels", "options", "summary"]
    print_table(f"noise schedules for {model}, {steps} steps", columns, rows, needed=4)


@click.command()
@click.argument("sampler", shell_complete=completion.samplers)
@click.option(
    "--schedule", default="karras", metavar="NAME", shell_complete=completion.schedules, help="See `kinvert schedules`."
)
@click.option("--steps", type=int, default=5, help="Number of steps.")
@model_levels
@click.option("--rising", is_flag=True, help="Up the schedule, as unsampling runs.")
@pairs("option", "Option of the sampler, e.g. eta=0.5; repeatable.")
def plan(sampler: str, schedule: str, steps: int, model: str, rising: bool, options: Sequence[str]) -> None:
    """Print a sampler's coefficients.

    These are all operations of SAMPLER on a schedule: evaluations of the denoiser and linear combinations.
    """
    if steps > MOST_LINES:
        raise ValueError(f"--steps must be at most {MOST_LINES} for a plan that is read, got {steps}")
    rule = ki.sampler(sampler, **parse_pairs("--option", options))
    levels = LEVELS[model]()
    if levels.kind == "flow":
        raise ValueError(f"{model} has flow times, and samplers run on sigmas; choose another --model, e.g. sd15")
    sigmas: Any = ki.schedule(schedule, steps, levels, sampler=rule)
    click.echo(str(ki.compile_plan(rule, rising_schedule(sigmas) if rising else sigmas)))


def _properties(name: str) -> dict[str, Any] | None:
    """Return what a sampler's Plan says; None for a sampler that chooses its own steps and so has no Plan."""
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
