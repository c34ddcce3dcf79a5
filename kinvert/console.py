"""Print what the command line has to say: tables that fit the terminal, notes, and lines.

If a table is too wide for the terminal, its last columns are left out, and a note says which. If that is not enough,
each row becomes a paragraph. Output to a file or a pipe has a line for each row, as wide as it needs.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["print_lines", "print_notes", "print_table"]

UNLIMITED = 100_000


def print_lines(*lines: str) -> None:
    """Print lines as they are; the terminal may break them."""
    for line in lines:
        _console().print(line, markup=False, soft_wrap=True)


def print_notes(*notes: str) -> None:
    """Print sentences, and break lines between words."""
    for note in notes:
        _wrapped(_console(), note, later="    ")


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    numbers: bool = False,
    needed: int | None = None,
) -> None:
    """Print a table with a title.

    Args:
        title: the line above the table.
        columns: names of the columns, the most important first; a name may have two lines.
        rows: a value for each column.
        numbers: whether all columns but the first have numbers.
        needed: number of columns that a table must have room for; by default all.
    """
    console, cells = _console(), [[str(cell) for cell in row] for row in rows]
    for shown in range(len(columns), (needed or len(columns)) - 1, -1):
        table = _table(title, columns[:shown], cells, numbers)
        if console.measure(table, options=console.options.update(width=UNLIMITED)).maximum <= console.width:
            _put(console, table)
            if left_out := ", ".join(map(_flat, columns[shown:])):
                _wrapped(console, f"Left out here: {left_out}. A wider terminal, a file or a pipe gets all columns.")
            return
    console.print(Text(title, style="bold"), soft_wrap=True)
    for first, *others in cells:
        console.print(Text(first, style="bold"), soft_wrap=True)
        said = [f"{_flat(name)}: {cell}" for name, cell in zip(columns[1:], others, strict=True) if cell]
        _wrapped(console, "; ".join(said), first="  ", later="  ")


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.collapse_padding, table.show_edge = True, False
    for k, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers and k else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row[: len(columns)]))
    return table


def _put(console: Console, table: Table) -> None:
    """Print a table; outside of a terminal, without the blanks at the ends of lines."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    print_lines(*(line.rstrip() for line in captured.get().splitlines()))


def _wrapped(console: Console, text: str, first: str = "", later: str = "") -> None:
    lines = textwrap.wrap(text, console.width, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _flat(name: str) -> str:
    return name.replace("/\n", "/").replace("\n", " ")


def _console() -> Console:
    """Return a console as wide as the terminal, or wide enough for everything if the output goes elsewhere."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else UNLIMITED, highlight=False)
