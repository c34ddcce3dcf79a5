"""How much memory a function takes: the tensors that live at once, counted as torch makes and frees them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations make in this context, while they live.

    Attributes:
        now, peak: bytes at present, and at most so far.
    """

    def __init__(self, least: int = 0) -> None:
        super().__init__()
        self.now, self.peak, self.least, self.paused = 0, 0, least, False
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.paused:
            for value in tree_leaves(out):
                if isinstance(value, Tensor):
                    self.add(value)
        return out

    def add(self, value: Tensor) -> None:
        """Count the storage of a tensor, if it is a new one."""
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or size < self.least:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_of(function: Callable[[Callable[[Any], Any]], Any], x: Tensor) -> float:
    """Return the most memory that a function takes, in units of x's own, without what happens inside a denoiser.

    `function` is given a wrapper for the denoiser, whose own tensors are not counted, but what it returns is.
    """
    live = Live()

    def wrap(denoiser: Any) -> Any:
        def uncounted(u: Tensor, sigma: Tensor, **conditioning: Any) -> Tensor:
            live.paused = True
            out: Tensor = denoiser(u, sigma, **conditioning)
            live.paused = False
            live.add(out)
            return out

        return uncounted

    with live:
        function(wrap)
    return live.peak / (x.numel() * x.element_size())
