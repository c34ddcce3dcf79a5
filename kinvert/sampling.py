r"""The two directions along a schedule.

Both take the same *sampling* schedule, decreasing and usually ending in 0, so a round trip uses the same arguments
twice:

* `sample` runs a sampler down the schedule, from noise to data;
* `unsample` runs it up the reversed schedule, from data to noise: the ComfyUI node *Unsampler*, generalised.

Unsampling is approximate. A step up evaluates the denoiser at the *cleaner* end of the interval where the step down
would evaluate it at the noisier one, so the round trip has the sampler's discretisation error, order for order.
"""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from kinvert.checks import check_decreasing, check_integer, check_number, has_values
from kinvert.coordinates import settle
from kinvert.denoisers import Cfg, Denoiser, Masked, guide, refuse_history, step_cfg
from kinvert.engine import Callback
from kinvert.engine.binding import kept_outside
from kinvert.engine.contract import check_state, rounding, warn_if_drowned
from kinvert.moments import check_flow_spread, check_kept
from kinvert.noise import Noise
from kinvert.parts import in_parts
from kinvert.plan import as_schedule
from kinvert.ready import Ready
from kinvert.rules import Rule
from kinvert.tensors import wide_dtype

Normalize = bool | Literal["sample", "sigma"]
OFFSET = 1e-4  # the default of the node

__all__ = [
    "Normalize",
    "dropped_steps",
    "offset_for",
    "rising_schedule",
    "sample",
    "tell_needs",
    "unsample",
    "without_graph",
]


P = ParamSpec("P")
R = TypeVar("R")


def without_graph(instead: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a verb run without gradients; it warns, with the way to get gradients, if x requires them."""

    def wrap(verb: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(verb)
        def run_verb(*args: P.args, **kwargs: P.kwargs) -> R:
            x = args[1] if len(args) > 1 else kwargs.get("x")
            if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
                warnings.warn(
                    f"x requires grad, but {verb.__name__} keeps no graph: for gradients use {instead}; else pass "
                    "x.detach()",
                    UserWarning,
                    stacklevel=2,
                )
            with torch.no_grad():
                return verb(*args, **kwargs)

        return run_verb

    return wrap


RUN = "ki.run(ki.compile_plan(sampler, sigmas), denoiser, x), which takes cfg, positive, negative and mask too"
RUN_UP = (
    "ki.run(ki.compile_plan(sampler, sigmas.flip(0)), denoiser, x), for sigmas that end above 0, which takes cfg, "
    "positive, negative and mask too"
)


@without_graph(RUN)
def sample(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    sampler: str | Rule = "euler",
    cfg: Cfg = 1.0,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
    latent: Tensor | None = None,
    mask_noise: Tensor | None = None,
    noise: Noise | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    max_batch: int | None = None,
    graph: bool = False,
) -> Tensor:
    """Sample: run a sampler down a schedule, from `x` at noise level `sigmas[0]` to `sigmas[-1]`.

    The result keeps no graph. `ki.run(ki.compile_plan(sampler, sigmas), denoiser, x, ...)` is the differentiable way,
    with `noise`, `cfg`, `positive`, `negative` and the mask as here.

    Args:
        denoiser: `denoiser(x, sigma, **conditioning) -> denoised`; sigma has shape (batch,).
        x: noisy state, shape (batch, *event), e.g. `sigmas[0] * torch.randn(...)`.
        sigmas: decreasing noise levels, 1-D, e.g. from `ki.schedule`; flow times for a denoiser in flow time.
        sampler: a name of `ki.SAMPLERS`, or a rule with options, e.g. `ki.sampler("heun", s_churn=10)`; in flow time as
            `ki.flow_sampler` has it.
        cfg: scale of classifier-free guidance, `D = U + cfg (C - U)`; 1 evaluates the positive branch alone. Or one
            scale for each step of `sigmas`, the noisiest first: an evaluation has that of the step in whose interval
            its noise level lies, see `kinvert.denoisers.step_cfg`. Or a function of sigma, shape (batch,). Or another
            way to guide, in all steps or in some of them: one of `ki.guidance`, or a function `(cond, uncond, sigma) ->
            denoised` of the predictions C and U, which takes each sample by itself.
        positive: keyword arguments of the denoiser for the conditional branch C.
        negative: keyword arguments for the unconditional branch U; needed where cfg is not 1 and by CFG++ samplers.
        mask: 1 = sample, 0 = keep `latent`; for all items alike, (H, W), for each, (batch, H, W), or for each item and
            channel, (batch, 1 or channels, H, W). For events of other dimensions see
            `kinvert.denoisers.resize_mask`.
        latent: the clean image of the kept region, of x's shape.
        mask_noise: the noise of the kept region, unit variance, of x's shape. None takes the noise that `x` has there,
            `(x - latent) / sigmas[0]`. If a mask is soft, x is a blend after the first step: a run that continues from
            such an x needs the noise that the run began with.
        noise: source for stochastic samplers, e.g. `ki.noise.white(seed)`; None draws the sampler's
            own kind (white or Brownian), seeded by torch's global generator.
        callback: called after each step with `index, sigma, sigma_next, x, denoised`.
        progress: show a progress bar.
        max_batch: the most samples that are evaluated at once; the batch is split, with its conditioning, for each call
            of the denoiser (with guidance a call may get twice as many rows). It bounds the denoiser's memory; the
            result is the same. The run itself needs a few states more (`kinvert.engine.kernels`).
        graph: record the denoiser as a CUDA graph and launch that for each evaluation, see `ki.graphs`. If that cannot
            be done, a RuntimeWarning says why and the denoiser is called as usual.

    Returns:
        The sample, shape (batch, *event), in x's dtype and on its device.

    Raises:
        TypeError, ValueError: an input that cannot work, named with what was got and the fix; a denoiser that returned
            NaN or infinity, with the step and its sigma.
    """
    needs = _needs_of(x)
    x = check_state(x)
    coordinates, rule, schedule = settle(denoiser, sampler, sigmas)
    check_decreasing("sigmas", schedule, "to run upwards use unsample, or ki.run with a Plan")
    job = Ready.of(rule, schedule)
    _warn_of_needs(needs, job, noise)
    check_flow_spread(job.plan, coordinates)
    if max_batch is not None or graph:
        refuse_history(cfg, "sample", "evaluates the parts of a batch in turn, or from a graph (max_batch=, graph=)")
    scales = step_cfg(cfg, schedule)
    guided = guide(denoiser, scales, positive, negative, pair=job.is_guided, batch=len(x), coordinates=coordinates)
    denoise = in_parts(guided, x, max_batch, graph)
    denoise = kept_outside(denoise, x, schedule[0], coordinates, mask, latent, mask_noise)
    return job.run_checked(denoise, x, noise, job.with_bar(callback, "sample") if progress else callback)


@without_graph(RUN_UP)
def unsample(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    sampler: str | Rule = "euler",
    end_at_step: int = 0,
    cfg: Cfg = 1.0,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
    normalize: Normalize = False,
    sigma_offset: float | None = None,
    noise: Noise | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    max_batch: int | None = None,
    graph: bool = False,
) -> Tensor:
    """Unsample: run a sampler up the reversed schedule, from the clean `x` to the noise behind it.

    This is the ComfyUI node *Unsampler* for any denoiser: the schedule is reversed, `sigma_offset` is added to every
    entry (so that it starts above 0), and the last `end_at_step` steps are dropped. Sample the result back with
    `sample(denoiser, latent, sigmas[end_at_step:], ...)`. In flow time the offset is left out where it would exceed
    t = 1, which is a level like any other; if it is more than the node's 1e-4, x is scaled to the time at which the run
    starts, `x_t = (1 - t) x`. The result keeps no graph; `ki.run` with a Plan of a rising schedule is differentiable.

    Args:
        denoiser, cfg, positive, negative, callback, progress, max_batch, graph: as in `sample`.
        x: clean image or latent, shape (batch, *event).
        sigmas: the *sampling* schedule, decreasing, usually ending in 0; it is reversed here.
        sampler: a deterministic sampler, by name or as a rule.
        end_at_step: leave out this many steps at the noisy end; at least one step always runs.
        mask: 1 = unsample, 0 = keep x; shapes as in `sample`. In the kept region the result is x, `(1 - t) x` in flow
            time, up to the rounding that the run amplifies (about 1e-2 in float32); samplers that lose it are refused.
        normalize: True subtracts the mean and divides by the unbiased standard deviation of the whole batch tensor,
            as the node does; "sample" does so for each sample; "sigma" divides by the last noise level.
        sigma_offset: added to every entry of the reversed schedule. None is the node's 1e-4 if x's dtype allows it,
            else the offset that makes the first level `2 eps`, 0.016 in bfloat16 and 0.002 in float16: rounding is then
            half the noise for data of size 1 (`kinvert.engine.contract.rounding`).
        noise: only for samplers with churn.

    Returns:
        The latent at noise level `sigmas[end_at_step] + sigma_offset` (unless normalized), in x's shape and dtype.

    Warns:
        RuntimeWarning: a given `sigma_offset` with which rounding drowns the latent, with the number.

    Raises:
        ValueError: a sampler that cannot run upwards (ancestral and SDE samplers, with what to use instead); any
            other input that cannot work.
        TypeError: as in `sample`.
    """
    x = check_state(x)
    if not isinstance(normalize, bool) and normalize not in ("sample", "sigma"):
        raise ValueError(f"normalize must be True, False, 'sample' or 'sigma', got {normalize!r}")
    coordinates, rule, schedule = settle(denoiser, sampler, sigmas)
    kept = schedule[dropped_steps(schedule, end_at_step) :]
    check_decreasing("sigmas", schedule, "unsample reverses it itself")
    offset = offset_for(x.dtype, schedule) if sigma_offset is None else sigma_offset
    rising = rising_schedule(schedule, end_at_step, offset, 1.0 if coordinates == "flow" else math.inf)
    _check_keeps_last(rule, rising)
    job = Ready.of(rule, rising)
    job.check_unsampling(noise, Ready.of(rule, kept))
    check_flow_spread(job.plan, coordinates)
    warn_if_drowned(x, job.sigmas[0], "the first slope of the way up", f"or sigma_offset={rounding(x, 0.5):.2g}")
    refuse_history(cfg, "unsample", "goes through the steps in reverse order")
    scales = step_cfg(cfg, schedule, rising)
    guided = guide(denoiser, scales, positive, negative, pair=job.is_guided, batch=len(x), coordinates=coordinates)
    denoise = in_parts(guided, x, max_batch, graph)
    if mask is not None:
        check_kept(job.plan, coordinates)
        denoise = Masked(denoise, mask, x, coordinates=coordinates)
    # Scale x to the time at which the run starts, so that what a mask keeps is exact to the last digit.
    if coordinates == "flow" and (mask is not None or rising[0] - kept[-1] > 1.01 * OFFSET):
        x = (1 - rising[0]) / (1 - kept[-1]) * x
    latent = job.run_checked(denoise, x, noise, job.with_bar(callback, "unsample") if progress else callback)
    return _normalize(latent, normalize, job.sigmas[-1])


_NEEDS: dict[int, tuple[weakref.ref[Tensor], tuple[str, ...]]] = {}
"""By id: latents of inversions, and what else each takes to give its image back. A tensor itself stays as it is."""


def tell_needs(
    latent: Tensor, memory: Mapping[str, Tensor], noises: Sequence[Tensor], embeddings: Mapping[str, Tensor]
) -> None:
    """Remember what belongs to a latent, for as long as its tensor lives, so that `sample` can warn if it is left."""
    belongings = {"auxiliary state": memory, "noises": noises, "embeddings": embeddings}
    needs = tuple(name for name, given in belongings.items() if len(given))
    if needs:
        key = id(latent)
        _NEEDS[key] = weakref.ref(latent, lambda _: _NEEDS.pop(key, None)), needs


def _needs_of(x: Any) -> tuple[str, ...]:
    """Return what was told of a tensor."""
    latent, needs = _NEEDS.get(id(x), (None, ()))
    return needs if latent is not None and latent() is x else ()


def _warn_of_needs(needs: tuple[str, ...], job: Ready, noise: Noise | None) -> None:
    """Warn if the latent of an inversion is sampled without what belongs to it."""
    left = []
    if "auxiliary state" in needs and job.plan is not None and job.plan.auxiliary:
        left.append("auxiliary state")
    if "noises" in needs and noise is None and job.plan is not None and job.plan.is_stochastic:
        left.append("noises")
    if "embeddings" in needs:  # one for each step, which this verb does not take
        left.append("embeddings")
    if left:
        warnings.warn(
            f"x is the latent of an inversion, and without its {' and '.join(left)} {job.rule.name} makes another "
            "image of it; use found.sample(denoiser), or pass x.clone() to sample the latent alone",
            RuntimeWarning,
            stacklevel=4,
        )


def rising_schedule(
    sigmas: Any, end_at_step: int = 0, sigma_offset: float = 1e-4, highest: float = math.inf
) -> tuple[float, ...]:
    """Return the schedule of `unsample`: reversed, `sigma_offset` added, the noisiest `end_at_step` steps dropped.

    The offset is left out if it would lead to `highest` (1 in flow time) or above.

    Raises:
        ValueError: a schedule that is not strictly decreasing, a negative `end_at_step` or `sigma_offset`.
    """
    schedule = as_schedule(sigmas)
    check_decreasing("sigmas", schedule, "unsample reverses it itself")
    sigma_offset = check_number("sigma_offset", sigma_offset, low=0, fix="the node uses 1e-4")
    kept = schedule[dropped_steps(schedule, end_at_step) :]
    levels: list[float] = []
    for sigma in reversed(kept):
        level = sigma + sigma_offset if sigma + sigma_offset < highest else sigma
        levels.append(level if not levels or level > levels[-1] else (levels[-1] + highest) / 2)
    return tuple(levels)


def offset_for(dtype: torch.dtype, schedule: tuple[float, ...]) -> float:
    """Return the default offset of `unsample`: what the dtype allows for data of size 1, 1e-4 to a tenth of sigma.

    The size of x does not enter: the result for one item of a batch must not depend on the others.
    """
    return max(OFFSET, min(2 * torch.finfo(dtype).eps - schedule[-1], 0.1 * schedule[0]))


def dropped_steps(schedule: tuple[float, ...], end_at_step: int) -> int:
    """Return how many steps `end_at_step` leaves out: at least one step always runs."""
    return min(check_integer("end_at_step", end_at_step, 0, fix="0 unsamples all the way"), len(schedule) - 2)


def _check_keeps_last(rule: Rule, rising: tuple[float, ...]) -> None:
    """Refuse a sampler that discards its last step, before compiling its Plan, which may fail for the same option."""
    if not rule.keeps_last:
        raise ValueError(
            f"{rule.name} discards its last step on a schedule that does not end in 0, so its latent would belong to "
            f"sigma {rising[-2]:g}; use ki.sampler({rule.name!r}, eta=0), which keeps it"
        )


def _normalize(latent: Tensor, how: Normalize, sigma: float) -> Tensor:
    """Return the latent as `unsample(normalize=how)` does."""
    if how is False:
        return latent
    if how == "sigma":
        return latent / sigma
    wide = latent.to(wide_dtype(latent.dtype))
    dims = tuple(range(latent.ndim)) if how is True else tuple(range(1, latent.ndim))
    varies = latent.numel() > (1 if how is True else len(latent))
    std = wide.std(dims, keepdim=True) if varies else wide.new_zeros(())
    if has_values(std) and not bool((std > 0).all()):  # one read, after the loop
        raise ValueError(
            f"normalize={how!r} needs a latent that varies, got standard deviation 0 in shape {tuple(latent.shape)}; "
            "use normalize='sigma'"
        )
    return ((wide - wide.mean(dims, keepdim=True)) / std).to(latent.dtype)
