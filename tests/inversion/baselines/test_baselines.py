"""Over all published inversions: an honest certificate, evaluations that are counted, bad input that is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inverting import MIXTURE
from publications import guidance, images, labelled, schedule, shifted
from torch import Tensor

import kinvert as ki
from kinvert.inversion.baselines import (
    BASELINES,
    aidi,
    ddim_inversion,
    dpm_solver_inversion,
    easyinv,
    fireflow,
    flow_edit,
    forward_first,
    gnri,
    null_text,
    renoise,
    rf_inversion,
    rf_solver,
    steer,
)
from kinvert.rules import DirectInversion
from kinvert.tensors import rms

EULER = ("ddim_clean", "ddim_noisy", "easyinv", "rf_inversion", "aidi", "aidi_anderson", "renoise", "dpm_solver_1")
EULER += ("uni_inv", "forward_first", "gnri")
SAMPLERS: dict[str, Any] = {
    **dict.fromkeys(EULER, ki.sampler("euler")),
    "rf_solver": ki.sampler("rf_solver"),
    "fireflow": ki.sampler("fireflow"),
    "dpm_solver_2": ki.sampler("dpmpp_2m"),
    "direct_inversion": DirectInversion(),
}
"""The sampler that each belongs to; one that is registered elsewhere is believed."""


def own_sampler(name: str, found: ki.Inversion) -> ki.Rule:
    assert found.back is not None
    own: ki.Rule = SAMPLERS.get(name, found.back.sampler)
    assert own == found.back.sampler
    return own


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_certificate_is_honest(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = images().to(dtype)
    found = BASELINES[name](labelled, x, schedule(), **guidance(1.5))
    assert found.latent.dtype == dtype and found.sigmas == tuple(schedule().tolist())
    noise = ki.noise.replay(found.noises) if found.noises else None
    back = ki.sample(labelled, found.latent, schedule(), sampler=own_sampler(name, found), noise=noise, **guidance(1.5))
    torch.testing.assert_close(
        found.round_trip_error, rms(back - x), rtol=1e-3, atol=1e-6 if dtype is torch.float32 else 1e-12
    )
    assert torch.equal(found.converged, found.round_trip_error <= found.allowed)
    assert "inversion of 4 samples" in str(found)


@pytest.mark.parametrize("name", BASELINES)
def test_evaluations_are_counted(name: str) -> None:
    """Rows that the denoiser saw; of an estimate, of starts and of the check too."""
    rows = 0

    def counting(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return MIXTURE(x, sigma)

    found = BASELINES[name](counting, torch.cat([images(2), 3 * images(1)]), schedule())
    assert rows == int(found.evaluations.sum())


@pytest.mark.parametrize("name", BASELINES)
def test_what_checks_the_latent_is_one_run_and_is_told(name: str) -> None:
    """`checking` is what the certificate cost: without it are left the evaluations of the way up."""
    found = BASELINES[name](MIXTURE, images(), schedule())
    assert found.checking == ki.compile_plan(own_sampler(name, found), schedule()).evaluations
    fewest = 0.9 if name == "forward_first" else 1  # noise takes the place of the first of its ten steps
    assert ((found.evaluations - found.checking) / (len(schedule()) - 1) >= fewest).all()


X, S = images(), schedule()


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "at": (lambda: ddim_inversion(MIXTURE, X, S, at="cleen"), ValueError, "unknown at 'cleen'; did you mean 'clean'. It must be one of clean, noisy"),  # type: ignore[arg-type]
    "ends at 0": (lambda: ddim_inversion(MIXTURE, X, ki.schedules.karras(5, 0.1, 10)), ValueError, r"stop at sigma_min > 0, e.g. sigmas\[:-1\]"),
    "rising": (lambda: aidi(MIXTURE, X, S.flip(0)), ValueError, r"decreasing.*sigmas.flip\(0\)"),
    "half": (lambda: aidi(MIXTURE, X.half(), S), TypeError, "x must be float32 or float64, got torch.float16"),
    "integers": (lambda: renoise(MIXTURE, X.int(), S), TypeError, "floating point"),
    "nan": (lambda: rf_solver(MIXTURE, X * math.nan, S), ValueError, "x has 24 NaN"),
    "nan, solved": (lambda: aidi(MIXTURE, X * math.nan, S), ValueError, "NaN"),
    "negative": (lambda: fireflow(labelled, X, S, cfg=2.0), ValueError, "negative= is missing"),
    "keep": (lambda: easyinv(MIXTURE, X, S, keep=2.0), ValueError, "keep must be a number from 0 to 1, got 2"),
    "iterations": (lambda: aidi(MIXTURE, X, S, iterations=0), ValueError, "iterations must be an int of at least 1, got 0"),
    "window": (lambda: aidi(MIXTURE, X, S, window=-1), ValueError, "window must be an int of at least 0"),
    "average": (lambda: renoise(MIXTURE, X, S, iterations=3, average=4), ValueError, "average must be at most iterations, 3, got 4"),
    "order": (lambda: dpm_solver_inversion(MIXTURE, X, S, order=3), ValueError, "order must be 1 .* or 2"),  # type: ignore[arg-type]
    "tau": (lambda: dpm_solver_inversion(MIXTURE, X, S, tau=0), ValueError, "tau must be a positive number, got 0"),
    "substeps": (lambda: dpm_solver_inversion(MIXTURE, X, S, substeps=1.5), ValueError, "substeps must be an int"),  # type: ignore[arg-type]
    "gamma": (lambda: rf_inversion(MIXTURE, X, S, gamma=1.5), ValueError, r"gamma must be a number from 0 \(not steered\) to 1, got 1.5"),
    "eta": (lambda: rf_inversion(MIXTURE, X, S, eta=-1), ValueError, "eta must be a number from 0"),
    "noise": (lambda: rf_inversion(MIXTURE, X, S, noise=X[:1]), ValueError, r"noise must be a tensor of x's shape \(4, 6\), got \(1, 6\)"),
    "forward": (lambda: forward_first(MIXTURE, X, S, forward=11), ValueError, "forward must be at most the number of steps, 10, got 11"),
    "noise first": (lambda: forward_first(MIXTURE, X, S, noise=X[:1]), ValueError, "noise must be a tensor of x's shape"),
    "edit of integers": (lambda: flow_edit(MIXTURE, X.int(), S, source=None, target=None), TypeError, "floating point"),
    "edit upwards": (lambda: flow_edit(MIXTURE, X, S.flip(0), source=None, target=None), ValueError, "decreasing"),
    "edit without negative": (lambda: flow_edit(labelled, X, S, source={"label": X[:, 0]}, target={"label": X[:, 0]}, cfg_target=2.0), ValueError, "negative= is missing"),
    "edit average": (lambda: flow_edit(MIXTURE, X, S, source=None, target=None, average=0), ValueError, "average must be an int of at least 1"),
    "edit times": (lambda: flow_edit(ki.denoisers.Gaussian(0.0, 1.0), X, ki.levels.FlowTimes([1.0, 0.5]), source=None, target=None), ValueError, "sigmas are flow times"),
    "image": (lambda: steer(MIXTURE, X[:3], 0.1, eta=0.5)(X, S[:1].expand(4)), ValueError, "image has shape .3, 6., which does not fit x's .4, 6."),
    "prior": (lambda: gnri(MIXTURE, X, S, weight=-1.0), ValueError, "weight must be"),
    "newton steps": (lambda: gnri(MIXTURE, X, S, iterations=0), ValueError, "iterations must be an int of at least 1"),
    "through": (lambda: gnri(torch.no_grad()(MIXTURE), X, S, through=True), TypeError, "through=True needs a denoiser whose result depends on x"),
    "label": (lambda: null_text(labelled, X, S, **guidance(2.0)), TypeError, "negative must have a floating point tensor to optimise, got label; pass the embedding"),
    "no negative": (lambda: null_text(MIXTURE, X, S), TypeError, "to optimise, got nothing"),
    "lr": (lambda: null_text(shifted, X, S, lr=0.0, positive={"shift": X}, negative={"shift": X}), ValueError, "lr must be a positive number"),
    "cfg 1": (lambda: null_text(shifted, X, S, cfg=1.0, positive={"shift": X}, negative={"shift": X}), TypeError, "cfg other than 1"),
    "no gradient": (lambda: null_text(torch.no_grad()(shifted), X, S, positive={"shift": X}, negative={"shift": X}), TypeError, r"no torch.no_grad\(\) inside"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
