"""Exact inversion: the latent, or the noise, that a given sampler maps to a given image, with a certificate."""

from kinvert._discover import import_all
from kinvert.inversion import baselines, solvers
from kinvert.inversion.exact import invert
from kinvert.inversion.extract import extract_noise
from kinvert.inversion.problem import Guess, Problem, Reason, Root, Search
from kinvert.inversion.result import Inversion
from kinvert.inversion.routes import METHODS, ROUTES, register_method
from kinvert.inversion.solvers import (
    Anderson,
    Attempt,
    Auto,
    Continuation,
    Damped,
    LevenbergMarquardt,
    NewtonKrylov,
    Picard,
    RunLevenbergMarquardt,
    Sequence,
    Solver,
    StepSweeps,
    Sweeps,
)
from kinvert.inversion.uniqueness import Preimages, preimages
from kinvert.inversion.watching import Solving, Stop, Watcher

__all__ = [
    "METHODS",
    "ROUTES",
    "Anderson",
    "Attempt",
    "Auto",
    "Continuation",
    "Damped",
    "Guess",
    "Inversion",
    "LevenbergMarquardt",
    "NewtonKrylov",
    "Picard",
    "Preimages",
    "Problem",
    "Reason",
    "Root",
    "RunLevenbergMarquardt",
    "Search",
    "Sequence",
    "Solver",
    "Solving",
    "StepSweeps",
    "Stop",
    "Sweeps",
    "Watcher",
    "baselines",
    "extract_noise",
    "invert",
    "preimages",
    "register_method",
]

for _part in (solvers, baselines):
    import_all(_part.__name__, _part.__path__)
