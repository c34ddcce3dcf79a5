"""Figures of results in memory, `ki.plot`: each function returns a matplotlib figure, which a notebook shows.

| Function | draws |
| --- | --- |
| `images` | images in rows |
| `latents` | latents, and how their values are distributed |
| `differences` | results beside their difference from an image |
| `convergence` | the residual that each step was left with |
| `contraction` | whether the published fixed-point iteration would converge |
| `schedules` | noise levels |
| `coefficients` | the coefficients of a Plan |

Each takes one thing or several by name: `ki.plot.images({"image": image, "edited": edited})`. A method has one
colour everywhere, also in the figures of the benchmark; another name has the same looks in every figure here, unless
another curve has them already. Nothing here uses pyplot, so no figure stays in memory and no window opens;
`figure.savefig("a.png")` writes one. Figures of the benchmark's records are in `kinvert.bench.report.figures`.

Needs matplotlib: `pip install 'kinvert[cli]'`.
"""

from kinvert.plot.curves import coefficients as coefficients
from kinvert.plot.curves import contraction as contraction
from kinvert.plot.curves import convergence as convergence
from kinvert.plot.curves import schedules as schedules
from kinvert.plot.rows import differences as differences
from kinvert.plot.rows import images as images
from kinvert.plot.rows import latents as latents

__all__ = ["coefficients", "contraction", "convergence", "differences", "images", "latents", "schedules"]
