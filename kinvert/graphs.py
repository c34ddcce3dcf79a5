"""CUDA graphs: the kernels of a run, or of one evaluation, recorded once and launched as one.

Between two kernels of a small network the GPU waits for Python. A recorded graph has no Python in it: `capture` records
the denoiser and all steps of a Plan, for runs that are repeated (the same Plan, denoiser, conditioning and shape, other
x and noise); `captured_denoiser` records one evaluation, which pays within a single run and is what
`sample(..., graph=True)` uses.

Recording needs a CUDA device and a denoiser that can be recorded: no reads of the device by the host, no shapes that
depend on values, no random numbers of its own. Where that is not so, the same calls run without a graph and `reason`
says why. The noise of a run is drawn before the launch, into tensors that the graph reads, so that any noise source
will do; they take the memory of `plan.draws` states.

Compiling instead, `torch.compile(lambda x: ki.run(plan, denoiser, x), fullgraph=True)`, fuses each linear combination
into one kernel and works where the denoiser compiles as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kinvert.denoisers import Denoiser, Guided
from kinvert.engine import Callback, Constants, check_state, checked_noise, fused_loop, noise_for, run
from kinvert.noise import Noise
from kinvert.plan import Plan

WARM_UPS = 2  # calls before the recording: libraries choose their kernels and take their memory in the first ones


def capture(plan: Plan, denoiser: Denoiser, x: Tensor) -> CapturedRun:
    """Record a whole run of a Plan.

    Args:
        plan: from `compile_plan`, without auxiliary state given.
        denoiser: see `ki.run`. What it closes over (weights, conditioning) is read at its present address whenever the
            graph is launched: change it in place, or capture again.
        x: a state like those to come: shape, dtype and device count, its values do not matter.

    Returns:
        A function `(x, noise=None, callback=None) -> Tensor` with the results of `ki.run(plan, denoiser, x, noise,
        callback)`; its `reason` is None, or says why it runs without a graph. It also does so, for that call, where a
        callback is given or x is of another shape, dtype or device.

    Raises:
        TypeError, ValueError: as `ki.run`, whose checks are made while recording.
    """
    check_state(x)
    return CapturedRun(plan, denoiser, x)


def captured_denoiser(denoiser: Denoiser, x: Tensor) -> CapturedDenoiser:
    """Record one evaluation of a denoiser, `denoiser(x, sigma)`, for states like x.

    Args:
        denoiser, x: see `capture`.

    Returns:
        A denoiser with the same results; its `reason` is None, or says why it runs without a graph.
    """
    check_state(x)
    return CapturedDenoiser(denoiser, x)


class CapturedRun:
    """What `capture` returns."""

    def __init__(self, plan: Plan, denoiser: Denoiser, x: Tensor) -> None:
        self.plan, self.denoiser = plan, denoiser
        self._x = torch.empty_like(x).copy_(x)
        self._noises = [torch.zeros_like(x) for _ in range(plan.draws)]
        self._constants = Constants.of(plan, x)  # of its own: the graph reads them where they are
        self._launch, self._result, self.reason = _record(self._run, x)

    def _run(self) -> Tensor:
        noises = iter(self._noises)
        return fused_loop(self.plan, self.denoiser, {"x": self._x}, lambda a, b: next(noises), None, self._constants)[
            "x"
        ]

    @torch.no_grad()
    def __call__(self, x: Tensor, noise: Noise | None = None, callback: Callback | None = None) -> Tensor:
        """Run the Plan from x; see `capture`."""
        if self._launch is None or callback is not None or not _alike(x, self._x):
            return run(self.plan, self.denoiser, x, noise, callback)
        draw = noise_for(self.plan, noise, x)
        intervals = (interval for step in self.plan.steps for interval in step.noises)
        for buffer, interval in zip(self._noises, intervals, strict=True):
            buffer.copy_(checked_noise(draw, interval, x))
        self._x.copy_(x)
        self._launch()
        return self._result.clone()


class CapturedDenoiser:
    """What `captured_denoiser` returns."""

    def __init__(self, denoiser: Denoiser, x: Tensor) -> None:
        self.denoiser = denoiser
        self._x = torch.empty_like(x).copy_(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        self._sigma = torch.ones(len(x), dtype=dtype, device=x.device)
        self._launch, self._result, self.reason = _record(lambda: denoiser(self._x, self._sigma), x)

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
    return (x.shape, x.dtype, x.device, x.stride()) == (like.shape, like.dtype, like.device, like.stride())


def _record(function: Callable[[], Any], x: Tensor) -> tuple[Callable[[], None] | None, Any, str | None]:
    """(launch, the result that a launch writes, None), or (None, None, the reason why there is no graph)."""
    if x.device.type != "cuda":
        return None, None, f"x is on {x.device.type}, and only a CUDA device has graphs"
    with torch.no_grad(), torch.cuda.device(x.device):
        try:
            return *_cuda_graph(function), None
        except RuntimeError as error:  # also what CUDA raises for an operation that cannot be recorded
            torch.cuda.synchronize()
            return None, None, f"the denoiser cannot be recorded: {error}"


def _cuda_graph(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Warm up on a stream of its own, as CUDA asks for, then record."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result
