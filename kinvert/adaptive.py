"""The old name of `kinvert.engine.adaptive`."""

from kinvert._moved import moved

__getattr__ = moved(__name__, "kinvert.engine.adaptive")
