"""The checks of arguments: what each takes, what it returns and what it says. How the verbs use them: test_inputs.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kinvert import checks
from kinvert.checks import (
    check_beside,
    check_callback,
    check_choice,
    check_count,
    check_count_field,
    check_decreasing,
    check_dense,
    check_finite,
    check_integer,
    check_number,
    check_positive,
    check_values,
    describe,
    has_values,
    is_integer,
    is_number,
    nearest,
    plain,
    reduced,
    unknown,
)

META = torch.empty(2, 3, device="meta")


def test_what_is_an_integer_and_a_number() -> None:
    assert is_integer(3) and is_integer(np.int8(3)) and is_number(3) and is_number(np.float32(0.5)) and is_number(0.5)
    for neither in (True, np.True_, "3", None, 3j, torch.tensor(3)):
        assert not is_integer(neither) and not is_number(neither)
    assert not is_integer(3.0)


def test_counts_are_ints_of_python() -> None:
    assert check_count("n", np.int64(1)) == 1 and type(check_count("n", np.int64(1))) is int
    for bad in (np.int64(0), True, 1.0):
        with pytest.raises(ValueError, match="n must be an int of at least 1"):
            check_count("n", bad)


def test_a_count_of_a_frozen_dataclass_is_stored_as_an_int() -> None:
    @dataclass(frozen=True)
    class Settings:
        window: Any = 3

        def __post_init__(self) -> None:
            check_count_field(self, "window", 2)

    assert type(Settings(np.int32(2)).window) is int
    with pytest.raises(ValueError, match="window must be an int of at least 2, got 1"):
        Settings(1)


def test_positive_numbers_are_floats_of_python() -> None:
    assert type(check_positive("v", np.float32(1))) is float
    for bad in (np.float32(0), True, np.float64(math.inf), np.float32("nan")):
        with pytest.raises(ValueError, match="v must be a positive number"):
            check_positive("v", bad)


REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: check_integer("n", 2.0), TypeError, "n must be an int, got 2.0"),
    (lambda: check_integer("n", True, fix="pass 1"), TypeError, "n must be an int, got True; pass 1"),
    (lambda: check_integer("n", 0), ValueError, "n must be at least 1, got 0"),
    (lambda: check_integer("n", -1, 0), ValueError, "n must not be negative, got -1"),
    (lambda: check_integer("n", 9, 1, 8, "pass 8"), ValueError, "n must be from 1 to 8, got 9; pass 8"),
    (lambda: check_number("v", "1"), TypeError, "v must be a number, got '1'; pass a float"),
    (lambda: check_number("v", torch.ones(2)), TypeError, "v must be a number, got Tensor of shape (2,); pass a float"),
    (lambda: check_number("v", math.nan, fix="pass 1"), ValueError, "v must be finite, got nan; pass 1"),
    (lambda: check_number("v", math.inf, above=0), ValueError, "v must be positive and finite, got inf"),
    (lambda: check_number("v", 0, above=0), ValueError, "v must be positive and finite, got 0"),
    (lambda: check_number("v", -1, low=0), ValueError, "v must be finite and not negative, got -1"),
    (lambda: check_number("v", 1, low=2), ValueError, "v must be finite and at least 2, got 1"),
    (lambda: check_number("v", 2, above=0, below=2), ValueError, "v must be finite and above 0 and below 2, got 2"),
    (lambda: check_choice("how", "fst", ("fast", "slow")), ValueError,
     "unknown how 'fst'; did you mean 'fast'? It must be one of fast, slow"),
    (lambda: check_choice("how", None, {"fast": 1}, ", or a function"), ValueError,
     "unknown how None; it must be one of fast, or a function"),
    (lambda: check_finite("x", torch.tensor([1.0, math.nan, math.inf])), ValueError,
     "x has 2 NaN or infinite values; clean the input"),
    (lambda: check_decreasing("sigmas", (1.0, 2.0)), ValueError,
     "sigmas must be the decreasing sampling schedule, got a rising one from 1 to 2; use sigmas.flip(0)"),
    (lambda: check_decreasing("sigmas", (1.0, 2.0), "it is reversed here"), ValueError,
     "sigmas must be the decreasing sampling schedule, got a rising one from 1 to 2; it is reversed here; use "
     "sigmas.flip(0)"),
    (lambda: check_dense("x", torch.ones(2).to_sparse()), TypeError,
     "x must be a dense tensor, got torch.sparse_coo; use x.to_dense()"),
    (lambda: check_beside("mask", META, torch.ones(2, 3)), ValueError,
     "mask has a shape but no values (meta or fake), and x, on cpu, has; give it values"),
    (lambda: check_values("x", META, "they are solved for"), ValueError,
     "x has a shape but no values (meta or fake), and they are solved for; give it values"),
    (lambda: check_callback(3), TypeError, "callback must be callable as callback(progress) once a step, got int"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_a_check_names_the_argument_what_was_got_and_the_fix(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_checks_return_what_they_take() -> None:
    assert type(check_integer("n", np.int64(3))) is int and check_integer("n", 0, 0) == 0
    assert type(check_number("v", np.float32(0.5))) is float and check_number("v", 2, above=1, below=3) == 2.0
    check_choice("how", "slow", ("fast", "slow"))
    check_finite("x", META)  # there is nothing to read
    check_decreasing("sigmas", (2.0, 1.0, 0.0))
    check_callback(None)


def test_names_that_are_near() -> None:
    assert unknown("model", "MNIST", ("digits", "mnist")) == (
        "unknown model 'MNIST'; did you mean 'mnist'? It must be one of digits, mnist"
    )
    assert unknown("colour", "blue", ()) == "unknown colour 'blue'; there are none"
    assert nearest("qqq", ["abc"]) is None
    assert reduced("k_DPM++ 2M a Scheduler") == "dpmpp2mancestral"


def test_what_a_value_is_called() -> None:
    assert describe(torch.ones(2, 3)) == "Tensor of shape (2, 3)" and describe(np.ones(2)) == "ndarray of shape (2,)"
    assert describe([np.ones(2)]) == "a list of ndarray of shape (2,)" and describe("a") == "'a'"


def test_tensors_without_values() -> None:
    assert has_values(torch.ones(2)) and not has_values(META)
    with FakeTensorMode():
        assert not has_values(torch.empty(2))


def test_plain_keeps_the_memory() -> None:
    class Image(torch.Tensor):
        pass

    x = torch.ones(2)
    image = x.as_subclass(Image)
    assert type(plain(image)) is torch.Tensor and plain(image).data_ptr() == x.data_ptr() and plain(x) is x


def test_every_name_of_the_module_is_offered() -> None:
    assert checks.__all__ == sorted(checks.__all__)
    defined = {name for name, value in vars(checks).items() if getattr(value, "__module__", "") == checks.__name__}
    assert {name for name in defined if not name.startswith("_")} <= set(checks.__all__)
