"""The engine: the one place where Plans, and rules, meet tensors.

`loop` is the loop that runs every sampler, `step` one step of it, `stepwise` the loop in the caller's hands. `kernels`
and `fused` do the same in fewer passes over memory; `graphs` records it; `adaptive` chooses its steps on the way.
"""

from kinvert.engine.contract import check_state
from kinvert.engine.draws import drawn_noises, noise_for
from kinvert.engine.fused import FusedRun, fused_loop
from kinvert.engine.loop import plain_loop, run, run_state
from kinvert.engine.step import Callback, Memory, Progress, advance, combine, stage_sigmas
from kinvert.engine.stepwise import Stepwise

__all__ = [
    "Callback",
    "FusedRun",
    "Memory",
    "Progress",
    "Stepwise",
    "advance",
    "check_state",
    "combine",
    "drawn_noises",
    "fused_loop",
    "noise_for",
    "plain_loop",
    "run",
    "run_state",
    "stage_sigmas",
]
