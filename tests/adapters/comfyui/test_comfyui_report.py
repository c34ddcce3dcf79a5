"""What the nodes say of a run."""

from __future__ import annotations

import warnings

import pytest
import torch

from kinvert.adapters.comfyui.report import gathered_warnings, moments_line


def test_warnings_of_a_run_are_gathered_and_logged_and_others_are_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(DeprecationWarning, match="of another program") as others, gathered_warnings() as notes:
        warnings.warn("the sampler diverges", RuntimeWarning, stacklevel=1)
        warnings.warn("of another program", DeprecationWarning, stacklevel=1)
    assert notes == ["the sampler diverges"]
    assert [record.getMessage() for record in caplog.records] == notes
    assert len(others) == 1


def test_moments_are_those_of_the_noise() -> None:
    assert moments_line(torch.tensor([1.0, 2.0, 3.0])) == "latent / sigma has mean 2.000 and standard deviation 1.000"
