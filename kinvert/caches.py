"""Caches that are bounded by the memory that they hold, whatever the number and the size of their entries."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, ParamSpec, TypeVar

__all__ = ["SizedCache", "sized_cache"]

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
P = ParamSpec("P")
R = TypeVar("R")


class SizedCache(Generic[Key, Value]):
    """Entries of at most `limit` bytes in all; the least recently used ones are dropped.

    The newest entry is always kept, so that the limit is exceeded by one entry at most. Threads may share a cache.

    Attributes:
        limit: bytes.
        size: bytes of all entries.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._entries: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Value | None:
        """Return the value of a key, or None."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def pop(self, key: Key) -> Value | None:
        """Take out a value, and return it, or None: nobody else gets it meanwhile."""
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is None:
                return None
            self.size -= entry[1]
            return entry[0]

    def put(self, key: Key, value: Value, size: int) -> None:
        """Keep a value of `size` bytes."""
        with self._lock:
            old = self._entries.pop(key, None)
            self._entries[key] = value, size
            self.size += size - (0 if old is None else old[1])
            while self.size > self.limit and len(self._entries) > 1:
                _, (_, dropped) = self._entries.popitem(last=False)
                self.size -= dropped

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._entries.clear()
            self.size = 0


def sized_cache(limit: int, size: Callable[..., int]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function of hashable positional arguments keep its results; `size(result, *arguments)` is in bytes.

    Results must not be None. The cache is the attribute `cache` of the function.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        cache: SizedCache[Hashable, R] = SizedCache(limit)

        @functools.wraps(function)
        def cached(*args: P.args, **kwargs: P.kwargs) -> R:
            key = args, tuple(kwargs.items())
            found = cache.get(key)
            if found is None:
                found = function(*args, **kwargs)
                cache.put(key, found, size(found, *args))
            return found

        cached.cache = cache  # type: ignore[attr-defined]
        return cached

    return decorate
