"""Read what `save` wrote: results, Plans and schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from kinvert.checks import describe, has_values
from kinvert.coordinates import Coordinates, coordinates_of
from kinvert.inversion.stored import inversion_of
from kinvert.levels import Levels
from kinvert.packing import from_fields, to_tree
from kinvert.planfile import plan_of
from kinvert.records import header_of, read_tree, write_tree
from kinvert.roundtrip import RoundTrip
from kinvert.rules import Rule
from kinvert.showing.brief import brief, never_fails, size
from kinvert.showing.charts import curve
from kinvert.showing.html import card, folded, html_never_fails, report, table

__all__ = ["Schedule", "load"]


@dataclass(frozen=True, eq=False)
class Schedule:
    """A schedule with what it was made of, to keep in a file: `ki.Schedule(sigmas, "karras", levels).save(path)`.

    Attributes:
        sigmas: the noise levels, or flow times; what the verbs take.
        name: of the schedule, e.g. a name of `ki.SCHEDULES`; None if it has none.
        levels: the noise levels of the model that it was made for; None if they are not known.
        options: options of the schedule, e.g. `{"rho": 7.0}`.
    """

    sigmas: Tensor
    name: str | None = None
    levels: Levels | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.sigmas, Tensor) or self.sigmas.ndim != 1:
            raise TypeError(f"sigmas must be a 1-D tensor, as ki.schedule returns it, got {describe(self.sigmas)}")

    @property
    def coordinates(self) -> Coordinates | None:
        """Whether the levels are flow times; None if they do not say."""
        return coordinates_of(self.sigmas)

    @never_fails
    def __repr__(self) -> str:
        """Return name, steps, range and what it was made of in one line."""
        parts = [self.name] if self.name else []
        if has_values(self.sigmas):
            unit = "flow time" if self.coordinates == "flow" else "sigma"
            first, last = self.sigmas[0], self.sigmas[-1]
            parts += [f"{len(self.sigmas) - 1} steps", f"{unit} {first:.4g} to {last:.4g}"]
        else:
            parts.append(size(self.sigmas))
        parts += [f"{name}={brief(value)}" for name, value in self.options.items()]
        return f"Schedule({', '.join(parts + ([repr(self.levels)] if self.levels else []))})"

    @html_never_fails
    def _repr_html_(self) -> str:
        values = self.sigmas.detach().tolist()
        drawn = curve(values, [f"place {i}" for i in range(len(values))], x_label="place")
        rest = table((), [("of the levels", repr(self.levels))]) if self.levels else ""
        listed = folded("all values", report(", ".join(f"{value:.6g}" for value in values)))
        return card(repr(self), drawn, rest, listed)

    def save(self, path: Path | str) -> None:
        """Write it to a safetensors file, which `ki.load` reads.

        Raises:
            ValueError: it cannot be written.
        """
        tree = {"sigmas": self.sigmas, "name": self.name, "levels": to_tree(self.levels), "options": dict(self.options)}
        write_tree(path, "schedule", tree)


READERS: dict[str, Callable[[Any, str, Rule | None], Any]] = {
    "inversion": inversion_of,
    "round_trip": lambda tree, what, _: from_fields(RoundTrip, tree, what),
    "plan": plan_of,
    "schedule": lambda tree, what, _: from_fields(Schedule, tree, what),
}
"""Kind of a file -> what makes the object of its tree."""


def load(path: Path | str, *, sampler: Rule | None = None) -> Any:
    """Read a file that `Inversion.save`, `RoundTrip.save`, `Plan.save` or `Schedule.save` wrote.

    Tensors come back bit by bit, on the CPU; `found.to(device)` moves them. Nothing in the file is run.

    Args:
        path: the file.
        sampler: the rule, for a result of a rule of your own that is not registered.

    Returns:
        What was saved: an `Inversion`, a `RoundTrip`, a `Plan` or a `Schedule`.

    Raises:
        ValueError: a file that is missing, damaged, cut off, of another program, or of a newer major version; a sampler
            that is not known here, or another than the one of the file. The message names the file.

    Warns:
        RuntimeWarning: the file has entries that this version does not know.
    """
    header = header_of(path)
    if header is None or header.kind not in READERS:
        what = "a file of another program" if header is None else f"of the kind {header.kind!r}"
        raise ValueError(
            f"{str(path)!r} holds no result that ki.load reads, it is {what}; `kinvert show {path}` says more. "
            "ki.pictures.read reads images and latents"
        )
    tree = read_tree(path, header)
    try:
        return READERS[header.kind](tree, repr(str(path)), sampler)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"cannot read {str(path)!r}: it is damaged, {type(error).__name__}: {error}") from error
