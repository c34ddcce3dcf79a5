"""The old place of `Auto` and of the equations of single steps, for one version."""

from kinvert._moved import moved_names

__getattr__ = moved_names(
    "kinvert.inversion.stepwise",
    {
        "Auto": "kinvert.inversion.solvers.Auto",
        "LEAST_CHANGE": "kinvert.inversion.steps.LEAST_CHANGE",
        "Trajectory": "kinvert.inversion.steps.Trajectory",
        "contraction": "kinvert.inversion.steps.contraction",
        "levels_of": "kinvert.inversion.steps.levels_of",
    },
)
