r"""Further roots of `F(u) = y`: follow the curve of solutions on from a known one.

The curve `(1 - t) (u - u0) + t (F(u) - y) = 0` of `continuation` passes through every root at t = 1, whatever u0 is.
From a known root it goes on both ways, and where it crosses t = 1 again there is another root.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kinvert.inversion.problem import Guess, Problem, Root, Search
from kinvert.inversion.solvers.continuation import Continuation, Curve, chord

__all__ = ["FARTHEST", "follow_on"]

FARTHEST = 3.0
"""The t at which a curve is given up; from there on it hardly turns back."""


def follow_on(problem: Problem, root: Tensor, start: Tensor, upwards: Tensor, settings: Continuation) -> Root:
    """Follow one curve of each sample from a root to its next crossing of t = 1.

    Args:
        problem: `F(u) = y`.
        root: known roots, shape (batch, *event).
        start: u0, shape (batch, *event).
        upwards: whether t grows at first, shape (batch,), bool.
        settings: how closely to follow.

    Returns:
        What was found; `residual` is infinite for a curve that ended before it was there: at t < 0, beyond `FARTHEST`,
        after `settings.max_points` points, or for lack of evaluations.
    """
    search = Search(problem, root)
    curve, everyone = Curve(settings, search, start), search.everyone
    here = torch.cat([root.flatten(1) / curve.scale, torch.ones_like(curve.scale)], 1)
    side = torch.where(upwards, 1.0, -1.0).to(root)[:, None]
    tangent = torch.zeros_like(here)
    tangent[:, -1:] = side
    active = everyone[search.affords(everyone) >= 3]
    tangent[active] = curve.tangent(here[active], tangent[active], active)
    length = torch.full_like(curve.scale, settings.length)
    found, missed = root.clone(), torch.full_like(search.residual, torch.inf)
    for _ in range(settings.max_points):
        active = active[(length[active, 0] > 1e-6 * settings.length) & (search.affords(active) >= 3)]
        if not len(active):
            break
        last, border = here[active], tangent[active]
        ahead, good = curve.advance(last, border, length, active)
        crossed = good & (side[active, 0] * (ahead[:, -1] - 1) <= 0)
        if bool(crossed.any()):
            index, before, after = active[crossed], last[crossed], ahead[crossed]
            crossing = torch.lerp(before, after, (1 - before[:, -1:]) / (after[:, -1:] - before[:, -1:]))
            end = settings.newton.solve(problem.take(index, search.evaluations), Guess(curve.point(crossing, index)))
            search.evaluations[index] += end.evaluations
            found[index], missed[index] = end.u, end.residual
        inside = (ahead[:, -1] > 0) & (ahead[:, -1] < FARTHEST)
        going = good & ~crossed & inside & (search.affords(active) >= 3)
        here[active[going]] = ahead[going]
        tangent[active[going]] = curve.tangent(ahead[going], chord(last, ahead)[going], active[going])
        active = active[going | ~good]
    search.u, search.residual = found, missed
    return search.root()
