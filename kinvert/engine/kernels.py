r"""A Plan as kernel calls: where each value of a run lives, and how it is computed in few passes over memory.

A run keeps its values in *slots*. Slots 0, 1, ... are rows: the engine allocates them once and overwrites them from
step to step. Slots -1, -2, ... hold foreign tensors (the caller's x, what the denoiser returned), which are never
written to. The linear combinations of a Plan become

* chains of `Lerp` and `Add`, in place if the old value is not needed any more. Terms that sum to 1 (x, denoised values)
  are interpolated one after the other, positive weights first, so that no partial sum vanishes; the rest (noise,
  slopes) is added. k terms take k - 1 operations and 3 (k - 1) passes over memory.
* `Mix`: one product of a small matrix with neighbouring rows, for all rows of an update at once. k terms and m results
  take k + m passes, and 2 more for every denoised value, which is first copied into a row. On a CPU a product is as
  fast as a chain at 4 terms and faster from 5 on, so a Plan with a row of more than `CHAIN` terms is computed so.

For `Mix` the rows are laid out as [side A | ring | side B]. A side holds the new x and the memory that each step
computes anew; an update reads one side and the ring and writes the other side. The ring holds values that later steps
read unchanged: noise, denoised values, past slopes.

No tensor is met here: `kinvert.engine.fused` runs the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import NamedTuple

from kinvert.caches import sized_cache
from kinvert.engine.operations import Add, Blend, Kernel, Lerp, Mix, Scale, Sum
from kinvert.forms import Denoised, Form, Noise, State, Symbol, Uncond
from kinvert.plan import KEPT, Interval, Plan, Stage, Step, plan_size

__all__ = ["Call", "Kernel", "Program", "StepKernels", "outlives", "program"]

CHAIN = 3  # the most terms for which a chain is preferred


class Call(NamedTuple):
    """One evaluation of the denoiser.

    Attributes:
        stage: the evaluation in the Plan.
        kernels: what prepares the input.
        input: the slot of the input.
        denoised, uncond: the slots of what the denoiser returns; uncond is None if it returns no pair.
        outlives: whether that is read after another evaluation.
    """

    stage: Stage
    kernels: tuple[Kernel, ...]
    input: int
    denoised: int
    uncond: int | None
    outlives: bool


class StepKernels(NamedTuple):
    """One step as kernels.

    Attributes:
        step: the step in the Plan.
        draws: rows and the intervals of the noises that are drawn into them.
        calls: the evaluations.
        update: the kernels of the new state.
        dead: slots of foreign tensors that nothing reads after the step.
    """

    step: Step
    draws: tuple[tuple[int, Interval], ...]
    calls: tuple[Call, ...]
    update: tuple[Kernel, ...]
    dead: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """A Plan, ready for the engine.

    Attributes:
        rows: number of rows, each as large as x.
        side: number of rows of a side; 0 if there is no `Mix`.
        foreign: number of slots for foreign tensors.
        start: slot of each value of the initial state.
        end: slot and scale of each value of the final state.
        steps: the kernels of each step.
        matrices: the rows of coefficients of each `Mix`.
        held: the most denoised values that are kept, outside the rows, while the denoiser is called again.
    """

    rows: int
    side: int
    foreign: int
    start: dict[str, int]
    end: dict[str, tuple[int, float]]
    steps: tuple[StepKernels, ...]
    matrices: tuple[tuple[tuple[float, ...], ...], ...]
    held: int

    @property
    def memory(self) -> int:
        """Count the tensors of x's size that a run needs besides x and the denoiser's own memory."""
        return self.rows + self.held

    def place(self, slot: int) -> int:
        """Return where the row of a slot lies in memory, [side A | ring | side B]; slots count side A, side B, ring."""
        return _place(slot, self.side, self.rows)


def _place(slot: int, side: int, rows: int) -> int:
    if slot < side:
        return slot
    return slot + rows - 2 * side if slot < 2 * side else slot - side


class _Value(NamedTuple):
    """A value: `scale` times what `slot` holds.

    `weight` says by how much the slot's content shifts if x and all D shift by 1: 1 for states, 0 for noise.
    """

    slot: int
    scale: float = 1.0
    weight: float = 1.0


Known = dict[Symbol, _Value]
_coefficient = itemgetter(0)


@dataclass
class _Pool:
    """Slots to take and to give back; `step` is 1 for rows and -1 for slots of foreign tensors."""

    next: int
    step: int
    free: list[int] = field(default_factory=list)

    def take(self) -> int:
        if self.free:
            return self.free.pop()
        self.next += self.step
        return self.next - self.step


@sized_cache(KEPT, lambda _, plan, *more: plan_size(plan))
def program(plan: Plan, half: bool = False) -> Program:
    """Return the kernel calls of a Plan: chains alone or, if a row has many terms, products too.

    Args:
        plan: the Plan.
        half: the state is in half precision. A lerp computes in float32 and rounds once; longer combinations are
            computed as `Sum`.
    """
    longest = max(len(form) for step in plan.steps for form in step.rows)
    return (_Mixed(plan) if longest > CHAIN and not half else _Chained(plan, half)).program()


def outlives(step: Step, stage: int) -> bool:
    """Tell whether what a stage returns is read after another evaluation, or handed out as it is."""
    outputs = Denoised(stage), Uncond(stage)
    rows = [step.x, *(form for _, form in step.memory)]
    if stage == len(step.stages) - 1:
        return any(form.alias() in outputs for form in rows)
    later = [*rows, *(after.input for after in step.stages[stage + 2 :])]
    handed_out = step.stages[stage + 1].input.alias() in outputs
    return handed_out or any(form[symbol] for form in later for symbol in outputs)


def _chain(out: int, form: Form, known: Known, first: int | None = None) -> list[Kernel]:
    """Return the kernels for a form, starting from the slot `first`, by default the one of the largest coefficient."""
    terms = _by_slot(form, known)
    moving = sorted([(c, slot) for slot, (c, value) in terms.items() if _moves(value)], key=_coefficient, reverse=True)
    others = sorted([(c, v.slot) for c, v in terms.values() if not _moves(v)], key=_coefficient, reverse=True)
    if not terms:
        return [Sum(out, ())]
    start, a = (terms[first][0], first) if first is not None else (moving or others)[0]
    rest = [(c, slot) for c, slot in moving if slot != a]
    total = start + sum([c for c, _ in rest])
    size = sum([abs(c) for c, _ in terms.values()])
    if not (len(rest) < len(moving) and start > 0 and abs(total - 1.0) <= 1e-12 * size):
        return [Scale(out, a, start), *(Add(out, out, slot, c) for c, slot in rest + others if slot != a)]
    kernels, before, left = list[Kernel](), start, [c for c, _ in rest]
    for i, (c, slot) in enumerate(rest, start=1):
        reached = 1.0 - sum(left[i:])  # the partial sum up to here; the last one is 1
        # The smaller weight is passed on: near 1 it would lose its digits in float32.
        if before < c:
            kernels.append(Lerp(out, slot, a, before / reached))
        else:
            kernels.append(Lerp(out, a, slot, c / reached))
        a, before = out, reached
    for c, slot in others:
        kernels.append(Add(out, a, slot, c))
        a = out
    return kernels or [Scale(out, a, 1.0)]


def _by_slot(form: Form, known: Known) -> dict[int, tuple[float, _Value]]:
    """Return the terms of a form by their slots; one slot may have several names."""
    terms: dict[int, tuple[float, _Value]] = {}
    for symbol, c in form:
        value = known[symbol]
        c *= value.scale  # noqa: PLW2901
        terms[value.slot] = (terms[value.slot][0] + c if value.slot in terms else c, value)
    return terms


def _moves(value: _Value) -> bool:
    """Tell whether a value shifts as x and D do, so that it may be interpolated."""
    return abs(value.weight - 1.0) < 1e-9


def _weight(form: Form, known: Known) -> float:
    return sum(c * known[s].scale * known[s].weight for s, c in form)


class _Chained:
    """Assign slots and write down the kernels; every combination is a chain."""

    fixed = 0  # rows below this number are never given back

    def __init__(self, plan: Plan, half: bool = False) -> None:
        self.plan, self.half = plan, half
        self.rows, self.foreign = _Pool(0, 1), _Pool(-1, -1)
        self.held = 0

    def program(self) -> Program:
        names = sorted(self.plan.steps[0].reads | {"x"})
        self.state = {State(name): _Value(self.home(name)) for name in names}
        self.start = {name: self.state[State(name)].slot for name in names}
        steps = tuple([self.step(step) for step in self.plan.steps])
        end = {str(symbol.key): (value.slot, value.scale) for symbol, value in self.state.items()}
        return Program(self.rows.next, 0, -1 - self.foreign.next, self.start, end, steps, (), self.held)

    def home(self, name: str) -> int:
        """Return the slot of a value of the initial state, which stays the caller's tensor."""
        return self.foreign.take()

    def step(self, step: Step) -> StepKernels:
        known = dict(self.state)
        draws, calls, scratch = [], [], list[int]()
        for r, interval in enumerate(step.noises):
            known[Noise(r)] = _Value(self.rows.take(), weight=0.0)
            draws.append((known[Noise(r)].slot, interval))
        for k, stage in enumerate(step.stages):
            alias, kernels = stage.input.alias(), list[Kernel]()
            if alias is not None and known[alias].scale == 1.0:
                slot = known[alias].slot
            else:
                slot, kernels = self.prepare(stage.input, known, scratch)
            initial = set(self.start.values()) if step is self.plan.steps[0] else set()
            self.held = max(self.held, len({v.slot for v in known.values() if v.slot < 0} - initial))
            for symbol in (Denoised(k), Uncond(k))[: 1 + stage.guided]:
                known[symbol] = _Value(self.output(symbol, step))
            uncond = known[Uncond(k)].slot if stage.guided else None
            calls.append(Call(stage, tuple(kernels), slot, known[Denoised(k)].slot, uncond, outlives(step, k)))
        kernels = self.update(step, known)
        live = {value.slot for value in self.state.values()}
        done = ({value.slot for value in known.values()} | set(scratch)) - live
        dead = tuple(slot for slot in done if slot < 0)
        self.foreign.free += dead
        self.rows.free += [slot for slot in done if slot >= self.fixed]
        return StepKernels(step, tuple(draws), tuple(calls), tuple(kernels), dead)

    def prepare(self, form: Form, known: Known, scratch: list[int]) -> tuple[int, list[Kernel]]:
        """Return the slot and the kernels of a denoiser's input."""
        scratch.append(self.rows.take())
        return scratch[-1], self.combine(scratch[-1], form, known)

    def combine(self, out: int, form: Form, known: Known, first: int | None = None) -> list[Kernel]:
        kernels = _chain(out, form, known, first)
        if not self.half:
            return kernels
        terms = tuple((known[s].slot, c) for s, c in form)
        if len(kernels) == 1 and isinstance(kernels[0], Lerp):
            return [Blend(*kernels[0], terms)]
        return [Sum(out, terms)]

    def output(self, symbol: Symbol, step: Step) -> int:
        """Return the slot of what the denoiser returns."""
        return self.foreign.take()

    def update(self, step: Step, known: Known) -> list[Kernel]:
        """Compute memory, then x. Each overwrites a row that is not read again, if there is one."""
        rows = [*step.memory, ("x", step.x)]
        kernels: list[Kernel] = []
        self.state = {State(name): known[alias] for name, form in rows if (alias := form.alias()) is not None}
        computed = [(name, form) for name, form in rows if form.alias() is None]
        for i, (name, form) in enumerate(computed):
            kept = {known[s].slot for _, later in computed[i + 1 :] for s, _ in later}
            kept |= {value.slot for value in self.state.values()}
            old = [
                s for s, c in form if known[s].slot >= 0 and known[s].slot not in kept and c > 0 and _moves(known[s])
            ]
            first = known[max(old, key=lambda s: form[s])].slot if old else None
            out = self.rows.take() if first is None else first
            kernels += self.combine(out, form, known, first)
            self.state[State(name)] = _Value(out, weight=_weight(form, known))
        return kernels


class _Mixed(_Chained):
    """Use `Mix` for updates, and for inputs of more than `CHAIN` terms."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        rows = [(name, form.alias(), form) for step in plan.steps for name, form in step.memory]
        shifted = {alias.key for _, alias, _ in rows if alias is not None and alias.kind == "state"} - {"x"}
        fresh = {name for name, alias, _ in rows if alias is None or alias == State("x")}
        self.side = ("x", *sorted(fresh - shifted))
        self.fixed = 2 * len(self.side)
        self.rows = _Pool(self.fixed, 1)
        self.now = 0
        self.mixes: list[tuple[int, list[dict[int, float]]]] = []  # for each: the side that is read, and the rows

    def program(self) -> Program:
        chained = super().program()
        matrices = tuple([self.matrix(*mix) for mix in self.mixes])
        return replace(chained, side=len(self.side), matrices=matrices)

    def home(self, name: str) -> int:
        """Return the row of a value of the initial state, which is copied there."""
        return self.side.index(name) if name in self.side else self.rows.take()

    def step(self, step: Step) -> StepKernels:
        """Decide first which rows the product computes, and which denoised values have to lie in the ring."""
        self.kept = [(name, form) for name, form in step.memory if name not in self.side]
        self.mixed = {name: form for name, form in (("x", step.x), *step.memory) if name in self.side}
        in_ring = {alias for _, form in self.kept if (alias := form.alias()) is not None}
        in_ring |= {s for stage in step.stages if len(stage.input) > CHAIN for s, _ in stage.input}
        if step is self.plan.steps[-1] and all(form.alias() for form in self.mixed.values()):
            self.mixed = {}
        for name, form in self.kept:
            replaced = [s for s, _ in form if s.kind == "denoised" and s not in in_ring]
            if form.alias() is None and replaced:
                self.mixed = {key: _eliminate(row, replaced[-1], form, name) for key, row in self.mixed.items()}
        self.in_ring = in_ring | {s for row in self.mixed.values() for s, _ in row}
        return super().step(step)

    def prepare(self, form: Form, known: Known, scratch: list[int]) -> tuple[int, list[Kernel]]:
        """Return the slot of the next x, where the denoiser's input is computed, and the kernels."""
        out = (1 - self.now) * len(self.side)
        return out, _chain(out, form, known) if len(form) <= CHAIN else [self.mix(out, [form], known)]

    def output(self, symbol: Symbol, step: Step) -> int:
        """Return a row of the ring for what a product reads, else the slot of a foreign tensor."""
        return self.rows.take() if symbol in self.in_ring else self.foreign.take()

    def update(self, step: Step, known: Known) -> list[Kernel]:
        """Leave past values where they are, put new ones into the ring, and compute the rest by one product."""
        kernels: list[Kernel] = []
        state: Known = {}
        known = dict(known)
        for name, form in self.kept:
            alias = form.alias()
            if alias is not None and known[alias].slot >= self.fixed:
                state[State(name)] = known[alias]
                continue
            out, unit = self.rows.take(), 1.0
            chain = _chain(out, form, known)
            if len(chain) > 1 and isinstance(chain[0], Scale):  # saves a pass: in units of the first coefficient
                _, first, unit = chain[0]
                added = [k for k in chain if isinstance(k, Add)]
                kernels += [Add(out, out if i else first, k.b, k.weight / unit) for i, k in enumerate(added)]
            else:
                kernels += chain
            state[State(name)] = known[_new(name)] = _Value(out, unit, _weight(form, known) / unit)
        if self.mixed:
            out = (1 - self.now) * len(self.side)
            forms = [self.mixed.get(name, Form({})) for name in self.side]
            kernels.append(self.mix(out, forms, known))
            for i, name in enumerate(self.side):
                if name in self.mixed:
                    state[State(name)] = _Value(out + i, weight=_weight(forms[i], known))
            self.now = 1 - self.now
        else:
            state |= {State(name): known[form.alias()] for name, form in (("x", step.x), *step.memory)}  # type: ignore[index]
        self.state = state
        return kernels

    def mix(self, out: int, forms: list[Form], known: Known) -> Mix:
        """Return the kernel for some forms at once; its matrix is made when the number of rows is known."""
        rows = [{slot: c for slot, (c, _) in _by_slot(form, known).items()} for form in forms]
        self.mixes.append((self.now, rows))
        return Mix(out, self.now, len(self.mixes) - 1)

    def matrix(self, now: int, rows: list[dict[int, float]]) -> tuple[tuple[float, ...], ...]:
        """Return the coefficients in the order in memory of the rows that are read: a side and the ring."""
        total, side = self.rows.next, len(self.side)
        dense = []
        for row in rows:
            line = [0.0] * (total - side)
            for slot, c in row.items():
                line[_place(slot, side, total) - side * now] = c
            dense.append(tuple(line))
        return tuple(dense)


def _new(name: str) -> Symbol:
    return Symbol("new", name)


def _eliminate(row: Form, symbol: Symbol, form: Form, name: str) -> Form:
    """Return `row` with `symbol` expressed by the new value `name`, which is `form`."""
    factor = row[symbol] / form[symbol]
    terms = {s: row[s] - factor * form[s] for s in {**row.terms, **form.terms} if s != symbol}
    return Form({**terms, _new(name): factor})
