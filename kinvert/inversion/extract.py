r"""`extract_noise`: the noises with which a stochastic sampler, started from the returned latent, makes a given image.

A run that draws noise reaches every image: choose the states `x_0, ..., x_N` that it shall pass through, the last of
them the image, and solve each step's row for the noise. With a_i the signal level of `sigma_i` (1 in
variance-exploding coordinates, `1 - sigma_i` in flow time) and standard normal `eps_i`, the states are noised upwards:

    x_i = (a_i/a_j) x_j + sqrt(sigma_i^2 - (a_i/a_j sigma_j)^2) eps_i

with `j = N` (path "independent") or `j = i + 1` (path "chain"). The first are independent marginals of the forward
process, the second is one sample of the process itself; read downwards, its states follow the posteriors
`q(x_{i+1} | x_i, x_N)`. Of the row `x_{i+1} = f + sum_r c_r n_r` of a step all but one noise can be known before, and

    n_s = (x_{i+1} - f - sum_{r != s} c_r n_r) / c_s

Noise s must enter no evaluation of its step. The other noises of the step (those of intermediate stages) are drawn from
their law given `sum_r c_r n_r`, which is estimated with the first evaluation in place of the later ones; the estimate
has no influence on the exactness, as n_s is solved for afterwards.

A step is solved from the state that the replay will have there, rounding and all, so errors do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from kinvert.analysis import brownian_covariance
from kinvert.checks import check_choice, check_decreasing, check_finite, check_values
from kinvert.coordinates import Coordinates, settle
from kinvert.denoisers import BoundDenoiser, Cfg, Denoiser, Guided, Masked, guide, step_cfg
from kinvert.denoisers.buffers import call_to_keep
from kinvert.engine import Callback, Memory, Progress, advance, check_state, combine, stage_sigmas
from kinvert.forms import Form, Noise, State, Symbol
from kinvert.inversion.back import WayBack
from kinvert.inversion.batches import FewBatches
from kinvert.inversion.certificate import Found, certify
from kinvert.inversion.problem import Reason
from kinvert.inversion.result import Inversion
from kinvert.inversion.verdict import check_guidance, check_rows, tolerance
from kinvert.noise import White, replay
from kinvert.parts import in_parts
from kinvert.plan import Plan, Step, compile_plan
from kinvert.rules import Rule
from kinvert.tensors import rms, wide_dtype

__all__ = ["TOLERANCES", "Path", "extract_noise"]

Path = Literal["independent", "chain"]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}  # half precision: as in `verdict`


@torch.no_grad()
def extract_noise(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    sampler: str | Rule = "euler_ancestral",
    path: Path = "independent",
    generator: torch.Generator | None = None,
    tol: float | None = None,
    cfg: Cfg = 1.0,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
    noise: White | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    max_batch: int | None = None,
) -> Inversion:
    r"""Extract the noises that make a stochastic sampler reproduce an image exactly.

    `sample(denoiser, result.latent, sigmas, sampler=sampler, noise=ki.noise.replay(result.noises))` is x, for every
    sampler whose last step draws noise: one evaluation for each of the sampler's own, and a second run as the check.
    The states in between are chosen at random (see the module); edits keep the noises and change the conditioning.

    Args:
        denoiser, cfg, positive, negative: as in `sample`.
        x: image, shape (batch, *event). It is taken as the state at `sigmas[-1]` > 0, as it is.
        sigmas: the decreasing sampling schedule. Its last step must draw noise, and the step to 0 never does: pass
            `sigmas[:-1]`.
        sampler: a stochastic sampler, by name or as a rule. `sa_solver` draws in an interval of noise levels only;
            it needs `ki.sampler("sa_solver", sde_end=0)`.
        path: "independent" noises x to every level anew (edit-friendly: the noises are the larger, the more steps
            there are, and successive ones are negatively correlated, so that they carry more of the image); "chain"
            goes up step by step (the noises are nearly those that a run draws: variance near 1, uncorrelated).
        generator: random numbers of the states and of the stage noises, on any device; None: torch's global generator.
        noise: the same as a source of white noise, e.g. `ki.noise.white(seed)` or one seed for each sample; give this
            or a generator.
        mask: 1 = steer, 0 = keep x, as in `unsample`: in the kept region the network sees x at every noise level.
        max_batch: the most samples that are evaluated at once, as in `sample`.
        callback: called after each step with `index, sigma, sigma_next, x, denoised, evaluations`.
        progress: show a progress bar.
        tol: root mean square of `sample(latent) - x` up to which a sample counts as converged, in parts of the size of
            each image, `max(rms(x), sigmas[-1])`. Default: 1e-10 in float64, 1e-4 in float32 and 8 eps in half
            precision (0.0078 in float16, 0.0625 in bfloat16). The error is that of rounding the last step, far below
            it.

    Returns:
        An `Inversion` with `latent` at `sigmas[0]` and `noises`, one of x's shape and dtype for each draw of a run. Its
        residuals are 0 in steps that draw no noise: they are not steered.

    Raises:
        TypeError, ValueError: an input that cannot work, named with what was got and the fix: a deterministic sampler,
            a schedule whose last step draws no noise, a sampler whose noise enters the evaluation (churn), NaN.

    Source: "independent": Huberman-Spiegelglas, Kulikov and Michaeli, An Edit Friendly DDPM Noise Space: Inversion and
    Manipulations (2024), arXiv 2304.06140, and, with the DPM-Solver++ SDE samplers, Brack et al., LEDITS++: Limitless
    Image Editing using Text-to-Image Models (2023), arXiv 2311.16711; "chain": Wu and De la Torre, Unifying Diffusion
    Models' Latent Space, with Applications to CycleDiffusion and Guidance (2022), arXiv 2210.05559.
    """
    x = _check_arguments(x, path, generator, noise)
    goal = tolerance(tol, x, TOLERANCES)
    coordinates, rule, schedule = settle(denoiser, sampler, sigmas)
    plan = compile_plan(rule, schedule)
    _check_plan(plan, schedule)
    scales = step_cfg(cfg, schedule)
    guided = guide(denoiser, scales, positive, negative, pair=plan.is_guided, batch=len(x), coordinates=coordinates)
    check_guidance(guided, x, plan.sigmas, "extract_noise")
    bound: Denoiser = in_parts(guided, x, max_batch, graph=False)
    cut: BoundDenoiser = guided
    if mask is not None:
        bound = Masked(bound, mask, x, coordinates=coordinates)
        cut = Masked(guided, mask, x, coordinates=coordinates)
    asked = check_rows(FewBatches(cut, max(2, min(len(x), max_batch or len(x))), fixed=True), x, plan.sigmas)
    normal = _normal(x, generator) if noise is None else _drawn(noise, x)
    states = _states(plan, coordinates, x, path, normal)
    levels = stage_sigmas(plan.stage_levels, x)
    state, noises, residuals, evaluations = {"x": states[0]}, list[Tensor](), list[Tensor](), 0
    for step in _with_bar(plan, progress):
        target, tape = states[step.index + 1], _Tape(bound)
        stage_levels = levels[evaluations : evaluations + len(step.stages)]
        drawn = _step_noises(plan.rule, step, tape, state, target, stage_levels, normal)
        state, seen = tape.advance(step, state, drawn, stage_levels)
        evaluations += len(step.stages)
        noises += drawn
        miss = state["x"].to(wide_dtype(x.dtype)) - target.to(wide_dtype(x.dtype))
        residuals.append(rms(miss if _solvable(step) is not None else torch.zeros_like(miss)))
        if callback is not None and seen is not None:
            copies = seen[0].clone(), seen[1].clone()
            callback(Progress(step.index, step.sigma, step.sigma_next, *copies, evaluations=evaluations))
    back = WayBack(plan.rule, plan.sigmas, coordinates, cfg, positive, negative, mask, x)
    again = back.sample(denoiser, states[0], memory={}, noises=noises, embeddings={}, max_batch=max_batch)
    found = Found(
        latent=states[0],
        restored=again,
        evaluations=asked + evaluations + plan.evaluations,
        checking=plan.evaluations,
        residuals=torch.stack(residuals),
        otherwise=Reason.PRECISION,
        notes=_unusual(plan, noises),
        row_checks=asked,
        noises=noises,
    )
    result = certify(plan, x, goal, found, back)
    return replace(result, warnings=(*_missed(result.round_trip_error, result.allowed), *result.warnings))


# -- one step ---------------------------------------------------------------------------------------------------------
class _Tape:
    """A denoiser for making the same step several times: it is called once a stage, then played back."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.outputs: list[Tensor | Guided] = []

    def advance(
        self, step: Step, state: Memory, noises: list[Tensor], levels: Tensor
    ) -> tuple[Memory, tuple[Tensor, Tensor] | None]:
        """Call `engine.advance` from the beginning of the tape."""
        calls = iter(range(len(step.stages)))

        def play(x: Tensor, sigma: Tensor) -> Tensor | Guided:
            k = next(calls)
            if k == len(self.outputs):
                self.outputs.append(call_to_keep(self.denoiser, x, sigma))
            return self.outputs[k]

        return advance(step, play, state, replay(noises).bind(state["x"]), levels)


def _step_noises(
    rule: Rule, step: Step, tape: _Tape, state: Memory, target: Tensor, levels: Tensor, normal: Callable[[], Tensor]
) -> list[Tensor]:
    """Return the noises of a step, in x's dtype; it ends at `target` if one of them can be solved for."""
    solved = _solvable(step)
    known = {Noise(r): normal() for r in range(len(step.noises))}
    # With one noise there is nothing to condition; nor if the first evaluation depends on the noises to be drawn.
    conditioned = solved is not None and len(known) > 1 and not _has_noise(step.stages[0].input)
    if conditioned:
        known[State("gap")] = target - tape.advance(_first_order(step), state, [], levels[:1])[0]["x"]
    noises = [combine(form, known, target) for form in _law(rule, step, conditioned)]
    if solved is not None:
        noises[solved] = torch.zeros_like(target)
        gap = target.to(wide_dtype(target.dtype)) - tape.advance(step, state, noises, levels)[0]["x"].to(
            wide_dtype(target.dtype)
        )
        noises[solved] = (gap / step.x[Noise(solved)]).to(target.dtype)
    return noises


def _solvable(step: Step) -> int | None:
    """Return the noise that moves x' most among those that enter no evaluation of the step, or None."""
    inputs = [stage.input for stage in step.stages]
    found = [r for r in range(len(step.noises)) if step.x[Noise(r)] and not any(form[Noise(r)] for form in inputs)]
    return max(found, key=lambda r: abs(step.x[Noise(r)]), default=None)


def _first_order(step: Step) -> Step:
    """Return the step without its noise, and with the first evaluation in place of the later ones."""
    terms: dict[Symbol, float] = {}
    for symbol, c in step.x:
        if symbol.kind == "noise":
            continue
        if symbol.kind != "state":
            symbol = Symbol(symbol.kind if step.stages[0].guided else "denoised", 0)  # noqa: PLW2901
        terms[symbol] = terms.get(symbol, 0.0) + c
    return replace(step, stages=step.stages[:1], noises=(), x=Form(terms), memory=())


def _law(rule: Rule, step: Step, conditioned: bool) -> list[Form]:
    r"""Return the noises of a step as forms in independent normals `n_r` and "gap", the value of `sum_r c_r noise_r`.

    For noises with covariance K, `w + K c (gap - c w) / (c K c)` with w of that covariance has the law given the gap.
    """
    count = len(step.noises)
    covariance = brownian_covariance(step.noises) if rule.default_noise == "brownian" else np.eye(count)
    values, vectors = np.linalg.eigh(covariance)
    weights = vectors * np.sqrt(np.maximum(values, 0.0))
    gain = np.zeros(count)
    if conditioned:
        c = np.array([step.x[Noise(r)] for r in range(count)])
        gain = covariance @ c / (c @ covariance @ c)
        weights -= np.outer(gain, c @ weights)
    return [
        Form({State("gap"): float(gain[r])} | {Noise(k): float(weights[r, k]) for k in range(count)})
        for r in range(count)
    ]


def _has_noise(form: Form) -> bool:
    return any(symbol.kind == "noise" for symbol, _ in form)


# -- the states -------------------------------------------------------------------------------------------------------
def _states(plan: Plan, coordinates: Coordinates, x: Tensor, path: Path, normal: Callable[[], Tensor]) -> list[Tensor]:
    """Return the states at the levels of the Plan, noisiest first, in x's dtype; the last is x."""
    levels = [((1.0 - sigma) if coordinates == "flow" else 1.0, sigma) for sigma in plan.sigmas]
    states = [x.to(wide_dtype(x.dtype))]
    for i in reversed(range(len(levels) - 1)):
        (a, sigma), (a_from, sigma_from) = levels[i], levels[-1 if path == "independent" else i + 1]
        signal = a / a_from
        noise = math.sqrt(sigma**2 - (signal * sigma_from) ** 2)
        states.append(signal * states[0 if path == "independent" else -1] + noise * normal())
    return [state.to(x.dtype) for state in reversed(states)]


def _drawn(noise: White, x: Tensor) -> Callable[[], Tensor]:
    """Return a function that draws from a source of white noise, in float32 for half precision."""
    draw = noise.bind(x.to(wide_dtype(x.dtype)))
    return lambda: draw(1.0, 0.0)


def _normal(x: Tensor, generator: torch.Generator | None) -> Callable[[], Tensor]:
    """Return a function that draws standard normal tensors like x, in float32 for half precision."""
    device = x.device if generator is None else generator.device

    def draw() -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=wide_dtype(x.dtype), device=device).to(x.device)

    return draw


# -- checks and report ------------------------------------------------------------------------------------------------
def _check_arguments(x: Tensor, path: Path, generator: torch.Generator | None, noise: Any) -> Tensor:
    x = check_state(x)
    check_values("x", x, "noise is extracted from them")
    check_finite("x", x)
    check_choice("path", path, get_args(Path))
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}; "
            "use torch.Generator().manual_seed(0)"
        )
    if noise is not None and (generator is not None or not isinstance(noise, White)):
        raise TypeError(
            f"noise must be a source of white noise such as ki.noise.white(0), and generator None beside it, got "
            f"{noise!r} and {generator!r}"
        )
    return x


def _check_plan(plan: Plan, schedule: tuple[float, ...]) -> None:
    """Refuse, before the first evaluation, a Plan that cannot be made to end at a given image."""
    name, last = plan.rule.name, plan.steps[-1]
    check_decreasing("sigmas", plan.sigmas)
    if not plan.is_stochastic:
        raise ValueError(
            f"{name} draws no noise on this schedule, so there is none to extract; use invert (exact) or unsample, or "
            "a stochastic sampler such as 'euler_ancestral' on a schedule that ends above 0"
        )
    if _solvable(last) is not None:
        return
    where = f"{name}: the last step, from sigma {last.sigma:g} to {last.sigma_next:g},"
    if any(_has_noise(form) for form in (last.x, *(stage.input for stage in last.stages))):
        churn = "switch churn off (s_churn=0) and use invert, or " if "s_churn" in plan.rule.noise_options else ""
        raise ValueError(
            f"{where} passes its noise through the denoiser, so it cannot be solved for it; {churn}take a sampler that "
            "adds its noise last, such as 'euler_ancestral'"
        )
    raise ValueError(f"{where} draws no noise, so it cannot be made to end at the image; {_fix(plan, schedule)}")


def _fix(plan: Plan, schedule: tuple[float, ...]) -> str:
    """Return the fix for a last step without noise: a shorter schedule if that helps, else the sampler's options."""
    drawing = max(step.index for step in plan.steps if step.noises)
    dropped = len(schedule) - drawing - 2
    options = ", ".join(plan.rule.options)
    if _solvable(compile_plan(plan.rule, schedule[:-dropped]).steps[-1]) is None:
        return f"set its options so that its last step draws noise (it has {options})"
    return f"stop at sigma {schedule[-dropped - 1]:g}, where it still draws noise: use sigmas[:-{dropped}]"


def _with_bar(plan: Plan, progress: bool) -> Iterable[Step]:
    if not progress:
        return plan.steps
    from tqdm.auto import tqdm

    bar: Iterable[Step] = tqdm(plan.steps, desc=f"extract_noise {plan.rule.name}")
    return bar


def _missed(error: Tensor, allowed: Tensor) -> list[str]:
    missed = (error > allowed).nonzero()[:, 0].tolist()
    if not missed:
        return []
    return [
        f"samples {', '.join(map(str, missed))} are not reproduced: error up to {float(error.max()):.3g}; does the "
        "denoiser return the same for the same input?"
    ]


def _unusual(plan: Plan, noises: list[Tensor]) -> list[str]:
    """Return a warning about maps that are far from the unit variance that the sampler would draw."""
    steps = [step for step in plan.steps for _ in step.noises]
    sizes = torch.stack([rms(n.to(wide_dtype(n.dtype))[None])[0] for n in noises]).tolist()
    worst = max(range(len(sizes)), key=lambda k: abs(math.log(max(sizes[k], 1e-300))))
    if 0.1 <= sizes[worst] <= 10.0:
        return []
    step = steps[worst]
    return [
        f"noise map {worst} (sigma {step.sigma:g} -> {step.sigma_next:g}) has rms {sizes[worst]:.3g}, where a run "
        "draws 1: an edit that replays it sees states the denoiser does not know; try path='chain' or other levels"
    ]
