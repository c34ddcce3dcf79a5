"""Schedules that carry the information that they hold flow times."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["FlowTimes"]

# Operations that turn a schedule into a schedule. All others, such as arithmetic or `flow_to_ve`, give plain tensors.
_KEPT = frozenset({
    Tensor.__getitem__, Tensor.flip, Tensor.clone, Tensor.detach, Tensor.contiguous, Tensor.to, Tensor.double,
    Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.cpu, Tensor.cuda, Tensor.type, Tensor.clamp, Tensor.clip,
    Tensor.clamp_min, Tensor.clamp_max, Tensor.unique_consecutive, Tensor.narrow, Tensor.reshape, Tensor.view,
    Tensor.round, torch.flip, torch.clone, torch.clamp, torch.clip, torch.clamp_min, torch.clamp_max, torch.cat,
    torch.concat, torch.concatenate, torch.unique_consecutive, torch.narrow, torch.reshape, torch.round,
})  # fmt: skip


class FlowTimes(Tensor):
    """A schedule of flow times t in [0, 1], `x_t = (1 - t) x0 + t eps`: a tensor marked as times and not sigmas.

    `ki.schedule` returns one for flow levels. It works like any other tensor. Slices, `flip`, `clamp`, `cat`,
    `unique_consecutive`, copies and conversions keep the mark. An item, and the result of any other operation, is a
    plain tensor. Mark your own times by `ki.levels.FlowTimes([1.0, 0.6, 0.2, 0.0])`.
    """

    coordinates: ClassVar[str] = "flow"

    @staticmethod
    def __new__(cls, times: Tensor | Iterable[float]) -> FlowTimes:
        """Mark flow times, 1-D; numbers become float64 on the CPU."""
        if not isinstance(times, Tensor):
            times = torch.tensor(list(times), dtype=torch.float64, device="cpu")
        return times.as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # No types are passed, so that torch returns plain tensors and only the results below are marked.
        result = Tensor.__torch_function__(func, (), args, kwargs or {})
        if func in _KEPT and type(result) is Tensor and result.ndim == 1:
            return result.as_subclass(cls)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> FlowTimes:
        memo[id(self)] = copy = self.clone()
        return copy  # type: ignore[return-value]


if hasattr(torch.serialization, "add_safe_globals"):
    torch.serialization.add_safe_globals([FlowTimes])  # for torch.load(weights_only=True)
