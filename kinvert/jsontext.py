"""Write data as JSON, which has no infinite numbers and no NaN: one form keeps them as strings, one drops them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

__all__ = ["canonical_json", "content_key", "from_canonical_json", "to_json"]

_NON_FINITE = {str(value): value for value in (math.inf, -math.inf, math.nan)}


def to_json(data: Any) -> str:
    """Return `data` as indented JSON for other programs, with null for numbers that are not finite.

    An object that JSON does not know is written as its attribute `name`.
    """
    plain = _replace_floats(data, lambda value: value if math.isfinite(value) else None)
    return json.dumps(plain, indent=2, allow_nan=False, default=lambda named: named.name) + "\n"


def canonical_json(data: Any) -> str:
    """Return `data` as JSON on one line, with sorted keys: equal data give equal text.

    Numbers that are not finite become the strings "inf", "-inf" and "nan".
    """
    return _compact(_replace_floats(data, lambda value: value if math.isfinite(value) else str(value)))


def from_canonical_json(text: str | bytes) -> Any:
    """Return the data that `canonical_json` wrote; the strings "inf", "-inf" and "nan" become floats.

    Raises:
        ValueError: it is no JSON: the bare words NaN and Infinity, which Python writes, are none.
    """
    try:
        return _restore_floats(json.loads(text, parse_constant=_refuse))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def content_key(content: Any) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of the canonical JSON of `content`.

    Raises:
        ValueError: a number in `content` is not finite.
    """
    return hashlib.sha256(_compact(content).encode()).hexdigest()[:16]


def _refuse(word: str) -> float:
    raise ValueError(f"the word {word} is no JSON")


def _compact(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _replace_floats(data: Any, replace: Callable[[float], Any]) -> Any:
    if isinstance(data, dict):
        return {key: _replace_floats(value, replace) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_replace_floats(value, replace) for value in data]
    return replace(data) if isinstance(data, float) else data


def _restore_floats(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _restore_floats(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_restore_floats(value) for value in data]
    return _NON_FINITE.get(data, data) if isinstance(data, str) else data
