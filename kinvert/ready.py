"""A sampler on a schedule, ready to run: it refuses meaningless runs beforehand, and NaN afterwards."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinvert.checks import check_finite, has_values
from kinvert.denoisers import Denoiser
from kinvert.engine import Callback, Progress, run_state
from kinvert.engine.adaptive import ends, run_adaptive
from kinvert.forms import State
from kinvert.noise import Noise, NoiseSource, default_noise, white
from kinvert.plan import Plan, compile_plan
from kinvert.rules import DPMAdaptive, Rule
from kinvert.rules import sampler as resolve_sampler

__all__ = ["Ready", "uses_evaluations", "with_bar"]

OUTPUTS = ("denoised", "uncond")
DETERMINISTIC = "'euler', 'heun' or 'dpmpp_2m'"


@dataclass(frozen=True)
class Ready:
    """A sampler on a schedule, ready to run: by its Plan, or by the controller of `dpm_adaptive`, which has none."""

    rule: Rule
    sigmas: tuple[float, ...]
    plan: Plan | None

    @classmethod
    def of(cls, sampler: str | Rule, schedule: tuple[float, ...]) -> Ready:
        """Compile a sampler for a schedule."""
        rule = resolve_sampler(sampler)
        if isinstance(rule, DPMAdaptive):
            return cls(rule, ends(schedule), None)
        plan = compile_plan(rule, schedule)
        return cls(rule, plan.sigmas, plan)

    @property
    def is_guided(self) -> bool:
        """Tell whether the denoiser must return a pair (CFG++)."""
        return self.plan is not None and self.plan.is_guided

    def run(self, denoiser: Denoiser, x: Tensor, noise: Noise | None, callback: Callback | None) -> Tensor:
        """Return the result, unchecked."""
        if self.plan is not None:
            return run_state(self.plan, denoiser, {"x": x}, noise, callback)["x"]
        if not isinstance(self.rule, DPMAdaptive):
            raise TypeError(f"{self.rule.name} needs a Plan; make one with Ready.of")
        if self.sigmas[0] == self.sigmas[1]:
            raise ValueError(
                f"{self.rule.name} runs between the positive levels of sigmas and needs two of them, got "
                f"{self.sigmas[0]:g} alone; give a longer schedule, or another sampler for a single step to 0"
            )
        return run_adaptive(self.rule, denoiser, x, self.sigmas, noise, callback)[0]

    def with_bar(self, callback: Callback | None, verb: str) -> Callback:
        """Return the callback with a progress bar."""
        steps = None if self.plan is None else len(self.plan.steps)
        return with_bar(callback, f"{verb} {self.rule.name}", steps, self.sigmas[-1])

    def run_checked(self, denoiser: Denoiser, x: Tensor, noise: Noise | None, callback: Callback | None) -> Tensor:
        """Run, then read the result once: raise ValueError for NaN or infinity, and read nothing inside the loop."""
        if self.plan is not None and not uses_evaluations(self.plan):
            self.refuse_idle(self.plan)
        if noise is None and self.plan is not None and self.plan.is_stochastic:
            noise = default_noise(self.rule.default_noise)  # chosen here, so that a second run sees the same noise
        result = self.run(denoiser, x, noise, callback)
        if has_values(result) and not bool(torch.isfinite(result).all()):
            raise ValueError(self._first_bad_step(denoiser, x, noise))
        return result

    def refuse_idle(self, plan: Plan) -> None:
        """Refuse a run that returns x unchanged; upwards, warn if it returns a multiple of x, as the node does."""
        keeps = "" if self.rule.keeps_last else f"ki.sampler({self.rule.name!r}, keep_last=True), "
        message = (
            f"{self.rule.name} returns x as it came, or a multiple of it: from sigma {self.sigmas[0]:g} to "
            f"{self.sigmas[-1]:g} in {len(plan.steps)} step(s) no evaluation of the denoiser enters its result; give a "
            f"longer schedule, or use {keeps}'euler' or 'heun'"
        )
        if plan.is_rising and any(step.x.alias() != State("x") for step in plan.steps):
            warnings.warn(message, RuntimeWarning, stacklevel=5)
        else:
            raise ValueError(message)

    def check_unsampling(self, noise: Noise | None, down: Ready) -> None:
        """Refuse, before the first evaluation, a sampler whose Plans, up or down, make unsampling meaningless."""
        name, noisy = self.rule.name, self.rule.noise_options
        fix = f"use ki.sampler({name!r}, eta=0) or " if "eta" in noisy else "use "
        fix += f"a deterministic sampler such as {DETERMINISTIC}"
        steps = () if self.plan is None else self.plan.steps
        for step in steps:
            if step.forgets_x:
                raise ValueError(
                    f"{name} cannot unsample: its step from sigma {step.sigma:g} up to {step.sigma_next:g} forgets x, "
                    f"so the result would not depend on the image; {fix}"
                )
        draws = max(0 if plan is None else plan.draws for plan in (self.plan, down.plan))
        if draws and noise is None:
            raise ValueError(
                f"{name} draws noise {draws} times on this schedule, so no latent alone gives the image; {fix}"
                + (", or switch churn off (s_churn=0)" if "s_churn" in noisy else "")
            )

    def _first_bad_step(self, denoiser: Denoiser, x: Tensor, noise: Noise | None) -> str:
        """Run again and read every value, to say where the first NaN or infinity came from."""
        check_finite("x", x)
        found: list[str] = []

        def checked(state: Tensor, sigma: Tensor) -> Any:
            out = denoiser(state, sigma)
            good_in = bool(torch.isfinite(state).all())
            parts = out if isinstance(out, tuple) else (out,)
            if not found and not (good_in and all(bool(torch.isfinite(part).all()) for part in parts)):
                what = "the denoiser returned NaN or infinity" if good_in else "the state overflowed"
                found.append(f"{what} at sigma {float(sigma[0]):g}")
            return out

        def locate(step: Progress) -> None:
            if len(found) == 1:
                found.append(f"in step {step.index} ({step.sigma:g} -> {step.sigma_next:g})")

        # A noise function of the caller cannot start again.
        self.run(checked, x, noise if noise is None or isinstance(noise, NoiseSource) else white(0), locate)
        where = " ".join(found) or "the result overflowed"
        return (
            f"{self.rule.name}: {where}; x is {x.dtype} with largest value {float(x.abs().max()):.3g}. Check the "
            "denoiser at this sigma, or run it in a wider dtype (float32)"
        )


def uses_evaluations(plan: Plan) -> bool:
    """Tell whether the final x depends on anything that the denoiser returns."""
    names = frozenset[str]()  # the values that depend on it so far
    for step in plan.steps:
        rows = ("x", step.x), *step.memory
        names = frozenset(n for n, form in rows if any(s.kind in OUTPUTS or s.key in names for s, _ in form))
    return "x" in names


def with_bar(callback: Callback | None, description: str, steps: int | None, last: float) -> Callback:
    """Return the callback with a progress bar, which the step to the level `last` closes."""
    from tqdm.auto import tqdm

    bar = tqdm(total=steps, desc=description)

    def update(step: Progress) -> None:
        bar.update()
        if step.sigma_next == last:
            bar.close()
        if callback is not None:
            callback(step)

    return update
