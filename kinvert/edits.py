r"""Edits: go up with what an image shows, come down with what it shall show.

The way up finds a latent at the noise level `sigmas[end_at_step]`; the way down samples it with another condition. The
more of the image is to stay, the lower the level: below it the layout is settled, and only what is finer is made anew.

With `S_c` the sampler's run on `sigmas[end_at_step:]` under the condition c, `edit` returns `S_target(z)`, where z is

* "invert": the latent with `S_source(z) = x`, solved for and certified;
* "unsample": the sampler run upwards, which has this property approximately;
* "extract_noise": a random state, with noises of a stochastic sampler for which `S_source(z) = x` exactly;
* "noise": x with fresh noise, `z = x + sigma eps`, which needs no source and depends on x less.

Source: Hertz, Mokady, Tenenbaum, Aberman, Pritch and Cohen-Or, Prompt-to-Prompt Image Editing with Cross Attention
Control (2022), arXiv 2208.01626 (another condition for sampling than for inversion).
Source: Meng, He, Song, Song, Wu, Zhu and Ermon, SDEdit: Guided Image Synthesis and Editing with Stochastic Differential
Equations (2021), arXiv 2108.01073 ("noise").
Source: Huberman-Spiegelglas, Kulikov and Michaeli, An Edit Friendly DDPM Noise Space: Inversion and Manipulations
(2024), arXiv 2304.06140 ("extract_noise").
Source: Shoemake, Animating Rotation with Quaternion Curves (1985), doi 10.1145/325165.325242 (`slerp`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinvert.brownian import Brownian
from kinvert.checks import check_beside, check_choice, check_decreasing, check_finite, is_number
from kinvert.coordinates import Setting, settle
from kinvert.denoisers import Cfg, Denoiser, guide, kept_cfg, resize_mask, step_cfg
from kinvert.engine import check_state
from kinvert.inversion import Inversion, extract_noise, invert
from kinvert.levels import FlowTimes
from kinvert.metrics import mse
from kinvert.noise import Noise, White, derived_seed, white
from kinvert.ready import Ready
from kinvert.rules import Rule
from kinvert.sampling import dropped_steps, sample, unsample
from kinvert.showing.brief import never_fails, size
from kinvert.showing.html import card, html_never_fails, report
from kinvert.showing.thumbnails import thumbnails
from kinvert.tensors import wide_dtype

__all__ = ["METHODS", "Edited", "edit", "slerp"]

METHODS = ("invert", "unsample", "extract_noise", "noise")
"""The ways up that `edit` knows."""


@dataclass(frozen=True, eq=False)
class Edited:
    """Edited images, and what they were made of. `print` gives a short report, a notebook shows it with pictures.

    Attributes:
        image: the edited images, shape (batch, *event).
        original: the images before the edit, the same shape.
        latent: the latents that were sampled, at `sigmas[0]`, the same shape.
        sigmas: the noise levels of the way down: the given ones without the `end_at_step` noisiest.
        method: how the latents were found.
        inversion: for "invert" and "extract_noise" the latents with their certificate; None for the others.
        reconstruction: what the latents give with the source, the same shape; None if it was not asked for.
        evaluations: of the denoiser, up and down together, for the sample that took the most; guidance counts as one.
    """

    image: Tensor
    original: Tensor
    latent: Tensor
    sigmas: tuple[float, ...]
    method: str
    inversion: Inversion | None
    reconstruction: Tensor | None
    evaluations: int

    def __str__(self) -> str:
        """Return a short report."""
        lines = [
            f"edit of {len(self.image)} samples by {self.method!r}, through sigma {self.sigmas[0]:.4g} and back in "
            f"{len(self.sigmas) - 1} steps, {self.evaluations} evaluations",
            f"  changed          rms {_rms_between(self.image, self.original)}",
        ]
        if self.reconstruction is not None:
            lines.append(f"  with the source  rms {_rms_between(self.reconstruction, self.original)}")
        if self.inversion is not None:
            lines.append(f"  converged        {int(self.inversion.converged.sum())} of {len(self.image)}")
        return "\n".join(lines)

    @never_fails
    def __repr__(self) -> str:
        """Return size, way up and cost in one line; the device is not read."""
        parts = [size(self.image), f"by {self.method!r}", f"through sigma {self.sigmas[0]:.4g}"]
        return f"Edited({', '.join(parts)}, {self.evaluations} evaluations)"

    @html_never_fails
    def _repr_html_(self) -> str:
        labels = [f"changed {rms:.2g}" for rms in mse(self.image, self.original).sqrt().tolist()]
        return card(
            repr(self),
            report(str(self)),
            thumbnails("before", self.original),
            thumbnails("edited", self.image, None, labels),
        )


def _rms_between(a: Tensor, b: Tensor) -> str:
    errors = mse(a, b).sqrt()
    return f"{float(errors.median()):.3g} (median), {float(errors.min()):.3g} to {float(errors.max()):.3g}"


@torch.no_grad()
def edit(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    sampler: str | Rule = "euler",
    method: str = "invert",
    end_at_step: int = 0,
    tol: float | None = None,
    max_evals: int | None = None,
    cfg: Cfg = 1.0,
    source_cfg: Cfg = 1.0,
    source: Mapping[str, Any] | None = None,
    target: Mapping[str, Any],
    negative: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
    noise: Noise | None = None,
    progress: bool = False,
    max_batch: int | None = None,
    reconstruct: bool = False,
) -> Edited:
    """Edit images: find their latents under the source condition, and sample these under the target.

    `edit(..., method="invert")` is `ki.invert(..., positive=source, cfg=source_cfg)` and then `found.sample(denoiser,
    positive=target, cfg=cfg)`; the other methods are as short.

    Args:
        denoiser, sampler, progress, max_batch: as in `sample`.
        x: images, shape (batch, *event): the states at `sigmas[-1]`.
        sigmas: the sampling schedule, decreasing. For "invert" and "extract_noise" it ends above 0, e.g. `sigmas[:-1]`.
        method: how to go up: "invert" (exact), "unsample" (approximate), "extract_noise" (exact, for stochastic
            samplers) or "noise" (SDEdit: fresh noise of `sigmas[end_at_step]`).
        end_at_step: how far up: leave out this many steps at the noisy end, both ways. The larger, the more of the
            image stays; at least one step always runs.
        tol, max_evals: as in `invert`; `tol` is for "extract_noise" too.
        cfg: guidance towards the target on the way down, as in `sample`.
        source_cfg: guidance towards the source on the way up. Without it the way up is the easiest to invert.
        source: keyword arguments of the denoiser that say what x shows; "noise" does not need it.
        target: keyword arguments of the denoiser that say what x shall show; `{}` for none.
        negative: those of the unconditional branch, in both directions; needed where a cfg is not 1.
        mask: 1 = edit, 0 = keep; shapes as in `sample`. What it keeps is x, to the bit. "invert" takes a hard mask.
        noise: the fresh noise of "noise" and the states of "extract_noise", reproducible: `ki.noise.white(seed)`. A
            stochastic sampler under "noise" draws from the same source, independently of the start; there
            `ki.noise.brownian(seed)` may be given too. None: torch's global generator. Under "invert" it is that of
            a reversible sampler that draws noise, as in `invert`.
        reconstruct: also return what the latents give with the source. For "invert" and "extract_noise" it costs
            nothing: the certificate has it.

    Returns:
        An `Edited`: the images, and the inversion that they were made of.

    Raises:
        TypeError, ValueError: as in `invert`, `unsample`, `extract_noise` and `sample`, and for an argument that the
            method has no use for. Both conditions are checked before the first evaluation.
    """
    check_choice("method", method, METHODS)
    _check_used(method, tol, max_evals, noise)
    x = check_state(x)
    setting = _shortened(settle(denoiser, sampler, sigmas), end_at_step)
    steps = len(setting.schedule) - 1
    up, down = (_guidance(kept_cfg(scale, steps), c, negative) for scale, c in ((source_cfg, source), (cfg, target)))
    _check_guidance("target, with cfg", denoiser, x, setting, down)
    if method != "noise" or reconstruct:
        _check_guidance("source, with source_cfg", denoiser, x, setting, up)
    kept = None if mask is None else resize_mask(mask, x) == 0
    levels = FlowTimes(setting.schedule) if setting.coordinates == "flow" else setting.schedule
    run: dict[str, Any] = {"sampler": setting.rule, "mask": mask, "progress": progress, "max_batch": max_batch}
    found: Inversion | None = None
    spent = [0]  # evaluations after each step
    if method == "invert":
        found = invert(denoiser, x, levels, tol=tol, max_evals=max_evals, noise=noise, **up, **run)
    elif method == "extract_noise":
        found = extract_noise(denoiser, x, levels, tol=tol, noise=noise, **up, **run)  # type: ignore[arg-type]
    if found is not None:
        image = found.sample(denoiser, callback=_note(spent), progress=progress, max_batch=max_batch, **down)
        cost, latent = int(found.evaluations.max()) + spent[-1], found.latent
        return _edited(method, setting, x, kept, latent, image, found.restored if reconstruct else None, cost, found)
    if mask is not None:
        run |= {"latent": x, "mask_noise": torch.zeros_like(x) if method == "unsample" else None}
    if method == "unsample":
        way = {name: value for name, value in run.items() if name not in ("latent", "mask_noise")}
        latent = unsample(denoiser, x, levels, callback=_note(spent), **up, **way)
    else:
        latent, run["noise"] = _noised(x, setting, noise), noise
    seen = [0]
    image = sample(denoiser, latent, levels, callback=_note(seen), **down, **run)
    back = sample(denoiser, latent, levels, **up, **run) if reconstruct else None
    return _edited(method, setting, x, kept, latent, image, back, spent[-1] + seen[-1] * (1 + reconstruct), None)


def _edited(
    method: str, setting: Setting, x: Tensor, kept: Tensor | None, latent: Tensor, image: Tensor, back: Tensor | None,
    evaluations: int, found: Inversion | None,
) -> Edited:  # fmt: skip
    """Put x where the mask keeps it, which sampling leaves there up to rounding, and return the result."""
    if kept is not None:
        image = torch.where(kept, x, image)
        back = None if back is None else torch.where(kept, x, back)
    return Edited(image, x, latent, setting.schedule, method, found, back, evaluations)


def _note(spent: list[int]) -> Any:
    """Return a callback that notes the evaluations of a run."""
    return lambda step: spent.append(step.evaluations)


def _guidance(cfg: Cfg, positive: Mapping[str, Any] | None, negative: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"cfg": cfg, "positive": positive, "negative": negative}


def _shortened(setting: Setting, end_at_step: int) -> Setting:
    """Return the setting without the noisiest steps."""
    check_decreasing("sigmas", setting.schedule, "edit goes up by itself")
    return setting._replace(schedule=setting.schedule[dropped_steps(setting.schedule, end_at_step) :])


def _check_used(method: str, tol: float | None, max_evals: int | None, noise: Noise | None) -> None:
    """Raise ValueError for an argument that the method has no use for, TypeError for noise of another kind."""
    uses = {"tol": ("invert", "extract_noise"), "max_evals": ("invert",), "noise": ("invert", "extract_noise", "noise")}
    for name, value in (("tol", tol), ("max_evals", max_evals), ("noise", noise)):
        if value is not None and method not in uses[name]:
            known = ", ".join(map(repr, uses[name][:-1])) + " and " * (len(uses[name]) > 1) + repr(uses[name][-1])
            raise ValueError(f"{name} is for method={known}, got it for {method!r}; leave it out")
    if noise is not None and not isinstance(noise, White | Brownian):
        raise TypeError(f"noise must be a source with a seed, such as ki.noise.white(0), got {type(noise).__name__}")


def _check_guidance(name: str, denoiser: Denoiser, x: Tensor, setting: Setting, guidance: dict[str, Any]) -> None:
    """Raise before the first evaluation if a way could not run with its conditioning."""
    positive = guidance["positive"]
    if positive is None and name.startswith("target"):
        raise TypeError(
            "target must be a mapping of keyword arguments of the denoiser, e.g. {'label': label}, got None"
        )
    try:
        guide(
            denoiser, step_cfg(guidance["cfg"], setting.schedule), positive, guidance["negative"],
            pair=Ready.of(setting.rule, setting.schedule).is_guided, batch=len(x), coordinates=setting.coordinates,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _noised(x: Tensor, setting: Setting, noise: Noise | None) -> Tensor:
    """Return x, the state at the last level, with fresh noise up to the first: a draw of the forward process."""
    first, last = setting.schedule[0], setting.schedule[-1]
    signal = (1 - first) / (1 - last) if setting.coordinates == "flow" else 1.0
    seed = getattr(noise, "seed", None)
    if seed is not None:  # not the stream that a sampler draws from
        seed = [derived_seed("edit", one) for one in seed] if isinstance(seed, tuple) else derived_seed("edit", seed)
    wide = x.to(wide_dtype(x.dtype))
    eps = white(seed).bind(wide)(last, first)
    return (signal * wide + math.sqrt(first**2 - (signal * last) ** 2) * eps).to(x.dtype)


def slerp(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    r"""Interpolate spherically from `a` (t = 0) to `b` (t = 1), each sample by its own angle.

    For latents u and v at the angle w it is `(sin((1 - t) w) u + sin(t w) v) / sin w`, with the norm that noise is
    likely to have; a straight line passes through shorter vectors. The norms of the two are interpolated too.

    Args:
        a: shape (batch, *event), e.g. latents of `invert`.
        b: the same shape.
        t: a number, or one number for each sample, shape (batch,).

    Returns:
        The latents in between, shape (batch, *event), in the dtype of `a`.

    Raises:
        TypeError: `a` or `b` is not a floating point tensor.
        ValueError: the shapes differ; two samples point in opposite directions, so that many great circles are
            shortest; a sample is 0 and has no direction; t is not finite or has another shape.
    """
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.ndim:
            got = f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating point tensor of shape (batch, *event), got {got}")
    if a.shape != b.shape:
        raise ValueError(f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; they must be equal, (batch, *event)")
    check_beside("b", b, a)
    flat = [x.reshape(len(x), -1).to(wide_dtype(x.dtype)) for x in (a, b)]
    u, v = (x / x.norm(dim=1, keepdim=True) for x in flat)
    # Half angles by differences: the arc cosine loses half the digits near 0 and pi.
    angle = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
    if bad := (~(angle < torch.pi - 1e-4)).nonzero().flatten().tolist():
        raise ValueError(f"a and b must not be 0 nor point in opposite directions, as samples {bad} do")
    t = _share(t, angle)
    same = angle == 0
    sine = torch.where(same, 1.0, angle.sin())
    first = torch.where(same, 1 - t, ((1 - t) * angle).sin() / sine)
    second = torch.where(same, t, (t * angle).sin() / sine)
    return (first[:, None] * flat[0] + second[:, None] * flat[1]).reshape(a.shape).to(a.dtype)


def _share(t: Any, angle: Tensor) -> Tensor:
    """Return t as a tensor like the angles, shape (batch,)."""
    if not is_number(t) and not (isinstance(t, Tensor) and t.shape in ((), angle.shape)):
        got = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t)
        raise ValueError(f"t must be a number, or a tensor with one for each sample, shape ({len(angle)},), got {got}")
    share = torch.as_tensor(t, dtype=angle.dtype, device=angle.device).expand(len(angle))
    check_finite("t", share)
    return share
