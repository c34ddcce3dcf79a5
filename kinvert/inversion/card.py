"""How an `Inversion` shows itself: its one line, and its card in a notebook."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kinvert.showing.brief import read_numbers, size
from kinvert.showing.charts import curve
from kinvert.showing.html import Html, card, paragraph, report, table
from kinvert.showing.thumbnails import thumbnails

if TYPE_CHECKING:
    from kinvert.inversion.result import Inversion

__all__ = ["inversion_card", "inversion_line"]


def inversion_line(found: Inversion) -> str:
    """Return size, run and verdict in one line; the device is read once, for three numbers."""
    steps = len(found.sigmas) - 1
    parts = [size(found.latent), f"{steps} steps, sigma {found.sigmas[0]:.4g} to {found.sigmas[-1]:.4g}"]
    if found.back is not None:
        parts.insert(0, found.back.sampler.name)
    error = found.round_trip_error
    numbers = read_numbers(lambda: (found.converged.sum(), error.isnan().any(), error.max()), beside=error)
    if numbers is not None:
        converged, unchecked, worst = numbers
        verdict = f"{converged:.0f} of {len(found.latent)} converged, worst round-trip error {worst:.2g}"
        parts.append("not checked" if unchecked else verdict)
    return f"Inversion({', '.join(parts)})"


def inversion_card(found: Inversion) -> Html:
    """Return the certificate, thumbnails of the latent and of what sampling makes of it, and the residuals by step."""
    level = found.sigmas[0]
    verdicts = _verdicts(found)
    parts = [
        report(str(found)),
        thumbnails("latent / sigma", found.latent.detach() / level, 3.0, verdicts),
        thumbnails("sampled back", found.restored, None, verdicts),
        _residuals(found),
    ]
    beside = [(name, size(value)) for name, value in (*found.memory.items(), *found.embeddings.items())]
    if beside:
        parts += [paragraph("what else belongs to the latent"), table((), beside)]
    return card(inversion_line(found), *parts)


def _verdicts(found: Inversion) -> list[str]:
    """Return for each sample its round-trip error, with a mark for converged or not."""
    errors, converged = found.round_trip_error.tolist(), found.converged.tolist()
    return [
        "not checked" if math.isnan(error) else f"{'✓' if good else '✗'} {error:.1e}"
        for error, good in zip(errors, converged, strict=True)
    ]


def _residuals(found: Inversion) -> Html:
    steps = len(found.sigmas) - 1
    if len(found.residuals) != steps or steps < 2:
        return paragraph("residuals by step", "there are none: the run was solved as a whole")
    worst = found.residuals.detach().amax(1).tolist()
    labels = [f"step {i}, sigma {found.sigmas[i]:.4g} to {found.sigmas[i + 1]:.4g}" for i in range(steps)]
    return Html(
        paragraph("residual of each step", "rms, the worst sample; dashed: the error that the image may have")
        + curve(worst, labels, float(found.allowed.min()))
    )
