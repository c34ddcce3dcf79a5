"""The readable reference: a rule run step by step on tensors, without a Plan.

It computes the rule's own formulas in the order in which they are written. It serves to debug a rule, and the tests
compare the compiled run of every sampler with it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kinvert.coordinates import settle
from kinvert.denoisers import Denoiser
from kinvert.denoisers.buffers import keep
from kinvert.engine.contract import check_outputs, check_state, checked_noise
from kinvert.engine.step import Memory, stage_sigmas
from kinvert.forms import Form
from kinvert.noise import Noise, NoiseFunction, bind, default_noise
from kinvert.plan import Interval, Stage, Step
from kinvert.rules.base import Rule, StepBuilder

__all__ = ["run_eager"]


def run_eager(rule: Rule, denoiser: Denoiser, x: Tensor, sigmas: Any, noise: Noise | None = None) -> Tensor:
    """Run a rule step by step on tensors, without compiling it: slower, easy to debug, the same result to rounding."""
    x = check_state(x)
    _, rule, schedule = settle(denoiser, rule, sigmas)  # in flow time as the verbs
    rule, levels = rule.prepare(schedule)
    draw = bind(default_noise(rule.default_noise) if noise is None else noise, x, clip=rule.noise_clip)
    state: Memory = {"x": x}
    for index in range(len(levels) - 1):
        builder = _EagerStep(levels, index, state, denoiser, draw)
        if index == 0:
            builder.memory.update(rule.auxiliary(builder))
        new_x: Any = rule.step(builder)
        remembered: dict[str, Any] = {**builder.remembered}
        state = {"x": new_x, **remembered}
    return state["x"]


class _EagerStep(StepBuilder):
    """A step whose states are tensors."""

    def __init__(self, sigmas: Any, index: int, memory: Any, denoiser: Denoiser, draw: NoiseFunction) -> None:
        super().__init__(sigmas, index, memory)
        self._denoiser, self._draw = denoiser, draw
        self._step = Step(index, self.sigma, self.sigma_next, (), (), Form({}))

    def denoise(self, x: Any, sigma: float) -> Any:
        return self._evaluate(x, sigma, guided=False)[0]

    def denoise_guided(self, x: Any, sigma: float) -> Any:
        return self._evaluate(x, sigma, guided=True)

    def _evaluate(self, x: Any, sigma: float, guided: bool) -> tuple[Any, Any]:
        stage = Stage(sigma, Form({}), guided)
        outputs = list(check_outputs(self._denoiser(x, stage_sigmas([sigma], x)[0].clone()), x, stage, self._step))
        keep(outputs)  # the rule may remember them
        return outputs[0], outputs[1]

    def noise(self, sigma_from: float, sigma_to: float) -> Any:
        return checked_noise(self._draw, Interval(sigma_from, sigma_to), self.x)  # type: ignore[arg-type]
