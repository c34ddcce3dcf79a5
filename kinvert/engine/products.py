"""The matrix products of a run: several rows of an update at once, in the way that is fastest on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from kinvert.engine.kernels import Program

__all__ = ["BLOCK", "Products", "blocks_for"]

BLOCK = 2048
"""On a CPU a product with one result is computed in blocks of so many columns, if they divide the rows: 15 to 40 %
faster than in one piece, because a block stays in the cache. Products with several results are slower in blocks."""


def blocks_for(code: Program, x: Tensor) -> int:
    """Return the number of blocks of a product on states like x; see `BLOCK`."""
    return (x.numel() // BLOCK if code.side == 1 and x.numel() % BLOCK == 0 else 0) or 1


class Products:
    """The rows of a buffer as the operands of products: for either side, what is read and where results go.

    A GPU, and a CPU if the user allows it, may compute products of matrices in TensorFloat-32 or less. Products of a
    matrix with a vector are exact everywhere, so they are taken then, one for each result.
    """

    def __init__(self, code: Program, buffer: Tensor, blocks: int) -> None:
        n, side = code.rows, code.side
        self.side = side
        self.exact = buffer.device.type == "cpu" and _matmuls_are_exact()
        numel = buffer.numel() // n
        flat = buffer.as_strided((n, numel), (numel, 1))
        if self.exact:
            cut = flat.view(n, blocks, numel // blocks).transpose(0, 1)
            self._rows = cut[:, : n - side], cut[:, side:]
            self._block_results = cut[:, :side], cut[:, n - side :]
        else:
            self._rows = flat[: n - side].t(), flat[side:].t()
            self._results = flat[:side].unbind(0), flat[n - side :].unbind(0)

    def mix(self, out: int, side: int, matrix: Tensor) -> None:
        """Multiply the rows of `side` and the ring by a matrix, shape (blocks, results, terms).

        The results go to the other side, or only the first of them, in place of x, if the matrix has one line.
        """
        rows = self._rows[side]
        if self.exact:
            result, lines = self._block_results[out != 0], matrix.size(1)
            torch.bmm(matrix, rows, out=result if lines == self.side else result[:, :lines])
        else:
            for line, row in zip(matrix[0].unbind(0), self._results[out != 0], strict=False):
                torch.mv(rows, line, out=row)


def _matmuls_are_exact() -> bool:
    """Tell whether torch multiplies float32 matrices in float32 on the CPU; False if it cannot say."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # some precisions were set by torch's newer names, torch.backends.<...>.fp32_precision
        return False
