"""Small linear algebra: what the solvers multiply and solve. No other place of the package calls `torch.linalg`.

On a CPU with two or more threads torch's batched LU factorisation, and with it `solve`, `inv` and `det` of a batch,
waits for itself for ever from about 150 unknowns on, and returns wrong pivots in some builds (pytorch issues 142815,
141358). One system after the other does not, and takes no longer. Devices without float64, and those that cannot solve,
have their systems solved by the host; all others solve them where they are, and the host waits for nothing.

Products of matrices in float32 are whatever the caller's modes make of them: bfloat16 under `torch.autocast`,
TensorFloat-32 or bfloat16 as `torch.set_float32_matmul_precision` says. A solver that is fed such products takes up to
three times the evaluations. Both modes leave float64 alone, so that is what `gram` multiplies in, and `combine` adds
rows up without a product of matrices; the networks that the solvers call keep their modes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kinvert.devices import has_float64, widest

PIECE = 2**16
"""Columns that a product takes at once: what it makes in between stays small next to the rows themselves."""


def gram(left: Tensor, right: Tensor) -> Tensor:
    """The products of rows with rows, shapes (n, p, m) and (n, q, m) -> (n, p, q), in the device's widest dtype."""
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
    """Sums of rows, `weights @ rows`: shapes (n or 1, p, r) and (n, r, m) -> (n, p, m), in the dtype of the rows."""
    weights = weights.to(rows.dtype)
    if rows.dtype == torch.float64:
        return weights @ rows
    sums = [
        torch.stack([(piece * w[:, :, None]).sum(1) for w in weights.unbind(1)], 1) for piece in rows.split(PIECE, -1)
    ]
    return torch.cat(sums, -1) if len(sums) > 1 else sums[0]


def ridged(system: Tensor, ridge: Tensor | float) -> Tensor:
    """Systems with something added to their diagonals, shapes (n, k, k) and (n,), which regularises them."""
    system.diagonal(dim1=1, dim2=2).add_(ridge[:, None] if isinstance(ridge, Tensor) else ridge)
    return system


def solve(system: Tensor, right: Tensor) -> Tensor:
    """`system^-1 right` of regularised systems, shapes (n, k, k) and (n, k, r), solved in float64; right's dtype.

    A singular system gives values that are not finite instead of an error: no host asks the device whether it worked.
    """
    if system.device.type != "cpu" and has_float64(system.device):
        try:
            return torch.linalg.solve_ex(system.double(), right.double())[0].to(right.dtype)
        except NotImplementedError:
            pass
    wide = zip(system.cpu().double(), right.cpu().double(), strict=True)
    return torch.stack([torch.linalg.solve_ex(a, b)[0] for a, b in wide]).to(right)


def singular_values(matrix: Tensor) -> list[float]:
    """The singular values of one matrix, largest first, computed by the host."""
    values: list[float] = torch.linalg.svdvals(matrix.cpu()).tolist()
    return values
