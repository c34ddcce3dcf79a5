"""Published inversions that store what corrects them."""

from __future__ import annotations

from typing import Any

import torch
from publications import close, guidance, images, labelled, schedule, shifted
from torch import Tensor

import kinvert as ki
from kinvert.inversion.baselines import (
    ddim_inversion,
    direct_inversion,
    null_text,
    sample_null_text,
)
from kinvert.rules import DirectInversion
from kinvert.tensors import rms


def test_direct_inversion_gives_the_image_back() -> None:
    found = direct_inversion(labelled, images(), schedule(), **guidance(7.5))
    # A run sums in another order than `advance`, by which the offsets are found, and amplifies the difference.
    assert found.converged.all() and float(found.round_trip_error.max()) < 1e-10
    close(found.latent, ddim_inversion(labelled, images(), schedule(), **guidance(1.0)).latent)
    replay = ki.noise.replay(found.noises)
    back = ki.sample(labelled, found.latent, schedule(), sampler=DirectInversion(), noise=replay, **guidance(7.5))
    close(back, images(), 1e-10)
    alone = ki.sample(labelled, found.latent, schedule(), **guidance(7.5))
    assert float(rms(alone - images()).min()) > 1e-2  # the latent by itself does not


def test_null_text_lowers_the_error() -> None:
    given: dict[str, Any] = {
        "cfg": 3.0, "positive": {"shift": torch.full((1, 6), 0.5, dtype=torch.float64)},
        "negative": {"shift": torch.zeros(1, 6, dtype=torch.float64)},
    }  # fmt: skip
    latent = ddim_inversion(shifted, images(), schedule(), positive=given["positive"]).latent
    before = rms(ki.sample(shifted, latent, schedule(), **given) - images())
    short, long = (null_text(shifted, images(), schedule(), lr=0.1, iterations=k, **given) for k in (5, 40))
    assert (short.round_trip_error < before).all() and (long.round_trip_error < 0.05 * before).all()
    torch.testing.assert_close(long.latent, latent, rtol=1e-11, atol=1e-11)
    assert long.embeddings["shift"].shape == (10, 4, 6)
    again = sample_null_text(shifted, latent, schedule(), long.embeddings, **given)
    close(rms(again - images()), long.round_trip_error, 1e-9)
    assert not given["negative"]["shift"].requires_grad and not long.embeddings["shift"].requires_grad


def test_null_text_leaves_the_network_alone() -> None:
    scale = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))

    def network(x: Tensor, sigma: Tensor, shift: Tensor) -> Tensor:
        return scale * shifted(x, sigma, shift)

    zero = {"shift": torch.zeros(1, 6, dtype=torch.float64)}
    found = null_text(network, images(), schedule(4), positive={"shift": zero["shift"] + 0.5}, negative=zero)
    assert scale.grad is None and not found.latent.requires_grad
