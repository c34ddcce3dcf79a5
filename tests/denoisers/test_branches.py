"""Kinds of prediction: what a network of each kind predicts, and that plain guidance is the same in all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import noise_like
from torch import Tensor

import kinvert as ki
from kinvert import guidance
from kinvert.denoisers import from_edm, from_eps, from_v, from_velocity, from_x0, guide
from kinvert.denoisers.branches import Branches, Model

LEVELS = ki.levels.edm(0.01, 80.0, sigma_data=0.5)
X, SIGMA = noise_like((3, 2, 4)), torch.tensor([0.03, 1.0, 60.0], dtype=torch.float64)
PREDICTED = [noise_like((3, 2, 4), seed) for seed in (1, 2)]


def seen(space: Any, denoiser: Any, x: Tensor = X, sigma: Tensor = SIGMA) -> list[Tensor]:
    """What a function in `space` is given, for networks that predict the two `PREDICTED`."""
    kept: list[Tensor] = []

    def keep(cond: Tensor, uncond: Tensor, sigma: Tensor) -> Tensor:
        kept[:] = [cond, uncond]
        return cond

    cond, uncond = ({"out": out} for out in PREDICTED)
    result = guide(denoiser, guidance.Function(keep, space), cond, uncond)(x, sigma)
    torch.testing.assert_close(result, guide(denoiser, 1.0, cond)(x, sigma), rtol=1e-9, atol=1e-9)
    return kept


def network(x: Tensor, t: Tensor, out: Tensor) -> Tensor:
    return out if len(x) == len(out) else torch.cat([PREDICTED[1], PREDICTED[0]])


@pytest.mark.parametrize(
    ("space", "denoiser"),
    [
        ("eps", from_eps(network, LEVELS)),
        ("v", from_v(network, LEVELS)),
        ("v", from_v(network, ki.levels.stable_diffusion())),
        ("x0", from_x0(network, LEVELS)),
        ("velocity", from_velocity(network)),
        ("velocity", from_velocity(network, ki.levels.flow(3.0))),
    ],
)
def test_a_function_gets_what_a_network_of_its_kind_predicts(space: Any, denoiser: Any) -> None:
    sigma = SIGMA / 61 if denoiser.coordinates == "flow" else SIGMA
    torch.testing.assert_close(seen(space, denoiser, sigma=sigma), PREDICTED, rtol=1e-9, atol=1e-9)
    assert Model.of(denoiser).prediction == space


def test_the_network_of_edm_predicts_v_with_the_other_sign() -> None:
    torch.testing.assert_close(seen("v", from_edm(network, LEVELS)), [-out for out in PREDICTED], rtol=1e-9, atol=1e-9)
    assert Model.of(from_edm(network, LEVELS)) == Model("ve", "v", 0.5)


@given(
    space=st.sampled_from(["x0", "eps", "v", "velocity"]),
    w=st.floats(-3, 10),
    level=st.floats(1e-3, 1e3),
    flow=st.booleans(),
)
@settings(deadline=None)
def test_plain_guidance_is_the_same_in_every_kind(space: Any, w: float, level: float, flow: bool) -> None:
    if flow:
        space, level = {"eps": "velocity", "v": "x0"}.get(space, space), level / (1 + level)
    model = Model("flow" if flow else "ve", sigma_data=0.7)
    both = Branches(*PREDICTED, level * X, torch.full((3,), level, dtype=torch.float64), model)
    got = both.combined(lambda cond, uncond, sigma: uncond + w * (cond - uncond), space)
    torch.testing.assert_close(got, torch.lerp(both.uncond, both.cond, w), rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("space", ["x0", "velocity"])
@pytest.mark.parametrize("coordinates", ["ve", "flow"])
def test_at_level_zero_a_network_gives_x_back(space: Any, coordinates: Any) -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    both = Branches(X, X, X, zero, Model(coordinates))
    torch.testing.assert_close(both.combined(lambda cond, uncond, sigma: 2 * cond - uncond, space), X)


@pytest.mark.parametrize("space", ["eps", "v"])
def test_flow_time_has_no_noises(space: Any) -> None:
    denoiser = from_velocity(network, ki.levels.flow())
    function = guidance.Function(lambda cond, uncond, sigma: cond, space)
    for given_, coordinates in ((denoiser, None), (lambda x, sigma: x, "flow")):
        with pytest.raises(ValueError, match=f"combines predictions of {space}, and the model is in flow time"):
            guide(given_, function, negative={}, coordinates=coordinates)


def test_the_schedule_says_what_the_denoiser_does_not() -> None:
    """A function of velocities in a run in flow time, for a denoiser without the attribute."""

    def denoiser(x: Tensor, sigma: Tensor, gain: float) -> Tensor:
        return (gain * x).sin() / (1 + sigma.reshape(-1, 1, 1))

    function, times = guidance.CFGZeroStar(3.0), ki.levels.FlowTimes([0.9, 0.6, 0.3, 0.1])
    branches: dict[str, Any] = {"positive": {"gain": 0.5}, "negative": {"gain": 0.3}}
    bound = guide(denoiser, function, **branches, coordinates="flow")
    want = ki.run(ki.compile_plan("euler", times.tolist()), bound, X)
    torch.testing.assert_close(ki.sample(denoiser, X, times, cfg=function, **branches), want, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ki.sample(denoiser, X, times.tolist(), cfg=function, **branches), want)
    found = ki.invert(denoiser, X, times, cfg=function, **branches)
    torch.testing.assert_close(found.sample(denoiser), X, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda cond, uncond, sigma: 0.0, "cfg must return a tensor, got float"),
        (lambda cond, uncond, sigma: cond[:, 0], r"cfg must return the shape of its input, \(3, 2, 4\), got \(3, 4\)"),
        (lambda sigma: 2.0, r"cfg\(sigma\) must return a scale for each sample, shape \(3,\), got 2.0"),
        (
            lambda sigma: sigma[:2],
            r"cfg\(sigma\) must return a scale for each sample, shape \(3,\), got Tensor of shape",
        ),
    ],
)
def test_what_a_function_returns_is_checked(function: Any, message: str) -> None:
    bound = guide(lambda x, sigma, out: out, function, *({"out": out} for out in PREDICTED))
    with pytest.raises((TypeError, ValueError), match=message):
        bound(X, SIGMA)


def test_bad_functions_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown space 'epsilon'; did you mean 'eps'"):
        guidance.Function(lambda cond, uncond, sigma: cond, "epsilon")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"function must be callable as function\(cond, uncond, sigma\), got float"):
        guidance.Function(3.0)  # type: ignore[arg-type]
