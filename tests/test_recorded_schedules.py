"""Sigma schedules against recordings of ComfyUI and k-diffusion.

Recordings are float32 and the schedules float64. They agree to 2e-6 relative, except where float32
loses digits inside the formula itself; `FLOAT32` holds those formulas, each with its cause, and the
test demands that the same formula in float32 gives the recorded numbers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from kinvert import levels
from kinvert.schedules import SCHEDULES, schedule

DATA = np.load(Path(__file__).parent / "data" / "schedules.npz")
CASES = json.loads(DATA["index"].tobytes())
STORES = {name: DATA[name] for name in ("f4", "f8")}
SD = levels.stable_diffusion()
MODELS = {
    "sd15": SD,
    "sdxl": SD,
    "vpred_zsnr": levels.stable_diffusion(zero_snr=True),
    "edm": levels.edm(),
    "flow_shift3": levels.flow(shift=3),
}
F32 = torch.float32
DIRECT = {  # recordings of functions called directly
    "k-diffusion get_sigmas_karras": "karras",
    "k-diffusion get_sigmas_polyexponential": "polyexponential",
    "k-diffusion get_sigmas_exponential": "exponential",
    "comfy get_sigmas_laplace": "laplace",
    "comfy kl_optimal": "kl_optimal",
    "kd get_sigmas_vp": "vp",
    "comfy get_sigmas_vp": "vp",
}
OPTIONS = ("sigma_min", "sigma_max", "rho", "mu", "beta", "beta_d", "beta_min", "eps_s")


def recorded(case) -> np.ndarray:
    store, offset, length = case["at"]
    return STORES[store][offset : offset + length].astype(np.float64)


BY_ID = {case["id"]: recorded(case) for case in CASES}


def kind(case) -> str:
    """The first two words: they tell the kinds of recording apart."""
    return " ".join(case["kind"].split()[:2])


def evaluate(case) -> np.ndarray:
    """What this library gives for the inputs of a recording, as float64."""
    model, name = MODELS.get(case.get("model")), kind(case)
    if name in DIRECT:
        options = {k: case[k] for k in OPTIONS if k in case}
        return SCHEDULES[DIRECT[name]].function(case["n"], **options).double().numpy()
    if name == "percent_to_sigma":
        return np.array([model.percent_to_sigma(case["percent"])])
    if name in ("sigma_table", "sigma_min", "sigma_max"):
        attribute = {"sigma_table": "sigmas"}.get(name, name)
        return np.atleast_1d(getattr(model, attribute))
    if name.startswith("timestep"):
        return model.timestep(torch.from_numpy(BY_ID[f"timestep_query/{case['model']}"])).numpy()
    if name.startswith("sigma(timestep)"):
        return model.sigma(torch.from_numpy(BY_ID[f"sigma_query/{case['model']}"])).numpy()
    options = {k: case[k] for k in ("sampler", "denoise") if k in case}
    sigmas = schedule(case["scheduler"], case["steps"], model, **options).double()
    if name == "sigmas the":  # the Unsampler node: upwards, with an offset, cut at the noisy end
        last = case["steps"] - min(case["end_at_step"], case["steps"] - 1)
        sigmas = (sigmas.flip(0) + 1e-4)[: last + 1]
    return sigmas.numpy()


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    scale = np.where(theirs == 0, 1, np.abs(theirs))
    return float((np.abs(ours - theirs) / scale).max(initial=0))


# --- The same formulas in float32, where float32 itself is further away than 2e-6 -----------------


def zero32(sigmas):
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def karras32(n, sigma_min, sigma_max, rho=7.0):
    """Near sigma_min, A + u (B - A) cancels: its error is eps A, against a value of B = A / 34."""
    a, b = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return zero32((a + torch.linspace(0, 1, n, dtype=F32) * (b - a)) ** rho)


def kl_optimal32(n, sigma_min, sigma_max):
    """Near pi / 2 the relative error of tan is sigma times that of the angle: 4519 * 3e-8."""
    u = torch.arange(n, dtype=F32) / (n - 1)
    return zero32((u * math.atan(sigma_min) + (1 - u) * math.atan(sigma_max)).tan())


def vp32(n, beta_d=19.9, beta_min=0.1, eps_s=1e-3):
    """k-diffusion's exp(x) - 1 at x = 1e-4 keeps 3 digits; ComfyUI's expm1 keeps all."""
    t = torch.linspace(1, eps_s, n, dtype=F32)
    return zero32(((t**2 * beta_d / 2 + t * beta_min).exp() - 1).sqrt())


def sigma32(table, t):
    """Zero terminal SNR: ln sigma rises by 0.7 over the last index, and t = 998.x is known to 3e-5."""
    log, t = table.sigmas.log().to(F32), torch.as_tensor(t, dtype=F32)
    weight = t.frac()
    return ((1 - weight) * log[t.floor().long()] + weight * log[t.ceil().long()]).exp()


def sgm_uniform32(n, table):
    return zero32(sigma32(table, torch.linspace(999, 0, n + 1, dtype=F32)[:-1]))


FLOAT32 = {"karras": karras32, "kl_optimal": kl_optimal32, "vp": vp32, "sgm_uniform": sgm_uniform32}
# The only (formula, model) where that is so; None is a direct call.
AMPLIFIED = {
    ("karras", None),
    ("kl_optimal", None),
    ("kl_optimal", "edm"),
    ("kl_optimal", "vpred_zsnr"),
    ("percent_to_sigma", "vpred_zsnr"),
    ("sgm_uniform", "vpred_zsnr"),
    ("vp", None),
}


def formula(case) -> str:
    return case.get("scheduler") or DIRECT.get(kind(case)) or case["kind"]


GROUPS = defaultdict(list)
for _case in CASES:
    GROUPS["-".join([*kind(_case).split(), _case.get("model", "")]).strip("-")].append(_case)


@pytest.mark.parametrize("group", GROUPS)
def test_recordings(group, monkeypatch):
    for case in GROUPS[group]:
        theirs = recorded(case)
        if case["kind"] == "query points":
            continue
        if case.get("denoise") == 0:  # the host returns the latent, untouched, for an empty schedule
            assert theirs.size == 0
            with pytest.raises(ValueError, match="nothing to do"):
                evaluate(case)
            continue
        ours = evaluate(case)
        if np.isnan(theirs).any():  # 0 / 0 in the host; here the only step there can be
            assert formula(case) == "kl_optimal"
            assert case.get("n", case.get("steps")) == 1
            top = case["sigma_max"] if "n" in case else MODELS[case["model"]].sigma_max
            offset = 1e-4 if kind(case) == "sigmas the" else 0
            assert ours.max() == top + offset
            theirs = np.where(np.isnan(theirs), top + offset, theirs)
        if relative(ours, theirs) <= 2e-6:
            continue
        key = (formula(case), case.get("model"))
        assert key in AMPLIFIED, (case["id"], relative(ours, theirs))
        with monkeypatch.context() as patch:
            if key[0] == "percent_to_sigma":
                patch.setattr(levels.DiscreteLevels, "sigma", sigma32)
            else:
                entry = dataclasses.replace(SCHEDULES[key[0]], function=FLOAT32[key[0]])
                patch.setitem(SCHEDULES, key[0], entry)
            in_float32 = evaluate(case)
        assert relative(in_float32, theirs) <= 5e-7, (case["id"], relative(in_float32, theirs))
