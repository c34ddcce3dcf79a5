"""An `Inversion` as a tree of plain data, for files, and on another device or in another dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from kinvert.checks import FLOATS
from kinvert.inversion.back import Steering, WayBack
from kinvert.inversion.problem import Reason
from kinvert.inversion.result import Inversion
from kinvert.packing import from_fields, from_tree, moved, to_tree
from kinvert.rules import Rule
from kinvert.telling import warn_user

__all__ = ["inversion_of", "inversion_tree", "moved_inversion"]

STATES = ("latent", "restored", "memory", "noises", "embeddings")
"""What another dtype changes; the numbers of the certificate stay as they were measured."""


def inversion_tree(found: Inversion) -> dict[str, Any]:
    """Return an inversion as plain data: its fields, those of the way back in "back"."""
    tree = {f.name: getattr(found, f.name) for f in fields(found) if f.name not in ("back", "reasons")}
    tree["reasons"] = [reason.name for reason in found.reasons]
    if (back := found.back) is not None:
        given = {name: _plain(getattr(back, name)) for name in ("sampler", "cfg", "positive", "negative")}
        steering = None if back.steering is None else dict(vars(back.steering))
        tree["back"] = {f.name: getattr(back, f.name) for f in fields(back)} | {"steering": steering}
        tree["back"] |= {name: to_tree(value) for name, value in given.items()}
    return tree


def inversion_of(tree: Mapping[str, Any], what: str, rule: Rule | None = None) -> Inversion:
    """Return the inversion of `inversion_tree`.

    Raises:
        ValueError: entries that are missing; a sampler that is not known here; a rule that is another one.
    """
    names = tree.get("reasons", ())
    plain = {name: value for name, value in tree.items() if name not in ("back", "reasons")}
    found = from_fields(Inversion, plain, what)
    back = tree.get("back")
    return replace(found, reasons=_reasons(names, what), back=None if back is None else _back_of(back, what, rule))


def _back_of(tree: Mapping[str, Any], what: str, rule: Rule | None) -> WayBack:
    steering = tree.get("steering")
    plain = {name: value for name, value in tree.items() if name != "steering"}
    back = from_fields(WayBack, plain, what, rule)
    return back if steering is None else replace(back, steering=Steering(**from_tree(steering, what)))


def _reasons(names: Any, what: str) -> tuple[Reason, ...]:
    """Return the reasons by name; one that a newer version added is `STALLED`, with a warning."""
    if new := sorted({name for name in names if name not in Reason.__members__}):
        warn_user(f"{what} has the reasons {', '.join(new)}, which this version of kinvert does not know: STALLED")
    return tuple(Reason.__members__.get(name, Reason.STALLED) for name in names)


def moved_inversion(found: Inversion, device: Any, dtype: torch.dtype | None) -> Inversion:
    """Return an inversion on another device, its states and its conditioning in another dtype; see `Inversion.to`."""
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATS))}, or None, got {dtype!r}")
    values = {
        f.name: moved(getattr(found, f.name), device, dtype if f.name in STATES else None)
        for f in fields(found)
        if f.name not in ("back", "reasons")
    }
    before = found.latent.dtype
    if dtype not in (None, before):
        note = f"converted from {before} to {dtype} after it was inverted: the certificate is that of {before}"
        values["warnings"] = (*found.warnings, note)
    if (back := found.back) is not None:
        names = ("positive", "negative", "mask", "image")
        cfg = back.cfg if isinstance(back.cfg, torch.Tensor) else moved(back.cfg, device)
        values["back"] = replace(
            back, cfg=cfg, **{name: moved(_plain(getattr(back, name)), device, dtype) for name in names}
        )
    return replace(found, **values)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
