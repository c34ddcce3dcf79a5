"""What belongs to a result, as a tree of plain data for a file, and back: conditioning, guidance, rules, levels.

Tensors, numbers, strings and what is made of them are kept as they are. Rules, the classes of `kinvert.guidance` and
noise levels are kept by name and parameters. Everything else, such as a function of your own or an object of another
program, cannot be kept: its place has an `Unsaved`, which says what it was, and a run that needs it asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from kinvert import guidance, levels
from kinvert.checks import describe, has_values, is_integer, is_number
from kinvert.denoisers import StepCfg
from kinvert.denoisers.cfg import Linear, PerStep
from kinvert.planfile import rule_of, rule_tree
from kinvert.records import Tagged, known_entries
from kinvert.rules import Rule

__all__ = ["Unsaved", "from_fields", "from_tree", "moved", "refuse_unsaved", "to_tree"]

T = TypeVar("T")
CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        *(guidance.APG, guidance.CFGZeroStar, guidance.DynamicThreshold, guidance.Interval, guidance.Rescale),
        *(guidance.Function, Linear, PerStep, StepCfg),
        *(levels.DiscreteLevels, levels.EDMLevels, levels.FlowLevels, levels.TableLevels, levels.VDiffusionLevels),
    )
}
"""The classes that a file keeps by name and fields."""


@dataclass(frozen=True)
class Unsaved:
    """What stands for a value that a file cannot hold.

    Attributes:
        description: what it was.
    """

    description: str

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Raise ValueError: it is no function any more."""
        raise ValueError(f"{self.description} could not be saved; give it again")


def to_tree(value: Any) -> Any:
    """Return a value as a tree that `records.write_tree` takes; what cannot be kept becomes a tagged description."""
    if type(value) in (list, tuple):
        return type(value)(to_tree(member) for member in value)
    if type(value) is dict:
        return {key: to_tree(member) for key, member in value.items()}
    if value is None or isinstance(value, (bool, str)):
        return value
    if is_number(value):
        return int(value) if is_integer(value) else float(value)  # NumPy's too
    if isinstance(value, (Tensor, np.ndarray)):
        return value if _is_kept(value) else Tagged("unsaved", describe(value))
    return _tagged(value)


def _tagged(value: Any) -> Tagged:
    """Return an object by name and parameters, or what describes it."""
    if isinstance(value, Rule):
        return Tagged("rule", rule_tree(value))
    if isinstance(value, Unsaved):
        return Tagged("unsaved", value.description)
    if CLASSES.get(type(value).__name__) is type(value):
        return _object_tree(value)
    return Tagged("unsaved", _described(value))


def _is_kept(value: Tensor | np.ndarray) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    plain_kind = value.layout is torch.strided and not value.is_nested and not value.is_quantized
    return plain_kind and not value.is_complex() and has_values(value)


def _object_tree(value: Any) -> Tagged:
    kept = {f.name: to_tree(getattr(value, f.name)) for f in fields(value) if f.init}
    if any(_has_unsaved(member) for member in kept.values()):
        return Tagged("unsaved", _described(value))
    return Tagged("object", {"class": type(value).__name__, "fields": kept})


def _has_unsaved(tree: Any) -> bool:
    if isinstance(tree, Tagged):
        return tree.tag == "unsaved" or _has_unsaved(tree.tree)
    if isinstance(tree, dict):
        return any(map(_has_unsaved, tree.values()))
    return isinstance(tree, (list, tuple)) and any(map(_has_unsaved, tree))


def _described(value: Any) -> str:
    """Say what a value was: the name of a function or a class, and its arguments if it prints them."""
    named = getattr(value, "__qualname__", None)
    if named is not None:
        return f"{getattr(value, '__module__', '?')}.{named}"
    own, cls = repr(value), type(value)
    return own if is_dataclass(value) and len(own) < 200 else f"an object of {cls.__module__}.{cls.__qualname__}"


def from_tree(tree: Any, what: str, rule: Rule | None = None) -> Any:
    """Return the value of a tree of `to_tree`.

    Args:
        tree: the data.
        what: the file, for messages.
        rule: the sampler, if the caller has it.

    Raises:
        ValueError: a rule that is not known here, or a kind of value that this version does not know.
    """
    if isinstance(tree, Tagged):
        return _from_tagged(tree, what, rule)
    if isinstance(tree, dict):
        return {key: from_tree(member, what, rule) for key, member in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(from_tree(member, what, rule) for member in tree)
    return tree


def _from_tagged(tree: Tagged, what: str, rule: Rule | None) -> Any:
    if tree.tag == "rule":
        return rule_of(tree.tree, what, rule)
    if tree.tag == "unsaved":
        return Unsaved(str(tree.tree))
    if tree.tag == "object" and tree.tree["class"] in CLASSES:
        return from_fields(CLASSES[tree.tree["class"]], tree.tree["fields"], what)
    name = tree.tree["class"] if tree.tag == "object" else tree.tag
    raise ValueError(f"{what} holds a {name}, which this version of kinvert does not know: pip install -U kinvert")


def from_fields(cls: type[T], tree: Mapping[str, Any], what: str, rule: Rule | None = None) -> T:
    """Return an object of a dataclass from its fields.

    Raises:
        ValueError: a field without a default is missing.

    Warns:
        RuntimeWarning: fields that the class does not have.
    """
    known = {
        f.name: f.default is MISSING and f.default_factory is MISSING
        for f in fields(cls)  # type: ignore[arg-type]
        if f.init
    }
    given = known_entries(f"{what} ({cls.__name__})", tree, known)
    return cls(**{name: from_tree(value, what, rule) for name, value in given.items()})


def refuse_unsaved(name: str, value: Any) -> None:
    """Raise ValueError if a value was not kept by the file that it was read from.

    Args:
        name: the argument.
        value: its value; dicts, lists and tuples are searched.
    """
    if isinstance(value, Unsaved):
        raise ValueError(
            f"{name} was {value.description}, which a file cannot hold; give it again, e.g. "
            f"found.sample(denoiser, {name.partition('[')[0]}=...)"
        )
    if isinstance(value, Mapping):
        for key, member in value.items():
            refuse_unsaved(f"{name}[{key!r}]", member)
    if isinstance(value, (list, tuple)):
        for i, member in enumerate(value):
            refuse_unsaved(f"{name}[{i}]", member)


def moved(value: Any, device: Any = None, dtype: torch.dtype | None = None) -> Any:
    """Return a value with its tensors on another device and, for floating point ones, in another dtype."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if type(value) is dict:
        return {key: moved(member, device, dtype) for key, member in value.items()}
    if type(value) in (list, tuple):
        return type(value)(moved(member, device, dtype) for member in value)
    return value
