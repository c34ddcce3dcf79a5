"""Old module paths answer for one version, with a DeprecationWarning that names the new place."""

from __future__ import annotations

import importlib

import pytest

import kinvert as ki
from kinvert.inversion import problem, routes, solvers, steps
from kinvert.inversion.couplings import Couplings, couplings

MOVED = {
    "trajectory": {
        "Sweeps": solvers.Sweeps, "StepSweeps": solvers.StepSweeps, "Equations": Couplings, "equations": couplings,
    },
    "stepwise": {"Auto": solvers.Auto, "LEAST_CHANGE": steps.LEAST_CHANGE, "levels_of": steps.levels_of},
    "continuation": {"Continuation": solvers.Continuation},
    "solution": {"Solution": problem.Root, "Judge": problem.Judge},
    "choice": {"METHODS": routes.METHODS, "choose": routes.choose},
    "solvers": {"Equation": problem.Problem},
}  # fmt: skip


@pytest.mark.parametrize("module", MOVED)
def test_a_name_answers_from_its_new_place(module: str) -> None:
    old = importlib.import_module(f"kinvert.inversion.{module}")
    for name, new in MOVED[module].items():
        with pytest.warns(DeprecationWarning, match=f"kinvert.inversion.{module}.{name} is now kinvert.inversion"):
            assert getattr(old, name) is new
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = old.nothing


def test_the_module_that_hid_behind_a_function_is_gone() -> None:
    with pytest.raises(ImportError):
        importlib.import_module("kinvert.inversion.invert")
    assert callable(ki.inversion.invert)
