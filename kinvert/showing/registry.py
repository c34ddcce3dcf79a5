"""A dictionary of names that prints as a few of them, and shows as a table in a notebook."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from kinvert.showing.brief import never_fails
from kinvert.showing.html import card, html_never_fails, table

__all__ = ["Registry", "Table"]

V = TypeVar("V")
Table = tuple[Sequence[str], Sequence[Sequence[object]]]
"""The head of a table and its rows."""
SHOWN = 12  # names in a repr


class Registry(dict[str, V]):
    """A dictionary by name.

    Args:
        entries: the first entries.
        what: what the entries are, e.g. "samplers".
        place: the name of the registry in code, e.g. "ki.SAMPLERS".

    Attributes:
        tabulate: makes the table of a notebook; without one it has the names alone.
    """

    def __init__(self, entries: Mapping[str, V] | None = None, *, what: str = "entries", place: str = "") -> None:
        super().__init__(entries or {})
        self.what, self.place = what, place
        self.tabulate: Callable[[Mapping[str, V]], Table] | None = None

    @never_fails
    def __repr__(self) -> str:
        """Return the number of entries and the first names."""
        names = list(self)
        hidden = len(names) - SHOWN
        more = f", ... and {hidden} more: list({self.place})" if hidden > 0 else ""
        text = f"{self.place or type(self).__name__}, {len(names)} {self.what}: {', '.join(names[:SHOWN])}{more}"
        return textwrap.fill(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)

    @html_never_fails
    def _repr_html_(self) -> str:
        head, rows = self.tabulate(self) if self.tabulate else (["name"], [[name] for name in self])
        return card(f"{self.place}: {len(self)} {self.what}", table(head, rows))
