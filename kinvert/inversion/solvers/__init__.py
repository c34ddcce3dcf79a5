"""Root finders for `F(u) = y`, one equation per sample, in one batch; one file each."""

from kinvert._moved import moved_names
from kinvert.inversion.problem import Guess, Judge, Problem, Reason, Root, Search
from kinvert.inversion.solvers.anderson import Anderson, Damped, Picard
from kinvert.inversion.solvers.auto import Attempt, Auto, Sequence
from kinvert.inversion.solvers.base import Solver
from kinvert.inversion.solvers.continuation import Continuation
from kinvert.inversion.solvers.levenberg import LevenbergMarquardt, RunLevenbergMarquardt
from kinvert.inversion.solvers.newton import NewtonKrylov
from kinvert.inversion.solvers.sweeps import StepSweeps, Sweeps

__all__ = [
    "Anderson",
    "Attempt",
    "Auto",
    "Continuation",
    "Damped",
    "Guess",
    "Judge",
    "LevenbergMarquardt",
    "NewtonKrylov",
    "Picard",
    "Problem",
    "Reason",
    "Root",
    "RunLevenbergMarquardt",
    "Search",
    "Sequence",
    "Solver",
    "StepSweeps",
    "Sweeps",
]

__getattr__ = moved_names("kinvert.inversion.solvers", {"Equation": "kinvert.inversion.problem.Problem"})
