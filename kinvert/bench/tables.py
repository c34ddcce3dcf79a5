"""The old name of `kinvert.bench.report.tables`."""

from kinvert._moved import moved

__getattr__ = moved(__name__, "kinvert.bench.report.tables")
