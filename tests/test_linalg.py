"""Small linear algebra: products and solutions, and that no other module calls torch's."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from kinvert import linalg

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("columns", [5, linalg.PIECE + 3])
@pytest.mark.parametrize("wide", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_are_those_of_matrices(
    columns: int, wide: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or in pieces, by matrices or, where there is no float64, by sums."""
    if wide != dtype == torch.float64:
        pytest.skip("a device without float64 has no float64 rows")
    monkeypatch.setattr(linalg, "widest", lambda device: wide)
    left, right = (torch.randn(2, rows, columns, dtype=dtype) for rows in (3, 40))
    products = linalg.gram(left, right)
    assert products.dtype == wide
    exact = left.double() @ right.double().mT
    torch.testing.assert_close(products.double(), exact, rtol=0, atol=1e-3 if wide == torch.float32 else 1e-9)
    weights = torch.randn(1, 2, 40, dtype=torch.float64)
    sums = linalg.combine(weights, right)
    assert sums.dtype == dtype
    atol = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(sums.double(), weights @ right.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_small_systems_are_solved(dtype: torch.dtype) -> None:
    system = torch.eye(7).double() + 0.1 * torch.randn(3, 7, 7, dtype=torch.float64)
    right = torch.randn(3, 7, 2, dtype=dtype)
    found = linalg.solve(system.to(dtype), right)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(system.to(dtype) @ found, right, rtol=tolerance, atol=tolerance)
    assert not linalg.solve(torch.zeros(2, 3, 3), torch.ones(2, 3, 1)).isfinite().any()  # and no error
    torch.testing.assert_close(linalg.singular_values(torch.diag(torch.tensor([1.0, 3.0, 2.0]))), [3.0, 2.0, 1.0])


UNSAFE = {"inverse", "inv", "pinverse", "det", "logdet", "slogdet", "lu", "lu_solve", "cholesky", "cholesky_solve",
          "cholesky_inverse", "svd", "qr", "geqrf", "lstsq", "solve_ex", "svdvals", "matrix_exp", "lobpcg"}  # fmt: skip


def test_determinants_are_products_of_singular_values() -> None:
    matrix = torch.randn(3, 200, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = torch.linalg.svdvals(matrix).log().sum(1)
    torch.testing.assert_close(linalg.log_abs_det(matrix), want, rtol=1e-12, atol=1e-9)


def test_one_module_calls_the_linear_algebra_of_torch() -> None:
    """Elsewhere nothing names `torch.linalg`, nor what torch has of it under other names; numpy's has no such fault."""
    for path in [*(ROOT / "kinvert").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        if path == ROOT / "kinvert" / "linalg.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and not ast.unparse(node).startswith(("np.", "linalg.", "numpy.")):
                assert node.attr not in UNSAFE and ast.unparse(node) != "torch.linalg", (path.name, ast.unparse(node))
