r"""The evaluations of a run as unknowns, and the model of the denoiser's derivative that sweeps learn from them.

Of `Y = a x_N + C D(Y)` (see `couplings`) only the derivative D' is unknown. Each evaluation of a sweep adds one secant
pair (dY, dD) at its level; D' is modelled on their span and taken as a number c outside it. The linear equations with
that model say what the noisier evaluations will return, and with those where to evaluate next. It is Anderson's
acceleration with the structure of the run kept; the linear algebra of a sweep is small next to a denoiser.

The unknowns are those of `D - c Y` (see `Couplings.reduced`), whose derivative is 0 outside the span. They are called
D below.

What must be kept of an evaluation are the values D and the last dD, which are rounded to half the digits: they are a
model. All else enters inner products alone, for which `Sketch` keeps a few numbers of each tensor.

Source: Anderson, Iterative Procedures for Nonlinear Integral Equations (1965); Fang and Saad, Two Classes of
Multisecant Methods for Nonlinear Acceleration (2009); here one secant model for every evaluation.
"""

from __future__ import annotations

import contextlib
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from kinvert import linalg
from kinvert.denoisers import BoundDenoiser, Guided
from kinvert.engine import stage_sigmas
from kinvert.inversion.couplings import Couplings
from kinvert.inversion.noise_floor import small_steps
from kinvert.inversion.problem import Guess
from kinvert.linalg import Sketch
from kinvert.tensors import rms

__all__ = ["SLOPE", "Secants"]

SLOPE, WIDTH = 0.35, 0.5
"""What D' is taken for outside of the span of differences: `SLOPE s^2 / (s^2 + sigma^2)`, s = `WIDTH` rms(x).

That is a part of the derivative of an exact denoiser of independent values of standard deviation s. It is 1 in some
directions of an image, at low noise, and 0 in others.
"""

ROOM = 10  # differences for which memory is taken at once
NARROW = {torch.float64: torch.float32, torch.float32: torch.float16}  # what differences are rounded to


class Secants:
    """The evaluations of some samples, their last differences, and the moves of a sweep.

    Attributes:
        D: outputs of the evaluations, shape (n, rows, m); two rows for a guided one.
        dD: the last differences of each, with rms 1, shape (n, rows, room, m); room grows up to the window.
        size: by how much these must be multiplied to belong to a dY of norm 1, shape (n, rows, room).
        sY, sD, sdY, sdD: sketches of the inputs, of the outputs, and of their differences for a dY of norm 1.
        counts: evaluations of each row at each level that have left a difference, shape (n, k), on the host.
        samples, index: the samples that the n rows belong to, as numbers and as a tensor of shape (n,).
        unit: what the residual of an evaluation is measured in, shape (batch, k).
        c: what D' is taken for, shape (n, k).
        a, C, B, alpha: the couplings of each sample, shapes (n, k), (n, k, rows), (n, rows) and (n, 1).
    """

    def __init__(
        self, system: Couplings, denoiser: BoundDenoiser, x: Tensor, window: int, wide: torch.dtype,
        slope: float = 0.0,
    ) -> None:  # fmt: skip
        self.shape, self.dtype, self.whole, self.window = x.shape[1:], x.dtype, denoiser, window
        self.system, self.outputs = system, 1 + system.guided
        self._reduce(slope, x)
        self.noise = 100 * torch.finfo(x.dtype).eps
        self.sigmas = stage_sigmas(list(system.levels), x)
        self.unit = self.sigmas.T.to(wide, copy=True)
        self.x = x.flatten(1).clone()
        self.sketch = Sketch(x[:1])
        n, (_, k, rows), m = len(x), self.C.shape, self.x.shape[1]
        room, size = min(window, ROOM), self.sketch.size
        self.D = self.x.new_zeros(n, rows, m)
        self.dD = self.x.new_zeros(n, rows, room, m, dtype=NARROW.get(x.dtype, x.dtype))
        self.sx = self.sketch(self.x)
        self.sY, self.sD = self.sx.new_zeros(n, k, size), self.sx.new_zeros(n, rows, size)
        self.sdY, self.sdD = (self.x.new_zeros(n, count, room, size) for count in (k, rows))
        self.size = self.sx.new_zeros(n, rows, room)
        self.counts = [[0] * k for _ in range(n)]
        self.samples, self.index, self.denoiser = list(range(n)), torch.arange(n, device=x.device), denoiser

    def _reduce(self, slope: float, x: Tensor) -> None:
        """Set c and the couplings of each sample; c is 0 where another would couple more. It reads the device once."""
        levels, guesses, systems = np.array(self.system.levels), list[np.ndarray](), list[Couplings]()
        for size in rms(x).tolist() if slope else [0.0] * len(x):
            c, system, width = 0.0 * levels, self.system, WIDTH * size
            if 0 < width < math.inf:
                with contextlib.suppress(np.linalg.LinAlgError):
                    guess = slope / (1.0 + (levels / width) ** 2)
                    reduced = system.reduced(guess)
                    if reduced.coupling < system.coupling:
                        c, system = guess, reduced
            guesses.append(c)
            systems.append(system)
        parts = [(system.a, system.C, system.B, np.array([system.alpha])) for system in systems]
        self.c, self.a, self.C, self.B, self.alpha = (
            torch.from_numpy(np.stack(part)).to(x.device, linalg.widest(x.device))
            for part in (guesses, *zip(*parts, strict=True))
        )
        self.is_reduced = any(guess.any() for guess in guesses)

    @property
    def latent(self) -> Tensor:
        """Return x_0 of every sample, shape (n, *event)."""
        return ((self.x - self.sum(self.B)) / self.alpha).reshape(-1, *self.shape).to(self.dtype)

    def residual(self) -> Tensor:
        """Return a sketch of `a x + C D - Y`, shape (n, k, size)."""
        return self.a[:, :, None] * self.sx[:, None] + linalg.combine(self.C, self.sD) - self.sY

    def sum(self, weights: Tensor) -> Tensor:
        """Return `sum_l weights_l D_l` of every sample in the widest dtype, shape (n, m); weights of (n, rows)."""
        return linalg.combine_wide(weights[:, None], self.D)[:, 0]

    def input(self, k: int) -> Tensor:
        """Return `Y_k = a x + C D` of every sample in the widest dtype, shape (n, m)."""
        return self.a[:, k, None] * self.x + self.sum(self.C[:, k])

    def sizes(self, residual: Tensor) -> Tensor:
        """Return the rms of every evaluation's residual in its unit, shape (n, k); infinite if it is not finite."""
        size = (residual.square().sum(2) / self.x.shape[1]).sqrt()
        return (size / self.unit[self.index]).nan_to_num(math.inf, math.inf)

    def keep(self, places: list[int]) -> None:
        """Go on with some rows only, in the same memory."""
        for name in ("x", "sx", "c", "a", "C", "B", "alpha", "D", "dD", "size", "sY", "sD", "sdY", "sdD"):
            values = getattr(self, name)
            for row, place in enumerate(places):
                if row != place:
                    values[row] = values[place]
            setattr(self, name, values[: len(places)])
        index = torch.tensor(places, device=self.x.device)
        self.samples, self.counts = [self.samples[p] for p in places], [self.counts[p] for p in places]
        self.index = self.index[index]
        self.denoiser = self.whole.take(self.index)

    def rows(self, k: int) -> slice:
        """Return the rows of D that belong to evaluation k."""
        return slice(k * self.outputs, (k + 1) * self.outputs)

    def evaluate(self, k: int, rows: Tensor, u: Tensor, slots: Tensor | None = None) -> None:
        """Call the denoiser at `Y_k = u` for some rows; `slots`, shape (len(rows),), take the differences."""
        every = len(rows) == len(self.index)
        denoiser = self.denoiser if every else self.whole.take(self.index[rows])
        moved, own = self.sketch(u) - self.sY[rows, k], self.rows(k)
        self.sY[rows, k] += moved
        out = denoiser(u.to(self.dtype).reshape(-1, *self.shape), self.sigmas[k, : len(u)].clone())
        tiny = torch.finfo(self.dtype).tiny
        size = moved.norm(dim=1, keepdim=True).clamp(min=tiny)
        if slots is not None:
            self.sdY[rows, k, slots] = (moved / size).to(self.dtype)
        for row, value in zip(range(own.start, own.stop), self._outputs(out), strict=True):
            new = (value.flatten(1) - self.c[rows, k, None] * u).to(self.dtype)
            sketch = self.sketch(new)
            if slots is not None:
                change = new - self.D[rows, row]
                unit = rms(change).clamp(min=tiny)
                self.dD[rows, row, slots] = (change / unit[:, None]).to(self.dD.dtype)
                self.size[rows, row, slots] = unit / size[:, 0]
                self.sdD[rows, row, slots] = ((sketch - self.sD[rows, row]) / size).to(self.dtype)
            self.D[rows, row], self.sD[rows, row] = new, sketch

    def probe(self, k: int, rows: Tensor, length: Tensor) -> Tensor:
        """Return the rms of the second difference of D at evaluation k, over steps of rms `length`; 3 evaluations."""
        y = self.input(k)[rows].to(self.dtype)
        e = small_steps(y, length.to(self.dtype))
        denoiser, sigma = self.whole.take(self.index[rows]), self.sigmas[k, : len(rows)]
        total = torch.zeros_like(y)
        for weight, u in ((-2, y), (1, y + e), (1, y - e)):
            out = denoiser(u.reshape(-1, *self.shape), sigma.clone())
            total = total + weight * self._outputs(out)[0].flatten(1).to(total.dtype)
        return rms(total).to(length.dtype)

    def _outputs(self, out: Tensor | Guided) -> tuple[Tensor, ...]:
        if isinstance(out, Guided):
            return tuple(out)[: self.outputs]
        return (out,) * self.outputs

    def start(self, guess: Guess) -> int:
        """Make the first evaluations, or take recorded ones; return how many each sample was asked for."""
        k, rows = self.C.shape[1:]
        if guess.denoised is None:
            self._start_at(guess.u.flatten(1))
            return k
        share = rows // guess.denoised.shape[1]  # rows that are expected to be the same
        for row in range(rows):
            self.D[:, row] = guess.denoised[:, row // share].flatten(1).to(self.dtype)
        base = self.x if guess.reached is None else guess.reached.flatten(1)
        if self.is_reduced:
            self._subtract(base)
        if guess.reached is None:
            self._start_from_expected()
            return k
        for row in range(rows):
            self.sD[:, row] = self.sketch(self.D[:, row])
        self.sY = self.a[:, :, None] * self.sketch(base)[:, None] + linalg.combine(self.C, self.sD)
        return 0

    def _subtract(self, base: Tensor) -> None:
        """Go from D to `D - c Y`, with the inputs Y of a run that ends at `base`, shape (n, m)."""
        a, C = (torch.from_numpy(part).to(self.a) for part in (self.system.a, self.system.C))
        c, columns = self.c[:, :, None], max(linalg.LEAST, base.shape[1] // len(C))
        for part, x in zip(self.D.split(columns, 2), base.split(columns, 1), strict=True):
            inputs = a[:, None] * x[:, None].to(a) + linalg.combine(C[None], part.to(a))
            part.sub_((c * inputs).repeat_interleave(self.outputs, 1).to(self.dtype))

    def _start_from_expected(self) -> None:
        """Sweep from what D holds; the error found at one evaluation is added to the guesses of all noisier ones."""
        for k in reversed(range(self.C.shape[1])):
            own = self.rows(k)
            before = self.D[:, own].clone()
            self.evaluate(k, self.index, self.input(k))
            for row in range(own.start):
                self.D[:, row] += (self.D[:, own] - before)[:, row % self.outputs]

    def _start_at(self, latent: Tensor) -> None:
        """Evaluate along a run from `latent`, shape (n, m)."""
        for k in range(self.C.shape[1]):
            end = self.alpha * latent + self.sum(self.B)
            self.evaluate(k, self.index, self.a[:, k, None] * end + self.sum(self.C[:, k]))

    def sweep(self, residual: Tensor, todo: list[list[bool]]) -> None:
        """Evaluate from the cleanest level to the noisiest, for each row those levels k with `todo[row][k]`."""
        known = min(self.window, max(map(max, self.counts)))
        change = self._change(known, residual) if known else None
        expected = self.sD.clone()
        if change is not None:
            expected += self._times(change, self.sdD[:, :, :known])
        for k, rows, slots in self._places(todo):
            own = self.rows(k)
            expected[:, own] = self.sD[:, own]
            if not len(rows):
                continue
            u = self.input(k)
            if change is not None:
                f = self.a[:, k, None] * self.sx + linalg.combine(self.C[:, k : k + 1], expected)[:, 0] - self.sY[:, k]
                u += self._moved(k, change, f)
            self.evaluate(k, rows, u[rows], slots)
            expected[:, own] = self.sD[:, own]

    def _places(self, todo: list[list[bool]]) -> list[tuple[int, Tensor, Tensor]]:
        """Return for every level, the cleanest first, the rows to evaluate and where to put their differences."""
        levels, rows, slots = list[int](), list[int](), list[int]()
        for k in reversed(range(self.C.shape[1])):
            places = [row for row, wanted in enumerate(todo) if wanted[k]]
            levels.append(len(places))
            rows += places
            for row in places:
                slots.append(self.counts[row][k] % self.window)
                self.counts[row][k] += 1
        if max(slots, default=0) >= self.dD.shape[2]:
            room = (0, 0, 0, min(ROOM, self.window - self.dD.shape[2]))
            self.dD, self.sdY, self.sdD = pad(self.dD, room), pad(self.sdY, room), pad(self.sdD, room)
            self.size = pad(self.size, room[2:])
        uploaded = torch.tensor([rows, slots], dtype=torch.int64, device=self.x.device)
        parts = uploaded.split(levels, 1)
        return [(k, *part.unbind(0)) for k, part in zip(reversed(range(self.C.shape[1])), parts, strict=True)]

    def _moved(self, k: int, change: Tensor, f: Tensor) -> Tensor:
        """Return by how much `Y_k` is expected to differ from `a x + C D`, shape (n, m).

        `f`, a sketch, is the residual that the expected changes of the noisier evaluations leave there.
        """
        n, known, own, room = len(change), change.shape[2], self.rows(k), self.dD.shape[2]
        left, couple = self.sdY[:, k, :known], self.C[:, k, own]
        image = (self.sdD[:, own, :known] * couple[:, :, None, None].to(self.dtype)).sum(1)
        weights = self.weights(linalg.gram(left, left - image), linalg.gram(left, f[:, None]))[:, None, :, 0]
        every = torch.cat([change[:, :k], weights], 1).repeat_interleave(self.outputs, 1)
        every = pad(every * self.C[:, k, : own.stop, None], (0, room - known)) * self.size[:, : own.stop]
        return linalg.combine_wide(every.reshape(n, 1, -1), self.dD[:, : own.stop].flatten(1, 2))[:, 0]

    def _times(self, change: Tensor, rows: Tensor) -> Tensor:
        """Return the changes of D in a basis of their differences, (n, k, s) and (n, rows, s, size)."""
        n, count, known, size = rows.shape
        weights = change.repeat_interleave(self.outputs, 1).reshape(n * count, 1, known)
        return linalg.combine(weights, rows.flatten(0, 1)).reshape(n, count, size)

    def _change(self, known: int, residual: Tensor) -> Tensor:
        """Return weights w of the expected changes, from `dY_k = residual_k + sum_l C_kl D'_l dY_l`; (n, k, known).

        Evaluation k is expected to change by `sum_s w_ks dY_ks`, and what it returns by the same sum of dD.
        """
        sdY, sdD = self.sdY[:, :, :known], self.sdD[:, :, :known]
        n, k, _, _ = sdY.shape
        sdD, C = sdD.unflatten(1, (k, self.outputs)), self.C.unflatten(2, (k, self.outputs))
        own, left = sdY.flatten(0, 1), sdY.flatten(1, 2).to(residual.dtype)
        system = torch.zeros(n, k, known, k, known, dtype=residual.dtype, device=own.device)
        for part in range(self.outputs):
            for level in range(k):  # one by one, since products are made of wide copies
                products = linalg.gram(left, sdD[:, level, part]).reshape(n, k, known, known)
                system[:, :, :, level].addcmul_(products, C[:, :, level, part, None, None], value=-1)
        system.diagonal(dim1=1, dim2=3).add_(linalg.gram(own, own).reshape(n, k, known, known).permute(0, 2, 3, 1))
        right = linalg.gram(own, residual.flatten(0, 1)[:, None]).reshape(n, k * known, 1)
        return self.weights(system.reshape(n, k * known, k * known), right).reshape(n, k, known)

    def weights(self, system: Tensor, right: Tensor) -> Tensor:
        """Solve for least-squares weights of unit differences, which may nearly depend on each other; no host read."""
        return linalg.solve(linalg.ridged(system, self.noise), right)
