"""How data becomes a latent: the methods that are compared.

A method is a function of a `Job` and the image, and returns the latent, or a `ki.Inversion` (or `Found`) with whatever
belongs to it. `METHODS` holds them by name; one of your own enters by `METHODS["mine"] = lambda job, x: ...`. A
combination that cannot work is refused by the library, with a message that ends up in the record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import kinvert as ki
from kinvert.analysis import explicit_inverse
from kinvert.denoisers import Denoiser, Guided, guide
from kinvert.engine import Memory, Progress, run_state
from kinvert.forms import State
from kinvert.inversion.baselines import BASELINES
from kinvert.inversion.reversible import invert_reversible
from kinvert.noise import derived_seed
from kinvert.plan import Plan, compile_plan
from kinvert.rules import Rule


class Counted:
    """A denoiser that counts what it is asked."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.items = denoiser, 0

    def __call__(self, x: Tensor, sigma: Tensor, /, *args: Any, **conditioning: Any) -> Tensor | Guided:
        """The denoiser's answer; every item of the batch counts."""
        self.items += len(x)
        return self.denoiser(x, sigma, *args, **conditioning)


@dataclass(frozen=True, eq=False)
class Job:
    """What a method is given besides the image.

    Attributes:
        denoiser: `denoiser(x, sigma, **conditioning) -> denoised`.
        sigmas: the decreasing sampling schedule, ending above 0.
        sampler: the rule that takes the latent back to data.
        guidance: `cfg`, `positive` and `negative`, the keyword arguments of `ki.sample` and the rest.
        question: "reconstruction" or "recovery".
        seed: of random numbers.
        max_evals: denoiser evaluations that one sample may cost, for methods that iterate; None sets no limit.
        memory: the auxiliary state that came with the image, where a reversible sampler made it.
        states: a method may put the states on its way here, by noise level (`job.see` as a callback does).
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

    @property
    def plan(self) -> Plan | None:
        """The sampler on the schedule; None for one that has no Plan there."""
        try:
            return compile_plan(self.sampler, self.sigmas)
        except ValueError:
            return None

    def bound(self) -> Any:
        """The guided denoiser `(x, sigma) -> denoised`, for running Plans of the sampler."""
        plan = self.plan
        return guide(self.denoiser, **self.guidance, pair=plan is not None and plan.is_guided)

    def see(self, step: Progress) -> None:
        """A callback that keeps the states of a run."""
        self.states[step.sigma] = step.x


@dataclass(frozen=True, eq=False)
class Found:
    """What a method found, and what it cost.

    Attributes:
        latent: shape (batch, *event).
        evaluations: denoiser evaluations per sample; a guided pair counts as one.
        converged: the method's own claim per sample; None where it makes none.
        residuals: per step, noisiest first, and sample; None where there are none.
        memory, noises: what belongs to the latent.
        sampler: what takes the latent back to data, where that is not the sampler of the job.
    """

    latent: Tensor
    evaluations: list[int]
    converged: list[bool] | None = None
    residuals: Tensor | None = None
    memory: Memory = field(default_factory=dict)
    noises: tuple[Tensor, ...] = ()
    sampler: Rule | None = None


Method = Callable[[Job, Tensor], Tensor | ki.Inversion | Found]


def _unsample(job: Job, x: Tensor) -> Tensor:
    return ki.unsample(
        job.denoiser, x, job.sigmas, sampler=job.sampler, sigma_offset=0.0, callback=job.see, **job.guidance
    )


def _ddim_clean(job: Job, x: Tensor) -> Tensor:
    return _unsample(replace(job, sampler=ki.sampler("euler")), x)


def _invert(method: str) -> Method:
    return lambda job, x: ki.invert(
        job.denoiser, x, job.sigmas, sampler=job.sampler, method=method, max_evals=job.max_evals, **job.guidance
    )


def _reversible(job: Job, x: Tensor) -> ki.Inversion | Found:
    plan = compile_plan(job.sampler, job.sigmas)
    explicit_inverse(plan)  # says so where there is none
    if not job.memory:
        return ki.invert(job.denoiser, x, job.sigmas, sampler=job.sampler, **job.guidance)
    undone = invert_reversible(plan, job.bound(), x, job.memory)
    return Found(undone.latent, [undone.evaluations] * len(x), memory=undone.memory)


def _without_memory(job: Job, x: Tensor) -> Found:
    found = _found(_reversible(replace(job, memory={}), x), job)
    return replace(found, memory={}, converged=None)


def _extract_noise(path: Any) -> Method:
    def extract(job: Job, x: Tensor) -> ki.Inversion:
        if job.question == "recovery":
            raise ValueError("extract_noise draws its latent, so it recovers none; ask for reconstruction")
        generator = torch.Generator().manual_seed(derived_seed("extract_noise", job.seed))
        return ki.extract_noise(
            job.denoiser, x, job.sigmas, sampler=job.sampler, path=path, generator=generator, **job.guidance
        )

    return extract


def _baseline(name: str, own: str = "euler") -> Method:
    """A published inversion; `own` is the sampler that it checks itself with."""

    def apply(job: Job, x: Tensor) -> Found:
        result, rule = BASELINES[name](job.denoiser, x, job.sigmas, **job.guidance), ki.sampler(own)
        found = _found(result, job)
        return found if job.sampler == rule else replace(found, converged=None)  # what it claims is for its own

    return apply


def _direct_inversion(job: Job, x: Tensor) -> Found:
    rule = ki.rules.DirectInversion()  # the noises are its offsets
    result = BASELINES["direct_inversion"](job.denoiser, x, job.sigmas, **job.guidance)
    return replace(_found(result, job), sampler=rule)


METHODS: dict[str, Method] = {
    "unsample": _unsample,  # the sampler, run up the schedule
    "ddim_clean": _ddim_clean,  # Euler upwards, the slope at the cleaner end of each step: what a flipped schedule does
    "ddim_noisy": _baseline("ddim_noisy"),  # Euler upwards, the noisier level's slope: the usual inverse scheduler
    "picard": _invert("picard"),  # the published fixed point
    "invert": _invert("auto"),  # exact, or said not to be
    "reversible": _reversible,  # closed form, with the auxiliary state
    "reversible_alone": _without_memory,  # the latent alone is kept
    "extract_noise": _extract_noise("independent"),
    "extract_noise_chain": _extract_noise("chain"),
    "easyinv": _baseline("easyinv"),
    "rf_inversion": _baseline("rf_inversion"),
    "rf_solver": _baseline("rf_solver", "rf_solver"),
    "fireflow": _baseline("fireflow", "fireflow"),
    "aidi": _baseline("aidi"),
    "aidi_anderson": _baseline("aidi_anderson"),
    "renoise": _baseline("renoise"),
    "dpm_solver_1": _baseline("dpm_solver_1"),
    "dpm_solver_2": _baseline("dpm_solver_2", "dpmpp_2m"),
    "direct_inversion": _direct_inversion,
}
"""Name -> method. Each published baseline of `kinvert.inversion.baselines` is one line."""
ITERATING = ("picard", "invert")  # those that `max_evals` is for


def find(method: str, job: Job, x: Tensor) -> Found:
    """Apply a method.

    Raises:
        ValueError, TypeError: a combination that cannot work; as the library says it.
    """
    before = job.denoiser.items
    result = METHODS[method](job, x)
    if isinstance(result, Tensor):
        return Found(result, [_share(job, before, len(x))] * len(x))
    return _found(result, job)


def _found(result: ki.Inversion | Found, job: Job) -> Found:
    """The way to the latent, without what an inversion spent on its certificate."""
    if isinstance(result, Found):
        return result
    stepwise = len(result.residuals) == len(job.sigmas) - 1 and not result.memory and not result.noises
    return Found(
        result.latent,
        (result.evaluations - result.checking - (0 if result.row_checks is None else result.row_checks)).tolist(),
        result.converged.tolist(),
        result.residuals if stepwise else None,
        result.memory,
        result.noises,
    )


def restore(job: Job, found: Found) -> tuple[Tensor, list[int]]:
    """Sample the latent back, with the memory and the noises that belong to it; and the evaluations per sample."""
    before, count = job.denoiser.items, len(found.latent)
    job = replace(job, sampler=found.sampler or job.sampler)
    if found.memory:
        closed = compile_plan(job.sampler, job.sigmas).closed
        start = {"x": found.latent, **found.memory}
        image = run_state(closed, job.bound(), start, callback=job.see)["x"]
    else:
        noise = ki.noise.replay(found.noises) if found.noises else None
        image = ki.sample(
            job.denoiser, found.latent, job.sigmas, sampler=job.sampler, noise=noise, callback=job.see, **job.guidance
        )
    return image, [_share(job, before, count)] * count


def generate(job: Job, latent: Tensor) -> tuple[Tensor, Memory, list[int]]:
    """Sample a latent: the image, the auxiliary state that a reversible sampler ends with, and the evaluations."""
    before, plan = job.denoiser.items, job.plan
    memory: Memory = {}
    if plan is not None and plan.auxiliary:
        memory = run_state(plan, job.bound(), {"x": latent}, callback=job.see)
        image = memory.pop("x")
    else:
        image = ki.sample(job.denoiser, latent, job.sigmas, sampler=job.sampler, callback=job.see, **job.guidance)
    return image, memory, [_share(job, before, len(latent))] * len(latent)


def sees_states(job: Job) -> bool:
    """Whether the first evaluation of every step is at the state itself, so that callbacks see the states."""
    plan = job.plan
    if plan is None:
        return False
    here = State("x")
    return all(s.stages and s.stages[0].sigma == s.sigma and s.stages[0].input.alias() == here for s in plan.steps)


def _share(job: Job, before: int, count: int) -> int:
    """Evaluations per sample since `before`; a guided pair is two of the denoiser, and counts as one."""
    plan, cfg = job.plan, job.guidance.get("cfg", 1.0)
    pair = job.guidance.get("negative") is not None and (cfg != 1.0 or (plan is not None and plan.is_guided))
    return round((job.denoiser.items - before) / count / (2 if pair else 1))
