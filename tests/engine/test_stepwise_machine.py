"""Runs one evaluation at a time in any order of calls: several at once, copied, saved and restored, equal `ki.run`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, rule, run_state_machine_as_test
from randomruns import RandomRule, few, smooth
from torch import Tensor

import kinvert as ki
from kinvert.engine import plain_loop

SIGMAS = (8.0, 5.0, 3.0, 1.0, 0.2)
STOPPED = [
    "euler",
    "heun",
    "lms",
    "dpmpp_2m",
    "uni_pc",
    "dpmpp_2m_sde",
    "er_sde",
    "sa_solver_pece",
    "edict",
    "rk4",
    "euler_cfg_pp",
]


def start(seed: int) -> Tensor:
    return 8 * torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def evaluate(plan: ki.Plan, x: Tensor, sigma: Tensor) -> Any:
    denoised = smooth(x, sigma, 0.5)
    return ki.Guided(denoised, smooth(x, sigma, -0.5)) if plan.is_guided else denoised


class Runs(RuleBasedStateMachine):
    """Runs under way, each with the result that it must have."""

    runs = Bundle("runs")
    states = Bundle("states")

    @rule(target=runs, name=st.sampled_from(STOPPED), seed=st.integers(0, 99), rows=st.booleans())
    def begin(self, name: str, seed: int, rows: bool) -> tuple[ki.Stepwise, Tensor]:
        plan = ki.compile_plan(RandomRule(seed) if rows else name, SIGMAS)
        with plain_loop():
            want = ki.run(plan, lambda x, sigma: evaluate(plan, x, sigma), start(seed), ki.noise.white(seed))
        return ki.stepwise(plan, start(seed), ki.noise.white(seed)), want

    @rule(pair=runs, times=st.integers(1, 4))
    def send(self, pair: tuple[ki.Stepwise, Tensor], times: int) -> None:
        run, _ = pair
        for _ in range(times):
            if not run.done:
                out = evaluate(run.plan, run.x, run.sigma)
                run.send(out)
                for part in out if isinstance(out, ki.Guided) else (out,):
                    part.fill_(torch.nan)  # it is the caller's again

    @rule(pair=runs)
    def look(self, pair: tuple[ki.Stepwise, Tensor]) -> None:
        """Reading changes nothing."""
        run, _ = pair
        assert 0 <= run.step <= len(run.plan.steps) and run.stage >= 0
        assert set(run.values) >= {"x"}
        if not run.done:
            run.sigma.zero_()
            read = run.plan.steps[run.step].reads
            if not run.stage and "x" in read:
                run.replace(**{name: value.clone() for name, value in run.values.items() if name in read})

    @rule(target=states, pair=runs, how=st.sampled_from(["as it is", "deepcopy", "written over"]))
    def keep(self, pair: tuple[ki.Stepwise, Tensor], how: str) -> tuple[ki.Plan, Any, Tensor]:
        run, want = pair
        state = run.state
        kept = copy.deepcopy(state)
        if how == "written over":
            for value in state["values"].values():
                value.fill_(torch.nan)
        return run.plan, kept if how != "as it is" else state, want

    @rule(target=runs, kept=states)
    def resume(self, kept: tuple[ki.Plan, Any, Tensor]) -> tuple[ki.Stepwise, Tensor]:
        plan, state, want = kept
        return ki.stepwise(plan, state=state), want

    @rule(pair=runs)
    def finish(self, pair: tuple[ki.Stepwise, Tensor]) -> None:
        run, want = pair
        while not run.done:
            run.send(evaluate(run.plan, run.x, run.sigma))
        assert torch.equal(run.result, want)


def test_runs_in_any_order_of_calls() -> None:
    run_state_machine_as_test(Runs, settings=few(15))
