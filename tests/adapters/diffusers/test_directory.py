"""The levels that a pipeline's scheduler was trained on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

import kinvert as ki
from kinvert.adapters.diffusers.directory import levels_of


def same(found: ki.levels.Levels, wanted: ki.levels.Levels) -> bool:
    return repr(found) == repr(wanted) and torch.equal(found.sigmas, wanted.sigmas)


FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize(
    ("scheduler", "shift"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0), 3.0),
        (FlowMatchHeunDiscreteScheduler(), 1.0),
        (UniPCMultistepScheduler(**FLOW, flow_shift=5.0), 5.0),
        (UniPCMultistepScheduler(**FLOW), 1.0),
    ],
)
def test_flow_levels_have_the_shift_of_the_scheduler(scheduler: Any, shift: float) -> None:
    assert same(levels_of(scheduler), ki.levels.flow(shift=shift))


def test_other_levels() -> None:
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert same(levels_of(scheduler), ki.levels.from_alphas_cumprod(scheduler.alphas_cumprod.double()))
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    assert same(levels_of(scheduler), ki.levels.edm(0.002, 80.0, sigma_data=0.5))
    with pytest.raises(ValueError, match="shifts its times by the size of the image"):
        levels_of(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
