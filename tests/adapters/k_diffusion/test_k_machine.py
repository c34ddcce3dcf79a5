"""Scripts of k-diffusion in any order of calls: nested, stopped, copied and repeated, a call gives what it gives alone."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from randomruns import few
from torch import Tensor

import kinvert as ki
import kinvert.adapters.k_diffusion as K

ABAR = torch.linspace(0.9999, 0.05, 20, dtype=torch.float64)
NAMES = ["euler", "heun", "lms", "dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "dpm_2", "dpm_fast"]
PLACES = st.sampled_from([0.1, 0.25, 1.0, 2.5, 4.0, 8.0])


class StoppedError(Exception):
    """What a script raises in a callback."""


class Net(torch.nn.Module):
    """A smooth network, which counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(0.3 * x) + 0.01 * t.reshape(-1, *[1] * (x.ndim - 1))


def start(seed: int) -> Tensor:
    return 4 * torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Script(RuleBasedStateMachine):
    """A script with one model, whose runs overlap."""

    paths = Bundle("paths")

    @initialize(cls=st.sampled_from([K.DiscreteEpsDDPMDenoiser, K.DiscreteVDDPMDenoiser]), quantize=st.booleans())
    def build(self, cls: Any, quantize: bool) -> None:
        self.make: Any = lambda: cls(Net(), ABAR, quantize)
        self.model: Any = self.make()
        self.known: dict[tuple[str, int, int], Tensor] = {}

    def arguments(self, name: str, steps: int, seed: int) -> tuple[Any, dict[str, Any]]:
        function = getattr(K, f"sample_{name}")
        if name == "dpm_fast":
            given: dict[str, Any] = {"sigma_min": 0.05, "sigma_max": 4.0, "n": steps}
        else:
            given = {"sigmas": self.make().get_sigmas(steps).double()}
        if "noise_sampler" in inspect.signature(function).parameters:
            given["noise_sampler"] = ki.noise.white(seed)
        return function, given

    def wanted(self, name: str, steps: int, seed: int) -> Tensor:
        """What the call gives in a script of its own."""
        key = (name, steps, seed)
        if key not in self.known:
            function, given = self.arguments(*key)
            self.known[key] = function(self.make(), start(seed), **given)
        return self.known[key]

    def call(self, name: str, steps: int, seed: int, callback: Any = None) -> None:
        function, given = self.arguments(name, steps, seed)
        x, before = start(seed), {key: copy.deepcopy(value) for key, value in given.items() if key == "sigmas"}
        result = function(self.model, x, callback=callback, **given)
        assert torch.equal(result, self.wanted(name, steps, seed)) and torch.equal(x, start(seed))
        assert all(torch.equal(given[key], value) for key, value in before.items())

    @rule(name=st.sampled_from(NAMES), steps=st.integers(2, 5), seed=st.integers(0, 2))
    def sample(self, name: str, steps: int, seed: int) -> None:
        self.call(name, steps, seed)

    @rule(outer=st.sampled_from(NAMES), inner=st.sampled_from(NAMES), steps=st.integers(2, 4), at=st.integers(0, 1))
    def sample_within(self, outer: str, inner: str, steps: int, at: int) -> None:
        """The callback of one run makes another one with the same model."""

        def callback(info: dict[str, Any]) -> None:
            if info["i"] == at:
                self.call(inner, 3, 1)

        self.call(outer, steps, 0, callback)

    @rule(name=st.sampled_from(NAMES), at=st.integers(0, 1))
    def stop(self, name: str, at: int) -> None:
        def callback(info: dict[str, Any]) -> None:
            if info["i"] == at:
                raise StoppedError

        function, given = self.arguments(name, 4, 0)
        with pytest.raises(StoppedError):
            function(self.model, start(0), callback=callback, **given)

    @rule(name=st.sampled_from(NAMES))
    def mistake(self, name: str) -> None:
        function, given = self.arguments(name, 3, 0)
        before = self.model.inner_model.calls
        with pytest.raises(TypeError, match="takes"):
            function(self.model, start(0), nothing=1, **given)
        with pytest.raises(TypeError, match="extra_args"):
            function(self.model, start(0), extra_args=[1], **given)
        assert self.model.inner_model.calls == before

    @rule(how=st.sampled_from(["deepcopy", "pickle", "state"]))
    def copy(self, how: str) -> None:
        if how == "deepcopy":
            self.model = copy.deepcopy(self.model)
        elif how == "pickle":
            self.model = pickle.loads(pickle.dumps(self.model))
        else:
            self.model.load_state_dict(self.make().state_dict())

    @rule(n=st.integers(1, 30))
    def look(self, n: int) -> None:
        fresh = self.make()
        assert torch.equal(self.model.get_sigmas(n), fresh.get_sigmas(n))
        middle = self.model.sigmas[1:-1]
        torch.testing.assert_close(self.model.t_to_sigma(self.model.sigma_to_t(middle, quantize=False)), middle)

    @rule(target=paths, seed=st.integers(0, 3))
    def path(self, seed: int) -> tuple[int, Any, Any]:
        x = start(0)
        return seed, K.BrownianTreeNoiseSampler(x, 0.1, 8.0, seed=seed), K.BatchedBrownianTree(x, 0.1, 8.0, seed=seed)

    @rule(pair=paths, a=PLACES, b=PLACES, c=PLACES)
    def ask(self, pair: tuple[int, Any, Any], a: float, b: float, c: float) -> None:
        """Whatever was asked before, but for rounding; parts of a path add up."""
        seed, sampler, tree = pair
        if a != b:
            fresh = K.BrownianTreeNoiseSampler(start(0), 0.1, 8.0, seed=seed)
            torch.testing.assert_close(sampler(a, b), fresh(a, b), rtol=1e-12, atol=1e-12)
        a, b, c = sorted({a, b, c}) if len({a, b, c}) == 3 else (0.1, 1.0, 8.0)
        torch.testing.assert_close(tree(a, b) + tree(b, c), tree(a, c))


def test_scripts_in_any_order_of_calls() -> None:
    run_state_machine_as_test(Script, settings=settings(few(6), stateful_step_count=20))
