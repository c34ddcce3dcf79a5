"""FlowEdit: the published formula in flow time, an exact answer, and what it costs."""

from __future__ import annotations

import itertools

import torch
from publications import close, flow_times, guidance, images, labelled, schedule
from torch import Tensor

import kinvert as ki
from kinvert.inversion.baselines import flow_edit

LABELS = {name: {"label": torch.full((4,), label)} for name, label in (("source", 0), ("target", 1))}


def in_flow(y: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return labelled(y / (1 - t[:, None]), t / (1 - t), label)


in_flow.coordinates = "flow"  # type: ignore[attr-defined]


def published(times: list[float], average: int) -> Tensor:
    """Z' = Z + (t' - t) mean[v(Z + z - x, t, target) - v(z, t, source)], z = (1 - t) x + t n, v = eps - x0."""
    x, generator = images(), torch.Generator().manual_seed(4)
    z_edit = x.clone()
    for t, t_next in itertools.pairwise(times):
        at, total = torch.full((4,), t, dtype=torch.float64), torch.zeros_like(x)
        for _ in range(average):
            z = (1 - t) * x + t * torch.randn(x.shape, generator=generator, dtype=x.dtype)
            z_target = z_edit + z - x
            v_target = (z_target - in_flow(z_target, at, **LABELS["target"])) / t
            total += v_target - (z - in_flow(z, at, **LABELS["source"])) / t
        z_edit = z_edit + (t_next - t) * total / average
    return z_edit


def test_flow_edit_as_published_in_both_coordinates() -> None:
    sigmas = torch.cat([schedule(), torch.zeros(1, dtype=torch.float64)])
    expected = published(flow_times(sigmas), 2)
    edited = flow_edit(labelled, images(), sigmas, average=2, generator=torch.Generator().manual_seed(4), **LABELS)
    close(edited, expected, 1e-11)
    times = ki.levels.ve_to_flow(sigmas)
    close(
        flow_edit(in_flow, images(), times, average=2, generator=torch.Generator().manual_seed(4), **LABELS), expected
    )


def test_an_edit_to_itself_changes_nothing() -> None:
    assert torch.equal(
        flow_edit(labelled, images(), schedule(), source=LABELS["source"], target=LABELS["source"]), images()
    )


def test_gaussian_data_moves_by_the_distance_of_the_means() -> None:
    """Means m and m + 1 and one deviation s: de/dt = (e - D) / t with D = (1 - g) + g e, whatever the noise is."""

    def gaussian(x: Tensor, sigma: Tensor, mean: Tensor) -> Tensor:
        gain = (0.25 / (0.25 + sigma**2))[:, None]
        return mean[:, None] + gain * (x - mean[:, None])

    means = {name: {"mean": torch.full((4,), m, dtype=torch.float64)} for name, m in (("source", 0.2), ("target", 1.2))}
    e = 0.0
    sigmas = [*schedule(30).tolist(), 0.0]
    for a, b in itertools.pairwise(sigmas):
        gain, q = 0.25 / (0.25 + a * a), (b / (1 + b)) / (a / (1 + a))
        e = q * e + (1 - q) * ((1 - gain) + gain * (1 + a) * e)
    edited = flow_edit(gaussian, images(), sigmas, **means)
    close(edited, images() + e, 1e-11)
    assert 0.7 < e < 1.3


def test_two_evaluations_for_each_noise_and_guidance() -> None:
    rows = 0

    def counting(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return labelled(x, sigma, label)

    flow_edit(counting, images(), schedule(), average=3, **LABELS)
    assert rows == 10 * 3 * 2 * 4
    given = guidance(1.0)
    plain, guided = (
        flow_edit(
            labelled, images(), schedule(), negative=given["negative"], cfg_target=cfg,
            generator=torch.Generator().manual_seed(4), **LABELS,
        )
        for cfg in (1.0, 3.0)
    )  # fmt: skip
    assert (guided - plain).abs().max() > 1e-2


def test_dtypes_are_kept() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        edited = flow_edit(labelled, images().to(dtype), schedule(), **LABELS)
        assert edited.dtype == dtype and edited.shape == (4, 6)
