"""What `watch` and the bars are told while an inversion solves, and how it is stopped."""

from __future__ import annotations

import dataclasses
import itertools
import math
import signal
import threading
import warnings
from typing import Any

import pytest
import torch
from inverting import MIXTURE, images, schedule
from torch import Tensor

import kinvert as ki
from kinvert.inversion import Reason
from kinvert.inversion.task import RUNS

SIGMAS = schedule(8)
SAMPLERS = ("euler", "heun", "dpmpp_2m")
STAGES = {"euler": 1, "heun": 2, "dpmpp_2m": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"mask": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])},
    "half": {"dtype": torch.float16, "tol": 1e-3},
    "parts": {"max_batch": 4},
    "limit": {"max_evals": 400},
}


class Counted:
    """A denoiser that counts its calls, and the rows of them."""

    def __init__(self) -> None:
        self.calls, self.rows = 0, 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return MIXTURE(x.double(), sigma.double()).to(x.dtype)


class StopAfter:
    """Asks to stop at the k-th evaluation."""

    def __init__(self, k: int) -> None:
        self.k, self.told = k, list[ki.Solving]()

    def __call__(self, now: ki.Solving) -> None:
        self.told.append(now)
        if len(self.told) == self.k:
            raise ki.Stop


def invert_quietly(denoiser: Any, sampler: str, dtype: torch.dtype = torch.float64, **options: Any) -> ki.Inversion:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return ki.invert(denoiser, images().to(dtype), SIGMAS, sampler=sampler, **options)


@pytest.mark.parametrize("k", [1, 13])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_stopped_search_returns_the_best_so_far_within_few_runs(sampler: str, name: str, k: int) -> None:
    options, denoiser, watch = OPTIONS[name], Counted(), StopAfter(k)
    found = invert_quietly(denoiser, sampler, watch=watch, **options)
    once = 8 * STAGES[sampler]
    parts = watch.told[-1].parts
    # The question whether the batch size matters, what is left of the run, the check, the plain run up and down. Of a
    # whole run a sweep that has begun is finished, and the best trial is checked, too.
    most = 5 if sampler == "dpmpp_2m" else 4
    assert len(watch.told) - k <= parts * (most * once + 2)
    ends = {Reason.STOPPED, Reason.CONVERGED} | ({Reason.PRECISION} if name == "half" else set())
    assert set(found.reasons) <= ends
    assert Reason.STOPPED in found.reasons or name == "half"
    assert [reason == Reason.CONVERGED for reason in found.reasons] == found.converged.tolist()
    assert watch.told[-1].stopping and not watch.told[k - 1].stopping
    x, dtype = images().to(options.get("dtype", torch.float64)), options.get("dtype", torch.float64)
    kept = {"mask": options["mask"]} if "mask" in options else {}
    up = ki.unsample(Counted(), x, SIGMAS, sampler=sampler, sigma_offset=0.0, **kept)
    back = ki.sample(Counted(), up, SIGMAS, sampler=sampler, **(kept and {**kept, "latent": x}))
    region = slice(4) if kept else slice(6)
    plain = (back - x).double()[:, region].square().mean(1).sqrt()
    assert (found.round_trip_error <= (1 + 1e-5) * plain + torch.finfo(dtype).eps).all()
    torch.testing.assert_close(found.sample(Counted()), found.restored, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_a_later_stop_leaves_less_to_solve() -> None:
    errors = [invert_quietly(Counted(), "euler", watch=StopAfter(k)).round_trip_error.max() for k in (1, 60, 80)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("method", ["newton", "continuation", "anderson", "sweeps"])
def test_every_root_finder_stops(method: str) -> None:
    denoiser, watch = Counted(), StopAfter(20)
    found = invert_quietly(denoiser, "euler", method=method, watch=watch, tol=1e-12)
    assert set(found.reasons) == {Reason.STOPPED}
    assert len(watch.told) <= 20 + 5 * 8 + 2  # a step of Newton's method ends with its line search


def test_a_run_that_is_solved_through_euler_stops() -> None:
    watch = StopAfter(700)  # the sweeps have given up by then
    sigmas = ki.schedules.karras(6, 0.02, 80.0)[:-1]
    with pytest.warns(RuntimeWarning, match="the search was stopped"):
        found = ki.invert(MIXTURE, images(2), sigmas, sampler="ipndm", watch=watch, tol=1e-13)
    assert Reason.STOPPED in found.reasons and len(watch.told) < 740


def test_the_warning_and_the_report_say_that_it_was_stopped() -> None:
    with pytest.warns(RuntimeWarning, match=r"sample 0 not inverted: .*; the search was stopped"):
        found = ki.invert(MIXTURE, images(1), SIGMAS, watch=StopAfter(5))
    assert "the search was stopped" in str(found)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_told_are_the_calls_of_the_denoiser(sampler: str) -> None:
    denoiser, told = Counted(), list[ki.Solving]()
    found = ki.invert(denoiser, images(), SIGMAS, sampler=sampler, watch=told.append, max_batch=4)
    limit = 8 * STAGES[sampler] * (2 * RUNS + 4 * 6)  # by default
    assert len(told) == denoiser.calls - 2  # those that ask whether rows mix
    for part in (0, 1):
        own = [now for now in told if now.part == part]
        assert [now.evaluations for now in own] == list(range(1, len(own) + 1))
        assert own[-1].evaluations >= found.evaluations[4 * part : 4 * part + 4].max() - 4
        assert {(now.samples, now.parts, now.steps, now.limit) for now in own} == {(4 if part == 0 else 2, 2, 8, limit)}
        solved = [now.solved for now in own]
        rises = {later - sooner for sooner, later in itertools.pairwise(solved)}
        assert rises <= {0, 1, -8}  # after the run that checks, some samples may be solved again, and finer
        assert solved[0] == 0 and (sampler == "dpmpp_2m" or solved[-1] == 8)
        assert all(0 <= now.open <= now.samples for now in own)
        assert max(now.rounds for now in own) > 1
        assert math.isnan(told[0].residual) and any(now.residual < 1e-4 for now in own)


def test_watching_changes_nothing() -> None:
    for sampler in SAMPLERS:
        alone = ki.invert(MIXTURE, images(), SIGMAS, sampler=sampler)
        watched = ki.invert(MIXTURE, images(), SIGMAS, sampler=sampler, watch=lambda now: None, progress=True)
        torch.testing.assert_close(watched.latent, alone.latent, rtol=0, atol=0)
        assert watched.evaluations.equal(alone.evaluations)


class Interrupts:
    """A denoiser at whose k-th calls somebody presses Ctrl-C."""

    def __init__(self, *calls: int) -> None:
        self.presses, self.calls = calls, 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        if self.calls in self.presses:
            signal.raise_signal(signal.SIGINT)
        return MIXTURE(x, sigma)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ctrl_c_returns_the_best_so_far(sampler: str) -> None:
    denoiser = Interrupts(10)
    with pytest.warns(RuntimeWarning) as caught:
        found = ki.invert(denoiser, images(), SIGMAS, sampler=sampler)
    assert "Ctrl-C: the inversion stops and returns the best that it has found" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert set(found.reasons) == {Reason.STOPPED}
    assert denoiser.calls <= 10 + 5 * 8 * STAGES[sampler]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_ctrl_c_raises() -> None:
    with pytest.raises(KeyboardInterrupt), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        ki.invert(Interrupts(10, 13), images(), SIGMAS)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_at_the_last_evaluation_is_told_of_too() -> None:
    denoiser = Counted()
    ki.invert(denoiser, images(), SIGMAS)
    with pytest.warns(RuntimeWarning, match="Ctrl-C"):
        found = ki.invert(Interrupts(denoiser.calls), images(), SIGMAS)
    assert found.converged.all()


def test_a_program_with_its_own_use_for_ctrl_c_keeps_it() -> None:
    pressed = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        assert ki.invert(Interrupts(10), images(), SIGMAS).converged.all()
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed == [signal.SIGINT]


def test_another_thread_inverts_too() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(ki.invert(MIXTURE, images(), SIGMAS)))
    thread.start()
    thread.join()
    assert found[0].converged.all()


def test_errors_of_watch_pass_and_what_cannot_be_called_is_refused() -> None:
    def fail(now: ki.Solving) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        ki.invert(MIXTURE, images(), SIGMAS, watch=fail)
    with pytest.raises(TypeError, match=r"watch must be callable as watch\(solving\) after each evaluation, got int"):
        ki.invert(MIXTURE, images(), SIGMAS, watch=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("sampler", "unit"), [("euler", "step"), ("dpmpp_2m", "sweep")])
def test_the_bars_show_the_solving_and_the_check(sampler: str, unit: str, capsys: Any) -> None:
    steps: list[ki.Progress] = []
    ki.invert(
        MIXTURE, images(), SIGMAS, sampler=sampler, progress=True, callback=steps.append, max_evals=500, max_batch=3
    )
    err = capsys.readouterr().err
    assert len(steps) == 16 and f"invert {sampler}" in err and f"{unit}/s" in err
    last = err.replace("\r", "\n").split(f"invert {sampler}")[-1]
    assert "0 of 3 samples open" in last and "of 496 evaluations" in last
    if unit == "step":
        assert "| 16/16 " in last and f"check {sampler}: 100%|" in err and "| 8/8 " in err


def test_the_bars_say_that_it_stops(capsys: Any) -> None:
    invert_quietly(Counted(), "euler", watch=StopAfter(5), progress=True)
    assert "stopping, " in capsys.readouterr().err


def test_closed_forms_tell_as_well(capsys: Any) -> None:
    told: list[ki.Solving] = []
    ki.invert(MIXTURE, images(), SIGMAS, sampler="edict", watch=told.append, progress=True)
    assert [now.evaluations for now in told] == list(range(1, len(told) + 1)) and len(told) == 32
    assert "check edict: 100%|" in capsys.readouterr().err


def test_what_is_told_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ki.Solving().open = 3  # type: ignore[misc]
