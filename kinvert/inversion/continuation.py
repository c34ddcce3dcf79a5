"""The old place of `Continuation`, for one version."""

from kinvert._moved import moved_names

__getattr__ = moved_names(
    "kinvert.inversion.continuation",
    {
        "Continuation": "kinvert.inversion.solvers.Continuation",
    },
)
