r"""What the functions `sample_*` take: signatures from the registry of samplers, and a table of what is different.

The options of a function are those of the sampler, with its defaults. `noise_sampler` follows `s_noise` if the sampler
draws noise. The samplers of k-diffusion's own file offer its options in its order, and none beyond them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from typing import Any, Literal

from kinvert.checks import suggestion
from kinvert.rules import SAMPLERS

__all__ = ["FACES", "Draws", "Face", "face_of", "function_name", "function_names"]

Draws = Literal["every step", "every step above 0", "as needed"]

SCHEDULE = ("sigmas",)
ORDER = ("order", "rtol", "atol", "h_init")
PID = ("pcoeff", "icoeff", "dcoeff", "accept_safety")
NOISE = "noise_sampler"
CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")
ANCESTRAL = ("eta", "s_noise", NOISE)


@dataclass(frozen=True)
class Face:
    """One function `sample_*`.

    Attributes:
        sampler: the name in `SAMPLERS`.
        options: its options, in their order.
        levels: the arguments that say which noise levels it visits.
        fixed: options that are not offered, with the values that make the sampler k-diffusion's.
        draws: when noise is drawn. k-diffusion draws also where the weight of the noise is 0, so that the next draw of
            torch's global generator depends on it.
    """

    sampler: str
    options: tuple[str, ...]
    levels: tuple[str, ...] = SCHEDULE
    fixed: Mapping[str, Any] = field(default_factory=dict)
    draws: Draws = "as needed"

    @property
    def signature(self) -> Signature:
        """The signature of the function."""
        defaults = {NOISE: None, "return_info": False} | SAMPLERS[self.sampler].options
        names = {"extra_args": None, "callback": None, "disable": None}
        names |= {name: defaults[name] for name in self.options}
        required = [_parameter(name) for name in ("model", "x", *self.levels)]
        return Signature([*required, *(_parameter(name, default) for name, default in names.items())])


FACES: dict[str, Face] = {
    face.sampler: face
    for face in (
        Face("euler", CHURN, draws="every step"),
        Face("heun", CHURN, draws="every step"),
        Face("dpm_2", CHURN, draws="every step"),
        Face("euler_ancestral", ANCESTRAL, fixed={"noise_at_down_zero": True}, draws="every step above 0"),
        Face("dpm_2_ancestral", ANCESTRAL, draws="every step above 0"),
        Face("dpmpp_2s_ancestral", ANCESTRAL, draws="every step above 0"),
        Face("lms", ("order",), fixed={"at_zero": "adams"}),
        Face("dpm_fast", ANCESTRAL, levels=("sigma_min", "sigma_max", "n"), draws="every step"),
        Face(
            "dpm_adaptive",
            (*ORDER, *PID, *ANCESTRAL, "return_info"),
            levels=("sigma_min", "sigma_max"),
            draws="every step",
        ),
        Face("dpmpp_sde", (*ANCESTRAL, "r")),
        Face("dpmpp_2m", ()),
        Face("dpmpp_2m_sde", (*ANCESTRAL, "solver_type")),
        Face("dpmpp_3m_sde", ANCESTRAL),
    )
}
"""The samplers of k-diffusion's own file."""


def function_names() -> dict[str, str]:
    """Return the names `sample_*` of all samplers, each with the name in `SAMPLERS`."""
    return {function_name(name): name for name in SAMPLERS}


def function_name(sampler: str) -> str:
    """Return the name of the function of a sampler."""
    return f"sample_{sampler}".replace("-", "_")


def face_of(function: str) -> Face:
    """Return the face of a function by its name, e.g. "sample_euler".

    Raises:
        AttributeError: no sampler has this name.
    """
    names = function_names()
    if function not in names:
        raise AttributeError(f"no sampler has the function {function!r}; {suggestion(function, names)}")
    name = names[function]
    if name in FACES:
        return FACES[name]
    entry = SAMPLERS[name]
    options = [option for option in entry.options if option not in entry.defaults or option == "eta"]
    if "s_noise" in options:
        options.insert(options.index("s_noise") + 1, NOISE)
    return Face(name, tuple(options))


def _parameter(name: str, default: Any = Parameter.empty) -> Parameter:
    return inspect.Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default)
