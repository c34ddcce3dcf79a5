"""Access to the recorded outputs in tests/data, and the denoisers they were made with."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kinvert as ki

DATA = Path(__file__).parent / "data"
Case = dict[str, Any]


@functools.cache
def load(name: str) -> dict[str, np.ndarray]:
    """All arrays of one file."""
    with np.load(DATA / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@functools.cache
def index() -> dict[str, list[Case]]:
    return json.loads((DATA / "recordings.json").read_text())


def array(case: Case, name: str) -> np.ndarray:
    """An array of a case, e.g. its `final` result."""
    store, offset, shape = case["arrays"][name]
    size = int(np.prod(shape))
    return load(case["file"].removesuffix(".npz"))[store][offset : offset + size].reshape(shape)


def shared(name: str, dtype: torch.dtype) -> Tensor:
    return torch.tensor(load("part1_shared")[f"shared/{name}"], dtype=dtype)


def relative_error(got: Tensor, recorded: np.ndarray) -> float:
    """Euclidean distance relative to the recording's norm, in float64."""
    want = torch.tensor(recorded, dtype=torch.float64)
    return float((got.double() - want).norm() / want.norm())


class Mixture:
    """D(x, sigma) of a mixture of isotropic Gaussians under x = a x0 + sigma eps; a = 1, or a = 1 - sigma for flow."""

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor, flow: bool) -> None:
        self.means, self.stds, self.weights, self.flow = means, stds, weights, flow

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        events = x.flatten(1)
        a = 1 - sigma if self.flow else torch.ones_like(sigma)
        variances = a[:, None] ** 2 * self.stds**2 + sigma[:, None] ** 2
        away = events[:, None] - a[:, None, None] * self.means.flatten(1)
        logits = self.weights.log() - events.shape[1] / 2 * variances.log() - away.square().sum(2) / (2 * variances)
        posteriors = self.means.flatten(1) + (a[:, None] * self.stds**2 / variances)[..., None] * away
        return (logits.softmax(1)[..., None] * posteriors).sum(1).reshape(x.shape)


def recorded_denoiser(case: Case, dtype: torch.dtype, uncond: bool = False) -> Mixture:
    """The denoiser of a sampler case; a Gaussian is a mixture of one."""
    end, flow = "_u" if uncond else "", case["process"] == "CONST"
    if case["denoiser"] == "G1":
        mean, std = shared(f"g1_mu{end}", dtype), shared(f"g1_s{end}", dtype)
        return Mixture(mean[None], std[None], torch.ones(1, dtype=dtype), flow)
    return Mixture(*(shared(f"g2_{what}{end}", dtype) for what in ("means", "stds", "weights")), flow)


class Counted:
    """A denoiser that counts its evaluations; with a scale, a pair for CFG++."""

    def __init__(self, cond: Mixture, uncond: Mixture, cfg: float | None) -> None:
        self.cond, self.uncond, self.cfg, self.calls = cond, uncond, cfg, 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor | ki.Guided:
        self.calls += 1
        denoised = self.cond(x, sigma)
        if self.cfg is None:
            return denoised
        uncond = self.uncond(x, sigma)
        return ki.Guided(uncond + (denoised - uncond) * self.cfg, uncond)


class RecordedNoise:
    """Replays the noise bank: each drawn interval gets the tensor that the recorded run got for it."""

    def __init__(self, case: Case, sigmas: list[float], dtype: torch.dtype) -> None:
        self.bank = shared("noise_bank", dtype)
        if "noise_calls" in case["arrays"]:
            self.intervals = [tuple(map(float, row)) for row in array(case, "noise_calls")]
        elif case["peer"] == "kdiff" or case["sampler"] == "heunpp2":  # one draw a step, used or not
            self.intervals = [(sigma, None) for sigma in sigmas[:-1]]
        else:  # drawn in order, whenever there is churn
            self.intervals = []
        self.next = 0

    def __call__(self, sigma_from: float, sigma_to: float) -> Tensor:
        if not self.intervals:
            self.next += 1
            return self.bank[self.next - 1]
        for k in range(self.next, len(self.intervals)):
            a, b = self.intervals[k]
            if np.isclose(a, sigma_from, rtol=1e-6) and (b is None or np.isclose(b, sigma_to, rtol=1e-6)):
                self.next = k + 1
                return self.bank[k]
        raise AssertionError(f"no recorded draw on {sigma_from} -> {sigma_to} after draw {self.next}")
