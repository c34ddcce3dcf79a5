"""The old name of `kinvert.bench.results`."""

from kinvert._moved import moved

__getattr__ = moved(__name__, "kinvert.bench.results")
