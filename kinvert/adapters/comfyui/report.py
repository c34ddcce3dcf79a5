"""What the nodes say of a run, as text for STRING outputs and the console."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

from torch import Tensor

__all__ = ["NOTE_AT_ONE", "gathered_warnings", "moments_line"]

NOTE_AT_ONE = (
    "the latent is at t = 1: the host multiplies it with 1 - t = 0, so a sampler that takes LATENT starts from zeros; "
    "connect the output noise to SamplerCustomAdvanced, or leave out one step with end_at_step=1"
)


def moments_line(noise: Tensor) -> str:
    """Return mean and standard deviation of what should be standard normal noise."""
    wide = noise.double() if noise.device.type == "cpu" else noise.float()
    return f"latent / sigma has mean {float(wide.mean()):.3f} and standard deviation {float(wide.std()):.3f}"


@contextlib.contextmanager
def gathered_warnings() -> Iterator[list[str]]:
    """Gather the warnings of kinvert for a report; they are logged to the console too, and others are passed on."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield notes
    for one in caught:
        if issubclass(one.category, RuntimeWarning):
            notes.append(str(one.message))
            logging.getLogger("kinvert").warning("%s", one.message)
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
