"""Warnings that point at the line that a user wrote, however deep in kinvert the reason is found."""

from __future__ import annotations

import inspect
import warnings

__all__ = ["warn_user"]

_INSIDE = ("kinvert", "torch")  # torch wraps the verbs in `no_grad`


def warn_user(message: str) -> None:
    """Give a RuntimeWarning for the first line outside kinvert and torch."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)
