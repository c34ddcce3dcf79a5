"""A run in few passes over memory: the kernels that `program` lays out for a Plan, in buffers that are used again.

The results are those of `engine`'s plain loop, to rounding. It is for runs that no one differentiates, vectorises or
compiles, and needs to know who holds a tensor: a row that the denoiser keeps is not overwritten.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, lerp

from kinvert import torch_hooks
from kinvert.denoisers import Denoiser
from kinvert.denoisers.buffers import keep, lay_out
from kinvert.engine.contract import check_outputs, checked_noise
from kinvert.engine.kernels import Call, Kernel, Pass, Program, program
from kinvert.engine.step import Callback, Memory, Progress, stage_sigmas
from kinvert.noise import NoiseFunction
from kinvert.plan import Interval, Plan
from kinvert.tensors import is_half, wide_dtype

BLOCK = 2048
"""A product with one result is made in pieces of so many columns, if they divide the rows: on a CPU 15 to 40 % faster
than in one piece. Products with several results are slower in pieces."""
_CONSTANTS: WeakKeyDictionary[Plan, tuple[Any, Constants, int | None]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Constants:
    """What does not change from run to run: the program of a Plan, and its numbers on the device.

    Attributes:
        program: the kernels.
        passes: the steps of the program, and the evaluations of each with their noise levels, shape (batch,).
        matrices: coefficients of each product, shape (blocks, results, terms), the same for all blocks.
        blocks: pieces that a product is made in; see `BLOCK`.
    """

    program: Program
    passes: tuple[tuple[Pass, tuple[tuple[Call, Tensor], ...]], ...]
    matrices: tuple[Tensor, ...]
    blocks: int

    @classmethod
    def of(cls, plan: Plan, x: Tensor) -> Constants:
        """Upload the numbers for a state like `x`."""
        code = program(plan, half=is_half(x.dtype))
        sigmas = stage_sigmas(plan.stage_levels, x)
        levels = (level.clone() for level in sigmas.unbind(0))  # a compiled network asks where a tensor starts
        passes = tuple([(one, tuple([(call, next(levels)) for call in one.calls])) for one in code.passes])
        blocks = x.numel() // BLOCK if code.side == 1 and x.numel() % BLOCK == 0 else 0
        if not code.matrices:
            return cls(code, passes, (), 1)
        lines = torch.tensor([row for matrix in code.matrices for row in matrix], dtype=torch.float64)
        lines = lines.to(x.dtype).to(x.device)
        matrices = [m.expand(blocks or 1, -1, -1) for m in lines.split([len(matrix) for matrix in code.matrices])]
        return cls(code, passes, tuple(matrices), blocks or 1)

    @property
    def version(self) -> int | None:
        """Return a number that changes if somebody writes into the noise levels, or None if that cannot be told."""
        versions = [torch_hooks.version(level) for _, evaluations in self.passes for _, level in evaluations]
        return None if None in versions else sum(filter(None, versions))


def constants_for(plan: Plan, x: Tensor) -> Constants:
    """The constants of a Plan; those of its latest run, if the state is alike and no denoiser wrote into its sigma."""
    if torch.is_inference_mode_enabled():  # tensors made in it are of no use outside
        return Constants.of(plan, x)
    key = (x.shape, x.dtype, x.device, type(x))
    known = _CONSTANTS.get(plan)
    if known is None or known[0] != key or known[2] is None or known[1].version != known[2]:
        constants = Constants.of(plan, x)
        known = _CONSTANTS[plan] = (key, constants, constants.version)
    return known[1]


class FusedRun:
    """A run as `program` lays it out: `start`, `advance` through the steps, `end`; again and again if need be.

    The values of the run are rows, which are used again from step to step, and tensors that are not the engine's (x,
    what the denoiser returned), which are never written to. Products need the rows side by side in one buffer. Each row
    is a tensor that starts its storage all the same, so that all inputs of a compiled network look alike.
    """

    def __init__(self, constants: Constants, x: Tensor) -> None:
        code = constants.program
        self.constants, self.code, self.x = constants, code, x
        self.values: list[Any] = [None] * (code.rows + code.foreign)
        self.contiguous = x.is_contiguous()
        # Products of matrices, unlike those with vectors, may be taken in TensorFloat-32 or less if the user allows it.
        self.exact = code.side and x.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
        self.storages, self.users = [0] * code.rows, [0] * code.rows
        if code.side:
            strides = x.stride() if self.contiguous else torch.empty_like(x).stride()
            shape, strides = (code.rows, *x.shape), (x.numel(), *strides)
            self.bind(torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device))
        else:
            for slot in range(code.rows):
                self.place(slot, torch.empty_like(x))

    def bind(self, buffer: Tensor) -> None:
        """Take the rows of `buffer`, shape (rows, batch, *event), for the values."""
        n, numel = self.code.rows, self.x.numel()
        self.buffer, rows = buffer, separate(buffer)
        self.sides, self.results = self.products(buffer.as_strided((n, numel), (numel, 1)))
        for slot in range(n):
            self.place(slot, rows[self.code.place(slot)])

    def place(self, slot: int, row: Tensor) -> None:
        """Take a tensor for a row, and note how many know its memory."""
        self.values[slot], self.storages[slot] = row, torch_hooks.storage_key(row)
        self.users[slot] = torch_hooks.holder_counters()[1](self.storages[slot])

    def replace(self, slot: int) -> None:
        """Leave a row to the denoiser, which keeps it, and go on with a copy."""
        if self.code.side:
            self.bind(self.buffer.clone())
        else:
            self.place(slot, self.values[slot].clone())

    def products(self, buffer: Tensor) -> tuple[Any, Any]:
        """What a product reads and what it writes, for either side: rows in pieces, or one by one."""
        n, side = self.code.rows, self.code.side
        if self.exact:
            blocks = self.constants.blocks
            pieces = buffer.view(n, blocks, buffer.shape[1] // blocks).transpose(0, 1)
            return (pieces[:, : n - side], pieces[:, side:]), (pieces[:, :side], pieces[:, n - side :])
        return (buffer[: n - side].t(), buffer[side:].t()), (buffer[:side].unbind(0), buffer[n - side :].unbind(0))

    def start(self, state: Memory) -> None:
        """Take up the initial state: as it is, or copied into its row."""
        if self.code.side:  # a product reads all rows of a side, with weight 0 where they mean nothing yet
            self.buffer.zero_()
        self.evaluations = 0
        for name, slot in self.code.start.items():
            self.put(slot, state[name])

    def advance(
        self,
        passes: Iterable[tuple[Pass, tuple[tuple[Call, Tensor], ...]]],
        denoiser: Denoiser,
        draw: NoiseFunction,
        callback: Callback | None = None,
    ) -> None:
        """Make steps, which are some of `constants.passes`. An input that the denoiser keeps is not overwritten."""
        values, compute, dtype, shape = self.values, self.compute, self.x.dtype, self.x.shape
        holders, users = torch_hooks.holder_counters()
        for (step, draws, _, kernels, dead), calls in passes:
            seen = None
            for slot, interval in draws:
                self.draw(slot, draw, interval)
            for (stage, before, slot, out, out_uncond, lives_on), sigma in calls:
                if before:
                    compute(before)
                x = values[slot]
                held = holders(x)
                denoised: Any = denoiser(x, sigma)
                uncond: Any = None
                plain = type(denoised) is Tensor and denoised.dtype is dtype and denoised.shape == shape
                if not plain or out_uncond is not None:
                    denoised, uncond = check_outputs(denoised, x, stage, step)
                if slot >= 0 and (holders(x) != held or users(self.storages[slot]) != self.users[slot]):
                    denoised, uncond = self.owned(denoised, slot), self.owned(uncond, slot)
                    if holders(x) != held or users(self.storages[slot]) != self.users[slot]:
                        self.replace(slot)
                if lives_on and out < 0:
                    outputs = [denoised, uncond]
                    del denoised, uncond  # the list has to be all there is of them
                    keep(outputs)
                    denoised, uncond = outputs
                    del outputs
                self.put(out, denoised)
                if out_uncond is not None:
                    self.put(out_uncond, uncond)
                if callback is not None and seen is None:
                    seen = values[slot].clone(), denoised.clone()
                del denoised, uncond  # what is in a row need not live on
            compute(kernels)
            for slot in dead:
                values[slot] = None
            self.evaluations += len(calls)
            if callback is not None and seen is not None:
                callback(Progress(step.index, step.sigma, step.sigma_next, *seen, evaluations=self.evaluations))

    def end(self) -> Memory:
        """The final state, in tensors of its own."""
        final = {}
        for name, (slot, scale) in self.code.end.items():
            value = self.values[slot].to(self.x.dtype, copy=True)
            final[name] = value if scale == 1.0 else value.mul_(scale)
        return final

    def put(self, slot: int, value: Tensor) -> None:
        """A tensor that is not the engine's: as it is, or copied into a row."""
        if slot < 0:
            self.values[slot] = value
        else:
            self.values[slot].copy_(value)

    def draw(self, slot: int, draw: NoiseFunction, interval: Interval) -> None:
        """Noise, straight into its row where the source can do that."""
        into = getattr(draw, "into", None)
        if into is not None and self.contiguous:
            into(self.values[slot], *interval)
        else:
            self.values[slot].copy_(checked_noise(draw, interval, self.x))

    def owned(self, out: Any, slot: int) -> Any:
        """What the denoiser returned; a copy where that is its input, or a part of it."""
        return out.clone() if out is not None and torch_hooks.storage_key(out) == self.storages[slot] else out

    def compute(self, kernels: tuple[Kernel, ...]) -> None:
        """Run kernels; see `program.Kernel`."""
        values = self.values
        for op, out, a, b, weight, terms in kernels:
            if op == "lerp":
                lerp(values[a], values[b], weight, out=values[out])
            elif op == "add":
                torch.add(values[a], values[b], alpha=weight, out=values[out])
            elif op == "mix":
                self.mix(out, a, self.constants.matrices[b])
            elif op == "scale":
                torch.mul(values[a], weight, out=values[out])
            elif op == "blend" and values[a].dtype == values[b].dtype:
                torch.lerp(values[a], values[b], weight, out=values[out])
            else:
                wide = torch.zeros_like(self.x, dtype=wide_dtype(self.x.dtype))
                for slot, c in terms:
                    wide.add_(values[slot], alpha=c)
                values[out].copy_(wide)

    def mix(self, out: int, side: int, matrix: Tensor) -> None:
        """The product for a whole side, or for the input of an evaluation, which takes the place of x alone."""
        rows, result = self.sides[side], self.results[out != 0]
        if self.exact:
            lines = matrix.size(1)
            torch.bmm(matrix, rows, out=result if lines == self.code.side else result[:, :lines])
        else:
            for line, row in zip(matrix[0].unbind(0), result, strict=False):
                torch.mv(rows, line, out=row)


def separate(buffer: Tensor) -> tuple[Tensor, ...]:
    """The rows of a buffer, each as a tensor that starts its own storage where torch can do that."""
    rows = buffer.unbind(0)
    if type(buffer) is not Tensor or buffer.device.type == "meta":
        return rows
    storage, size = buffer.untyped_storage(), rows[0].nbytes
    pieces = [storage[i * size : (i + 1) * size] for i in range(len(rows))]
    return tuple([buffer.new_empty(0).set_(p, 0, r.shape, r.stride()) for p, r in zip(pieces, rows, strict=True)])


def fused_loop(plan: Plan, denoiser: Denoiser, state: Memory, draw: NoiseFunction, callback: Callback | None) -> Memory:
    """The run as `program` lays it out: the same values in buffers that are used again from step to step."""
    state = {name: lay_out(value) for name, value in state.items()}
    x = state["x"]
    version = torch_hooks.version(x)
    constants = constants_for(plan, x)
    fused = FusedRun(constants, x)
    fused.start(state)
    fused.advance(constants.passes, denoiser, draw, callback)
    if torch_hooks.version(x) != version:
        raise ValueError(
            "the denoiser wrote into x, so that the state and your own tensor changed under the run; let it work on a "
            "copy, e.g. x = x.clone() in front of an operation in place"
        )
    return fused.end()
