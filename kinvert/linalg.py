"""Small linear algebra, and the only place of the package that calls `torch.linalg`.

On a CPU with two or more threads torch's batched LU factorisation, and with it `solve`, `inv` and `det` of a batch,
waits for itself for ever from about 150 unknowns on, and returns wrong pivots in some builds (pytorch issues 142815,
141358). One system after the other does not, and takes no longer. Devices without float64, and those that cannot solve,
have their systems solved by the host; all others solve them where they are, and the host waits for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kinvert.devices import has_float64


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
