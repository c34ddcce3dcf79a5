"""A run in few passes over memory: the kernels that `kernels.program` lays out for a Plan, in reused memory.

The results are those of the plain loop, to rounding. It serves runs that nobody differentiates, vectorises or compiles,
and it counts who holds a tensor: a row that the denoiser keeps is not overwritten.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, lerp

from kinvert import torch_hooks
from kinvert.caches import SizedCache
from kinvert.denoisers import Denoiser
from kinvert.denoisers.buffers import keep, lay_out
from kinvert.engine.contract import check_outputs, checked_noise
from kinvert.engine.kernels import Call, Program, StepKernels, program
from kinvert.engine.operations import Add, Blend, Kernel, Lerp, Mix, Scale, Sum
from kinvert.engine.products import Products, blocks_for
from kinvert.engine.step import Callback, Memory, Progress, stage_sigmas
from kinvert.noise import NoiseFunction
from kinvert.plan import Interval, Plan, plan_size
from kinvert.tensors import is_half, wide_dtype

__all__ = ["FusedRun", "Uploaded", "fused_loop"]

_Kind = tuple[torch.Size, torch.dtype, torch.device, type]
_LATEST: SizedCache[Plan, tuple[_Kind, Uploaded]] = SizedCache(2**24)
"""What the latest run of each Plan uploaded, and for which kind of state; it is taken out while a run uses it."""

ROWS = 256
"""The largest batch for which the noise levels of all evaluations are kept as denoisers get them, shape (batch,). For
larger ones each is one number, and is expanded for its evaluation."""

StepOnDevice = tuple[StepKernels, tuple[tuple[Call, Tensor], ...]]
"""The kernels of a step, and its evaluations with their noise levels, as in `Uploaded.levels`."""


@dataclass(frozen=True)
class Uploaded:
    """The program of a Plan and its numbers on the device, which do not change from run to run.

    Attributes:
        program: the kernels.
        steps: the steps of the program, with the noise levels of their evaluations.
        levels: those noise levels, one after the other, shape (batch,); (1,) if the batch is larger than `ROWS`.
        matrices: coefficients of each product, shape (blocks, results, terms), the same for all blocks.
        blocks: the number of blocks that a product is computed in; see `products.BLOCK`.
    """

    program: Program
    steps: tuple[StepOnDevice, ...]
    levels: tuple[Tensor, ...]
    matrices: tuple[Tensor, ...]
    blocks: int

    @property
    def nbytes(self) -> int:
        """The memory of the levels and the coefficients, in bytes."""
        return sum(tensor.untyped_storage().nbytes() for tensor in (*self.levels, *self.matrices[:1]))

    @classmethod
    def of(cls, plan: Plan, x: Tensor) -> Uploaded:
        """Upload the numbers for a state like `x`."""
        code = program(plan, half=is_half(x.dtype))
        sigmas = stage_sigmas(plan.stage_levels, x)
        if len(x) > ROWS:
            sigmas = sigmas[:, :1]
        levels = tuple([level.clone() for level in sigmas.unbind(0)])  # a compiled network asks where a tensor starts
        rest = iter(levels)
        steps = tuple([(one, tuple([(call, next(rest)) for call in one.calls])) for one in code.steps])
        if not code.matrices:
            return cls(code, steps, levels, (), 1)
        blocks = blocks_for(code, x)
        lines = torch.tensor([row for matrix in code.matrices for row in matrix], dtype=torch.float64, device="cpu")
        lines = lines.to(x.dtype).to(x.device)
        matrices = [m.expand(blocks, -1, -1) for m in lines.split([len(matrix) for matrix in code.matrices])]
        return cls(code, steps, levels, tuple(matrices), blocks)


def take_uploaded(plan: Plan, x: Tensor) -> Uploaded:
    """Return the numbers of a Plan on the device for one run alone: those of an earlier run if they serve and are free.

    They serve if the state is alike and no denoiser wrote into its sigma, which it may. So no other run reads them
    meanwhile, in another thread or inside of the denoiser.
    """
    if torch.is_inference_mode_enabled():  # tensors made in this mode cannot be used outside of it
        return Uploaded.of(plan, x)
    kind, numbers = _LATEST.pop(plan) or (None, None)
    if numbers is None or kind != _kind(x) or torch_hooks.total_version(numbers.levels) != 0:
        return Uploaded.of(plan, x)
    return numbers


def leave_uploaded(plan: Plan, x: Tensor, numbers: Uploaded) -> None:
    """Leave the numbers of a run that ended to the next one."""
    if not torch.is_inference_mode_enabled():
        _LATEST.put(plan, (_kind(x), numbers), numbers.nbytes + plan_size(plan))


def _kind(x: Tensor) -> _Kind:
    """Return what the numbers on the device depend on besides the Plan."""
    return x.shape, x.dtype, x.device, type(x)


class FusedRun:
    """A run by the kernels of a program: `start`, `make_steps`, `end`; as often as needed.

    Values live in rows, which are used again from step to step, and in foreign tensors (x, what the denoiser returned),
    which are never written to. Products need the rows side by side in one buffer. Each row is still a tensor that
    starts its own storage, so that all inputs of a compiled network look alike.
    """

    def __init__(self, numbers: Uploaded, x: Tensor) -> None:
        code = numbers.program
        self.numbers, self.code, self.x = numbers, code, x
        self.values: list[Any] = [None] * (code.rows + code.foreign)
        self.contiguous = x.is_contiguous()
        self.storages, self.users = [0] * code.rows, [0] * code.rows
        if code.side:
            strides = x.stride() if self.contiguous else torch.empty_like(x).stride()
            shape, strides = (code.rows, *x.shape), (x.numel(), *strides)
            self.bind(torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device))
        else:
            for slot in range(code.rows):
                self.place(slot, torch.empty_like(x))

    def bind(self, buffer: Tensor) -> None:
        """Use the rows of `buffer`, shape (rows, batch, *event), for the values."""
        self.buffer, rows = buffer, separate(buffer)
        self.products = Products(self.code, buffer, self.numbers.blocks)
        for slot in range(self.code.rows):
            self.place(slot, rows[self.code.place(slot)])

    def place(self, slot: int, row: Tensor) -> None:
        """Use a tensor as a row, and note how many tensors share its memory."""
        _, users = torch_hooks.holder_counters()
        self.values[slot], self.storages[slot] = row, torch_hooks.storage_key(row)
        self.users[slot] = users(self.storages[slot])

    def leave(self, slot: int) -> None:
        """Leave a row to the denoiser, which keeps it, and go on with a copy."""
        if self.code.side:
            self.bind(self.buffer.clone())
        else:
            self.place(slot, self.values[slot].clone())

    def start(self, state: Memory) -> None:
        """Take the initial state: by reference, or copied into its row."""
        if self.code.side:  # a product reads all rows of a side, with weight 0 if they mean nothing yet
            self.buffer.zero_()
        self.evaluations = 0
        for name, slot in self.code.start.items():
            self.store(slot, state[name])

    def make_steps(
        self,
        steps: Iterable[StepOnDevice],
        denoiser: Denoiser,
        draw: NoiseFunction,
        callback: Callback | None = None,
    ) -> None:
        """Make some of the steps in `numbers.steps`. An input that the denoiser keeps is not overwritten."""
        few = len(self.x) <= ROWS
        values, compute, dtype, shape = self.values, self.compute, self.x.dtype, self.x.shape
        holders, users = torch_hooks.holder_counters()
        for (step, draws, _, update, dead), calls in steps:
            seen = None
            for slot, interval in draws:
                self.draw(slot, draw, interval)
            for (stage, kernels, slot, out, out_uncond, lives_on), sigma in calls:
                if kernels:
                    compute(kernels)
                x = values[slot]
                held = holders(x)
                denoised: Any = denoiser(x, sigma if few else sigma.expand(len(x)).contiguous())
                uncond: Any = None
                plain = type(denoised) is Tensor and denoised.dtype is dtype and denoised.shape == shape
                if not plain or out_uncond is not None:
                    denoised, uncond = check_outputs(denoised, x, stage, step)
                if slot >= 0 and (holders(x) != held or users(self.storages[slot]) != self.users[slot]):
                    denoised, uncond = self.owned(denoised, slot), self.owned(uncond, slot)
                    if holders(x) != held or users(self.storages[slot]) != self.users[slot]:
                        self.leave(slot)
                if lives_on and out < 0:
                    outputs = [denoised, uncond]
                    del denoised, uncond  # the list has to hold the only references
                    keep(outputs)
                    denoised, uncond = outputs
                    del outputs
                self.store(out, denoised)
                if out_uncond is not None:
                    self.store(out_uncond, uncond)
                if callback is not None and seen is None:
                    seen = values[slot].clone(), denoised.clone()
                del denoised, uncond  # what was copied into a row can be freed
            compute(update)
            for slot in dead:
                values[slot] = None
            self.evaluations += len(calls)
            if callback is not None and seen is not None:
                callback(Progress(step.index, step.sigma, step.sigma_next, *seen, evaluations=self.evaluations))

    def end(self) -> Memory:
        """Return the final state, in tensors of its own."""
        final = {}
        for name, (slot, scale) in self.code.end.items():
            value = self.values[slot].to(self.x.dtype, copy=True)
            final[name] = value if scale == 1.0 else value.mul_(scale)
        return final

    def store(self, slot: int, value: Tensor) -> None:
        """Store a foreign tensor in `slot`: by reference (slot < 0), or copied into the row."""
        if slot < 0:
            self.values[slot] = value
        else:
            self.values[slot].copy_(value)

    def draw(self, slot: int, draw: NoiseFunction, interval: Interval) -> None:
        """Draw noise, straight into its row if the source can write there."""
        into = getattr(draw, "into", None)
        if into is not None and self.contiguous:
            into(self.values[slot], *interval)
        else:
            self.values[slot].copy_(checked_noise(draw, interval, self.x))

    def owned(self, out: Any, slot: int) -> Any:
        """Return what the denoiser returned, as a copy if it is the denoiser's input or a part of it."""
        return out.clone() if out is not None and torch_hooks.storage_key(out) == self.storages[slot] else out

    def compute(self, kernels: tuple[Kernel, ...]) -> None:
        """Run kernels."""
        values = self.values
        for kernel in kernels:
            if type(kernel) is Lerp:
                out, a, b, weight = kernel
                lerp(values[a], values[b], weight, out=values[out])
            elif type(kernel) is Add:
                out, a, b, weight = kernel
                torch.add(values[a], values[b], alpha=weight, out=values[out])
            elif type(kernel) is Mix:
                out, side, number = kernel
                self.products.mix(out, side, self.numbers.matrices[number])
            elif type(kernel) is Scale:
                out, a, weight = kernel
                torch.mul(values[a], weight, out=values[out])
            elif type(kernel) is Blend and values[kernel.a].dtype == values[kernel.b].dtype:
                torch.lerp(values[kernel.a], values[kernel.b], kernel.weight, out=values[kernel.out])
            elif type(kernel) is Sum or type(kernel) is Blend:
                wide = torch.zeros_like(self.x, dtype=wide_dtype(self.x.dtype))
                for slot, c in kernel.terms:
                    wide.add_(values[slot], alpha=c)
                values[kernel.out].copy_(wide)


def separate(buffer: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of a buffer, each as a tensor that starts its own storage if torch can do that."""
    rows = buffer.unbind(0)
    if type(buffer) is not Tensor or buffer.device.type == "meta":
        return rows
    storage, size = buffer.untyped_storage(), rows[0].nbytes
    pieces = [storage[i * size : (i + 1) * size] for i in range(len(rows))]
    return tuple([buffer.new_empty(0).set_(p, 0, r.shape, r.stride()) for p, r in zip(pieces, rows, strict=True)])


def fused_loop(plan: Plan, denoiser: Denoiser, state: Memory, draw: NoiseFunction, callback: Callback | None) -> Memory:
    """Run a Plan by the kernels of its program.

    Raises:
        ValueError: the denoiser wrote into x.
    """
    state = {name: lay_out(value) for name, value in state.items()}
    x = state["x"]
    version = torch_hooks.version(x)
    numbers = take_uploaded(plan, x)
    fused = FusedRun(numbers, x)
    fused.start(state)
    fused.make_steps(numbers.steps, denoiser, draw, callback)
    if torch_hooks.version(x) != version:
        raise ValueError(
            "the denoiser wrote into x, so that the state and your own tensor changed under the run; let it work on a "
            "copy, e.g. x = x.clone() in front of an operation in place"
        )
    leave_uploaded(plan, x, numbers)
    return fused.end()
