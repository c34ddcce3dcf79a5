"""Invert images: the methods that the benchmark compares.

A method is a function of a `Setup` and the images. It returns the latent, or a `ki.Inversion` (or a `MethodResult`)
with what belongs to the latent. `METHODS` holds them by name; one of your own enters by
`METHODS["mine"] = lambda setup, x: ...`. The library refuses a combination that cannot work, and its message ends up in
the record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

import kinvert as ki
from kinvert._moved import moved_names
from kinvert.analysis import explicit_inverse
from kinvert.denoisers import Denoiser, Guided, guide
from kinvert.engine import Memory, Progress, run_state
from kinvert.forms import State
from kinvert.inversion.back import WayBack
from kinvert.inversion.baselines import BASELINES
from kinvert.inversion.reversible import invert_reversible
from kinvert.inversion.verdict import ROWS
from kinvert.noise import derived_seed
from kinvert.plan import Plan, compile_plan
from kinvert.rules import Rule
from kinvert.showing.brief import brief_repr
from kinvert.showing.registry import Registry

__all__ = [
    "ITERATING",
    "METHODS",
    "Counted",
    "Method",
    "MethodResult",
    "Setup",
    "apply_method",
    "generate",
    "restore",
    "sees_states",
]


class Counted:
    """A denoiser that counts the items that it evaluates."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.items = denoiser, 0

    def __call__(self, x: Tensor, sigma: Tensor, /, *args: Any, **conditioning: Any) -> Tensor | Guided:
        """Call the denoiser and count each item of the batch."""
        self.items += len(x)
        return self.denoiser(x, sigma, *args, **conditioning)

    def __getattr__(self, name: str) -> Any:
        # What kinvert asks a denoiser for: what x and sigma mean, how exact it can be, its levels.
        if name in ("coordinates", "levels", "network_dtype", "prediction"):
            return getattr(self.denoiser, name)
        raise AttributeError(name)


@dataclass(frozen=True, eq=False)
class Setup:
    """What a method is given besides the images.

    Attributes:
        denoiser: `denoiser(x, sigma, **conditioning) -> denoised`.
        sigmas: the decreasing sampling schedule, ending above 0.
        sampler: the rule that takes the latent back to data.
        guidance: `cfg`, `positive` and `negative`, the keyword arguments of `ki.sample` and the other verbs.
        question: "reconstruction" if an image is given, "recovery" if a latent is.
        seed: of random numbers.
        max_evals: denoiser evaluations that one sample may cost, for methods that iterate; None sets no limit.
        memory: the auxiliary state that came with the image, if a reversible sampler made it.
        states: a method may put the states on its way here, by noise level (`callback=setup.see` does so).
    """

    denoiser: Counted
    sigmas: tuple[float, ...]
    sampler: Rule
    guidance: Mapping[str, Any] = field(default_factory=dict)
    question: str = "reconstruction"
    seed: int = 0
    max_evals: int | None = None
    memory: Memory = field(default_factory=dict)
    states: dict[float, Tensor] = field(default_factory=dict)

    __repr__ = brief_repr

    @property
    def plan(self) -> Plan | None:
        """The Plan of the sampler on the schedule; None for a sampler that has no Plan there."""
        try:
            return compile_plan(self.sampler, self.sigmas)
        except ValueError:
            return None

    def bound(self) -> Any:
        """Return the guided denoiser `(x, sigma) -> denoised`, for running Plans of the sampler."""
        plan = self.plan
        return guide(self.denoiser, **self.guidance, pair=plan is not None and plan.is_guided)

    def see(self, step: Progress) -> None:
        """Keep the state of a step: pass this method as a callback."""
        self.states[step.sigma] = step.x


@dataclass(frozen=True, eq=False)
class MethodResult:
    """What a method found, and what it cost.

    Attributes:
        latent: shape (batch, *event).
        evaluations: denoiser evaluations per sample; a guided pair counts as one.
        converged: the method's own claim per sample; None if it makes no claim.
        residuals: by step, noisiest first, and sample; None if the method has none.
        memory, noises: what belongs to the latent.
        sampler: the rule that takes the latent back to data, if it is not the sampler of the setup.
    """

    latent: Tensor
    evaluations: list[int]
    converged: list[bool] | None = None
    residuals: Tensor | None = None
    memory: Memory = field(default_factory=dict)
    noises: tuple[Tensor, ...] = ()
    sampler: Rule | None = None

    __repr__ = brief_repr


Method = Callable[[Setup, Tensor], Tensor | ki.Inversion | MethodResult]


def _unsample(setup: Setup, x: Tensor) -> Tensor:
    return ki.unsample(
        setup.denoiser, x, setup.sigmas, sampler=setup.sampler, sigma_offset=0.0, callback=setup.see, **setup.guidance
    )


def _ddim_clean(setup: Setup, x: Tensor) -> Tensor:
    return _unsample(replace(setup, sampler=ki.sampler("euler")), x)


def _invert(method: str) -> Method:
    return lambda setup, x: ki.invert(
        setup.denoiser,
        x,
        setup.sigmas,
        sampler=setup.sampler,
        method=method,
        max_evals=setup.max_evals,
        **setup.guidance,
    )


def _limited(budget: int) -> Method:
    """Return `invert` with so many evaluations of each step on the way up, and the run that checks it."""

    def apply(setup: Setup, x: Tensor) -> ki.Inversion:
        plan = compile_plan(setup.sampler, setup.sigmas)
        limit = (budget + 1) * plan.evaluations + ROWS
        return ki.invert(
            setup.denoiser, x, setup.sigmas, sampler=setup.sampler, max_evals=limit, **setup.guidance
        )  # fmt: skip

    return apply


def _reversible(setup: Setup, x: Tensor) -> ki.Inversion | MethodResult:
    plan = compile_plan(setup.sampler, setup.sigmas)
    explicit_inverse(plan)  # raises if the sampler has none
    if not setup.memory:
        return ki.invert(setup.denoiser, x, setup.sigmas, sampler=setup.sampler, **setup.guidance)
    undone = invert_reversible(plan, setup.bound(), x, setup.memory)
    return MethodResult(undone.latent, [undone.evaluations] * len(x), memory=undone.memory)


def _without_memory(setup: Setup, x: Tensor) -> MethodResult:
    found = _as_result(_reversible(replace(setup, memory={}), x), setup)
    return replace(found, memory={}, converged=None)


def _extract_noise(path: Literal["independent", "chain"]) -> Method:
    def extract(setup: Setup, x: Tensor) -> ki.Inversion:
        if setup.question == "recovery":
            raise ValueError("extract_noise draws its latent, so it recovers none; ask for reconstruction")
        generator = torch.Generator().manual_seed(derived_seed("extract_noise", setup.seed))
        return ki.extract_noise(
            setup.denoiser, x, setup.sigmas, sampler=setup.sampler, path=path, generator=generator, **setup.guidance
        )

    return extract


def _baseline(name: str, own: str = "euler") -> Method:
    """Return the method of a published inversion; `own` is the sampler that it checks itself with."""

    def apply(setup: Setup, x: Tensor) -> MethodResult:
        result, rule = BASELINES[name](setup.denoiser, x, setup.sigmas, **setup.guidance), ki.sampler(own)
        found = _as_result(result, setup)
        # A claim to have converged holds for its own sampler only.
        return found if setup.sampler == rule else replace(found, converged=None)

    return apply


def _direct_inversion(setup: Setup, x: Tensor) -> MethodResult:
    rule = ki.rules.DirectInversion()  # the noises are its offsets
    result = BASELINES["direct_inversion"](setup.denoiser, x, setup.sigmas, **setup.guidance)
    return replace(_as_result(result, setup), sampler=rule)


METHODS: Registry[Method] = Registry(
    {
        "unsample": _unsample,  # the sampler, run up the schedule
        "ddim_clean": _ddim_clean,  # Euler upwards, the cleaner end's slope: what a flipped schedule does
        "ddim_noisy": _baseline("ddim_noisy"),  # Euler upwards, the noisier level's slope: the usual inverse scheduler
        "picard": _invert("picard"),  # the published fixed point
        "invert": _invert("auto"),  # exact, or reported as not exact
        # The same with a limit: evaluations of each step on the way up, and a run to check.
        **{f"invert_{budget}": _limited(budget) for budget in (1, 2, 3, 4, 6, 8, 10, 20)},
        "reversible": _reversible,  # closed form, with the auxiliary state
        "reversible_alone": _without_memory,  # the latent alone is kept
        "extract_noise": _extract_noise("independent"),
        "extract_noise_chain": _extract_noise("chain"),
        "easyinv": _baseline("easyinv"),
        "uni_inv": _baseline("uni_inv"),
        "forward_first": _baseline("forward_first"),
        "rf_inversion": _baseline("rf_inversion"),
        "rf_solver": _baseline("rf_solver", "rf_solver"),
        "fireflow": _baseline("fireflow", "fireflow"),
        "aidi": _baseline("aidi"),
        "aidi_anderson": _baseline("aidi_anderson"),
        "renoise": _baseline("renoise"),
        "gnri": _baseline("gnri"),
        "dpm_solver_1": _baseline("dpm_solver_1"),
        "dpm_solver_2": _baseline("dpm_solver_2", "dpmpp_2m"),
        "direct_inversion": _direct_inversion,
    },
    what="methods",
    place="bench.METHODS",
)
"""Name -> method. Each published baseline of `kinvert.inversion.baselines` is one line."""
ITERATING = ("picard", "invert")
"""The methods that `max_evals` bounds."""


def apply_method(method: str, setup: Setup, x: Tensor) -> MethodResult:
    """Invert images by a method of `METHODS`.

    Raises:
        ValueError, TypeError: a combination that cannot work, in the library's words.
    """
    before = setup.denoiser.items
    result = METHODS[method](setup, x)
    if isinstance(result, Tensor):
        return MethodResult(result, [_evaluations_since(setup, before, len(x))] * len(x))
    return _as_result(result, setup)


def _as_result(result: ki.Inversion | MethodResult, setup: Setup) -> MethodResult:
    """Convert to a `MethodResult`, whose evaluations leave out those that went into a certificate."""
    if isinstance(result, MethodResult):
        return result
    stepwise = len(result.residuals) == len(setup.sigmas) - 1 and not result.memory and not result.noises
    return MethodResult(
        result.latent,
        (result.evaluations - result.checking - (0 if result.row_checks is None else result.row_checks)).tolist(),
        result.converged.tolist(),
        result.residuals if stepwise else None,
        result.memory,
        result.noises,
    )


def restore(setup: Setup, found: MethodResult) -> tuple[Tensor, list[int]]:
    """Sample the latent back, with the memory and the noises that belong to it.

    Returns:
        The images, and the denoiser evaluations per sample.
    """
    before, count = setup.denoiser.items, len(found.latent)
    setup = replace(setup, sampler=found.sampler or setup.sampler)
    way = WayBack(setup.sampler, setup.sigmas, **setup.guidance)
    image = way.sample(
        setup.denoiser, found.latent, memory=found.memory, noises=found.noises, embeddings={}, callback=setup.see
    )
    return image, [_evaluations_since(setup, before, count)] * count


def generate(setup: Setup, latent: Tensor) -> tuple[Tensor, Memory, list[int]]:
    """Sample a latent.

    Returns:
        The images, the auxiliary state that a reversible sampler ends with, and the denoiser evaluations per sample.
    """
    before, plan = setup.denoiser.items, setup.plan
    memory: Memory = {}
    if plan is not None and plan.auxiliary:
        memory = run_state(plan, setup.bound(), {"x": latent}, callback=setup.see)
        image = memory.pop("x")
    else:
        image = ki.sample(
            setup.denoiser, latent, setup.sigmas, sampler=setup.sampler, callback=setup.see, **setup.guidance
        )
    return image, memory, [_evaluations_since(setup, before, len(latent))] * len(latent)


def sees_states(setup: Setup) -> bool:
    """Tell whether the first evaluation of every step is at the state itself, so that callbacks see the states."""
    plan = setup.plan
    if plan is None:
        return False
    here = State("x")
    return all(s.stages and s.stages[0].sigma == s.sigma and s.stages[0].input.alias() == here for s in plan.steps)


def _evaluations_since(setup: Setup, before: int, count: int) -> int:
    """Return the evaluations per sample since the count `before`; a guided pair, two calls, counts as one."""
    plan, cfg = setup.plan, setup.guidance.get("cfg", 1.0)
    pair = setup.guidance.get("negative") is not None and (cfg != 1.0 or (plan is not None and plan.is_guided))
    return round((setup.denoiser.items - before) / count / (2 if pair else 1))


__getattr__ = moved_names(
    __name__, {"Job": "kinvert.bench.methods.Setup", "Found": "kinvert.bench.methods.MethodResult"}
)
