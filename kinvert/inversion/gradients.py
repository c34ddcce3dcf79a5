r"""Gradients of a latent: the implicit function theorem at the solution that an inversion found.

A sampler's run that starts from x alone falls into pieces that do, single steps or, for multistep samplers, the whole
run. In a piece from z to y with evaluations `o_k = D(Y_k, sigma_k)` everything else is linear, the Plan's rows:

    Y_k = a_k z + sum_j N_kj o_j        y = e z + sum_j B_j o_j

A gradient b with respect to y goes backwards through that, from the last evaluation to the first,

    mu_j = B_j b + sum_k N_kj G_k       G_k = D'(Y_k)^T mu_k        F'^T b = e b + sum_k a_k G_k

Given the gradient g with respect to the latent z instead, b is the solution of `F'^T b = g`, and `-mu_j` the gradient
with respect to the evaluation `o_j`: from there autograd goes on to the conditioning, the parameters, and all else that
the denoiser depends on. b is the g of the next cleaner piece, and at last the gradient with respect to the image. The
iteration of a root finder takes no part in it.

Source: Bai, Kolter and Koltun, Deep Equilibrium Models (2019), arXiv 1909.01377, for gradients at a fixed point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kinvert.analysis import explicit_inverse
from kinvert.denoisers import BoundDenoiser, Guided
from kinvert.engine import run_state
from kinvert.engine.recompute import refuse_second_derivatives, started_state
from kinvert.engine.stepwise import stepwise
from kinvert.forms import Denoised, State, Symbol, Uncond
from kinvert.inversion.solvers.newton import gmres
from kinvert.plan import Plan, Step
from kinvert.tensors import rms, wide_dtype

if TYPE_CHECKING:
    from kinvert.inversion.result import Inversion

__all__ = ["Piece", "implicit_latent", "pieces"]

KRYLOV, ROUNDS = 100, 10
"""Products of one call of GMRES, and calls at most, each for what the one before left over."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Steps that start from x alone; see the module.

    Attributes:
        first: number of its first evaluation in the run.
        outputs: for each evaluation the places of what it returned: one, or two of a pair.
        sigma, sigma_next: the levels at its ends.
        a, e, B, N: the coefficients; shapes (stages,), (), (outputs,) and (stages, outputs).
    """

    first: int
    outputs: tuple[tuple[int, ...], ...]
    sigma: float
    sigma_next: float
    a: np.ndarray
    e: float
    B: np.ndarray
    N: np.ndarray


def pieces(plan: Plan) -> list[Piece]:
    """Cut a deterministic Plan wherever a step starts from x alone.

    Raises:
        ValueError: a piece forgets the state at its start, so that no theorem says how that depends on the end.
    """
    groups: list[list[Step]] = []
    for step in plan.steps:
        if not groups or not step.reads <= {"x"}:
            groups = groups or [[]]
            groups[-1].append(step)
        else:
            groups.append([step])
    found: list[Piece] = []
    for group in groups:
        found.append(_piece(plan, group, sum(len(piece.outputs) for piece in found)))
    return found


def _piece(plan: Plan, steps: Sequence[Step], first: int) -> Piece:
    """Compute the coefficients of some steps by running their rows on vectors (z, outputs...)."""
    stages = [stage for step in steps for stage in step.stages]
    outputs, count = [], 0
    for stage in stages:
        outputs.append(tuple(range(count, count + 1 + stage.guided)))
        count += 1 + stage.guided
    unit = np.eye(1 + count)
    values: dict[Symbol, np.ndarray] = {State("x"): unit[0]}
    inputs, done = [], 0
    for step in steps:
        for k, stage in enumerate(step.stages):
            inputs.append(stage.input.at(values) + 0 * unit[0])
            for symbol, place in zip((Denoised(k), Uncond(k)), outputs[done], strict=False):
                values[symbol] = unit[1 + place]
            done += 1
        rows = {"x": step.x, **dict(step.memory)}
        values = {State(name): row.at(values) + 0 * unit[0] for name, row in rows.items()}
    end = values[State("x")]
    if end[0] == 0:
        raise ValueError(
            f"{plan.rule.name} forgets x between sigma {steps[0].sigma:g} and {steps[-1].sigma_next:g}, so that its "
            "latent is one of many and has no gradient; stop above 0, e.g. sigmas[:-1]"
        )
    table = np.stack(inputs) if inputs else np.zeros((0, 1 + count))
    return Piece(
        first, tuple(outputs), steps[0].sigma, steps[-1].sigma_next, table[:, 0], float(end[0]), end[1:], table[:, 1:]
    )


def implicit_latent(found: Inversion, plan: Plan, denoiser: BoundDenoiser, x: Tensor) -> Tensor:
    """Return the latent of an inversion as a differentiable function of the image and of the denoiser.

    Args:
        found: the inversion, of the run of `plan`.
        plan: deterministic.
        denoiser: with its conditioning and its mask bound.
        x: the image, like `found.latent`.

    Raises:
        ValueError, TypeError: see `Inversion.differentiable`.
    """
    check_theorem(found, plan)
    if found.memory:
        return _through_inverse(found, plan, denoiser, x)
    cut = pieces(plan)
    inputs, outputs, restored = _evaluate(plan, denoiser, found.latent)
    region = None if found.back is None else found.back.mask
    error = rms(restored.to(wide_dtype(x.dtype)) - x.detach(), region)
    _refuse_another(error, 2 * found.allowed, "a round-trip error", found)
    equations = _Equations(cut, inputs, outputs, max(found.tolerance, 640 * torch.finfo(wide_dtype(x.dtype)).eps))
    latent: Tensor = _Implicit.apply(equations, found.latent, x, *(part for pair in outputs for part in pair))
    return latent


def check_theorem(found: Inversion, plan: Plan) -> None:
    """Raise ValueError if the latent is no solution, or one of an equation that is not known here."""
    if plan.is_stochastic or found.noises:
        raise ValueError(
            f"the latent of {plan.rule.name} belongs to its noises, which were drawn: it is no function of the image; "
            "invert a deterministic sampler"
        )
    if found.embeddings or (found.back is not None and found.back.steering is not None):
        raise ValueError("the latent was found for embeddings or steering that depend on the image; use ki.invert")
    if found.converged.all():
        return
    if found.round_trip_error.isnan().any():
        raise ValueError("the inversion was not checked, so it is not known to be a solution; leave out check=False")
    i = int((found.round_trip_error / found.allowed).argmax())
    raise ValueError(
        f"the gradient follows from an equation that sample {i} does not solve: its round-trip error is "
        f"{float(found.round_trip_error[i]):.2g}, allowed {float(found.allowed[i]):.2g} ({found.reasons[i].name}), and "
        f"{int((~found.converged).sum())} of {len(found.converged)} samples did not converge; leave those out, "
        "x[found.converged], or invert them first (more evaluations, more steps, float64)"
    )


def _refuse_another(error: Tensor, allowed: Tensor, what: str, found: Inversion) -> None:
    """Raise ValueError if the latent is not that of this image and this denoiser."""
    if not bool((error <= allowed).all()):
        i = int((error / allowed).nan_to_num(torch.inf).argmax())
        raise ValueError(
            f"the latent is not the one of this image and this denoiser: sample {i} has {what} of "
            f"{float(error[i]):.2g}, allowed {float(allowed[i]):.2g}, where the inversion had "
            f"{float(found.round_trip_error[i]):.2g}; give the same x, network and conditioning as to invert"
        )


def _through_inverse(found: Inversion, plan: Plan, denoiser: BoundDenoiser, x: Tensor) -> Tensor:
    """Return the latent of a reversible sampler: its inverse is a run, which autograd follows."""
    inverse = explicit_inverse(plan)
    started, _ = started_state(plan, denoiser, x, inverse.sigmas[0])
    latent = run_state(inverse, denoiser, {"x": x, **started})["x"]
    rounding = (found.amplification or 1.0) * torch.finfo(x.dtype).eps
    allowed = max(found.tolerance, rounding) * rms(found.latent)
    _refuse_another(rms(latent.detach() - found.latent), allowed, "a latent that differs by an rms", found)
    return latent


def _evaluate(plan: Plan, denoiser: BoundDenoiser, latent: Tensor) -> tuple[list[Tensor], list[list[Tensor]], Tensor]:
    """Run the sampler, and keep the graph of each evaluation by itself; return its inputs and outputs, and the image.

    Raises:
        ValueError: an evaluation without a graph.
    """
    inputs, outputs, run = [], [], stepwise(plan, latent)
    while not run.done:
        x = run.x.detach().requires_grad_()
        with torch.enable_grad():
            result: Any = denoiser(x, run.sigma)
        parts = list(result) if isinstance(result, Guided) else [result]
        if not all(part.requires_grad for part in parts):
            raise ValueError(
                "the denoiser's result has no graph that leads to x; it has to be differentiable: no torch.no_grad(), "
                "inference mode or detach() inside, and no recorded graph"
            )
        inputs.append(x)
        outputs.append(parts)
        known = [part.detach().clone() for part in parts]
        run.send(Guided(*known) if isinstance(result, Guided) else known[0])
    return inputs, outputs, run.result


def _largest(missed: Tensor, size: Tensor) -> float:
    """Return the largest residual of a batch, relative to the right sides of norms `size`."""
    return float((missed.norm(dim=1) / size.clamp(min=torch.finfo(size.dtype).tiny)).max())


class _Implicit(torch.autograd.Function):
    """The latent, whose gradient is the solution of linear equations."""

    @staticmethod
    def forward(ctx: Any, equations: _Equations, latent: Tensor, x: Tensor, *outputs: Tensor) -> Tensor:
        ctx.equations, ctx.like = equations, [x.dtype, *(part.dtype for part in outputs)]
        return latent.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("the implicit function theorem is used for the first one here")
        found = ctx.equations.solve(gradient)
        return None, None, *(value.to(dtype) for value, dtype in zip(found, ctx.like, strict=True))


@dataclass(frozen=True, eq=False)
class _Equations:
    """The linear equations of a run.

    Attributes:
        cut: the pieces of the run.
        inputs: of its evaluations, each the leaf of its own graph.
        outputs: of its evaluations, one or two each.
        tol: relative residual that is accepted; a tenth of it is aimed at.
    """

    cut: list[Piece]
    inputs: list[Tensor]
    outputs: list[list[Tensor]]
    tol: float

    def solve(self, gradient: Tensor) -> list[Tensor]:
        """Return the gradients with respect to the image and to all outputs, from that with respect to the latent."""
        of_outputs = list[Tensor]()
        g = gradient.to(wide_dtype(gradient.dtype))
        for piece in self.cut:
            g, mu = self._solved(piece, g)
            of_outputs += [-value for value in mu]
        return [g, *of_outputs]

    def _solved(self, piece: Piece, g: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the gradient with respect to the end of a piece, and what `_back` returns for it beside."""

        def apply(b: Tensor, todo: Tensor) -> Tensor:
            whole = torch.zeros_like(g)
            whole[todo] = b.reshape(-1, *g.shape[1:])
            return self._back(piece, whole)[0].flatten(1)[todo]

        right, everyone = g.flatten(1), torch.arange(len(g), device=g.device)
        if not piece.outputs:
            return g / piece.e, []
        b, missed, size = torch.zeros_like(right), right, right.norm(dim=1)
        worst = _largest(missed, size)
        for _ in range(ROUNDS):
            if not worst > self.tol / 10:  # a digit more than is asked for
                break
            better = b + gmres(apply, missed, KRYLOV, max(0.05 * self.tol / worst, 1e-12))[0]
            left = right - apply(better, everyone)
            if not _largest(left, size) < worst:  # rounding in the network's gradients leaves the rest
                break
            b, missed, worst = better, left, _largest(left, size)
        self._check(piece, missed.norm(dim=1), size)
        b = b.reshape(g.shape)
        return b, self._back(piece, b)[1]

    def _back(self, piece: Piece, b: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Go backwards through a piece: from b to `F'^T b` and the `mu_j`, all of b's shape."""
        mu, total = [float(value) * b for value in piece.B], piece.e * b
        for k in reversed(range(len(piece.outputs))):
            outputs = self.outputs[piece.first + k]
            given = [mu[j].to(part.dtype) for j, part in zip(piece.outputs[k], outputs, strict=True)]
            (found,) = torch.autograd.grad(
                outputs, self.inputs[piece.first + k], given, retain_graph=True, allow_unused=True
            )
            if found is None:
                raise ValueError("the denoiser's result does not depend on x in its graph; no detach() inside")
            G = found.to(b.dtype)
            total = total + float(piece.a[k]) * G
            for j in range(piece.outputs[k][0]):
                if piece.N[k, j]:
                    mu[j] = mu[j] + float(piece.N[k, j]) * G
        return total, mu

    def _check(self, piece: Piece, missed: Tensor, size: Tensor) -> None:
        """Raise RuntimeError if the equations of a piece were not solved."""
        if bool((missed <= self.tol * size).all()):
            return
        i = int((missed / size).nan_to_num(torch.inf).argmax())
        if not bool(size.isfinite().all()):
            raise RuntimeError(
                f"the gradient of the latent is not finite (sample {i}): look at the loss and the network"
            )
        raise RuntimeError(
            f"the equations of the gradient of sample {i} were solved to {float(missed[i] / size[i]):.2g} between "
            f"sigma {piece.sigma:.4g} and {piece.sigma_next:.4g}, not to {self.tol:.2g}: the derivative of the sampler "
            "is nearly singular there, or the network's own gradients are noisy; take float64, smaller steps or less "
            "guidance, or a larger tol in invert"
        )
