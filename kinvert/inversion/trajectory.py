"""The old place of sweeps and couplings, for one version."""

from kinvert._moved import moved_names

__getattr__ = moved_names(
    "kinvert.inversion.trajectory",
    {
        "Equations": "kinvert.inversion.couplings.Couplings",
        "StepSweeps": "kinvert.inversion.solvers.StepSweeps",
        "Sweeps": "kinvert.inversion.solvers.Sweeps",
        "equations": "kinvert.inversion.couplings.couplings",
    },
)
