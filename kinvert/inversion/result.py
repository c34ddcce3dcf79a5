"""What every inversion returns: the latent, and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinvert import metrics
from kinvert.checks import describe
from kinvert.denoisers import Cfg, Denoiser
from kinvert.engine import Callback
from kinvert.inversion.back import WayBack
from kinvert.inversion.card import inversion_card, inversion_line
from kinvert.inversion.problem import Reason
from kinvert.records import write_tree
from kinvert.sampling import tell_needs
from kinvert.showing.brief import never_fails
from kinvert.showing.html import html_never_fails

__all__ = ["Inversion", "WayBack"]


@dataclass(frozen=True, eq=False)
class Inversion:
    """A latent with its certificate; `print` gives a short report, a notebook shows it with pictures.

    Attributes:
        latent: the state at the noisiest level, shape (batch, *event), that the sampler maps to the given image.
        residuals: root mean square of `step(state) - known next state` per step and sample, shape (steps, batch), the
            first row at the noisiest step; an estimate of it if the step was solved by sweeps over its evaluations
            (`StepSweeps`); one row, the round-trip error, for a run that was solved as a whole.
        converged: whether sample i is reproduced to its tolerance, shape (batch,), bool. Judged by sampling the latent
            again, never by the solver's own residual alone.
        evaluations: denoiser evaluations spent on sample i, shape (batch,), int64; a guided pair counts as one.
        checking: those of `evaluations` that went into the certificate, per sample: the run that checks the latent, and
            the contraction.
        row_checks: those of `evaluations` that checked whether the denoiser mixes the samples of its batch, shape
            (batch,): three of the first sample and one of the second; None if that was not checked.
        round_trip_error: root mean square of `sample(latent) - image`, shape (batch,); with a mask, over the
            processed region; NaN if it was not checked. float32 if the image is in half precision.
        tolerance: what `converged` was judged by, in parts of the size of the image.
        allowed: the same as an error, shape (batch,): `tolerance` times the size, `max(rms(image), sigmas[-1])`.
        sigmas: noise levels of the run, decreasing; the latent is at the first.
        noises: for stochastic samplers, the unit-variance noises in the order in which a run draws them; replay them
            with `ki.noise.replay(inversion.noises)`.
        restored: what the sampler makes of the latent, shape (batch, *event): the image up to `round_trip_error`, and
            for a sample that did not converge the nearest image that was reached; None if it was not checked.
        contraction: per step and sample an estimate of `|I - F'|` at the solution, F the step, by power iteration: the
            factor by which the published fixed-point iteration would change an error; it fails above 1. Shape
            (steps, batch); None if the steps were not solved one by one, NaN if `max_evals` left nothing for it.
        amplification: of rounding errors, as predicted before the run, for algebraically reversible samplers.
        memory: auxiliary state that belongs to the latent (algebraically reversible samplers), by name.
        embeddings: negative conditioning of every step, by keyword, shape (steps, batch, ...) (null-text inversion).
        reasons: why the search ended, a `Reason` for each sample; `CONVERGED` if `converged` is true.
        back: the sampling run that was inverted, which `sample` runs.
        floor: rms error that the noise of the denoiser's answers (rounding, randomness) alone leaves, as far as the
            search met it, shape (batch,); 0 if it met none. No latent is known to come closer.
        warnings: what a reader should know, e.g. the step at which a sample could not be solved.
    """

    latent: Tensor
    residuals: Tensor
    converged: Tensor
    evaluations: Tensor
    round_trip_error: Tensor
    tolerance: float
    allowed: Tensor
    sigmas: tuple[float, ...]
    checking: int = 0
    row_checks: Tensor | None = None
    noises: tuple[Tensor, ...] = ()
    memory: dict[str, Tensor] = field(default_factory=dict)
    restored: Tensor | None = None
    contraction: Tensor | None = None
    amplification: float | None = None
    warnings: tuple[str, ...] = ()
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    reasons: tuple[Reason, ...] = ()
    back: WayBack | None = field(default=None, repr=False)
    floor: Tensor | None = None

    def __post_init__(self) -> None:
        tell_needs(self.latent, self.memory, self.noises, self.embeddings)

    def sample(
        self,
        denoiser: Denoiser,
        *,
        cfg: Cfg | None = None,
        positive: Mapping[str, Any] | None = None,
        negative: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        max_batch: int | None = None,
    ) -> Tensor:
        """Sample the latent back, with all that belongs to it: auxiliary state, noises, embeddings, mask, steering.

        `found.sample(denoiser)` is the image, up to `round_trip_error`. Give other conditioning to edit it.

        Args:
            denoiser: as in `ki.sample`.
            cfg, positive, negative: the conditioning; None takes that of the inversion, `{}` none.
            callback, progress, max_batch: as in `ki.sample`.

        Returns:
            The sample, shape (batch, *event).

        Raises:
            ValueError: an `Inversion` that was made by hand and does not know its sampler; as in `ki.sample`.
        """
        back = self._known_back()
        with torch.no_grad():
            return back.with_guidance(cfg, positive, negative).sample(
                denoiser, self.latent, memory=self.memory, noises=self.noises, embeddings=self.embeddings,
                callback=callback, progress=progress, max_batch=max_batch,
            )  # fmt: skip

    def differentiable(
        self,
        denoiser: Denoiser,
        x: Tensor | None = None,
        *,
        cfg: Cfg | None = None,
        positive: Mapping[str, Any] | None = None,
        negative: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Return the latent with its gradient: with respect to the image, the conditioning and the network.

        The latent solves `sample(latent) = x`, so the implicit function theorem gives its exact derivative there,
        whichever method found it. The backward pass solves linear equations by GMRES, to the `tolerance` of the
        inversion; each of its products is a pass backwards through the evaluations of a step, for multistep samplers
        of the run. A reversible sampler is differentiated through its inverse.

        It costs a run of the sampler, whose graph is kept as `ki.run` keeps it; `torch.utils.checkpoint` around the
        denoiser makes that small.

        Args:
            denoiser: the one that was inverted. It must be differentiable.
            x: the image that was inverted; give it if it requires gradients. None takes `back.image`.
            cfg, positive, negative: as they were inverted with, None takes those; tensors in them may require
                gradients. So may the network's parameters, and all else that the denoiser depends on.

        Returns:
            The values of `latent`, with a graph. It can be differentiated once. In the backward pass a RuntimeError
            says, with the number, that the equations could not be solved.

        Raises:
            ValueError: samples that did not converge or were not checked, since the theorem needs a solution; another
                image, network or conditioning, whose latent this is not; noises, embeddings or steering; a denoiser
                without a graph; an `Inversion` that was made by hand.
        """
        from kinvert.inversion.gradients import implicit_latent  # which runs the engine

        back = self._known_back().with_guidance(cfg, positive, negative)
        x = back.image if x is None else x
        if not isinstance(x, Tensor) or (x.shape, x.dtype, x.device) != (
            self.latent.shape,
            self.latent.dtype,
            self.latent.device,
        ):
            raise ValueError(
                f"x must be the image, of shape {tuple(self.latent.shape)} in {self.latent.dtype} on "
                f"{self.latent.device}, got {describe(x)}"
            )
        plan, bound = back.bound(denoiser, x)
        return implicit_latent(self, plan, bound, x)

    def _known_back(self) -> WayBack:
        if self.back is None:
            raise ValueError(
                "this Inversion does not know its sampler; use ki.sample with the latent, memory and noises"
            )
        return self.back

    def save(self, path: Path | str) -> None:
        """Write everything to a safetensors file, which `ki.load` reads; nothing is pickled.

        It holds the latent and what belongs to it, the certificate, the sampler with its options, the levels, `cfg`,
        the mask, the steering and the conditioning. Tensors, numbers and strings are kept exactly, a guidance of
        `kinvert.guidance` by its parameters. Other objects and functions of your own are kept as a description, and
        `sample` then asks for them.

        Args:
            path: the file to create or replace; `.safetensors` is the usual ending.

        Raises:
            ValueError: it cannot be written.
        """
        from kinvert.inversion.stored import inversion_tree  # which imports this module

        write_tree(path, "inversion", inversion_tree(self))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Inversion:
        """Return the inversion on another device, or in another dtype.

        Args:
            device: where all its tensors go; None leaves them.
            dtype: of the latent, of what belongs to it and of floating point conditioning; None leaves them. The
                numbers of the certificate stay as they were measured, and a note in `warnings` says so.

        Raises:
            TypeError: a dtype that is no floating point format of states.
        """
        from kinvert.inversion.stored import moved_inversion

        return moved_inversion(self, device, dtype)

    @classmethod
    def join(cls, parts: Sequence[Inversion]) -> Inversion:
        """Join inversions of the parts of a batch into the one of the whole."""
        if len(parts) == 1:
            return parts[0]

        def cat(name: str, dim: int = 0) -> Any:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.cat(values, dim)

        names = ("latent", "converged", "evaluations", "round_trip_error", "allowed", "restored", "floor")
        return replace(
            parts[0],
            **{name: cat(name) for name in names},
            residuals=cat("residuals", 1),
            contraction=cat("contraction", 1),
            amplification=max((part.amplification for part in parts if part.amplification is not None), default=None),
            memory={name: torch.cat([part.memory[name] for part in parts]) for name in parts[0].memory},
            noises=tuple(map(torch.cat, zip(*(part.noises for part in parts), strict=True))),
            reasons=tuple(reason for part in parts for reason in part.reasons),
            warnings=tuple(dict.fromkeys(note for part in parts for note in part.warnings)),
        )

    @never_fails
    def __repr__(self) -> str:
        """Return size, run and verdict in one line."""
        return inversion_line(self)

    @html_never_fails
    def _repr_html_(self) -> str:
        return inversion_card(self)

    def __str__(self) -> str:
        """Return a short report."""
        n, steps = len(self.latent), len(self.sigmas) - 1
        per_step, checking = self.evaluations.cpu().double().median() / steps, self.checking / steps
        lines = [f"inversion of {n} samples over {steps} steps, sigma {self.sigmas[-1]:g} to {self.sigmas[0]:g}"]
        if self.round_trip_error.isnan().any():
            lines.append("  not checked      the latents were not sampled again (check=False)")
        else:
            worst = int(self.round_trip_error.argmax())
            lines += [
                f"  converged        {int(self.converged.sum())} of {n} (tolerance {self.tolerance:.3g} of its "
                f"size, an rms error of {_span(self.allowed)}; sampled again)",
                f"  round-trip error median {float(self.round_trip_error.median()):.3g}, worst "
                f"{float(self.round_trip_error[worst]):.3g} (sample {worst})",
            ]
        lines.append(
            f"  evaluations      {float(per_step):.1f} a step and sample (median), {checking:.1f} for this certificate"
        )
        if len(self.residuals) == steps:
            step = int(self.residuals.amax(1).argmax())
            lines.append(
                f"  residuals        at most {float(self.residuals.max()):.3g} (step {step}, {self._step(step)})"
            )
        if self.contraction is not None:
            known = self.contraction.nan_to_num(0.0)
            step = int(known.amax(1).argmax())
            lines.append(
                f"  contraction      of a fixed-point iteration at least about {float(known.max()):.3g} (step {step}, "
                f"{self._step(step)}), median {float(self.contraction.nanmedian()):.3g}"
            )
        if self.floor is not None and self.floor.any():
            lines.append(
                f"  noise floor      the denoiser's answers are rounded or noisy: an rms error of about "
                f"{float(self.floor.max()):.2g} is left"
            )
        if self.amplification is not None:
            lines.append(f"  amplification    of rounding about {self.amplification:.3g}, predicted")
        lines.append(f"  latent / sigma   {self._gaussianity()}")
        if self.noises:
            lines.append(f"  noises           {len(self.noises)} maps, rms {_rms_of(self.noises):.3f}")
        return "\n".join(lines + [f"  {warning}" for warning in self.warnings])

    def _step(self, step: int) -> str:
        return f"sigma {self.sigmas[step]:.4g} -> {self.sigmas[step + 1]:.4g}"

    def _gaussianity(self) -> str:
        """Return moments of `latent / sigma`, medians over the samples; a standard normal has 0, 1, 0, 0."""
        z = self.latent.cpu().double() / self.sigmas[0]
        names = {"mean": metrics.mean, "std": metrics.std, "skew": metrics.skew, "kurtosis": metrics.kurtosis}
        parts = [f"{name} {float(value(z).median()):+.3f}" for name, value in names.items()]
        return ", ".join(parts) + f", KS distance to a normal {float(metrics.ks(z).median()):.3f}"


def _span(values: Tensor) -> str:
    low, high = f"{values.min():.3g}", f"{values.max():.3g}"
    return low if low == high else f"{low} to {high}"


def _rms_of(noises: tuple[Tensor, ...]) -> float:
    return float(torch.stack([n.cpu().double().square().mean() for n in noises]).mean().sqrt())
