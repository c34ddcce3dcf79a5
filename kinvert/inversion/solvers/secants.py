r"""The evaluations of a run as unknowns, and the model of the denoiser's derivative that sweeps learn from them.

Of `Y = a x_N + C D(Y)` (see `couplings`) only the derivative D' is unknown. Each sweep adds one secant pair (dY, dD)
per evaluation; D' is modelled on their span and taken as 0 outside it. The linear equations with that model say what
the noisier evaluations will return, and with those where to evaluate next. It is Anderson's acceleration with the
structure of the run kept; the linear algebra of a sweep is small next to a denoiser.

Source: Anderson, Iterative Procedures for Nonlinear Integral Equations (1965); Fang and Saad, Two Classes of
Multisecant Methods for Nonlinear Acceleration (2009); here one secant model for every evaluation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from kinvert import linalg
from kinvert.denoisers import BoundDenoiser, Guided
from kinvert.engine import stage_sigmas
from kinvert.inversion.couplings import Couplings
from kinvert.inversion.problem import Guess

__all__ = ["Secants"]

ROOM = 10  # differences for which memory is taken at once


class Secants:
    """The evaluations of some samples, their last differences, and the moves of a sweep.

    Attributes:
        Y, D: inputs and outputs of the evaluations, shapes (n, k, m) and (n, rows, m); two rows for a guided one.
        dY, dD: their differences, shapes (n, k, room, m) and (n, rows, room, m); room grows up to the window.
        samples, index: the samples that the n rows belong to, as numbers and as a tensor of shape (n,).
        unit: what the residual of an evaluation is measured in, shape (batch, k).
    """

    def __init__(self, system: Couplings, denoiser: BoundDenoiser, x: Tensor, window: int, wide: torch.dtype) -> None:
        self.shape, self.dtype, self.whole, self.window = x.shape[1:], x.dtype, denoiser, window
        self.a, self.C, self.B = (torch.from_numpy(part).to(x.device, wide) for part in (system.a, system.C, system.B))
        self.alpha, self.outputs = system.alpha, 1 + system.guided
        self.noise = 100 * torch.finfo(x.dtype).eps
        self.sigmas = stage_sigmas(list(system.levels), x)
        self.unit = self.sigmas.T.to(wide, copy=True)
        self.x = x.flatten(1).to(wide)
        n, k, rows, m = len(x), len(self.a), len(self.B), self.x.shape[1]
        self.Y, self.D = self.x.new_zeros(n, k, m), self.x.new_zeros(n, rows, m)
        self.dY, self.dD = self.x.new_zeros(n, k, 0, m), self.x.new_zeros(n, rows, 0, m)
        self.samples, self.index, self.denoiser = list(range(n)), torch.arange(n, device=x.device), denoiser
        self.sweeps = 0

    @property
    def latent(self) -> Tensor:
        """Return x_0 of every sample, shape (n, *event)."""
        return ((self.x - self.sum(self.B)) / self.alpha).reshape(-1, *self.shape).to(self.dtype)

    def residual(self) -> Tensor:
        """Return `a x + C D - Y`, shape (n, k, m)."""
        return self.a[:, None] * self.x[:, None] + linalg.combine(self.C[None], self.D) - self.Y

    def sum(self, weights: Tensor) -> Tensor:
        """Return `sum_l weights_l D_l` of every sample, shape (n, m)."""
        return linalg.combine(weights[None, None], self.D)[:, 0]

    def sizes(self, residual: Tensor) -> Tensor:
        """Return the rms of every evaluation's residual in its unit, shape (n, k); infinite if it is not finite."""
        return (residual.square().mean(2).sqrt() / self.unit[self.index]).nan_to_num(math.inf, math.inf)

    def keep(self, places: list[int]) -> None:
        """Go on with some rows only."""
        index = torch.tensor(places, device=self.x.device)
        for name in ("x", "Y", "D", "dY", "dD"):
            setattr(self, name, getattr(self, name)[index])
        self.samples = [self.samples[place] for place in places]
        self.index = self.index[index]
        self.denoiser = self.whole.take(self.index)

    def rows(self, k: int) -> slice:
        """Return the rows of D that belong to evaluation k."""
        return slice(k * self.outputs, (k + 1) * self.outputs)

    def evaluate(self, k: int, rows: Tensor, u: Tensor) -> None:
        """Let `Y_k = u` for some rows, and call the denoiser there."""
        every = len(rows) == len(self.index)
        denoiser = self.denoiser if every else self.whole.take(self.index[rows])
        out = denoiser(u.reshape(-1, *self.shape).to(self.dtype), self.sigmas[k, : len(u)])
        self.Y[rows, k] = u
        for part, value in enumerate(self._outputs(out)):
            self.D[rows, k * self.outputs + part] = value.flatten(1).to(u.dtype)

    def _outputs(self, out: Tensor | Guided) -> tuple[Tensor, ...]:
        if isinstance(out, Guided):
            return tuple(out)[: self.outputs]
        return (out,) * self.outputs

    def start(self, guess: Guess) -> int:
        """Make the first evaluations, or take recorded ones; return how many each sample was asked for."""
        if guess.denoised is None:
            self._start_at(guess.u.flatten(1).to(self.x.dtype))
            return len(self.a)
        expected = guess.denoised.flatten(2).to(self.x.dtype)
        if expected.shape[1] < len(self.B):
            expected = expected.repeat_interleave(self.outputs, 1)
        if guess.inputs is None:
            self._start_from(expected)
            return len(self.a)
        self.Y, self.D = guess.inputs.flatten(2).to(self.x.dtype), expected
        return 0

    def _start_from(self, expected: Tensor) -> None:
        """Sweep with D as expected; the error found at one evaluation is added to the guesses of all noisier ones."""
        self.D[:] = expected
        for k in reversed(range(len(self.a))):
            self.evaluate(k, self.index, self.a[k] * self.x + self.sum(self.C[k]))
            more, noisier = self.D[:, self.rows(k)] - expected[:, self.rows(k)], slice(k * self.outputs)
            self.D[:, noisier] = expected[:, noisier] + more.repeat(1, k, 1)

    def _start_at(self, latent: Tensor) -> None:
        """Evaluate along a run from `latent`, shape (n, m)."""
        for k in range(len(self.a)):
            end = self.alpha * latent + self.sum(self.B)
            self.evaluate(k, self.index, self.a[k] * end + self.sum(self.C[k]))

    def sweep(self, residual: Tensor, todo: list[list[bool]]) -> None:
        """Evaluate from the cleanest level to the noisiest, for each row those levels k with `todo[row][k]`."""
        known = min(self.sweeps, self.window)
        dY, dD = self.dY[:, :, :known], self.dD[:, :, :known]
        Y, D = self.Y.clone(), self.D.clone()
        if known:
            self.D += self._change(dY, dD, residual)
        places = [[row for row, levels in enumerate(todo) if levels[k]] for k in range(len(self.a))]
        uploaded = torch.tensor([row for rows in places for row in rows], dtype=torch.int64, device=self.x.device)
        for k, rows in reversed(list(enumerate(uploaded.split([len(rows) for rows in places])))):
            own, couple = self.rows(k), self.C[k, self.rows(k)]
            self.D[:, own] = D[:, own]
            if not len(rows):
                continue
            f = self.a[k] * self.x[rows] + self.sum(self.C[k])[rows] - Y[rows, k]
            u = Y[rows, k] + f
            if known:
                left, image = dY[rows, k], (dD[rows, own] * couple[:, None, None]).sum(1)
                weights = self.weights(linalg.gram(left, left - image), linalg.gram(left, f[:, None]))
                u = u + linalg.combine(weights.mT, image)[:, 0]
            self.evaluate(k, rows, u)
        moved = self.Y - Y
        size = moved.norm(dim=2, keepdim=True).clamp(min=torch.finfo(moved.dtype).tiny)
        slot = self.sweeps % self.window
        if slot == self.dY.shape[2]:
            room = (0, 0, 0, min(ROOM, self.window - slot))
            self.dY, self.dD = pad(self.dY, room), pad(self.dD, room)
        self.dY[:, :, slot] = moved / size
        self.dD[:, :, slot] = (self.D - D) / size.repeat_interleave(self.outputs, 1)
        self.sweeps += 1

    def _change(self, dY: Tensor, dD: Tensor, residual: Tensor) -> Tensor:
        """Return the expected change of D, from `dY_k = residual_k + sum_l C_kl D'_l dY_l` for all k."""
        n, k, known, _ = dY.shape
        dD, C = dD.unflatten(1, (k, self.outputs)), self.C.unflatten(1, (k, self.outputs))
        own, left = dY.flatten(0, 1), dY.flatten(1, 2)
        system = torch.zeros(n, k, known, k, known, dtype=linalg.widest(dY.device), device=dY.device)
        for part in range(self.outputs):
            products = linalg.gram(left, dD[:, :, part].flatten(1, 2)).reshape(system.shape)
            system.addcmul_(products, C[:, None, :, part, None].to(system.dtype), value=-1)
        system.diagonal(dim1=1, dim2=3).add_(linalg.gram(own, own).reshape(n, k, known, known).permute(0, 2, 3, 1))
        right = linalg.gram(own, residual.flatten(0, 1)[:, None]).reshape(n, k * known, 1)
        weights = self.weights(system.reshape(n, k * known, k * known), right).reshape(n * k, 1, known)
        changes = [linalg.combine(weights, dD[:, :, part].flatten(0, 1))[:, 0] for part in range(self.outputs)]
        return torch.stack(changes, 1).reshape(n, k * self.outputs, -1)

    def weights(self, system: Tensor, right: Tensor) -> Tensor:
        """Solve for least-squares weights of unit differences, which may nearly depend on each other; no host read."""
        return linalg.solve(linalg.ridged(system, self.noise), right)
