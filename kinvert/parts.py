"""A batch in parts: the denoiser sees a few samples at a time, each with its conditioning."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinvert.checks import check_integer
from kinvert.denoisers import Denoiser, Guided
from kinvert.denoisers.buffers import call_to_keep, lay_out
from kinvert.denoisers.guidance import Guidance
from kinvert.engine.graphs import captured_denoiser

__all__ = ["batch_parts", "in_parts"]


def in_parts(denoiser: Guidance, x: Tensor, max_batch: int | None, graph: bool) -> Denoiser:
    """Return the denoiser in parts of a batch, or as a graph, or both."""
    whole: Denoiser = denoiser
    parts = batch_parts(x, max_batch)
    if len(parts) > 1:
        whole = _InParts(len(parts[0]), [denoiser.take(index) for index in parts])
    if graph:
        captured = captured_denoiser(whole, x)
        if captured.reason is not None:
            warnings.warn(f"running without a graph: {captured.reason}", RuntimeWarning, stacklevel=4)
        return captured
    return whole


def batch_parts(x: Tensor, max_batch: int | None) -> tuple[Tensor, ...]:
    """Return the indices of a batch in parts of at most `max_batch`; one part if that is None."""
    size = len(x)
    if max_batch is not None:
        size = check_integer("max_batch", max_batch, fix="None evaluates the whole batch at once")
    return torch.arange(len(x), device=x.device).split(size)


@dataclass(frozen=True)
class _InParts:
    """A denoiser that is called for `size` samples at a time, each time with their conditioning."""

    size: int
    denoisers: list[Guidance]

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor | Guided:
        outputs: list[Any] = []
        for denoiser, *part in zip(self.denoisers, x.split(self.size), sigma.split(self.size), strict=True):
            outputs.append(call_to_keep(denoiser, *map(lay_out, part)))
        if isinstance(outputs[0], Guided):
            return Guided(*map(torch.cat, zip(*outputs, strict=True)))
        return torch.cat(outputs)
