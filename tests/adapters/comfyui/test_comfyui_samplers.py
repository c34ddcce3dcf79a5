"""Samplers and schedules of kinvert in the host."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from standin import POSITIVE, TABLE, Host, Model, back, error, latent, model, run
from torch import Tensor

import kinvert as ki
from kinvert.adapters.comfyui import host
from kinvert.adapters.comfyui.samplers import RuleSampler, chosen_rule, make_schedule, parse_options

SIGMAS = {"eps": torch.tensor([6.0, 3.0, 1.5, 0.7, 0.3, 0.0]), "flow": torch.tensor([0.95, 0.8, 0.6, 0.4, 0.2, 0.0])}


def plain(patcher: Model, kind: str) -> Any:
    """The model as a denoiser, without the host."""

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return patcher.model.denoised(x, sigma, POSITIVE)

    denoiser.coordinates = "flow" if kind == "flow" else "ve"  # type: ignore[attr-defined]
    denoiser.levels = patcher.model.model_sampling  # type: ignore[attr-defined]
    return denoiser


def start(patcher: Model, kind: str) -> tuple[Tensor, Tensor]:
    """LATENT, and the state that the host makes of it."""
    z = latent()["samples"]
    x = patcher.model.process_latent_in(z).double()
    return z, x * (1 - float(SIGMAS[kind][0])) if kind == "flow" else x


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "euler_ancestral", "dpmpp_sde", "dpm_adaptive", "sa_solver"])
def test_a_sampler_is_the_one_of_kinvert(name: str, kind: str) -> None:
    patcher = model(kind)
    z, x = start(patcher, kind)
    rule = ki.sampler(name)
    if name == "sa_solver" and kind == "eps":  # its interval is that of the model
        rule = ki.sampler(name, sde_start=float(TABLE[799]), sde_end=float(TABLE[200]))
    noise = getattr(ki.noise, rule.default_noise)(4)
    wanted = ki.sample(plain(patcher, kind), x, SIGMAS[kind], sampler=rule, noise=noise)
    assert error(back(patcher, name, SIGMAS[kind], z), patcher.model.process_latent_out(wanted)) < 1e-5


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_a_rising_schedule_unsamples(kind: str) -> None:
    patcher = model(kind)
    z = latent()["samples"]
    x = patcher.model.process_latent_in(z).double()
    falling = SIGMAS[kind][:-1]
    if kind == "flow":
        x = x * (1 - float(falling[-1]))
    wanted = ki.unsample(plain(patcher, kind), x, falling, sampler="heun", sigma_offset=0.0)
    wanted = patcher.model.process_latent_out(patcher.model.model_sampling.undo(float(falling[0]), wanted))
    assert error(back(patcher, "heun", falling.flip(0), z), wanted) < 1e-6


@pytest.mark.usefixtures("comfy")
def test_upwards_a_stochastic_sampler_is_refused_with_the_fix() -> None:
    patcher = model()
    with pytest.raises(ValueError, match="eta=0"):
        back(patcher, "euler_ancestral", SIGMAS["eps"][:-1].flip(0), latent()["samples"])
    assert patcher.model.calls == []


@pytest.mark.usefixtures("comfy")
def test_cfg_pp_gets_the_pair() -> None:
    patcher = model()
    z, x = start(patcher, "eps")

    def pair(y: Tensor, sigma: Tensor) -> ki.Guided:
        cond, uncond = (patcher.model.denoised(y, sigma, s) for s in (POSITIVE, torch.tensor([-0.5, -1.0])))
        return ki.Guided(uncond + 2.0 * (cond - uncond), uncond)

    wanted = patcher.model.process_latent_out(ki.sample(pair, x, SIGMAS["eps"], sampler="euler_cfg_pp"))
    assert error(back(patcher, "euler_cfg_pp", SIGMAS["eps"], z, cfg=2.0), wanted) < 1e-5


@pytest.mark.usefixtures("comfy")
def test_zeros_at_t_1_are_an_error_and_noise_is_not() -> None:
    patcher = model("flow")
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    z = latent()["samples"]
    with pytest.raises(ValueError, match="SamplerCustomAdvanced"):
        back(patcher, "euler", sigmas, z)
    assert bool(back(patcher, "euler", sigmas, z, noise=torch.randn(2, 4, 6, 8)).isfinite().all())


@pytest.mark.usefixtures("comfy")
def test_the_noise_of_a_model_with_another_scale_is_scaled() -> None:
    patcher, other = model("flow"), model("flow")
    other.model.model_sampling.noise_scale = 2.0
    sigmas = SIGMAS["flow"]
    z = latent()["samples"]
    quiet = run("KinvertSampler", sampler_name="euler_ancestral", options="s_noise=0")[0]
    loud = run("KinvertSampler", sampler_name="euler_ancestral", options="s_noise=2")[0]
    assert torch.equal(back(other, "euler_ancestral", sigmas, z), back(patcher, loud, sigmas, z))
    assert torch.equal(back(other, quiet, sigmas, z), back(patcher, quiet, sigmas, z))


@pytest.mark.usefixtures("comfy")
def test_a_schedule_of_one_level_changes_nothing() -> None:
    z = latent()["samples"]
    torch.testing.assert_close(back(model(), "euler", torch.tensor([1.0]), z), z)


def test_the_bar_ends_at_its_end_however_many_steps_a_sampler_makes(comfy: Host) -> None:
    patcher = model()
    for name in ("euler", "dpm_fast", "dpm_adaptive"):
        run(
            "KinvertUnsampler", model=patcher, steps=9, end_at_step=0, cfg=1.0, sampler_name=name, scheduler="even",
            normalize="disable", positive=POSITIVE, negative=POSITIVE, latent_image=latent(),
        )  # fmt: skip
        assert comfy.shown[-1] == (9, 9), name


values = st.one_of(st.booleans(), st.none(), st.integers(-9, 9), st.floats(-1e6, 1e6), st.sampled_from(["heun", "bh2"]))


@given(st.dictionaries(st.sampled_from(["eta", "s_noise", "solver_type", "r"]), values))
def test_options_are_read_as_they_are_written(options: dict[str, Any]) -> None:
    assert parse_options(", ".join(f"{name} = {value}" for name, value in options.items())) == options


@pytest.mark.parametrize(
    "text, message",
    [
        ("eta", "name=value, got 'eta'"),
        ("eta=", "name=value, got 'eta='"),
        ("=1", "name=value, got '=1'"),
        ("eta=0, eta=1", "has eta twice"),
        ("eta=(1", "'\\(1' is no value"),
        ("eta=__import__('os')", "is no value"),
    ],
)
def test_other_options_are_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_options(text)


@pytest.mark.usefixtures("comfy")
def test_an_unknown_option_is_an_error_that_names_the_others() -> None:
    with pytest.raises(TypeError, match="heun has no option 'eta'"):
        run("KinvertSampler", sampler_name="heun", options="eta=0")


@pytest.mark.usefixtures("comfy")
def test_a_sampler_of_another_pack_is_refused_where_its_formulas_are_needed() -> None:
    def sample_other() -> None: ...

    with pytest.raises(TypeError, match="Sampler \\(kinvert\\), got sample_other"):
        chosen_rule("euler", host.to_sampler(sample_other))
    own = run("KinvertSampler", sampler_name="euler_ancestral", options="eta=0")[0]
    assert chosen_rule("heun", own) == ki.sampler("euler_ancestral", eta=0)


@pytest.mark.usefixtures("comfy")
def test_schedules_are_those_of_the_host_and_those_of_kinvert() -> None:
    patcher = model()
    assert len(make_schedule(patcher, "even", 10)) == 11
    assert len(make_schedule(patcher, "long", 10)) == 13
    assert len(make_schedule(patcher, "twice", 10)) == 11
    ten, eleven = (make_schedule(patcher, "even", n).tolist() for n in (10, 11))
    assert make_schedule(patcher, "even", 10, "dpm_2").tolist() == eleven[:-2] + eleven[-1:]
    assert make_schedule(patcher, "even", 10, "heun").tolist() == ten
    assert make_schedule(patcher, "even", 5, denoise=0.5).tolist() == ten[5:]
    own = ki.schedule("polyexponential", 10, ki.levels.DiscreteLevels(TABLE.double()))
    torch.testing.assert_close(make_schedule(patcher, "polyexponential", 10).double(), own, rtol=1e-6, atol=0)
    assert float(make_schedule(model("flow"), "beta57", 10)[0]) == 1.0
    with pytest.raises(ValueError, match="denoise must be"):
        make_schedule(patcher, "even", 10, denoise=0.0)


@pytest.mark.usefixtures("comfy")
def test_a_replaying_sampler_takes_its_own_schedule_alone() -> None:
    sampler = host.to_sampler(RuleSampler(ki.sampler("euler"), sigmas=(2.0, 1.0)))
    back(model(), sampler, torch.tensor([2.0, 1.0]), latent()["samples"])
    with pytest.raises(ValueError, match=re.escape("from 2 to 1 in 1 steps, got one from 3 to 1 in 2")):
        back(model(), sampler, torch.tensor([3.0, 2.0, 1.0]), latent()["samples"])


@pytest.mark.usefixtures("comfy")
def test_a_schedule_of_one_step_is_run() -> None:
    patcher = model()
    z, x = start(patcher, "eps")
    wanted = patcher.model.process_latent_out(ki.sample(plain(patcher, "eps"), x, SIGMAS["eps"][:2]))
    assert error(back(patcher, "euler", SIGMAS["eps"][:2], z), wanted) < 1e-5
