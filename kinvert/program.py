"""The old name of `kinvert.engine.kernels`."""

from kinvert._moved import moved

__getattr__ = moved(__name__, "kinvert.engine.kernels")
