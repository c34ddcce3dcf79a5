"""Find the modules of a package that register what they hold: a sampler, a root finder, a published inversion."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable

__all__ = ["import_all"]


def import_all(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that a new file registers itself and no list has to name it.

    Args:
        package: its name, `__name__` in its `__init__`.
        path: its `__path__`.
    """
    for module in pkgutil.iter_modules(path, f"{package}."):
        importlib.import_module(module.name)
