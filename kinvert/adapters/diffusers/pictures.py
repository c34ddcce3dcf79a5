"""The old name of `kinvert.pictures`."""

from kinvert._moved import moved

__getattr__ = moved(__name__, "kinvert.pictures")
