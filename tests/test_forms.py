"""Forms are a vector space and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinvert.forms import Denoised, Form, Noise, State, Uncond

SYMBOLS = [State("x"), State("d[-1]"), Denoised(0), Denoised(1), Uncond(0), Noise(0)]
# Small integers and halves: their sums and products are exact in floating point, so the laws are equalities.
SCALARS = st.integers(-64, 64).map(lambda k: k / 2)
FORMS = st.dictionaries(st.sampled_from(SYMBOLS), SCALARS, max_size=4).map(Form)


@given(FORMS, FORMS, FORMS, SCALARS, SCALARS)
def test_vector_space(a: Form, b: Form, c: Form, s: float, t: float) -> None:
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert a - a == Form({})
    assert s * (a + b) == s * a + s * b
    assert (s + t) * a == s * a + t * a
    assert s * (t * a) == (s * t) * a
    assert a * 1.0 == a
    assert (a + a) / 2 == a
    assert hash(a + b) == hash(b + a)


@given(FORMS, SCALARS)
def test_coefficients(a: Form, s: float) -> None:
    assert all((s * a)[symbol] == s * a[symbol] for symbol in SYMBOLS)
    assert all(c != 0 for _, c in a)


x, d = Form.of(State("x")), Form.of(Denoised(0))
NONLINEAR: dict[str, Callable[[], Any]] = {
    "product": lambda: x * d,
    "quotient": lambda: x / d,
    "inverse": lambda: 1.0 / x,
    "power": lambda: x**2,
    "abs": lambda: abs(x),
    "method": lambda: x.abs(),
    "clamp": lambda: x.clamp(-1, 1),
    "comparison": lambda: x > 0,
    "equality": lambda: x == 0,
    "condition": lambda: bool(x),
    "float": lambda: float(x),
    "affine": lambda: x + 1.0,
    "affine on the left": lambda: 1.0 + x,
    "difference": lambda: x - 1.0,
    "difference on the left": lambda: 1.0 - x,
    "sqrt": lambda: math.sqrt(x),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", NONLINEAR)
def test_nonlinear_operations_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=r"linear"):
        NONLINEAR[name]()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_coefficients_are_finite(value: float) -> None:
    with pytest.raises(ValueError, match="coefficient of x is"):
        x * value


def test_alias_and_text() -> None:
    assert x.alias() == State("x")
    assert (2.0 * x).alias() is None
    assert (x + d).alias() is None
    assert str(0.5 * x - d + 2 * Form.of(Noise(1))) == "0.5 x - D0 + 2 n1"
    assert str(-x) == "-x"
    assert str(Form({})) == "0"
