r"""Steps chosen on the way: DPM-Solver with an error estimate, `dpm_adaptive`.

A trial step is compiled from the rule for its levels and made by `advance`, like any step of a Plan. The controller
reads one number per trial, the error, and decides on the next step. So, unlike those of a Plan, the levels depend on
the state, and on the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kinvert.checks import check_values
from kinvert.coefficients import ancestral_split
from kinvert.coordinates import settle
from kinvert.denoisers import Denoiser
from kinvert.engine.contract import check_state, checked_noise
from kinvert.engine.step import Callback, Memory, Progress, advance, combine, stage_sigmas
from kinvert.forms import Form, State
from kinvert.forms import Noise as NoiseSymbol
from kinvert.noise import Noise, bind, default_noise, replay
from kinvert.plan import Interval, compile_step
from kinvert.rules.adaptive import DPMAdaptive
from kinvert.tensors import wide_dtype

__all__ = ["AdaptiveInfo", "Trial", "ends", "run_adaptive"]

MAX_TRIALS = 10_000
X, NOISE = Form.of(State("x")), Form.of(NoiseSymbol(0))


@dataclass(frozen=True)
class AdaptiveInfo:
    """The cost of a run.

    Attributes:
        steps: trial steps.
        evaluations: denoiser evaluations, `order` for each trial.
        accepted: trials whose result was used.
        rejected: trials that were repeated with a shorter step.
        memory: values of x's size that are carried from trial to trial besides x: the low-order result of the last
            accepted one.
    """

    steps: int
    evaluations: int
    accepted: int
    rejected: int
    memory: int = 1


@dataclass(frozen=True, eq=False)
class Trial:
    """What `watch` is told after every trial step. The tensors are copies.

    Attributes:
        sigma: where the run stands now; the level of the trial if it was rejected.
        x: the state there.
        denoised: what the denoiser returned at the beginning of the trial.
        error: the error, in units of what rtol and atol allow.
        h: the signed width in -log sigma that the controller proposes next.
        info: the cost so far.
    """

    sigma: float
    x: Tensor
    denoised: Tensor
    error: float
    h: float
    info: AdaptiveInfo


def run_adaptive(
    solver: DPMAdaptive,
    denoiser: Denoiser,
    x: Tensor,
    sigmas: object,
    noise: Noise | None = None,
    callback: Callback | None = None,
    watch: Callable[[Trial], None] | None = None,
) -> tuple[Tensor, AdaptiveInfo]:
    """Run from `x` at `sigmas[0]` to the last positive noise level of the schedule, in steps that it chooses.

    Args:
        solver: the pair of methods, and the settings of the controller.
        denoiser: `denoiser(x, sigma) -> denoised` with x (batch, *event) and sigma (batch,).
        x: the state, shape (batch, *event), floating point. It is not modified.
        sigmas: noise levels, 1-D, falling or rising; only the ends count. With a single positive level x is returned.
        noise: source for eta > 0; None draws white noise. Drawn once an accepted step.
        callback: called with a `Progress` after every accepted step.
        watch: called with a `Trial` after every trial step.

    Returns:
        The final state, of x's shape, dtype and device, and an `AdaptiveInfo`.

    Raises:
        ValueError: an error estimate that is NaN or infinite, with its sigma; steps that get too small or too many; a
            rising schedule with eta > 0.
        TypeError: x that is not a floating point tensor.
    """
    x = check_state(x)
    check_values("x", x, f"{solver.name} chooses its steps by them")
    first, last = ends(settle(denoiser, solver, sigmas).schedule)
    if solver.eta and last > first:
        raise ValueError(
            f"{solver.name}: the noise of a rising run has negative variance for eta={solver.eta:g}; use eta=0"
        )
    source = default_noise(solver.default_noise) if noise is None else noise
    draw = bind(source if solver.eta else replay([]), x)
    direction = math.copysign(1.0, last - first)
    control = _Controller(solver, -direction * solver.h_init)
    sigma, low_before = first, x
    accepted = trials = 0
    while direction * math.log(last / sigma) > 1e-5:
        trials += 1
        proposed = sigma * math.exp(-control.h)
        target = proposed if direction * (last - proposed) > 0 else last
        down, up = _split(solver, sigma, target, last)
        step = compile_step(solver, (sigma, down), 0, {"x": X})
        levels = stage_sigmas([stage.sigma for stage in step.stages], x)
        watched = callback is not None or watch is not None
        state, seen = advance(step, denoiser, {"x": x}, draw, levels, watched=watched)
        error = _error(solver, state, low_before)
        if control.accepts(error, sigma, target, trials):
            low_before, x = state["low"], state["x"]
            if up > 0:
                n = checked_noise(draw, Interval(sigma, target), x)
                x = combine(X + up * NOISE, {State("x"): x, NoiseSymbol(0): n}, x)
            if callback is not None and seen is not None:
                denoised = seen[1].clone()  # `watch` is told of it after the callback, which may write into its own
                callback(Progress(accepted, sigma, target, seen[0], denoised, evaluations=solver.order * trials))
            accepted, sigma = accepted + 1, target
        if watch is not None and seen is not None:
            info = AdaptiveInfo(trials, solver.order * trials, accepted, trials - accepted)
            watch(Trial(sigma, x.clone(), seen[1], error, control.h, info))
    info = AdaptiveInfo(trials, solver.order * trials, accepted, trials - accepted)
    return x if trials else x.clone(), info


def ends(sigmas: tuple[float, ...]) -> tuple[float, float]:
    """Return the first level of a schedule and its last positive one."""
    return sigmas[0], sigmas[-1] or sigmas[-2]


@dataclass
class _Controller:
    """The signed width h of the next trial in lambda, and the last two accepted 1 / error for the PID law."""

    solver: DPMAdaptive
    h: float
    history: tuple[float, float] | None = None

    def accepts(self, error: float, sigma: float, target: float, trials: int) -> bool:
        """Tell whether a trial is accepted, and set h for the next one."""
        p, i, d = self.solver.pcoeff, self.solver.icoeff, self.solver.dcoeff
        where = f"{self.solver.name}: in the trial step {trials} from sigma {sigma:g} to {target:g}"
        if not math.isfinite(error):
            raise ValueError(
                f"{where} the error estimate is {error}: the denoiser returned NaN or infinity, or the state "
                "overflowed; check the denoiser at this sigma, or use a wider dtype (float32)"
            )
        k = 1.5 if self.solver.eta else self.solver.order
        inverse = 1.0 / (error + 1e-8)
        one, two = self.history or (inverse, inverse)
        ratio = inverse ** ((p + i + d) / k) * one ** (-(p + 2 * d) / k) * two ** (d / k)
        factor = 1.0 + math.atan(ratio - 1.0)
        self.h *= factor
        accepted = factor >= self.solver.accept_safety
        if trials >= MAX_TRIALS or abs(self.h) < 1e-9:
            raise ValueError(
                f"{where} the error is {error:.3g} times what rtol and atol allow, and the step is down to "
                f"{abs(self.h):.3g} in log sigma; use larger rtol or atol, or look for a jump of the denoiser there"
            )
        if accepted:
            self.history = (inverse, one)
        elif self.history is None:
            self.history = (inverse, inverse)
        return accepted


def _error(solver: DPMAdaptive, state: Memory, low_before: Tensor) -> float:
    """Return the error estimate, the one number that the host reads in a trial."""
    wide = wide_dtype(low_before.dtype)
    low, high = state["low"].to(wide), state["x"].to(wide)
    allowed = (solver.rtol * torch.maximum(low.abs(), low_before.to(wide).abs())).clamp(min=solver.atol)
    return float(((low - high) / allowed).square().mean().sqrt())


def _split(solver: DPMAdaptive, sigma: float, target: float, last: float) -> tuple[float, float]:
    """Return the level that the step goes to, not below the last one, and the noise that leads from there to target."""
    if not solver.eta:
        return target, 0.0
    down = max(ancestral_split(sigma, target, solver.eta)[0], last)
    return down, solver.s_noise * math.sqrt(target**2 - down**2)
