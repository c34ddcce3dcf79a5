"""Intervals of the numbers in a report: a paired bootstrap over images and seeds.

A sample belongs to a *unit*: an image, or a latent that a seed made. A resample draws as many units as there are, with
replacement, and takes all samples of a drawn unit as often as it was drawn. Two rows with the same units see the same
resamples. What makes an image difficult then affects both in the same way, and their difference is known better than
either number. Rows with other units are resampled independently.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 13.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from kinvert.bench.problems import image_numbers
from kinvert.bench.questions import QUESTIONS
from kinvert.bench.results import Record
from kinvert.streams import derived_seed

__all__ = [
    "LEVEL",
    "RESAMPLES",
    "Unit",
    "holds",
    "interval",
    "lower_share",
    "of_records",
    "resampled",
    "units",
    "weights",
    "wilson",
]

RESAMPLES = 2000
LEVEL = 0.95
Unit = tuple[str, int, int]


def units(record: Record) -> list[Unit]:
    """Return the unit of each sample of a record.

    What starts from an image of a data set that comes with kinvert has the image as its unit: several seeds may choose
    the same image. Otherwise the unit is the seed with the place in the batch, for batches of that size.
    """
    cell = record["cell"]
    seed, size = cell["seed"], cell["count"]
    numbers = image_numbers(cell["model"], size, seed) if _starts_from_image(cell["question"]) else None
    if numbers is not None:
        return [("image", number, 0) for number in numbers]
    return [(f"seed {seed}", size, k) for k in range(size)]


def _starts_from_image(question: str) -> bool:
    return question in QUESTIONS and QUESTIONS[question].start == "image"


@lru_cache(maxsize=256)
def weights(of: tuple[Unit, ...]) -> np.ndarray:
    """Return how often each resample takes each sample, shape (RESAMPLES, samples): equal units, equal weights."""
    place = {unit: k for k, unit in enumerate(dict.fromkeys(of))}
    random = np.random.default_rng(derived_seed(f"bootstrap of {list(place)}", 0))
    drawn = random.integers(len(place), size=(RESAMPLES, len(place)))
    times = np.stack([np.bincount(row, minlength=len(place)) for row in drawn])
    return times[:, [place[unit] for unit in of]]


def resampled(values: Sequence[float], of: Sequence[Unit], *, share: bool = False) -> np.ndarray:
    """Compute the median of the values in each resample, or their mean if they are a share; shape (RESAMPLES,)."""
    times, numbers = weights(tuple(of)), np.asarray(values, dtype=float)
    if share:
        return times @ numbers / times.sum(1)
    order = np.argsort(numbers, kind="stable")
    sums = np.cumsum(times[:, order], axis=1)
    half = sums[:, -1:] / 2
    low, high = (sums < half).sum(1), (sums <= half).sum(1)  # the two values in the middle, equal if there is one
    below, above = numbers[order][low], numbers[order][high]
    with np.errstate(invalid="ignore"):  # infinities of both signs have no mean
        return np.where(below == above, below, below / 2 + above / 2)


def interval(values: Sequence[float], of: Sequence[Unit]) -> tuple[float, float] | None:
    """Compute the percentile interval of the median, at `LEVEL`.

    Returns:
        None if a value is NaN, or if all values belong to one unit, which says nothing about others.
    """
    if len(set(of)) < 2 or any(map(math.isnan, values)):
        return None
    drawn = np.sort(resampled(values, of))
    low = math.floor((1 - LEVEL) / 2 * len(drawn))
    return float(drawn[low]), float(drawn[len(drawn) - 1 - low])


def of_records(records: Sequence[Record], name: str) -> tuple[float, float] | None:
    """Compute the interval of the median of a metric over the samples of records, which have different seeds."""
    values = [value for record in records for value in record["metrics"].get(name) or ()]
    of = [unit for record in records if record["metrics"].get(name) for unit in units(record)]
    return interval(values, of)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Compute Wilson's interval of a share of `count` independent samples, at `LEVEL`.

    Unlike a bootstrap it has a width if all samples agree: 4 of 4 gives 51% to 100%.
    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference (1927).
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def lower_share(a: np.ndarray, b: np.ndarray) -> float:
    """Return the share of resamples in which a is below b.

    If it is at least `(1 + LEVEL) / 2`, the interval of the difference of a and b lies below 0. Infinite values are
    compared as numbers are.
    """
    return float((a < b).mean())


def holds(count: int) -> float:
    """Return how often the range of `count` independent values holds the median, the most that any interval can."""
    return 1 - 2.0 ** (1 - count)
