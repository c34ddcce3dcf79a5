"""The old place of what a search returns, for one version; a `Root` holds it all."""

from kinvert._moved import moved_names

__getattr__ = moved_names(
    "kinvert.inversion.solution",
    {
        "Judge": "kinvert.inversion.problem.Judge",
        "Solution": "kinvert.inversion.problem.Root",
    },
)
