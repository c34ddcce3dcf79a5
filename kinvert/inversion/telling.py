"""The old name of `kinvert.telling`."""

from kinvert._moved import moved

__getattr__ = moved(__name__, "kinvert.telling")
