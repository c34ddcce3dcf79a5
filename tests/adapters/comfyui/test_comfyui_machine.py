"""The nodes in any order of calls: with shared models and samplers, stopped, repeated, each gives what it gives alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, rule, run_state_machine_as_test
from randomruns import few
from standin import NEGATIVE, POSITIVE, Host, Model, StoppedError, back, error, latent, model, run
from torch import Tensor

from kinvert.adapters.comfyui.samplers import make_schedule

KINDS = st.sampled_from(["eps", "flow"])
NAMES = st.sampled_from(["euler", "heun", "dpmpp_2m", "ddim"])
SEEDS = st.integers(0, 2)


class Workflows(RuleBasedStateMachine):
    """A host whose models and samplers are kept from one workflow to the next."""

    models = Bundle("models")
    samplers = Bundle("samplers")
    latents = Bundle("latents")

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.host = Host()
        self.host.install(self.patch)
        self.known: dict[Any, Tensor] = {}

    def teardown(self) -> None:
        self.patch.undo()

    def same(self, key: Any, make: Callable[[Model, Any], Tensor], patcher: Model, sampler: Any = None) -> Tensor:
        """Check a result against that of a model and a sampler which nobody has used."""
        kind, name = key[:2]
        if key not in self.known:
            fresh = run("KinvertSampler", sampler_name=name)[0] if sampler is not None else None
            self.known[key] = make(model(kind), fresh)
        result = make(patcher, sampler)
        assert torch.equal(result, self.known[key])
        return result

    @rule(target=models, kind=KINDS)
    def load(self, kind: str) -> tuple[str, Model]:
        return kind, model(kind)

    @rule(target=samplers, name=NAMES)
    def choose(self, name: str) -> tuple[str, Any]:
        return name, run("KinvertSampler", sampler_name=name)[0]

    @rule(target=latents, of=models, name=NAMES, seed=SEEDS, end=st.integers(1, 3))
    def unsample(self, of: tuple[str, Model], name: str, seed: int, end: int) -> tuple[str, Tensor, int]:
        image = latent(seed=seed)

        def make(patcher: Model, _: Any) -> Tensor:
            return run(
                "KinvertUnsampler", model=patcher, steps=5, end_at_step=end, cfg=1.0, sampler_name=name,
                scheduler="even", normalize="disable", positive=POSITIVE, negative=NEGATIVE, latent_image=image,
            )[0]["samples"]  # fmt: skip

        found = self.same((of[0], name, "unsample", seed, end), make, of[1])
        assert torch.equal(image["samples"], latent(seed=seed)["samples"])
        return of[0], found, end

    @rule(of=models, by=samplers, given=latents)
    def sample(self, of: tuple[str, Model], by: tuple[str, Any], given: tuple[str, Tensor, int]) -> None:
        kind, patcher = of
        if kind == given[0]:
            sigmas, before = make_schedule(patcher, "even", 5)[given[2] :], given[1].clone()
            key = (kind, by[0], "sample", given[1].sum().item(), given[2])
            self.same(key, lambda patcher, sampler: back(patcher, sampler, sigmas, given[1]), patcher, by[1])
            assert torch.equal(given[1], before)

    @rule(of=models, seed=SEEDS)
    def invert(self, of: tuple[str, Model], seed: int) -> None:
        kind, patcher = of
        sigmas = make_schedule(patcher, "even", 5)[1:]

        def make(patcher: Model, _: Any) -> Tensor:
            return run(
                "KinvertInvert", model=patcher, sampler_name="euler", sigmas=sigmas, cfg=1.0, tolerance=0.0,
                max_evaluations=0, positive=POSITIVE, negative=NEGATIVE, latent_image=latent(seed=seed),
            )[0]["samples"]  # fmt: skip

        found = self.same((kind, "euler", "invert", seed), make, patcher)
        assert error(back(patcher, "euler", sigmas[:-1], found), latent(seed=seed)["samples"]) < 2e-5

    @rule(of=models, by=samplers, seed=SEEDS, after=st.integers(0, 2))
    def stop(self, of: tuple[str, Model], by: tuple[str, Any], seed: int, after: int) -> None:
        """The user stops a workflow after some evaluations."""
        self.host.checks, self.host.stop_after = 0, after
        try:
            with pytest.raises(StoppedError):
                run(
                    "KinvertUnsampler", model=of[1], steps=5, end_at_step=0, cfg=1.0, sampler_name=by[0],
                    scheduler="even", normalize="disable", positive=POSITIVE, negative=NEGATIVE,
                    latent_image=latent(seed=seed),
                )  # fmt: skip
        finally:
            self.host.stop_after = None

    @rule(of=models)
    def mistake(self, of: tuple[str, Model]) -> None:
        """A stochastic sampler cannot run up: refused before the model is asked."""
        calls = len(of[1].model.calls)
        rising = make_schedule(of[1], "even", 5)[1:-1].flip(0)
        with pytest.raises(ValueError, match="eta=0"):
            back(of[1], "euler_ancestral", rising, latent()["samples"])
        assert len(of[1].model.calls) == calls and not of[1].model_options


def test_nodes_in_any_order_of_calls() -> None:
    run_state_machine_as_test(Workflows, settings=settings(few(6), stateful_step_count=20))
