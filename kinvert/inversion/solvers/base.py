"""The base class of root finders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from kinvert.inversion.problem import Guess, Problem, Root

__all__ = ["Solver"]


class Solver(ABC):
    """A root finder: frozen settings and one method.

    Every sample has its own equation, its own tolerance and its own end: a sample that is solved costs no further
    evaluations, and no sample's result depends on its neighbours.
    """

    scope: ClassVar[str] = "step"
    """What its problems are: "step", each step of a run by itself, or "run", the whole run."""

    @property
    def is_published(self) -> bool:
        """Tell whether it is run for comparison, as it was published, so that nothing is put in its place."""
        return False

    @abstractmethod
    def solve(self, problem: Problem, guess: Guess) -> Root:
        """Return the best iterates from `guess`; a sample is solved if `residual <= problem.tolerance`."""
