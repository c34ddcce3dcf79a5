"""The old name of `kinvert.engine.kernels`."""

from typing import Any

from kinvert._moved import moved, moved_names

_find = moved(__name__, "kinvert.engine.kernels")
_find_renamed = moved_names(__name__, {"Pass": "kinvert.engine.kernels.StepKernels"})


def __getattr__(name: str) -> Any:
    return (_find_renamed if name == "Pass" else _find)(name)
