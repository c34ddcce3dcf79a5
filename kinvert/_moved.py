"""Old names that work for one version, with a DeprecationWarning: of modules that moved, and of renamed arguments."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

__all__ = ["moved", "moved_names", "renamed"]

P = ParamSpec("P")
T = TypeVar("T")


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


def renamed(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a function accept keyword arguments by their old names, with a DeprecationWarning.

    Args:
        **names: the new name of each argument by its old name, e.g. `renamed(rule="sampler")`.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            for old, new in names.items():
                if old in kwargs:
                    text = (
                        f"{function.__name__}: the argument {old} is now {new}; the old name goes with the next version"
                    )
                    warnings.warn(text, DeprecationWarning, stacklevel=2)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def moved_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
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
