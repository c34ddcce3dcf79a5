"""What a rule computes, as part of a key: equal rules can differ in their names and in their code.

The rules of kinvert compute by the methods of their classes and by the functions of the modules of these; the code of
both is in the key. A notebook or an editor that loads code again may have replaced any of them. The code of others may
depend on anything: functions, constants and closures of other places.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from operator import is_
from types import FunctionType
from typing import Any

from kinvert.rules.base import Rule

__all__ = ["code_of"]

_Contents = tuple[tuple[Any, ...], tuple[Any, ...]]
_SEEN: dict[type, tuple[_Contents, list[FunctionType] | None]] = {}
"""Classes of kinvert: what they and their modules had in them when they were looked through, and their functions."""


def code_of(rule: Rule) -> tuple[object, ...] | None:
    """Return the name and the code of a rule, hashable; None if code from outside of kinvert takes part."""
    found: list[object] = [rule.name]
    for cls in type(rule).__mro__[:-2]:  # without ABC and object
        functions = _functions_of(cls)
        if functions is None:
            return None
        found += [function.__code__ for function in functions]
    for f in fields(rule):
        if isinstance(value := getattr(rule, f.name), Rule):
            inner = code_of(value)
            if inner is None:
                return None
            found.append(inner)
    return tuple(found)


def _functions_of(cls: type) -> list[FunctionType] | None:
    """Return the functions of a class and of its module; None if some are not of kinvert."""
    if not _is_of_kinvert(cls.__module__):
        return None
    own, beside = vars(cls), vars(sys.modules.get(cls.__module__, object))
    contents = tuple(own.values()), tuple(beside.values())
    seen = _SEEN.get(cls)
    if seen is None or not all(_is_same(*pair) for pair in zip(seen[0], contents, strict=True)):
        functions = [*_methods(own.values()), *_beside(cls.__module__, beside.values())]
        known = all(isinstance(f, FunctionType) and _is_known(f.__globals__.get("__name__")) for f in functions)
        seen = _SEEN[cls] = contents, functions if known else None
    return seen[1]


def _is_same(old: tuple[Any, ...], new: tuple[Any, ...]) -> bool:
    """Tell whether two tuples hold the same objects."""
    return len(old) == len(new) and all(map(is_, old, new))


def _methods(values: Iterable[Any]) -> Iterator[Any]:
    """Yield what runs if a class with these attributes is used: its methods, without their decorators."""
    for value in values:
        for name in ("fget", "__func__", "func", "__wrapped__"):  # of properties, class methods, cached properties
            value = getattr(value, name, None) or value  # noqa: PLW2901
        if callable(value) and not isinstance(value, type):
            yield value


def _beside(module: str, values: Iterable[Any]) -> list[FunctionType]:
    """Return the functions of a module that were written in it."""
    return [value for value in values if isinstance(value, FunctionType) and value.__module__ == module]


def _is_known(module: object) -> bool:
    """Tell whether a method is of kinvert, or what `dataclass` gives to a class: from Python 3.13 on `__replace__`."""
    return module == "dataclasses" or _is_of_kinvert(module)


def _is_of_kinvert(module: object) -> bool:
    return str(module).partition(".")[0] == "kinvert"
