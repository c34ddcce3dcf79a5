r"""The inverse of a whole run, from equations for all its evaluations at once.

But for the denoiser a Plan is linear. With the inputs `Y_k` of its evaluations and `D_k = D(Y_k, sigma_k)` its rows add
up to

    Y_k = alpha_k x_0 + sum_l A_kl D_l          x_N = alpha x_0 + sum_l B_l D_l

and, x_0 eliminated, to equations in which the image x_N is given and the evaluations are the unknowns:

    Y = a x_N + C D(Y),     a_k = alpha_k / alpha,     C = A - a B^T

A one-step rule couples an evaluation to less noisy ones alone, the memory of a multistep rule to noisier ones too. The
equations are solved by sweeps from the cleanest evaluation to the noisiest, one evaluation each. Everything in them is
known but the derivative D', and of that every sweep shows one difference more at each level, `D' dY = dD`. The linear
equations with D' from the last differences, and 0 outside their span, say what the noisier evaluations will be, and
with those the next `Y_k`. It is Anderson's acceleration with the structure of the run kept; the linear algebra of a
sweep is small next to a denoiser.

Source: the multisecant idea of Anderson (1965); Fang and Saad, Two Classes of Multisecant Methods for Nonlinear
Acceleration (2009); here one secant model for every evaluation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from kinvert import linalg
from kinvert.checks import check_count_field
from kinvert.denoisers import Guided
from kinvert.engine import stage_sigmas
from kinvert.forms import Denoised, State, Symbol, Uncond
from kinvert.inversion.plain import Recorded
from kinvert.inversion.solution import Judge, Solution, indices
from kinvert.inversion.solvers import Equation, Root, Select, Solver, StepEquation
from kinvert.plan import Plan
from kinvert.tensors import per_sample, wide_dtype

ROOM = 10  # differences for which memory is taken at once


@dataclass(frozen=True)
class Sweeps:
    """The method for whole runs, of any deterministic sampler without auxiliary state.

    Attributes:
        window: differences kept. Up to `2 window + 4` float64 tensors of x's size per evaluation of the run are the
            memory that a sample takes: as many as there were sweeps, in tens.
        max_sweeps: of one evaluation a level each, or fewer.
        focus: a sweep evaluates where the residual is above this share of the sample's largest. At high noise it mostly
            is not, for many sweeps.
        patience: sweeps in which the residual must halve; a sample that does not manage is given up.
    """

    window: int = 40
    max_sweeps: int = 100
    focus: float = 0.01
    patience: int = 12

    def __post_init__(self) -> None:
        check_count_field(self, "window")
        check_count_field(self, "max_sweeps")

    def solve(
        self,
        plan: Plan,
        select: Select,
        x: Tensor,
        goal: float,
        budget: int,
        judge: Judge | None = None,
        plain: Recorded | None = None,
    ) -> Solution:
        """Solve for every sample of x, shape (batch, *event), until its round trip misses at most `goal` of its size.

        The round trip is run where the residual is at most 0.3 goal, in units of max(size, sigma) at the worst
        evaluation; a tenth of that for samplers that magnify it. Evaluations beyond `budget` are not begun.

        Args:
            judge: what is asked of a round trip; by default the rms over all values, to `goal`.
            plain: an approximate run to start from, whose latent is returned where nothing better is found. Round trips
                are then run after so many evaluations, too, and no others in the end, so that a larger budget goes on
                where a smaller one ended.
        """
        judge = judge or Judge.of(plan, select, x, goal)
        # The noise is what x_N and D leave, magnified by sigma / sigma_min: no work for single precision.
        wide = linalg.widest(x.device)
        run, found = _Run(plan, select, x, self.window, wide), Solution.empty(x)
        run.scale = run.scale.maximum(judge.size.to(wide)[:, None]) * judge.share.to(wide)[:, None]
        spent = plan.evaluations  # by all alike
        if plain is None:
            run.start(run.x[:, None].expand_as(run.D))
        else:
            spent = plain.evaluations
            run.Y, run.D = plain.rows(run.x)
            found.take(plain, judge)
        found.evaluations, pause, gap = (
            [spent] * len(x),
            [spent + plan.evaluations] * len(x),
            [plan.evaluations] * len(x),
        )
        enough = judge.enough.tolist()
        asked, mark, since = [0.3 * goal] * len(x), [math.inf] * len(x), [0] * len(x)
        for sweep in range(1, self.max_sweeps + 1):
            residual, samples = run.residual(), run.samples
            sizes = run.sizes(residual).tolist()
            worst = [max(levels) for levels in sizes]
            found.improve(run, worst)
            for i, size in zip(samples, worst, strict=True):
                if size < mark[i] / 2:
                    mark[i], since[i] = size, sweep
            ready = [i for i, size in zip(samples, worst, strict=True) if size <= asked[i]]
            paused = [i for i in samples if plain and found.evaluations[i] >= pause[i]]
            found.check(plan, judge, sorted({*ready, *paused}))
            for i in ready:
                asked[i] /= 10
            for i in paused:
                gap[i] *= 2
                pause[i] = found.evaluations[i] + gap[i]
            going = [
                place for place, i in enumerate(samples)
                if not found.errors[i] <= enough[i]
                and sweep - since[i] < self.patience
                and found.evaluations[i] + 2 * plan.evaluations <= budget
            ]  # fmt: skip
            if not going or sweep == self.max_sweeps:
                break
            todo = [[size > max(asked[i], self.focus * worst[place]) for size in sizes[place]]
                    for place, i in enumerate(samples)]  # fmt: skip
            if len(going) < len(samples):
                run.keep(going)
                residual, todo = run.residual(), [todo[place] for place in going]
            for place, levels in zip(going, todo, strict=True):
                found.evaluations[samples[place]] += sum(levels)
            run.sweep(residual, todo)
        left = [i for i in range(len(x)) if found.open[i] and not (plain and math.isfinite(found.errors[i]))]
        found.check(plan, judge, left)
        return found


@dataclass(frozen=True)
class StepSweeps(Solver):
    """The same for the evaluations of one step, as a solver of its equation; `Sweeps` describes the attributes.

    The equation must be a `StepEquation`. The residual of a `Root` is the rms of the worst evaluation's, times the sum
    of |B|: to first order what the step misses y by at most, if D does not stretch.
    """

    window: int = 12
    max_sweeps: int = 40
    focus: float = 0.5
    patience: int = 6

    def __post_init__(self) -> None:
        check_count_field(self, "window")
        check_count_field(self, "max_sweeps")

    def solve(self, equation: Equation, start: Tensor) -> Root:
        """See `Solver`."""
        assert isinstance(equation, StepEquation)
        y, wide = equation.value, wide_dtype(equation.value.dtype)
        run = _Run(equation.plan, equation.select, y, self.window, wide)
        if equation.forecast is None:
            run.start_at(start.flatten(1).to(wide))
        else:
            run.start(equation.forecast.flatten(2).to(wide).repeat_interleave(run.outputs, 1))
        run.scale.fill_(1.0 / float(run.B.abs().sum()))
        equation.said = equation.mean(start)  # where the denoiser fails, nothing better is known
        equation.evaluations += equation.cost
        root = Root(start.clone(), torch.full_like(equation.tolerance, math.inf))
        mark, since = root.residual.clone(), torch.zeros_like(equation.evaluations)
        for sweep in range(self.max_sweeps):
            residual = run.residual()
            sizes = run.sizes(residual).nan_to_num(math.inf).to(y.dtype)
            worst = sizes.amax(1)
            better = root.keep(run.index, run.latent, worst)
            said = run.D[:, 0].reshape(-1, *run.shape).to(y.dtype)
            equation.said[run.index] = torch.where(per_sample(better, said), said, equation.said[run.index])
            halved = worst < mark[run.index] / 2
            mark[run.index] = torch.where(halved, worst, mark[run.index])
            since[run.index] = torch.where(halved, sweep, since[run.index])
            going = equation.is_open(run.index, worst) & (sweep - since[run.index] < self.patience)
            wanted = sizes > equation.tolerance[run.index, None].maximum(self.focus * worst[:, None])
            todo = (wanted & going[:, None]).tolist()  # the one read of a sweep
            places = [place for place, levels in enumerate(todo) if any(levels)]
            if not places:
                break
            if len(places) < len(todo):
                run.keep(places)
                residual, todo = run.residual(), [todo[place] for place in places]
            equation.evaluations[run.index] += indices([sum(levels) for levels in todo], y)
            run.sweep(residual, todo)
        return root


@dataclass(frozen=True, eq=False)
class Equations:
    """`Y = a x_N + C D` and `x_0 = (x_N - B D) / alpha`, and the noise level of every evaluation.

    D has one row for each evaluation, or two, D and U, where the Plan is guided: a (k,), C (k, rows), B (rows,).
    """

    a: np.ndarray
    C: np.ndarray
    B: np.ndarray
    alpha: float
    levels: tuple[float, ...]
    guided: bool

    @property
    def weights(self) -> np.ndarray:
        """What each evaluation weighs in x_N, in parts of their sum."""
        weights: np.ndarray = self.B.reshape(len(self.a), -1).sum(1)
        return weights / weights.sum()

    @property
    def coupling(self) -> float:
        """The largest sum of a row of |C|: by how much `Y <- a x_N + C D(Y)` stretches at most, if D does not."""
        return float(np.abs(self.C).sum(1).max())


def equations(plan: Plan) -> Equations:
    """The equations of a deterministic Plan that starts from x alone and does not forget it."""
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
    return Equations(a, C, result[1:], float(result[0]), tuple(levels), plan.is_guided)


class _Run:
    """The evaluations of some samples, their last differences, and the steps of the method.

    Y has shape (n, k, m), D (n, rows, m), and their differences dY (n, k, room, m), dD (n, rows, room, m), where room
    grows up to the window.
    """

    def __init__(self, plan: Plan, select: Select, x: Tensor, window: int, wide: torch.dtype) -> None:
        system = equations(plan)
        self.shape, self.dtype, self.select, self.window = x.shape[1:], x.dtype, select, window
        self.a, self.C, self.B = (torch.from_numpy(part).to(x.device, wide) for part in (system.a, system.C, system.B))
        self.alpha, self.outputs = system.alpha, 1 + system.guided
        self.noise = 100 * torch.finfo(x.dtype).eps
        self.sigmas = stage_sigmas(list(system.levels), x)
        self.scale = self.sigmas.T.to(wide, copy=True)
        self.x = x.flatten(1).to(wide)
        n, k, rows, m = len(x), len(self.a), len(self.B), self.x.shape[1]
        self.Y, self.D = self.x.new_zeros(n, k, m), self.x.new_zeros(n, rows, m)
        self.dY, self.dD = self.x.new_zeros(n, k, 0, m), self.x.new_zeros(n, rows, 0, m)
        self.samples = list(range(n))
        self.index = indices(self.samples, x)
        self.denoiser = select(self.index)
        self.sweeps = 0

    @property
    def latent(self) -> Tensor:
        """x_0 of every sample, shape (n, *event)."""
        return ((self.x - self.sum(self.B)) / self.alpha).reshape(-1, *self.shape).to(self.dtype)

    def residual(self) -> Tensor:
        """`a x + C D - Y`, shape (n, k, m)."""
        return self.a[:, None] * self.x[:, None] + linalg.combine(self.C[None], self.D) - self.Y

    def sum(self, weights: Tensor) -> Tensor:
        """`sum_l weights_l D_l` of every sample, shape (n, m)."""
        return linalg.combine(weights[None, None], self.D)[:, 0]

    def sizes(self, residual: Tensor) -> Tensor:
        """The rms of every evaluation's residual, in units of `scale`, which is sigma's; shape (n, k)."""
        return residual.square().mean(2).sqrt() / self.scale[self.index]

    def keep(self, places: list[int]) -> None:
        """Go on with some rows only."""
        index = indices(places, self.x)
        for name in ("x", "Y", "D", "dY", "dD"):
            setattr(self, name, getattr(self, name)[index])
        self.samples = [self.samples[place] for place in places]
        self.index = self.index[index]
        self.denoiser = self.select(self.index)

    def rows(self, k: int) -> slice:
        """The rows of D that belong to evaluation k."""
        return slice(k * self.outputs, (k + 1) * self.outputs)

    def evaluate(self, k: int, rows: Tensor, u: Tensor) -> None:
        """Let `Y_k = u` for some rows."""
        every = len(rows) == len(self.samples)
        denoiser = self.denoiser if every else self.select(self.index[rows])
        out = denoiser(u.reshape(-1, *self.shape).to(self.dtype), self.sigmas[k, : len(u)])
        self.Y[rows, k] = u
        for part, value in enumerate(self._outputs(out)):
            self.D[rows, k * self.outputs + part] = value.flatten(1).to(u.dtype)

    def _outputs(self, out: Tensor | Guided) -> tuple[Tensor, ...]:
        if isinstance(out, Guided):
            return tuple(out)[: self.outputs]
        return (out,) * self.outputs

    def start(self, expected: Tensor) -> None:
        """The first sweep, with D as expected; by what an evaluation gives more, noisier ones will give more too."""
        self.D[:] = expected
        for k in reversed(range(len(self.a))):
            self.evaluate(k, self.index, self.a[k] * self.x + self.sum(self.C[k]))
            more, noisier = self.D[:, self.rows(k)] - expected[:, self.rows(k)], slice(k * self.outputs)
            self.D[:, noisier] = expected[:, noisier] + more.repeat(1, k, 1)

    def start_at(self, latent: Tensor) -> None:
        """The first evaluations, those of a run from `latent`, shape (n, m)."""
        for k in range(len(self.a)):
            end = self.alpha * latent + self.sum(self.B)
            self.evaluate(k, self.index, self.a[k] * end + self.sum(self.C[k]))

    def sweep(self, residual: Tensor, todo: list[list[bool]]) -> None:
        """From the cleanest level to the noisiest, one evaluation where `todo[row][k]` says so."""
        known = min(self.sweeps, self.window)
        dY, dD = self.dY[:, :, :known], self.dD[:, :, :known]
        Y, D = self.Y.clone(), self.D.clone()
        if known:
            self.D += self._change(dY, dD, residual)
        places = [[row for row, levels in enumerate(todo) if levels[k]] for k in range(len(self.a))]
        uploaded = indices([row for rows in places for row in rows], self.x)
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
        """What the linear equations expect D to change by: `dY_k = residual_k + sum_l C_kl D'_l dY_l` for all k."""
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
        """Least-squares weights of differences of unit length, which may nearly depend on each other; no host read."""
        return linalg.solve(linalg.ridged(system, self.noise), right)
