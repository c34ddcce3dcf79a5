"""The seam: what the nodes use of the host, and what happens without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from standin import Host, latent, model, run

from kinvert.adapters.comfyui import host


def test_the_table_has_what_the_stand_in_has_and_nothing_else() -> None:
    assert [call.name for call in host.CALLS] == list(Host().names())


@pytest.mark.usefixtures("comfy")
def test_every_call_of_the_table_is_made_by_name() -> None:
    text = Path(host.__file__).read_text()
    _, code = text.split('"""What the nodes use of the host\'s modules."""')
    for call in host.CALLS:
        assert f'_of_host("{call.name}"' in code, call.name


def test_without_the_host_the_package_is_imported_and_its_nodes_say_what_is_missing() -> None:
    with pytest.raises(ImportError, match=r"run inside ComfyUI, and comfy\.samplers\.KSAMPLER was not found"):
        run("KinvertSampler", sampler_name="euler")


def test_an_old_host_has_no_nested_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = tuple(call.name for call in host.CALLS if call.since == "0.33.0")
    assert len(newer) == 4
    Host().install(monkeypatch, without=newer)
    result = run(
        "KinvertUnsampler", model=model(), steps=4, end_at_step=0, cfg=1.0, sampler_name="euler", scheduler="even",
        normalize="disable", positive=torch.zeros(2), negative=torch.zeros(2), latent_image=latent(),
    )  # fmt: skip
    assert result[0]["samples"].shape == (2, 4, 6, 8)


@pytest.mark.usefixtures("comfy")
def test_a_model_from_image_to_image_is_refused() -> None:
    with pytest.raises(ValueError, match="no noise behind an image"):
        host.coordinates_of_model(model("image").model.model_sampling)


@pytest.mark.parametrize(
    "cast, dtype, found",
    [
        (None, torch.float16, torch.float16),
        (torch.bfloat16, torch.float8_e4m3fn, torch.bfloat16),
        (None, torch.float8_e4m3fn, torch.bfloat16),
    ],
)
def test_the_dtype_is_the_one_that_the_network_computes_in(
    cast: torch.dtype | None, dtype: torch.dtype, found: torch.dtype
) -> None:
    patcher = model(dtype=dtype)
    patcher.model.manual_cast_dtype = cast
    assert host.network_dtype(patcher) == found


@pytest.mark.usefixtures("comfy")
def test_a_schedule_that_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.modules["comfy.samplers"], "calculate_sigmas", lambda *_: torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="no finite levels for 1 steps"):
        run("KinvertScheduler", model=model(), scheduler="even", steps=1)
