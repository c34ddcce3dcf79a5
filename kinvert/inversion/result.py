"""What every inversion returns: the latent, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Inversion:
    """A latent with its certificate; `print` gives a short report.

    Attributes:
        latent: the state at the noisiest level, shape (batch, *event), that the sampler maps to the given image.
        residuals: root mean square of `step(state) - known next state` per step and sample, shape (steps, batch), the
            first row at the noisiest step; one row for the whole run where it was solved as one.
        converged: whether sample i is reproduced to its tolerance, shape (batch,), bool. Judged by sampling the latent
            again, never by the solver's own residual alone.
        evaluations: denoiser evaluations spent on sample i, shape (batch,), int64; a guided pair counts as one.
        round_trip_error: root mean square of `sample(latent) - image`, shape (batch,).
        tolerance: what `converged` was judged by.
        sigmas: noise levels of the run, decreasing; the latent is at the first.
        noises: for stochastic samplers, the unit-variance noises in the order in which a run draws them; replay them
            with `ki.noise.replay(inversion.noises)`.
        memory: auxiliary state that belongs to the latent (algebraically reversible samplers), by name.
        warnings: what a reader should know, e.g. the step at which a sample could not be solved.
    """

    latent: Tensor
    residuals: Tensor
    converged: Tensor
    evaluations: Tensor
    round_trip_error: Tensor
    tolerance: float
    sigmas: tuple[float, ...]
    noises: tuple[Tensor, ...] = ()
    memory: dict[str, Tensor] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        n, steps = len(self.latent), len(self.sigmas) - 1
        per_step = self.evaluations.double().median() / steps
        flat = (self.latent.reshape(n, -1).double() / self.sigmas[0]).cpu()
        worst = int(self.round_trip_error.argmax())
        lines = [
            f"inversion of {n} samples over {steps} steps, sigma {self.sigmas[-1]:g} to {self.sigmas[0]:g}",
            f"  converged        {int(self.converged.sum())} of {n} (tolerance {self.tolerance:.3g}, sampled again)",
            f"  round-trip error median {self.round_trip_error.median():.3g}, worst {self.round_trip_error[worst]:.3g} "
            f"(sample {worst})",
            f"  evaluations      {per_step:.1f} a step and sample (median)",
            f"  latent / sigma   mean {flat.mean():+.3f}, standard deviation {flat.std(correction=0):.3f}",
        ]
        if self.noises:
            lines.append(f"  noises           {len(self.noises)} maps, rms {_rms_of(self.noises):.3f}")
        return "\n".join(lines + [f"  {warning}" for warning in self.warnings])


def rms(x: Tensor) -> Tensor:
    """Root mean square per sample, shape (batch,)."""
    return x.reshape(len(x), -1).square().mean(1).sqrt()


def _rms_of(noises: tuple[Tensor, ...]) -> float:
    return float(torch.stack([n.double().square().mean() for n in noises]).mean().sqrt())
