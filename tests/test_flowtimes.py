"""Schedules that are marked as flow times."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from flowmodels import LEVELS, TIMES
from problems import noise_like
from torch import Tensor

import kinvert as ki
from kinvert.levels import FlowTimes


@pytest.mark.parametrize("name", [n for n, entry in ki.SCHEDULES.items() if entry.needs != "nothing"])
def test_schedules_of_flow_levels_are_flow_times(name: str) -> None:
    for levels in (LEVELS, ki.levels.flux()):
        for options in ({}, {"denoise": 0.5}, {"sampler": "dpm_2"}):
            assert type(ki.schedule(name, 7, levels, **options)) is FlowTimes
        if ki.SCHEDULES[name].needs == "levels":
            assert type(ki.SCHEDULES[name].function(7, levels)) is FlowTimes
    assert type(ki.schedule(name, 7, ki.levels.stable_diffusion())) is Tensor


def test_flow_times_keep_their_mark() -> None:
    plain = torch.tensor(TIMES.tolist(), dtype=torch.float64)
    kept = [
        TIMES[2:], TIMES[::2], TIMES[plain > 0.5], TIMES.flip(0), TIMES.clone(), TIMES.detach(), TIMES.float(),
        TIMES.to(torch.float32), TIMES.cpu(), torch.cat([TIMES[:3], TIMES[3:]]), torch.cat([TIMES[:-1], plain[-1:]]),
        TIMES.clamp(max=1 - 1e-4), torch.unique_consecutive(TIMES), pickle.loads(pickle.dumps(TIMES)),
        copy.copy(TIMES), copy.deepcopy(TIMES), FlowTimes(plain), ki.levels.ve_to_flow(torch.tensor([3.0, 0.0])),
    ]  # fmt: skip
    assert {type(value) for value in kept} == {FlowTimes}
    other = [
        TIMES[0], next(iter(TIMES)), TIMES * 2, 1 - TIMES, TIMES.max(), TIMES[:, None], TIMES.diff(), TIMES.new_zeros(2),
        TIMES[0] * noise_like((3,)), TIMES * plain, ki.levels.flow_to_ve(TIMES.clamp(max=0.9)),
        ki.levels.ve_to_flow(3.0), LEVELS.sigma(plain * 1000), LEVELS.timestep(TIMES),
    ]  # fmt: skip
    assert {type(value) for value in other} == {Tensor}
    assert torch.equal(TIMES, plain)
    assert torch.equal(TIMES * 2, plain * 2)
    assert repr(TIMES[-2:]) == "FlowTimes([0.1364, 0.0000], dtype=torch.float64)"
    for weights_only in (False, True):
        file = io.BytesIO()
        torch.save({"times": TIMES}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=weights_only)["times"]
        assert type(loaded) is FlowTimes
        assert torch.equal(loaded, TIMES)
