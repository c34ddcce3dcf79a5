"""Streams of random numbers: which generator seeds belong to the integer that a user passes as a seed.

Each purpose ("white", "brownian", ...) has its own stream, so that equal seeds for different purposes, and
`torch.randn` with a generator of the same seed, give independent numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["NoiseFunction", "Seed", "check_seeds", "derived_seed", "empty_noise", "generator_seeds", "mixed"]

NoiseFunction = Callable[[float, float], Tensor]
"""`noise(sigma_from, sigma_to)`: the noise of one interval of a run, of x's shape and unit variance."""
Seed = int | tuple[int, ...]
"""One seed for a batch, or one for each sample."""


def derived_seed(purpose: str, seed: int) -> int:
    """Return a seed for `torch.Generator` that belongs to `purpose`, made from a user's integer.

    Numbers drawn with it are independent of those that the user draws with a generator of the same seed or a
    neighbouring one, and of those for another purpose. It depends only on its arguments. torch's generator on a CPU
    reads only the lowest 32 bits of a seed; these differ for different seeds from 0 to 2^32 - 1, so that no two streams
    of one purpose coincide.

    Args:
        purpose: any text.
        seed: 64 bits, as torch's generators take it.

    Returns:
        A number of 63 bits.
    """
    return _derive(_key(purpose), seed)


def generator_seeds(purpose: str, seed: Seed) -> list[int]:
    """Return the generator seeds of a batch: one, or one for each sample."""
    key = _key(purpose)
    return [_derive(key, one) for one in (seed if isinstance(seed, tuple) else (seed,))]


def mixed(*values: int) -> int:
    """Hash integers to 63 bits; each is absorbed by the finalizer of SplitMix64.

    Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators (2014), doi 10.1145/2660193.2660195.
    """
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def check_seeds(seed: Seed, x: Tensor) -> None:
    """Raise ValueError if there are several seeds and not one for each sample of x."""
    if isinstance(seed, tuple) and len(seed) != x.shape[0]:
        raise ValueError(f"noise got {len(seed)} seeds for a batch of {x.shape[0]}; give one seed, or one per sample")


def empty_noise(seed: Seed, x: Tensor) -> NoiseFunction:
    """Return the noise function for a state without values: tensors like x."""
    check_seeds(seed, x)
    return lambda sigma_from, sigma_to: torch.empty_like(x)


def _derive(key: int, seed: int) -> int:
    seed %= 2**64  # torch reads -1 as 2^64 - 1
    upper = mixed(key, seed)
    low = (seed ^ mixed(key, seed >> 32)) % 2**32  # from here on a permutation of 32 bits
    for factor in (0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F):
        low = (low ^ low >> 16) * factor % 2**32
    return upper >> 32 << 32 | low ^ low >> 15


def _key(purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"kinvert.noise {purpose}".encode(), digest_size=8).digest(), "big")
