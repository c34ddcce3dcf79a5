"""How a Plan shows itself: its one line, and its steps as a table in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kinvert.showing.html import Html, card, folded, report, table

if TYPE_CHECKING:
    from kinvert.plan import Plan, Step

__all__ = ["plan_card", "plan_line"]

FIRST, LAST = 6, 2  # steps of the table; a click shows the others
MOST = 200  # steps that a card prints


def plan_line(plan: Plan) -> str:
    """Return the rule and the size of a run in one line."""
    unit = "flow time" if plan.coordinates == "flow" else "sigma"
    span = f"{unit} {plan.sigmas[0]:.4g} to {plan.sigmas[-1]:.4g}"
    parts = [repr(plan.rule), _counted(len(plan.steps), "step"), span, _counted(plan.evaluations, "evaluation")]
    if plan.draws:
        parts.append(f"{_counted(plan.draws, 'draw')} of noise")
    if plan.memory_size:
        parts.append(f"remembers {plan.memory_size}")
    return f"Plan({', '.join(parts)})"


def plan_card(plan: Plan) -> Html:
    """Return a table of the first and last steps, and all rows as they are printed, folded."""
    steps = plan.steps
    shown = steps if len(steps) <= FIRST + LAST else steps[:FIRST]
    rows = [_row(step) for step in shown]
    if len(shown) < len(steps):
        rows += [("...", f"{len(steps) - FIRST - LAST} more steps", "", ""), *map(_row, steps[-LAST:])]
    head = ("step", "sigma", "evaluations at", "update")
    if len(steps) > MOST:
        return card(plan_line(plan), table(head, rows), report("print(plan) shows every row"))
    return card(plan_line(plan), table(head, rows), folded("all rows", report(str(plan))))


def _row(step: Step) -> Sequence[object]:
    levels = ", ".join(f"{stage.sigma:.4g}" for stage in step.stages)
    update = "\n".join(f"{name}' = {form}" for name, form in (("x", step.x), *step.memory))
    return step.index, f"{step.sigma:.4g} to {step.sigma_next:.4g}", levels, report(update)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
