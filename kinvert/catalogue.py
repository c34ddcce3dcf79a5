"""The registries of samplers and schedules as tables: what each entry is, read off its Plan and its docstring.

An import of this module gives `ki.SAMPLERS` and `ki.SCHEDULES` their tables, which notebooks show.
"""

from __future__ import annotations

from collections.abc import Mapping

from kinvert.analysis import properties
from kinvert.rules import SAMPLERS, SamplerEntry, sampler
from kinvert.schedules import SCHEDULES, ScheduleEntry
from kinvert.showing.registry import Table

__all__ = ["sampler_table", "schedule_table"]


def sampler_table(entries: Mapping[str, SamplerEntry]) -> Table:
    """Return name, order, cost, noise, how a step can be reversed, and source of each sampler."""
    head = ("name", "order", "evaluations a step", "stochastic", "reversible", "options", "source")
    return head, [_sampler_row(name, entry) for name, entry in entries.items()]


def _sampler_row(name: str, entry: SamplerEntry) -> tuple[object, ...]:
    rule = sampler(name)
    try:
        found = properties(rule)
    except ValueError:  # it chooses its steps during the run, so there is no Plan to read
        evaluations, stochastic, reversible = "varies", "", "no plan"
    else:
        evaluations, stochastic = str(found.evaluations_per_step), "yes" if found.stochastic else "no"
        reversible = found.invertibility
    return name, rule.ode_order, evaluations, stochastic, reversible, _options(entry.options), entry.source


def schedule_table(entries: Mapping[str, ScheduleEntry]) -> Table:
    """Return name, what it is built from, options, summary and source of each schedule."""
    head = ("name", "built from", "options", "summary", "source")
    rows = [(e.name, e.needs, _options(e.options), e.summary, e.source) for e in entries.values()]
    return head, rows


def _options(options: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={getattr(value, 'name', value)}" for key, value in options.items())


SAMPLERS.tabulate = sampler_table
SCHEDULES.tabulate = schedule_table
