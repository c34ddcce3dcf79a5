"""The names of samplers and schedules in other hosts, and the error messages for unknown names.

A name is reduced to its letters and digits. Case, separators, a leading `k_` or `sample_` and a trailing `Scheduler`
are ignored. `++` becomes `pp`, a word `a` becomes `ancestral`, a last word `k` or `ka` becomes `karras`. The result is
looked up among the names of kinvert and in the tables below. The name of a schedule may follow the name of a sampler.
A name of another host is never accepted, because some mean different things in different hosts; the error message
suggests what it is called here.

Source: AUTOMATIC1111's web UI, InvokeAI and RES4LYF (their lists of names), diffusers (its scheduler classes),
k-diffusion (its functions).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from kinvert.checks import nearest, reduced

__all__ = [
    "REGISTRIES",
    "SAMPLERS_ELSEWHERE",
    "SCHEDULES_ELSEWHERE",
    "Meaning",
    "meaning",
    "unknown_sampler",
    "unknown_schedule",
]

REGISTRIES: dict[str, Mapping[str, object]] = {"sampler": {}, "schedule": {}}
"""The known names; each registry adds itself."""


@dataclass(frozen=True)
class Meaning:
    """The meaning of a name of another host.

    Attributes:
        sampler: a name of `SAMPLERS`, or None.
        options: the options that the sampler needs, as code.
        schedule: a name of `SCHEDULES`, or None.
        schedule_options: the options that the schedule needs, as code.
        note: an explanation for the error message.
    """

    sampler: str | None = None
    options: str = ""
    schedule: str | None = None
    schedule_options: str = ""
    note: str = ""

    @property
    def rule(self) -> str:
        """The sampler, as the code of an argument."""
        return f"ki.sampler({self.sampler!r}, {self.options})" if self.options else repr(self.sampler)

    @property
    def sigmas(self) -> str:
        """The schedule, as the code of a call."""
        return ", ".join([f"ki.schedule({self.schedule!r}", "...", *filter(None, [self.schedule_options])]) + ")"


_ABSENT = "kinvert does not have it"
_LOW_START = "it is the nearest: the first steps are of lower order, where that one makes Runge-Kutta steps"
_ADAMS = "it is the exponential Adams-Bashforth method of Nørsett, with the true step sizes"
_PAIRS = "two of its steps are one here, so halve their number"

# Reduced names, without a trailing "scheduler" or "discretescheduler", that differ from the names here.
SAMPLERS_ELSEWHERE: dict[str, Meaning] = {
    "ddimcfgpp": Meaning("euler_cfg_pp"),
    "dpmpp": Meaning("dpmpp_2m"),
    "dpmpp2s": Meaning("dpmpp_2s_ancestral", "eta=0", note=_PAIRS),
    "lmsd": Meaning("lms"),
    "plms": Meaning("ipndm", note=_LOW_START),
    "tcd": Meaning(note=_ABSENT),
    # classes of diffusers
    "cosinedpmsolvermultistep": Meaning(
        "dpmpp_2m_sde", schedule="exponential", note="the levels are ki.levels.edm(0.3, 500.0, 1.0)"
    ),
    "ddimparallel": Meaning("ddim"),
    "ddpmparallel": Meaning("ddpm"),
    "deismultistep": Meaning("deis", "max_order=2, variable='log_sigma', lower_order_final=True"),
    "dpmsolver": Meaning("dpmpp_2m", note="it is the ++ form, in the denoised image"),
    "dpmsolvermultistep": Meaning(
        "dpmpp_2m",
        note="with solver_type='heun' it is 'res_multistep', with algorithm_type='sde-dpmsolver++' 'dpmpp_2m_sde', "
        "with solver_order=3 'dpmpp_3m', with solver_order=1 'euler'",
    ),
    "dpmsolvermultistepinverse": Meaning("dpmpp_2m", note="it runs upwards with ki.unsample and ki.invert"),
    "dpmsolversde": Meaning("dpmpp_sde"),
    "dpmsolversinglestep": Meaning("dpmpp_2s_ancestral", "eta=0", note=_PAIRS),
    "edmdpmsolvermultistep": Meaning("dpmpp_2m", schedule="karras", note="the levels are ki.levels.edm(...)"),
    "edmeuler": Meaning("euler", schedule="karras", note="the levels are ki.levels.edm(...)"),
    "flowmatcheuler": Meaning("euler", schedule="normal", note="the levels are ki.levels.flow(shift)"),
    "flowmatchheun": Meaning("heun", schedule="normal", note="the levels are ki.levels.flow(shift)"),
    "flowmatchlcm": Meaning("lcm", schedule="normal", note="the levels are ki.levels.flow(shift)"),
    "pndm": Meaning("ipndm", note=_LOW_START),
    "unipcmultistep": Meaning("uni_pc_bh2"),
    # RES4LYF, Rex
    "abnorsett2m": Meaning("res_2m", note=_ADAMS),
    "abnorsett3m": Meaning("res_3m", note=_ADAMS),
    "abnorsett4m": Meaning("res_2m", "order=4", note=_ADAMS),
    "coxmatthews4s": Meaning("etdrk4"),
    "dormandprince6s": Meaning("dormand_prince"),
    "heun2s": Meaning("heun"),
    "krogstad4s": Meaning("res_4s_krogstad"),
    "kutta3s": Meaning("rk3"),
    "midpoint2s": Meaning("midpoint"),
    "ralston2s": Meaning("ralston"),
    "rex": Meaning(
        "mccallum_foster",
        "rule=ki.rules.LawsonRungeKutta(ki.sampler('midpoint').tableau), coupling='data'",
        note="for SDEs it is 'rex_sde'",
    ),
    "rk384s": Meaning("rk38"),
    "rk44s": Meaning("rk4"),
    "strehmelweiner4s": Meaning("strehmel_weiner"),
}
SCHEDULES_ELSEWHERE: dict[str, Meaning] = {
    "aligned": Meaning(schedule="ays"),
    "alignyoursteps": Meaning(schedule="ays"),
    "alignyourstepsgits": Meaning(note=_ABSENT),
    "automatic": Meaning(note="it stands for the sampler's own, mostly 'karras', 'exponential' for SDE samplers"),
    "ddim": Meaning(schedule="ddim_uniform"),
    "gits": Meaning(note=_ABSENT),
    "linspace": Meaning(schedule="normal"),
    "lu": Meaning(schedule="exponential"),
    "lulambdas": Meaning(schedule="exponential"),
    "optimalsteps": Meaning(note="it is computed from a denoiser, by ki.optimal.oss"),
    "oss": Meaning(note="it is computed from a denoiser, by ki.optimal.oss"),
    "sdturbo": Meaning(schedule="trailing", note="with 10 steps, of which the first n are taken, and then 0"),
    "sgm": Meaning(schedule="sgm_uniform"),
    "uniform": Meaning(schedule="normal"),
}
for _model in ("sd15", "sdxl", "svd"):
    for _name in ("ays", "alignyoursteps"):
        SCHEDULES_ELSEWHERE[_name + _model] = Meaning(schedule="ays", schedule_options=f"model={_model!r}")


def unknown_sampler(name: object) -> str:
    """Return the error message for a name that is no sampler."""
    return f"unknown sampler {name!r}{_advice(name, 'sampler')} (all names: ki.SAMPLERS or `kinvert samplers`)"


def unknown_schedule(name: object) -> str:
    """Return the error message for a name that is no schedule."""
    return f"unknown schedule {name!r}{_advice(name, 'schedule')} (all names: {', '.join(REGISTRIES['schedule'])})"


def meaning(name: object) -> Meaning | None:
    """Return what a name of another host is called here (a sampler, a schedule or both), or None if unknown."""
    text = reduced(str(name))
    return _sampler(text) or _schedule(text) or _both(text)


def _sampler(text: str) -> Meaning | None:
    """Return the meaning of a reduced name as a sampler."""
    known = {reduced(name): Meaning(name) for name in REGISTRIES["sampler"]}
    known = SAMPLERS_ELSEWHERE | known
    spellings = (text, text.removeprefix("k"), re.sub("a$", "ancestral", text), re.sub("a$", "ancestral", text[1:]))
    return next((known[spelling] for spelling in spellings if spelling in known), None)


def _schedule(text: str) -> Meaning | None:
    """Return the meaning of a reduced name as a schedule."""
    known = SCHEDULES_ELSEWHERE | {reduced(name): Meaning(schedule=name) for name in REGISTRIES["schedule"]}
    spelling = text.removeprefix("use").removesuffix("sigmas").removesuffix("schedule")
    return known.get(text) or known.get(spelling)


def _both(text: str) -> Meaning | None:
    """Return the meaning of a reduced name as a sampler followed by its schedule."""
    for cut in range(1, len(text)):  # the longest name of a schedule first
        schedule = _schedule(text[cut:])
        if schedule is None or schedule.schedule is None:
            continue
        found = _sampler(text[:cut])
        if found is None and (near := nearest(text[:cut], REGISTRIES["sampler"])):
            found = Meaning(near)
        if found is not None and found.sampler is not None:
            return replace(found, schedule=schedule.schedule, schedule_options=schedule.schedule_options)
    return None


def _advice(name: object, wanted: str) -> str:
    """Return the part of an error message that says what to write instead."""
    found = _schedule(reduced(str(name))) if wanted == "schedule" else None
    found = found or meaning(name)
    if found is None:
        near = nearest(name, REGISTRIES[wanted])
        found = Meaning(**{wanted: near}) if near else Meaning()
    note = f"; {found.note}" if found.note else ""
    if found.sampler and found.schedule:
        return f"; use sampler={found.rule} with {found.sigmas}{note}"
    if found.schedule and wanted == "sampler":
        return f"; it names a schedule: use {found.sigmas} for the sigmas, and a sampler such as 'euler'"
    if found.sampler and wanted == "schedule":
        return f"; it names a sampler: use sampler={found.rule}, and a schedule such as 'karras'{note}"
    if found.options or found.schedule_options:
        return f"; use {found.rule if found.sampler else found.sigmas}{note}"
    same = found.sampler or found.schedule
    return f"; did you mean {same!r}?{note[1:2]}{note[2:3].upper()}{note[3:]}" if same else note
