"""Which root finder `invert` takes: those that exist by name, and those that a sampler leaves room for."""

from __future__ import annotations

from collections.abc import Callable

from kinvert.checks import check_choice
from kinvert.inversion.continuation import Continuation
from kinvert.inversion.solvers import Anderson, Damped, NewtonKrylov, Picard, Solver
from kinvert.inversion.stepwise import Auto
from kinvert.inversion.trajectory import Sweeps
from kinvert.plan import Plan

METHODS: dict[str, Callable[[], Solver | Sweeps]] = {
    "auto": Auto,
    "anderson": Anderson,
    "damped": Damped,
    "continuation": Continuation,
    "newton": NewtonKrylov,
    "picard": Picard,
    "sweeps": Sweeps,
}


def choose(method: object, plan: Plan) -> Solver | Sweeps:
    """The root finder of a name, or the one given, for the runs of a Plan.

    Steps that remember nothing are solved one by one, or the run as a whole by sweeps; a multistep run as a whole only;
    an algebraically reversible one is undone in closed form, where nothing is left to be found. "auto" is for all.

    Raises:
        ValueError: an unknown name; a method that would not be used for this sampler, with those that would.
    """
    if not isinstance(method, (Solver, Sweeps)):
        check_choice("method", method, METHODS, ", or a Solver")
        method = METHODS[str(method)]()
    if method == Auto():
        return method
    name = plan.rule.name
    got = next((key for key, make in METHODS.items() if make() == method), method)
    if plan.auxiliary:
        raise ValueError(
            f"method must be 'auto' for {name}, got {got!r}: its steps are undone in closed form, and no root is sought"
        )
    if plan.is_multistep and not isinstance(method, Sweeps):
        raise ValueError(
            f"method must be 'auto', 'sweeps' or a Sweeps for {name}, got {got!r}: its steps remember earlier ones, so "
            "that the run is solved as a whole; a solver of single steps needs a sampler such as 'euler' or 'heun'"
        )
    return method
