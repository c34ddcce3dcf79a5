"""Small linear algebra for the solvers. No other module of the package calls `torch.linalg`.

On a CPU with two or more threads, torch's batched LU factorisation (used by `solve`, `inv` and `det` of a batch) hangs
from about 150 unknowns on, and returns wrong pivots in some builds (pytorch issues 142815, 141358). Solving one system
after the other avoids both and takes no longer. The host solves the systems of devices that have no float64 or cannot
solve; all other devices solve their own, and the host does not wait.

The precision of float32 matrix products depends on the caller's modes: bfloat16 under `torch.autocast`, TensorFloat-32
or bfloat16 with `torch.set_float32_matmul_precision`. With such products a solver takes up to three times the
evaluations. Neither mode changes float64. Therefore `gram` multiplies in float64, and `combine` adds rows without a
matrix product. The networks that the solvers call keep the caller's modes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from kinvert.devices import has_float64, widest

__all__ = [
    "LEAST",
    "PIECE",
    "Sketch",
    "combine",
    "combine_wide",
    "gram",
    "log_abs_det",
    "ridged",
    "singular_values",
    "solve",
]

PIECE = 2**16
"""Columns that a product takes at once, so that its intermediate results stay small beside the rows."""
FEW, LEAST = 4, 256
"""Rows that the intermediate results of `combine_wide` take, and the columns that are taken at least at once."""
SKETCH = 509
"""Numbers in a sketch; a prime."""


def gram(left: Tensor, right: Tensor) -> Tensor:
    """Multiply rows with rows, shapes (n, p, m) and (n, q, m) -> (n, p, q), in the device's widest dtype."""
    wide = widest(left.device)
    total = left.new_zeros(len(left), left.shape[1], right.shape[1], dtype=wide)
    for a, b in zip(left.split(PIECE, -1), right.split(PIECE, -1), strict=True):
        if wide == torch.float64:
            total += a.double() @ b.double().mT
        else:
            few = max(1, 16 * PIECE // max(1, a[0].numel()))
            total += torch.cat([(a[:, :, None] * rows[:, None]).sum(-1) for rows in b.split(few, 1)], -1)
    return total


def combine(weights: Tensor, rows: Tensor) -> Tensor:
    """Add up rows, `weights @ rows`: shapes (n or 1, p, r) and (n, r, m) -> (n, p, m), in the dtype of the rows."""
    weights = weights.to(rows.dtype)
    if rows.dtype == torch.float64:
        return weights @ rows
    sums = [
        torch.stack([(piece * w[:, :, None]).sum(1) for w in weights.unbind(1)], 1) for piece in rows.split(PIECE, -1)
    ]
    return torch.cat(sums, -1) if len(sums) > 1 else sums[0]


def combine_wide(weights: Tensor, rows: Tensor) -> Tensor:
    """Add up rows like `combine`, in the device's widest dtype, with intermediate results of a few rows in size."""
    n, r, m = rows.shape
    wide, piece = widest(rows.device), max(LEAST, FEW * m // max(1, r))
    total = rows.new_empty(n, weights.shape[1], m, dtype=wide)
    for first in range(0, m, piece):
        part = slice(first, first + piece)
        total[:, :, part] = combine(weights.to(wide), rows[:, :, part].to(wide))
    return total


class Sketch:
    """A few numbers of each tensor, which keep inner products: exactly for few values, else to about 6 %.

    Values with random signs are added up, each 509th into the same sum. No size of an image shares a factor with that.

    Source: Charikar, Chen and Farach-Colton, Finding Frequent Items in Data Streams (2002).

    Attributes:
        size: of a sketch.
    """

    def __init__(self, like: Tensor) -> None:
        m = like.numel()
        self.size, self.more, self.signs = min(m, SKETCH), -m % SKETCH, None
        if m > SKETCH:
            signs = torch.randint(2, (m,), generator=torch.Generator().manual_seed(0), dtype=torch.int8, device="cpu")
            self.signs = (2 * signs - 1).to(like.device)

    def __call__(self, values: Tensor) -> Tensor:
        """Return the sketches of tensors of shape (n, m), shape (n, size), in the device's widest dtype."""
        wide = widest(values.device)
        if self.signs is None:
            return values.to(wide, copy=True)
        return pad(values * self.signs, (0, self.more)).unflatten(1, (-1, SKETCH)).sum(1, dtype=wide)


def ridged(system: Tensor, ridge: Tensor | float) -> Tensor:
    """Regularise systems: add `ridge` to their diagonals, in place; shapes (n, k, k) and (n,)."""
    system.diagonal(dim1=1, dim2=2).add_(ridge[:, None] if isinstance(ridge, Tensor) else ridge)
    return system


def log_abs_det(matrix: Tensor) -> Tensor:
    """Return `log |det|` of each matrix, shape (n, m, m) -> (n,), computed by the host, in float64."""
    found = [torch.linalg.slogdet(one).logabsdet for one in matrix.detach().to("cpu", torch.float64)]
    return torch.stack(found).to(matrix.device, widest(matrix.device))


def solve(system: Tensor, right: Tensor) -> Tensor:
    """Return `system^-1 right`, shapes (n, k, k) and (n, k, r), solved in float64, in the dtype of `right`.

    A singular system gives values that are not finite instead of an error, so that the host need not wait.
    """
    if system.device.type != "cpu" and has_float64(system.device):
        try:
            return torch.linalg.solve_ex(system.double(), right.double())[0].to(right.dtype)
        except NotImplementedError:
            pass
    wide = zip(system.cpu().double(), right.cpu().double(), strict=True)
    return torch.stack([torch.linalg.solve_ex(a, b)[0] for a, b in wide]).to(right)


def singular_values(matrix: Tensor) -> list[float]:
    """Return the singular values of one matrix, largest first, computed by the host."""
    values: list[float] = torch.linalg.svdvals(matrix.cpu()).tolist()
    return values
