"""The old place of the table of methods, for one version; `choose` returns a route too."""

from kinvert._moved import moved_names

__getattr__ = moved_names(
    "kinvert.inversion.choice",
    {
        "METHODS": "kinvert.inversion.routes.METHODS",
        "choose": "kinvert.inversion.routes.choose",
    },
)
