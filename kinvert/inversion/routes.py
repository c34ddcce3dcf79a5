"""Which way each kind of Plan goes, and which root finders that way offers.

| the Plan                | route        | methods                                                              |
|-------------------------|--------------|----------------------------------------------------------------------|
| has auxiliary state     | `ClosedForm` | "auto"                                                               |
| remembers nothing       | `StepByStep` | those of `StepByStep.methods`, or a `Solver` of steps                |
| starts from x alone     | `WholeRun`   | "auto", "sweeps", "levenberg", a `Solver` of runs                    |

The first route that accepts the Plan and offers the method is taken. The numbers that a route is tuned by are its
fields. `register_method` adds a root finder of your own to the route that solves for what its `scope` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from kinvert.checks import unknown
from kinvert.inversion.certificate import Found
from kinvert.inversion.closed_form import ClosedForm
from kinvert.inversion.solvers import Auto, Solver
from kinvert.inversion.step_by_step import StepByStep
from kinvert.inversion.task import Task
from kinvert.inversion.whole_run import WholeRun
from kinvert.plan import Plan
from kinvert.showing.registry import Registry

__all__ = ["METHODS", "ROUTES", "Route", "choose", "register_method"]

Make = TypeVar("Make", bound=Callable[[], Solver])


class Route(Protocol):
    """A way to invert runs of one kind.

    Attributes:
        methods: the root finders that it offers, by name.
        scope: what it solves for; it takes root finders of that `Solver.scope`.
    """

    @property
    def methods(self) -> dict[str, Callable[[], Solver]]:
        """Return the root finders that it offers, by name."""
        ...

    @property
    def scope(self) -> str:
        """Return what it solves for: "step", "run" or "closed form"."""
        ...

    def accepts(self, plan: Plan) -> bool:
        """Tell whether it inverts runs of this Plan."""
        ...

    def solve(self, task: Task, solver: Solver) -> Found:
        """Find the latents of a task."""
        ...


ROUTES: tuple[Route, ...] = (ClosedForm(), StepByStep(), WholeRun())
METHODS: Registry[Callable[[], Solver]] = Registry(
    {name: make for route in reversed(ROUTES) for name, make in route.methods.items()},
    what="root finders",
    place="ki.inversion.METHODS",
)
"""Every root finder by name; "auto" is each route's own first choice."""


def register_method(name: str) -> Callable[[Make], Make]:
    """Make a root finder a `method` of `invert`, under a name; for use as a decorator.

    Args:
        name: the name; the root finder is called without arguments to make one.

    Returns:
        A decorator of a class or function that returns a `Solver`.

    Raises:
        ValueError: the name is taken, or no route solves for the `scope` of this `Solver`.
    """

    def register(make: Make) -> Make:
        scope = make().scope
        route = next((route for route in ROUTES if route.scope == scope), None)
        if name in METHODS:
            raise ValueError(f"the method name {name!r} is taken; choose another")
        if route is None:
            raise ValueError(unknown("scope", scope, [route.scope for route in ROUTES]))
        route.methods[name] = METHODS[name] = make
        return make

    return register


def choose(method: str | Solver, plan: Plan) -> tuple[Route, Solver]:
    """Return the route of a Plan, and the root finder that `method` names or is.

    Raises:
        ValueError: an unknown name; a method that the routes of this sampler do not offer, with those that they do.
    """
    if isinstance(method, Solver):
        method = "auto" if method == Auto() else method
    elif not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"{unknown('method', method, METHODS)}, or a Solver")
    for route in ROUTES:
        if not route.accepts(plan):
            continue
        if isinstance(method, str) and method in route.methods:
            return route, route.methods[method]()
        if isinstance(method, Solver) and method.scope == route.scope:
            return route, method
    raise ValueError(_refusal(method, plan))


def _refusal(method: str | Solver, plan: Plan) -> str:
    """Return what to say of a method that no route of a Plan offers."""
    name = plan.rule.name
    got = next((key for key, make in METHODS.items() if make() == method), method)
    if plan.auxiliary:
        return (
            f"method must be 'auto' for {name}, got {got!r}: its steps are undone in closed form, and no root is sought"
        )
    return (
        f"method must be 'auto', 'sweeps', 'levenberg' or a Solver of runs for {name}, got {got!r}: its steps remember "
        "earlier ones, so that the run is solved as a whole; one of single steps needs a sampler such as 'heun'"
    )
