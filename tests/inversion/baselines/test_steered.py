"""RF-Inversion: its formula, its limits, and steering back."""

from __future__ import annotations

import itertools

import torch
from inverting import MIXTURE
from problems import noise_like
from publications import close, flow_times, guidance, images, labelled, schedule, velocity

import kinvert as ki
from kinvert.inversion.baselines import (
    ddim_inversion,
    rf_inversion,
    steer,
)


def test_rf_inversion_as_published() -> None:
    """dY = (v + gamma (v_1 - v)) dt by Euler's method in flow time, for a mixture of the two fields."""
    y_1 = noise_like((4, 6), seed=3)
    y = images() / 1.1
    for t, t_next in itertools.pairwise(flow_times(schedule())[::-1]):
        v = velocity(y, t)
        y = y + (t_next - t) * (v + 0.3 * ((y_1 - y) / (1 - t) - v))
    close(rf_inversion(MIXTURE, images(), schedule(), gamma=0.3, noise=y_1).latent, y * 11)


def test_rf_inversion_without_and_with_full_control() -> None:
    y_1 = noise_like((4, 6), seed=3)
    plain = rf_inversion(MIXTURE, images(), schedule(), gamma=0.0, noise=y_1)
    exact = ddim_inversion(MIXTURE, images(), schedule(), at="clean")
    close(plain.latent, exact.latent)
    close(plain.round_trip_error, exact.round_trip_error, 1e-9)
    full = rf_inversion(MIXTURE, images(), schedule(), gamma=1.0, noise=y_1)
    close(full.latent, images() + 9.9 * y_1)
    there = rf_inversion(MIXTURE, images(), [1e6, 10.0, 0.1], gamma=1.0, noise=y_1).latent / (1 + 1e6)
    close(there, y_1, 1e-5)  # in flow time, at t = 1


def test_steering_back() -> None:
    x, start = images(), 10 * noise_like((4, 6))
    for cfg in (1.0, 7.5):
        steered = steer(labelled, x, 0.1, eta=1.0)
        close(ki.sample(steered, start, schedule(), **guidance(cfg)), x, 1e-11)
    assert torch.equal(
        ki.sample(steer(MIXTURE, x, 0.1, eta=0.0), start, schedule()), ki.sample(MIXTURE, start, schedule())
    )
    errors = [float(rf_inversion(MIXTURE, x, schedule(), eta=eta).round_trip_error.max()) for eta in (0.0, 0.5, 1.0)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-11
    half = steer(MIXTURE, x, 0.1, eta=1.0, until=2.0)
    at = torch.tensor([0.5, 0.5, 3.0, 3.0], dtype=torch.float64)
    close(half(start, at)[:2], MIXTURE(start, at)[:2])  # type: ignore[index]
    close(half(start, at)[2:], (start - 3.0 * (start - x) / 2.9)[2:])  # type: ignore[index]
