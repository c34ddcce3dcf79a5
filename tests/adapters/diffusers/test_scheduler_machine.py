"""The scheduler under calls in any order: a run that is finished is the engine's, and a call out of order changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch
from drives import bases, denoiser_of, network, noise, start_of
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from randomruns import few

import kinvert as ki
from kinvert.adapters.diffusers import KinvertScheduler


class Pipeline(RuleBasedStateMachine):
    """A host that asks, repeats, copies, makes mistakes and begins again."""

    @initialize(
        space=st.sampled_from(["ve", "vp", "flow"]),
        sampler=st.sampled_from(["euler", "heun", "dpmpp_2m", "lms", "res_2s", "uni_pc", "leapfrog"]),
    )
    def build(self, space: str, sampler: str) -> None:
        self.scheduler: Any = KinvertScheduler.from_scheduler(bases()[space], sampler)
        self.begin(3, 0)

    @rule(steps=st.integers(2, 6), seed=st.integers(0, 9))
    def begin(self, steps: int, seed: int) -> None:
        """Also in the middle of a run, as a pipeline that was interrupted."""
        self.scheduler.set_timesteps(steps)
        self.latents = noise(seed=seed)
        self.x, self.k = self.latents * self.scheduler.init_noise_sigma, 0

    @property
    def t(self) -> Any:
        return self.scheduler.timesteps[self.k]

    def waiting(self) -> bool:
        return self.k < len(self.scheduler.timesteps)

    @precondition(waiting)
    @rule(times=st.integers(1, 3))
    def ask(self, times: int) -> None:
        """The input of the network may be asked for more than once."""
        asked = [self.scheduler.scale_model_input(self.x, self.t) for _ in range(times)]
        assert all(torch.equal(asked[0], other) for other in asked)

    @precondition(waiting)
    @rule()
    def step(self) -> None:
        before = self.x.clone()
        out = network(self.scheduler.scale_model_input(self.x, self.t), float(self.t))
        new = self.scheduler.step(out, self.t, self.x, return_dict=False)[0]
        assert torch.equal(self.x, before)
        out.fill_(torch.nan)
        self.x, self.k = new, self.k + 1
        if not self.waiting():
            plan = ki.compile_plan(self.scheduler.sampler, self.scheduler.schedule)
            want = ki.run(plan, denoiser_of(self.scheduler), start_of(self.scheduler, self.latents))
            want = want / self.scheduler._course_now().table.to_x(plan.sigmas[-1])
            assert float((new - want).abs().max()) <= 2e-5 * float(want.abs().max())

    @precondition(waiting)
    @rule(offset=st.sampled_from([0.5, 1e4, -77.25]))
    def step_out_of_order(self, offset: float) -> None:
        with pytest.raises(ValueError, match="timestep"):
            self.scheduler.step(torch.zeros_like(self.x), float(self.t) + offset, self.x)

    @precondition(waiting)
    @rule()
    def step_of_another_shape(self) -> None:
        with pytest.raises(ValueError, match="shape"):
            self.scheduler.step(torch.zeros(2, 4, 4), self.t, self.x)

    @rule()
    def copy(self) -> None:
        self.scheduler = copy.deepcopy(self.scheduler)


@pytest.mark.filterwarnings("ignore:.*makes unit Gaussian data:RuntimeWarning")
def test_a_scheduler_in_any_order_of_calls() -> None:
    run_state_machine_as_test(Pipeline, settings=few(10))
