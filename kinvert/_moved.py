"""Old import paths: a module that was moved answers from its new place for one version, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["moved", "renamed"]


def moved(old: str, new: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of the module `old`, which answers with the names of the module `new`."""

    def find(name: str) -> Any:
        value = getattr(importlib.import_module(new), name)  # dunder names too, so that tools can inspect the module
        if not name.startswith("__"):
            warnings.warn(
                f"{old} is now {new}; the old name goes with the next version", DeprecationWarning, stacklevel=2
            )
        return value

    return find


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module that stays, some names of which moved or changed.

    Args:
        module: its name.
        names: old name -> full new name, e.g. {"Job": "kinvert.bench.methods.Setup"}.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new, _, attribute = names[name].rpartition(".")
        warnings.warn(
            f"{module}.{name} is now {names[name]}; the old name goes with the next version",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(new), attribute)

    return find
