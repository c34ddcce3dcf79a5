"""The old name of `kinvert.editing`."""

from kinvert._moved import moved

__getattr__ = moved(__name__, "kinvert.editing")
