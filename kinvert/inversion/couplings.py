r"""How the evaluations of a run depend on each other: a Plan is linear but for the denoiser.

With the inputs `Y_k` of its evaluations and `D_k = D(Y_k, sigma_k)` the rows of a Plan add up to

    Y_k = alpha_k x_0 + sum_l A_kl D_l          x_N = alpha x_0 + sum_l B_l D_l

and, x_0 eliminated, to equations in which the image x_N is given and the evaluations are the unknowns:

    Y = a x_N + C D(Y),     a_k = alpha_k / alpha,     C = A - a B^T

A one-step rule couples an evaluation to less noisy ones alone, the memory of a multistep rule to noisier ones too.

The same equations hold for `E = D - c Y` in place of D, with other numbers. If c is near the derivative of D, E varies
less than D, and the equations stretch what it varies by less: with `G = (1 - C c)^-1`, which solves for Y,

    Y = G a x_N + G C E          x_N (1 - B c G a) = alpha x_0 + (B + B c G C) E
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kinvert.forms import Denoised, State, Symbol, Uncond
from kinvert.plan import Plan

__all__ = ["Couplings", "couplings"]


@dataclass(frozen=True, eq=False)
class Couplings:
    """`Y = a x_N + C D` and `x_0 = (x_N - B D) / alpha`, and the noise level of every evaluation.

    D has one row for each evaluation, or two, D and U, where the Plan is guided: a (k,), C (k, rows), B (rows,).
    """

    a: np.ndarray
    C: np.ndarray
    B: np.ndarray
    alpha: float
    levels: tuple[float, ...]
    guided: bool
    ends: tuple[float, float]

    @property
    def noisiest(self) -> float:
        """Return the noise level where the Plan starts."""
        return self.ends[0]

    @property
    def r(self) -> float:
        """Return the ratio of its last noise level to its first."""
        return self.ends[1] / self.ends[0]

    @property
    def weights(self) -> np.ndarray:
        """Return the weight of each evaluation in x_N, in parts of their sum."""
        weights: np.ndarray = self.B.reshape(len(self.a), -1).sum(1)
        return weights / weights.sum()

    @property
    def coupling(self) -> float:
        """Return the largest sum of a row of |C|: the most that `Y <- a x_N + C D(Y)` stretches, if D does not."""
        return float(np.abs(self.C).sum(1).max())

    def reduced(self, c: np.ndarray) -> Couplings:
        """Return the couplings of `D - c Y`; c has shape (k,), and holds for D and U where the Plan is guided.

        Raises:
            numpy.linalg.LinAlgError: a denoiser `D = c Y` would leave nothing of x_0, or make the equations singular.
        """
        k = len(self.a)
        own, last = self.C.reshape(k, k, -1).sum(2), c * self.B.reshape(k, -1).sum(1)
        solved = np.linalg.solve(np.eye(k) - own * c, np.column_stack([self.a, self.C]))
        a, C = solved[:, 0], solved[:, 1:]
        share = 1.0 - float(last @ a)
        if share == 0.0:
            raise np.linalg.LinAlgError("the run forgets where it starts")
        return replace(self, a=a, C=C, B=(self.B + last @ C) / share, alpha=self.alpha / share)


def couplings(plan: Plan) -> Couplings:
    """Return the couplings of a deterministic Plan that starts from x alone and does not forget it."""
    outputs = 2 if plan.is_guided else 1
    unit = np.eye(1 + plan.evaluations * outputs)
    values: dict[Symbol, np.ndarray] = {State("x"): unit[0]}
    rows: list[np.ndarray] = []
    levels: list[float] = []
    for step in plan.steps:
        for j, stage in enumerate(step.stages):
            first = 1 + len(rows) * outputs
            values[Denoised(j)], values[Uncond(j)] = unit[first], unit[first + outputs - 1]
            rows.append(stage.input.at(values))
            levels.append(stage.sigma)
        values = {State(name): form.at(values) for name, form in (("x", step.x), *step.memory)}
    inputs, result = np.stack(rows), values[State("x")]
    a = inputs[:, 0] / result[0]
    C = inputs[:, 1:] - np.outer(a, result[1:])
    C[np.abs(C) < 1e-13 * np.abs(C).max(axis=1, keepdims=True)] = 0.0  # what cancels but for rounding
    return Couplings(
        a, C, result[1:], float(result[0]), tuple(levels), plan.is_guided, (plan.sigmas[0], plan.sigmas[-1])
    )
