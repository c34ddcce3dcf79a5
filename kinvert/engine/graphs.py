"""CUDA graphs: the kernels of a run, of a step, or of one evaluation, recorded once and launched as one.

Between two kernels of a small network the GPU waits for Python. A recorded graph has no Python in it:

* `capture` records the denoiser and all steps of a Plan, as one graph or as one for each step. It pays for runs that
  are repeated: the same Plan, denoiser, conditioning and shape, other x and noise.
* `captured_denoiser` records one evaluation. It pays within a single run; `sample(..., graph=True)` uses it.

Recording needs a CUDA device and a denoiser that can be recorded: no reads of the device by the host, no shapes that
depend on values, no random numbers of its own. Otherwise the same calls run without a graph and `reason` says why.
Noise is drawn before a launch, into tensors that the graph reads, so any noise source will do.

Graphs of single steps share their memory and are launched in the order in which they were recorded, so that each finds
what earlier ones left there. Between them there is Python again: a callback can see the run, and noise is drawn step by
step. A run in one graph is one launch; its noise, `plan.draws` states, is drawn ahead.

Compiling instead, `torch.compile(lambda x: ki.run(plan, denoiser, x), fullgraph=True)`, fuses each linear combination
into one kernel and works if the denoiser compiles as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from kinvert.checks import check_choice
from kinvert.denoisers import Denoiser, Guided
from kinvert.engine.contract import check_plan, check_state, checked_noise
from kinvert.engine.draws import noise_for
from kinvert.engine.fused import FusedRun, Uploaded
from kinvert.engine.loop import run
from kinvert.engine.step import Callback, Progress
from kinvert.noise import Noise
from kinvert.plan import Plan
from kinvert.tensors import wide_dtype
from kinvert.torch_hooks import can_reuse_memory

__all__ = [
    "RECORDERS",
    "CapturedDenoiser",
    "CapturedRun",
    "Recorder",
    "Recording",
    "Steps",
    "capture",
    "captured_denoiser",
    "record_cuda_graphs",
]

Steps = Literal["all", "each"]

WARM_UPS = 2  # calls before the recording: libraries choose their kernels and take their memory in the first ones


class Recording(NamedTuple):
    """What a recorder gives.

    Attributes:
        launches: one function for each recorded function, which carries it out again; empty if there is a reason.
        result: the tensor that the last of them writes.
        reason: None, or why nothing was recorded.
    """

    launches: list[Callable[[], None]]
    result: Any
    reason: str | None


class Recorder(Protocol):
    """Records functions on a device; see `RECORDERS`."""

    def __call__(self, functions: Sequence[Callable[[], Any]], x: Tensor, /) -> Recording:
        """Record functions that work in place, to be launched in this order, for states like x."""
        ...


def capture(plan: Plan, denoiser: Denoiser, x: Tensor, steps: Steps = "all") -> CapturedRun:
    """Record a whole run of a Plan.

    Args:
        plan: from `compile_plan`, without auxiliary state given.
        denoiser: see `ki.run`. What it closes over (weights, conditioning) is read at its present address whenever the
            graph is launched: change it in place, or capture again.
        x: a state like those to come: shape, dtype and device count, its values do not matter.
        steps: "all" in one graph, or a graph for "each", for runs that are watched by a callback, or whose noise
            would take too much memory if it were drawn ahead.

    Returns:
        A function `(x, noise=None, callback=None) -> Tensor` with the results of `ki.run(plan, denoiser, x, noise,
        callback)`; its `reason` is None, or says why it runs without a graph. A single call runs without it, too, if x
        has another shape, dtype or device, or if a callback is given and all steps are one graph.

    Raises:
        TypeError, ValueError: as `ki.run`, whose checks are made while recording.
        ValueError: steps that is neither "all" nor "each".
    """
    check_plan(plan)
    x = check_state(x)
    check_choice("steps", steps, get_args(Steps))
    return CapturedRun(plan, denoiser, x, steps)


def captured_denoiser(denoiser: Denoiser, x: Tensor) -> CapturedDenoiser:
    """Record one evaluation of a denoiser, `denoiser(x, sigma)`, for states like x.

    Args:
        denoiser, x: see `capture`.

    Returns:
        A denoiser with the same results; its `reason` is None, or says why it runs without a graph.
    """
    x = check_state(x)
    return CapturedDenoiser(denoiser, x)


class CapturedRun:
    """What `capture` returns."""

    def __init__(self, plan: Plan, denoiser: Denoiser, x: Tensor, steps: Steps) -> None:
        self.plan, self.denoiser, self.steps = plan, denoiser, steps
        self._x = torch.empty_like(x).copy_(x)
        count = len(plan.steps)
        self._parts = [range(count)] if steps == "all" else [range(i, i + 1) for i in range(count)]
        draws = [sum(len(plan.steps[i].noises) for i in part) for part in self._parts]
        self._noises = [torch.zeros_like(x) for _ in range(max(draws))]
        self._seen: dict[int, Progress] = {}  # by step; all share two tensors
        self._numbers = Uploaded.of(plan, x)  # its own, since the graphs read them at their addresses
        self._fused: FusedRun | None = None
        self._launches, self._result, self.reason = _record([self._recording(part) for part in self._parts], x)

    def _recording(self, part: range) -> Callable[[], Tensor | None]:
        """Return the function to record for some steps; that of the last step returns the result."""

        def steps() -> Tensor | None:
            if self._fused is None:
                self._fused = FusedRun(self._numbers, self._x)
            if part[0] == 0:
                self._fused.start({"x": self._x})
            noises = iter(self._noises)
            callback = self._keep if self.steps == "each" else None
            recorded = self._numbers.steps[part[0] : part[-1] + 1]
            self._fused.make_steps(recorded, self.denoiser, lambda a, b: next(noises), callback)
            return self._fused.end()["x"] if part[-1] == len(self.plan.steps) - 1 else None

        return steps

    def _keep(self, progress: Progress) -> None:
        """Copy what callbacks receive into two fixed tensors, so that the graph writes to stable addresses."""
        known = next(iter(self._seen.values()), None)
        x = torch.empty_like(progress.x) if known is None else known.x
        denoised = torch.empty_like(progress.denoised) if known is None else known.denoised
        self._seen[progress.index] = replace(
            progress, x=x.copy_(progress.x), denoised=denoised.copy_(progress.denoised)
        )

    @torch.no_grad()
    def __call__(self, x: Tensor, noise: Noise | None = None, callback: Callback | None = None) -> Tensor:
        """Run the Plan from x; see `capture`."""
        unseen = callback is not None and self.steps == "all"
        if self.reason is not None or unseen or not _alike(x, self._x):
            return run(self.plan, self.denoiser, x, noise, callback)
        draw = noise_for(self.plan, noise, x)
        self._x.copy_(x)
        for part, launch in zip(self._parts, self._launches, strict=True):
            intervals = [interval for i in part for interval in self.plan.steps[i].noises]
            for buffer, interval in zip(self._noises, intervals, strict=False):
                buffer.copy_(checked_noise(draw, interval, x))
            launch()
            seen = self._seen.get(part[0])
            if callback is not None and seen is not None:
                callback(replace(seen, x=seen.x.clone(), denoised=seen.denoised.clone()))
        return self._result.clone()


class CapturedDenoiser:
    """What `captured_denoiser` returns."""

    def __init__(self, denoiser: Denoiser, x: Tensor) -> None:
        self.denoiser = denoiser
        self._x = torch.empty_like(x).copy_(x)
        dtype = wide_dtype(x.dtype)
        self._sigma = torch.ones(len(x), dtype=dtype, device=x.device)
        launches, self._result, self.reason = _record([lambda: denoiser(self._x, self._sigma)], x)
        self._launch = launches[0] if launches else None

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor | Guided:
        """Evaluate the denoiser; see `captured_denoiser`."""
        if self._launch is None or not _alike(x, self._x):
            return self.denoiser(x, sigma)
        self._x.copy_(x)
        self._sigma.copy_(sigma)
        self._launch()
        if isinstance(self._result, Guided):
            return Guided(*(part.clone() for part in self._result))
        return self._result.clone()


def _alike(x: Tensor, like: Tensor) -> bool:
    """Tell whether a recording for `like` serves x."""
    return (x.shape, x.dtype, x.device, x.stride()) == (like.shape, like.dtype, like.device, like.stride())


def _record(functions: Sequence[Callable[[], Any]], x: Tensor) -> Recording:
    """Record functions, one graph for each, with the recorder of x's device."""
    recorder = RECORDERS.get(x.device.type)
    if recorder is None:
        return Recording([], None, f"x is on {x.device.type}, and only a CUDA device has graphs")
    if not can_reuse_memory():
        return Recording([], None, "this version of torch lacks what the engine needs to run in place")
    return recorder(functions, x)


def record_cuda_graphs(functions: Sequence[Callable[[], Any]], x: Tensor) -> Recording:
    """Record functions as CUDA graphs that share their memory; the `Recorder` for "cuda"."""
    with torch.no_grad(), torch.cuda.device(x.device):
        try:
            return _cuda_graphs(functions)
        except RuntimeError as error:  # also what CUDA raises for an operation that cannot be recorded
            torch.cuda.synchronize()
            return Recording([], None, f"the denoiser cannot be recorded: {error}")


def _cuda_graphs(functions: Sequence[Callable[[], Any]]) -> Recording:
    """Warm up on a stream of its own, as CUDA requires, then record one function after the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            for function in functions:
                function()
    torch.cuda.current_stream().wait_stream(stream)
    launches, result, memory = list[Callable[[], None]](), None, torch.cuda.graph_pool_handle()
    for function in functions:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            result = function()
        launches.append(graph.replay)
    return Recording(launches, result, None)


RECORDERS: dict[str, Recorder] = {"cuda": record_cuda_graphs}
"""The recorder for each type of device; add one for a device that has graphs of its own."""
