r"""Newton's method on `F(u) = y` without derivatives of the denoiser.

`u <- u + alpha d` with `F'(u) d = y - F(u)` solved by GMRES on directional derivatives, which are finite differences,
and alpha halved until the residual falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kinvert import linalg
from kinvert.checks import check_count_field
from kinvert.inversion.problem import Guess, Problem, Root, Search
from kinvert.inversion.solvers.base import Solver
from kinvert.tensors import per_sample, rms, wide_dtype

__all__ = ["NewtonKrylov", "Operator", "gmres", "line_search", "smallest_singular_value"]


@dataclass(frozen=True)
class NewtonKrylov(Solver):
    r"""Newton's method with matrix-free GMRES and a backtracking line search, every sample on its own.

    A step solves `F'(u) d = f` to the relative accuracy `forcing` (or `krylov` directional derivatives), then takes
    `u + alpha d` with the first alpha of 1, 1/2, 1/4, ... for which the residual falls. A sample without such an alpha
    ends at its best iterate.

    With `least_change` the linear equations are solved for the least distance from y instead of from u: of several
    solutions, where F' is singular, one that is locally nearest to y. `u + d = y + e` with e the least-norm solution
    of `F'(u) e = f + F'(u) (u - y)`, which GMRES finds where F' is symmetric, as it is for an exact denoiser, and else
    nearly.

    Source: Knoll and Keyes, Jacobian-free Newton-Krylov Methods (2004).
    """

    krylov: int = 20
    forcing: float = 0.05
    max_iterations: int = 12
    halvings: int = 6
    least_change: bool = False

    def __post_init__(self) -> None:
        check_count_field(self, "krylov")
        check_count_field(self, "max_iterations")

    def solve(self, problem: Problem, guess: Guess) -> Root:
        """See `Solver`."""
        search, shape = Search(problem, guess.u), guess.u.shape[1:]
        residual = search.evaluate(guess.u, search.everyone)
        search.residual = rms(residual).nan_to_num(math.inf, math.inf)
        active = self._able(search, search.everyone)
        for _ in range(self.max_iterations):
            if not len(active):
                break
            here = active

            def apply(v: Tensor, todo: Tensor, here: Tensor = here) -> Tensor:
                part = here[todo]
                return search.differentiate(search.u[part], residual[part], v.reshape(-1, *shape), part).flatten(1)

            moved, right = (search.u[active] - problem.value[active]).flatten(1), residual[active].flatten(1)
            anchored = self.least_change and bool(moved.any())
            if anchored:
                right = right + apply(moved, torch.arange(len(active), device=right.device))

            def affords(here: Tensor = here) -> Tensor:
                return search.affords(here) - 1  # a call is left for the line search

            direction, _ = gmres(apply, right, self.krylov, self.forcing, affords)
            direction = (direction - moved if anchored else direction).reshape(-1, *shape)
            active = self._able(search, active[line_search(search, residual, active, direction, self.halvings)])
        return search.root(least=self._least)

    @property
    def _least(self) -> int:
        """Return the calls of a step at least: a product, the line search, and maybe the anchor."""
        return 2 + self.least_change

    def _able(self, search: Search, index: Tensor) -> Tensor:
        """Return those of `index` that are open and afford a step."""
        residual = search.residual[index]
        able = search.is_open(index, residual) & (search.affords(index) >= self._least)
        return index[search.problem.watch.rows(able, residual)]


Operator = Callable[[Tensor, Tensor], Tensor]
"""`(v, todo) -> A v` for the rows `todo` of a batch of linear equations, v of shape (len(todo), m)."""


def gmres(
    apply: Operator, b: Tensor, krylov: int, forcing: float, affords: Callable[[], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Solve `A x = b` per row to the relative accuracy `forcing`, from 0, with at most `krylov` products a row.

    affords: returns how many products may be made now for each row, shape (rows,); x is 0 where there never were any.

    Returns:
        x, shape (rows, m), and the images under A of the orthonormal basis that was built, shape (rows, products, m). A
        row takes `2 krylov + 4` tensors of its size.

    Source: Saad and Schultz, GMRES: A Generalized Minimal Residual Algorithm for Nonsymmetric Linear Systems (1986).
    """
    dtype, (n, m) = b.dtype, b.shape
    b = b.to(wide_dtype(dtype))  # the small systems are not solved in half precision
    finfo = torch.finfo(b.dtype)
    size, x = b.norm(dim=1), torch.zeros_like(b)
    most = min(krylov, m)
    basis, images = b.new_zeros(n, most + 1, m), b.new_zeros(n, most, m)
    basis[:, 0] = b / size[:, None].clamp(min=finfo.tiny)
    left = torch.full((n,), most, device=b.device) if affords is None else affords()
    todo = (left > 0).nonzero()[:, 0]  # a row that is good enough costs no further products
    image = images[:, :0]
    for j in range(most if len(todo) else 0):
        images[todo, j] = apply(basis[todo, j].to(dtype), todo).to(b.dtype)
        spanned, image = basis[:, : j + 1], images[:, : j + 1]
        # The projected problem is small: least squares on the images of the orthonormal basis.
        gram = linalg.gram(image, image)
        ridge = finfo.eps * gram.diagonal(dim1=1, dim2=2).amax(1)
        weights = linalg.solve(linalg.ridged(gram, ridge), linalg.gram(image, b[:, None])).mT
        x[todo] = linalg.combine(weights, spanned)[todo, 0]
        missed = (b - linalg.combine(weights, image)[:, 0]).norm(dim=1)
        going = missed[todo] > forcing * size[todo]
        if affords is not None:
            going &= affords()[todo] > 0
        todo = todo[going.nonzero()[:, 0]]  # the one read of a product
        if not len(todo):
            break
        new = images[:, j : j + 1]
        for _ in range(2):  # twice is enough to be orthogonal to rounding
            new = new - linalg.combine(linalg.gram(new, spanned), spanned)
        basis[:, j + 1] = new[:, 0] / new[:, 0].norm(dim=1, keepdim=True).clamp(min=finfo.tiny)
    return x.to(dtype), image


def line_search(search: Search, residual: Tensor, active: Tensor, direction: Tensor, halvings: int) -> Tensor:
    """Move every sample along its direction as far as the residual falls; return which of `active` moved.

    `residual`, f at the best iterates of all samples, follows in place.
    """
    origin, waiting = search.u[active], torch.arange(len(active), device=active.device)
    moved = torch.zeros(len(active), dtype=torch.bool, device=active.device)
    for halving in range(halvings + 1):
        trial = origin[waiting] + direction[waiting] * 0.5**halving
        f = search.evaluate(trial, active[waiting])
        better = search.keep(active[waiting], trial, rms(f).nan_to_num(math.inf, math.inf))
        residual[active[waiting]] = torch.where(per_sample(better, f), f, residual[active[waiting]])
        moved[waiting] |= better
        waiting = waiting[(~better & (search.affords(active[waiting]) >= 1)).nonzero()[:, 0]]
        if not len(waiting):
            break
    return moved


def smallest_singular_value(problem: Problem, u: Tensor, products: int) -> tuple[float, Tensor]:
    """Estimate the smallest singular value of F' at u for a problem of one sample.

    It is the least stretch `|F' v| / |v|` over the Krylov space of the residual: an upper bound, and the value itself
    once that space is the whole one. Near 0, F folds there, and no state nearby comes closer to y.

    Returns:
        The value, NaN if F is not finite, and the evaluations that it took, shape (1,).
    """
    search = Search(problem, u)
    f = search.evaluate(u, search.everyone)

    def apply(v: Tensor, todo: Tensor) -> Tensor:
        return search.differentiate(u, f, v.reshape(u.shape), todo).flatten(1)

    images = gmres(apply, f.flatten(1), products, 0.0)[1]
    value = linalg.singular_values(images[0])[-1] if images.isfinite().all() else math.nan
    return value, search.evaluations
