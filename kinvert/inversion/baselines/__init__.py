r"""Published inversions, for comparison: each a few lines on the same engine, with the same certificate.

In the coordinates `x = x0 + sigma eps`, with a step of the sampler from the noisier level `a` to the cleaner `b`,
`D(x, sigma)` the denoised image and `d(x, sigma) = (x - D) / sigma`, DDIM samples by the Euler step
`x_b = F(x_a) = x_a + (b - a) d(x_a, a)`. Its inverse solves `x_a = x_b + (a - b) d(x_a, a)`, where x_a stands on both
sides, and most methods differ in what they put on the right:

* `ddim_inversion`: x_b, at either of the two noise levels;
* `aidi`, `renoise`, `dpm_solver_inversion`: an iteration; `gnri`: one with a prior;
* `easyinv`: the same as DDIM, and less of the result; `forward_first`: noise first, and DDIM after it;
* `uni_inv`: a prediction of x_a by the step before;
* `rf_inversion`, `rf_solver`, `fireflow`: the equation of a rectified flow, steered, or with a method of order 2;
* `direct_inversion`, `null_text`: DDIM, and what corrects its error when sampling.

`flow_edit` inverts nothing: it is an edit to compare with edits by inversion.

All others take `(denoiser, x, sigmas, *, cfg, positive, negative)` as `sample` does, and options of their own. x is the
image, shape (batch, *event), float32 or float64: the state at `sigmas[-1] > 0`. All return an `Inversion` whose
`round_trip_error` was measured by sampling the latent again with the sampler the method belongs to, and whose
`evaluations` count that, as `checking`. `converged` is judged as `invert` does; that a method is approximate is no
reason for a warning here. Where nothing was solved, `residuals` is the error of the whole run; where a step was, that
of the last iterate that was evaluated, which is the one before the one taken. All raise TypeError or ValueError for an
input that cannot work, with what was got and the fix: a schedule that ends at 0, half precision, NaN, an option out of
its range.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from kinvert.inversion.baselines.explicit import (
    ddim_inversion,
    easyinv,
    fireflow,
    forward_first,
    rf_solver,
    uni_inv,
)
from kinvert.inversion.baselines.guided_newton import gnri
from kinvert.inversion.baselines.inversion_free import flow_edit
from kinvert.inversion.baselines.iterative import Averaged, aidi, dpm_solver_inversion, renoise
from kinvert.inversion.baselines.steered import rf_inversion, steer
from kinvert.inversion.baselines.stored import direct_inversion, null_text, sample_null_text
from kinvert.inversion.result import Inversion
from kinvert.showing.registry import Registry

__all__ = [
    "BASELINES",
    "Averaged",
    "aidi",
    "ddim_inversion",
    "direct_inversion",
    "dpm_solver_inversion",
    "easyinv",
    "fireflow",
    "flow_edit",
    "forward_first",
    "gnri",
    "null_text",
    "register_baseline",
    "renoise",
    "rf_inversion",
    "rf_solver",
    "sample_null_text",
    "steer",
    "uni_inv",
]

Baseline = TypeVar("Baseline", bound=Callable[..., Inversion])

BASELINES: Registry[Callable[..., Inversion]] = Registry(
    {
        "ddim_clean": functools.partial(ddim_inversion, at="clean"),
        "ddim_noisy": ddim_inversion,
        "easyinv": easyinv,
        "uni_inv": uni_inv,
        "forward_first": forward_first,
        "rf_inversion": rf_inversion,
        "rf_solver": rf_solver,
        "fireflow": fireflow,
        "aidi": aidi,
        "aidi_anderson": functools.partial(aidi, window=3),
        "renoise": renoise,
        "gnri": gnri,
        "dpm_solver_1": dpm_solver_inversion,
        "dpm_solver_2": functools.partial(dpm_solver_inversion, order=2),
        "direct_inversion": direct_inversion,
    },
    what="published inversions",
    place="ki.inversion.baselines.BASELINES",
)
"""Name -> function, for every baseline that takes any conditioning; `null_text` needs one that can be optimised."""


def register_baseline(name: str) -> Callable[[Baseline], Baseline]:
    """Add a published inversion to `BASELINES`, under a name; for use as a decorator.

    Raises:
        ValueError: the name is taken.
    """

    def register(baseline: Baseline) -> Baseline:
        if name in BASELINES:
            raise ValueError(f"the name {name!r} is taken by another baseline; choose another")
        BASELINES[name] = baseline
        return baseline

    return register
