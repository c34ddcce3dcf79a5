"""Names of other hosts, and what is said of a name that is not known."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kinvert as ki
from kinvert.rules.names import SAMPLERS_ELSEWHERE, SCHEDULES_ELSEWHERE, meaning

SD = ki.levels.stable_diffusion()

# What each host calls it, and what it is here; with "|" the schedule that the name brings along.
AUTOMATIC1111 = {
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ SDE": "dpmpp_sde",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPM++ 2M SDE Heun": "dpmpp_2m_sde_heun",
    "DPM++ 2S a": "dpmpp_2s_ancestral",
    "DPM++ 3M SDE": "dpmpp_3m_sde",
    "Euler a": "euler_ancestral",
    "Euler": "euler",
    "LMS": "lms",
    "Heun": "heun",
    "DPM2": "dpm_2",
    "DPM2 a": "dpm_2_ancestral",
    "DPM fast": "dpm_fast",
    "DPM adaptive": "dpm_adaptive",
    "DDIM": "ddim",
    "DDIM CFG++": "euler_cfg_pp",
    "PLMS": "ipndm",
    "UniPC": "uni_pc",
    "LCM": "lcm",
}
TYPES = {
    "Uniform": "normal",
    "Karras": "karras",
    "Exponential": "exponential",
    "Polyexponential": "polyexponential",
    "SGM Uniform": "sgm_uniform",
    "KL Optimal": "kl_optimal",
    "Align Your Steps": "ays",
    "Simple": "simple",
    "Normal": "normal",
    "DDIM": "ddim_uniform",
    "Beta": "beta",
}
OTHERS = {
    "k_euler_a": "euler_ancestral",
    "euler_a": "euler_ancestral",
    "EulerA": "euler_ancestral",
    "k_dpm_2_a": "dpm_2_ancestral",
    "k_dpm_ad": "dpm_adaptive",
    "k_dpmpp_2m_ka": "dpmpp_2m|karras",
    "euler_k": "euler|karras",
    "kdpm_2_a_k": "dpm_2_ancestral|karras",
    "dpmpp_2m_sde_k": "dpmpp_2m_sde|karras",
    "unipc": "uni_pc",
    "dpm++_2m": "dpmpp_2m",
    "dpmpp-2m": "dpmpp_2m",
    "sample_dpmpp_2m": "dpmpp_2m",
    "k_diffusion.sampling.sample_euler_ancestral": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "diffusers.EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm_2",
    "KDPM2AncestralDiscreteScheduler": "dpm_2_ancestral",
    "LMSDiscreteScheduler": "lms",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": "dpmpp_2s_ancestral",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "UniPCMultistepScheduler": "uni_pc_bh2",
    "DEISMultistepScheduler": "deis",
    "PNDMScheduler": "ipndm",
    "IPNDMScheduler": "ipndm",
    "SASolverScheduler": "sa_solver",
    "LCMScheduler": "lcm",
    "EDMEulerScheduler": "euler|karras",
    "FlowMatchEulerDiscreteScheduler": "euler|normal",
    "DPM-Solver++(2M)": "dpmpp_2m",
    "Euler a CFG++": "euler_ancestral_cfg_pp",
    "Eulr Karras": "euler|karras",
}


def sampler_error(name: str) -> str:
    with pytest.raises(ValueError) as error:
        ki.sampler(name)
    return str(error.value)


def schedule_error(name: str) -> str:
    with pytest.raises(ValueError) as error:
        ki.schedule(name, 5, SD)
    return str(error.value)


@pytest.mark.parametrize(("name", "here"), [*AUTOMATIC1111.items(), *OTHERS.items()])
def test_a_sampler_of_another_host_is_suggested_first(name: str, here: str) -> None:
    found, message = meaning(name), sampler_error(name)
    assert found is not None and "|".join(filter(None, (found.sampler, found.schedule))) == here
    start = f"unknown sampler {name!r}; "
    assert message.startswith((f"{start}did you mean", f"{start}use "))
    assert repr(here.partition("|")[0]) in message[len(start) :].partition(" (all")[0].partition(";")[0]


@pytest.mark.parametrize("sampler", AUTOMATIC1111)
@pytest.mark.parametrize("schedule", TYPES)
def test_a_sampler_with_a_schedule_names_both(sampler: str, schedule: str) -> None:
    found = meaning(f"{sampler} {schedule}")
    assert found is not None
    if (sampler, schedule) == ("DDIM", "Uniform"):  # the name of a schedule, ComfyUI's
        assert found.schedule == "ddim_uniform" and found.sampler is None
        return
    assert (found.sampler, found.schedule) == (AUTOMATIC1111[sampler], TYPES[schedule])


def test_the_message_of_a_combined_name() -> None:
    advice = "use sampler='dpmpp_2m' with ki.schedule('karras', ...) (all names"
    assert sampler_error("DPM++ 2M Karras").startswith(f"unknown sampler 'DPM++ 2M Karras'; {advice}")
    assert schedule_error("DPM++ 2M Karras").startswith(f"unknown schedule 'DPM++ 2M Karras'; {advice}")
    assert "model='sdxl'" in schedule_error("AYS SDXL")


@pytest.mark.parametrize(("name", "here"), [*TYPES.items(), ("use_karras_sigmas", "karras"), ("SD Turbo", "trailing")])
def test_a_schedule_of_another_host_is_suggested_first(name: str, here: str) -> None:
    assert schedule_error(name).startswith(f"unknown schedule {name!r}; did you mean {here!r}?")


def test_a_schedule_is_no_sampler_and_the_other_way_round() -> None:
    assert "it names a schedule: use ki.schedule('sgm_uniform', ...)" in sampler_error("SGM Uniform")
    assert "it names a sampler: use sampler='euler_ancestral'" in schedule_error("Euler a")


def test_absent_names_are_reported() -> None:
    assert "kinvert does not have it" in sampler_error("TCD")
    assert "kinvert does not have it" in schedule_error("gits")
    assert sampler_error("xyz") == "unknown sampler 'xyz' (all names: ki.SAMPLERS or `kinvert samplers`)"


def test_every_meaning_can_be_built() -> None:
    for found in (*SAMPLERS_ELSEWHERE.values(), *SCHEDULES_ELSEWHERE.values()):
        assert found.sampler or found.schedule or found.note
        if found.sampler:
            assert isinstance(eval(found.rule if found.options else f"ki.sampler({found.rule})"), ki.Rule)
        if found.schedule:
            assert len(eval(found.sigmas.replace("...", "5, SD"))) > 2


@pytest.mark.parametrize("name", [*ki.SAMPLERS])
def test_separators_and_case_do_not_matter(name: str) -> None:
    for written in (name.upper(), name.replace("_", " "), name.replace("_", "-").title(), name.replace("pp", "++")):
        found = meaning(written)
        assert found is not None and found.sampler == name and not found.schedule, written


@given(st.text(string.printable, max_size=30))
def test_no_name_breaks_the_message(name: str) -> None:
    if name not in ki.SAMPLERS:
        assert sampler_error(name).startswith(f"unknown sampler {name!r}")
    if name not in ki.SCHEDULES:
        assert schedule_error(name).startswith(f"unknown schedule {name!r}")


def test_the_schedule_of_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown sampler 'DPM2'; did you mean 'dpm_2'\?"):
        ki.schedule("karras", 5, SD, sampler="DPM2")
