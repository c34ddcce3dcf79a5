"""The parts of a card in a notebook: text, tables, pictures, all escaped and without a file or a network beside them.

Colours are those of the page around a card, so that it can be read in light and in dark notebooks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TypeVar

__all__ = ["Html", "card", "folded", "html_never_fails", "paragraph", "report", "strip", "table"]

T = TypeVar("T")


class Html(str):
    """Text that is HTML already. Everything else is escaped."""

    __slots__ = ()


STYLE = """
.kinvert{color:inherit;font-size:13px;line-height:1.4;max-width:100%;overflow-x:auto}
.kinvert pre{color:inherit;background:none;border:0;margin:4px 0;padding:0;white-space:pre-wrap;font-size:12px}
.kinvert p{margin:6px 0 2px}
.kinvert small{opacity:.75}
.kinvert table{border-collapse:collapse;color:inherit;background:none;margin:4px 0;font-size:12px}
.kinvert tr{background:none!important}
.kinvert th,.kinvert td{color:inherit;background:none;text-align:left;vertical-align:top;padding:2px 12px 2px 0;
border:0;border-bottom:1px solid rgba(128,128,128,.35);white-space:normal}
.kinvert figure{display:inline-block;margin:0 5px 4px 0;text-align:center;font-size:11px}
.kinvert img{image-rendering:pixelated;width:64px;height:64px;object-fit:contain;margin:0;display:block;
border:1px solid rgba(128,128,128,.5)}
.kinvert svg{display:block;max-width:100%;color:inherit}
.kinvert summary{cursor:pointer}
"""


def text(words: object) -> str:
    """Return words as HTML, escaped unless they are `Html`."""
    return words if isinstance(words, Html) else escape(str(words))


def card(title: str, *parts: str) -> Html:
    """Put parts below a title; strings that are not `Html` are escaped."""
    return Html(f"<div class='kinvert'><style>{STYLE}</style><b>{text(title)}</b>{''.join(map(text, parts))}</div>")


def report(words: str) -> Html:
    """Return a printed report, line for line."""
    return Html(f"<pre>{text(words)}</pre>")


def paragraph(words: str, small: str = "") -> Html:
    """Return a line of text, with more in small letters."""
    return Html(f"<p>{text(words)}{f' <small>{text(small)}</small>' if small else ''}</p>")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """Return a table; `head` may be empty."""
    first = f"<thead><tr>{''.join(f'<th>{text(name)}</th>' for name in head)}</tr></thead>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return Html(f"<table>{first}<tbody>{body}</tbody></table>")


def folded(summary: str, content: str) -> Html:
    """Return content that a click on its summary shows."""
    return Html(f"<details><summary>{text(summary)}</summary>{text(content)}</details>")


def strip(sources: Iterable[str], labels: Sequence[str]) -> Html:
    """Return pictures in a row, given by their addresses, each with a label below it."""
    figures = [
        f"<figure><img src='{text(source)}' alt='{text(label)}'/><figcaption>{text(label)}</figcaption></figure>"
        for source, label in zip(sources, labels, strict=True)
    ]
    return Html(f"<div>{''.join(figures)}</div>")


def html_never_fails(build: Callable[[T], str]) -> Callable[[T], str]:
    """Wrap a `_repr_html_` so that a result that is half filled is shown by its `repr`, and says what is missing."""

    @functools.wraps(build)
    def safe(self: T) -> str:
        try:
            return str(build(self))
        except Exception as error:
            missing = f"(not shown whole: {type(error).__name__}: {error})"
            return str(card(type(self).__name__, report(f"{self!r}\n{missing}")))

    return safe
