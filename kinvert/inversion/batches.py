"""What the denoiser is called with while samples finish one by one: few batch sizes, and tensors of its own.

A compiled network is compiled again for inputs that it has not seen: another batch size, or a view of a larger tensor.
A captured graph or an engine of fixed size takes one batch size alone. So an inversion fills its batches up to the
whole batch, or to a half, a quarter, ... of it, by repeating one of the samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kinvert.denoisers import BoundDenoiser, Guided
from kinvert.engine.contract import checked_output
from kinvert.inversion.watching import Watch
from kinvert.torch_hooks import is_view

__all__ = ["FewBatches"]


@dataclass(frozen=True)
class FewBatches:
    """A denoiser for some samples, which sees few batch sizes.

    Attributes:
        denoiser: of these samples.
        largest: the largest batch size.
        fixed: whether that is the only one; else a half, a quarter, ... of it are used too.
        watch: counts the calls.
        most: the most rows of one call if more than `largest` are asked for, as a Jacobian does; not filled up.
    """

    denoiser: BoundDenoiser
    largest: int
    fixed: bool = False
    watch: Watch | None = field(default=None, repr=False)
    most: int = 0
    _known: dict[int, BoundDenoiser] = field(default_factory=dict, init=False, repr=False)

    def size(self, count: int) -> int:
        """Return the batch size for `count` samples."""
        size = max(self.largest, count)
        while not self.fixed and count <= (half := (size + 1) // 2) < size:
            size = half
        return size

    def take(self, index: Tensor) -> FewBatches:
        """Return the same for the samples `index`, shape (n,)."""
        return replace(self, denoiser=self.denoiser.take(index))

    @property
    def varies(self) -> bool:
        """Tell whether the denoiser sees other batch sizes than the largest."""
        return self.size(1) < self.largest

    def steady(self) -> FewBatches:
        """Return the same, called with the largest batch size only, so that a network answers as it does there."""
        return replace(self, fixed=True)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor | Guided:
        """Evaluate all of them. What the denoiser returns for repeated samples is dropped."""
        count, most = len(x), max(self.most, self.largest)
        if count > most:
            places = torch.arange(count, device=x.device).split(most)
            parts = [self.take(index)(x[index], sigma[index]) for index in places]
            if isinstance(parts[0], Guided):
                return Guided(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))
            return torch.cat(parts)  # type: ignore[arg-type]
        more = self.size(count) - count
        given, where = _filled(x, more), "in an evaluation of the inversion"
        out = self._with(more, count, x.device)(given, _filled(sigma, more))
        if self.watch is not None:
            self.watch.count()
        if isinstance(out, Guided):
            return Guided(*(checked_output(part, given, where)[:count] for part in out))
        return checked_output(out, given, where)[:count]

    def _with(self, more: int, count: int, device: torch.device) -> BoundDenoiser:
        """Return the denoiser of these samples and `more` copies of the first."""
        if more not in self._known:
            index = _filled(torch.arange(count, device=device), more)
            self._known[more] = self.denoiser.take(index) if more else self.denoiser
        return self._known[more]


def _filled(rows: Tensor, more: int) -> Tensor:
    """Return the rows and `more` copies of the first, in a tensor of its own: a view of another is copied."""
    if more:
        return torch.cat([rows, rows[:1].expand(more, *rows.shape[1:])])
    shared = rows.ndim == 1 and rows.stride(0) == 0  # one level of a batch, and what a copy of one row of it keeps
    if not (is_view(rows) or rows.storage_offset() or shared):
        return rows
    return rows.clone(memory_format=torch.contiguous_format if shared else torch.preserve_format)
