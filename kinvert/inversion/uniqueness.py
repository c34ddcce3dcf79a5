r"""Is the latent of an image the only one? `preimages` looks for others.

A step of a one-step sampler is a map `x' = F(x)`, and under guidance several states may lead to the same next one. Each
branches the way up: the noisier steps are inverted from there, and end in another latent of the same image. For every
step of a known way, from the cleanest to the noisiest, other solutions are sought from states around the known one, and
then along curves of solutions through it (`solvers.further`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kinvert.checks import check_count
from kinvert.coordinates import settle
from kinvert.denoisers import BoundDenoiser, Cfg, Denoiser, guide, step_cfg
from kinvert.inversion.back import WayBack
from kinvert.inversion.batches import FewBatches
from kinvert.inversion.certificate import Found, certify
from kinvert.inversion.exact import check_image, check_invertible, falling, invert
from kinvert.inversion.problem import Guess, Problem, Reason
from kinvert.inversion.result import Inversion
from kinvert.inversion.solvers import Anderson, Attempt, Auto, Continuation, NewtonKrylov, Solver
from kinvert.inversion.solvers import Sequence as Solvers
from kinvert.inversion.solvers.further import follow_on
from kinvert.inversion.steps import invert_steps, levels_of, step_problem
from kinvert.inversion.task import Task
from kinvert.inversion.verdict import tolerance
from kinvert.noise import white
from kinvert.plan import Plan, compile_plan
from kinvert.rules import Rule
from kinvert.showing.brief import brief_repr
from kinvert.tensors import rms

__all__ = ["Preimages", "preimages"]

APART = 1e-4
"""States are different if they differ by more than this part of their size, and by 100 times the step's tolerance."""


@dataclass(frozen=True, eq=False)
class Preimages:
    """The latents that were found for one image; `print` gives a short report.

    Attributes:
        inversions: an `Inversion` of each, with its certificate; the first is the one that `invert` finds, or that was
            given.
        evaluations: of the denoiser, in all.
    """

    inversions: tuple[Inversion, ...]
    evaluations: int

    __repr__ = brief_repr

    @property
    def latents(self) -> Tensor:
        """Return the latents, shape (count, *event)."""
        return torch.cat([found.latent for found in self.inversions])

    @property
    def converged(self) -> Tensor:
        """Tell which of them sampling takes to the image, shape (count,); all but perhaps the first."""
        return torch.cat([found.converged for found in self.inversions])

    @property
    def distances(self) -> Tensor:
        """Return `|a - b|` of every two latents in parts of the norm of the first one, shape (count, count)."""
        flat = self.latents.flatten(1).double()
        return (flat[:, None] - flat[None]).norm(dim=2) / flat[0].norm()

    @property
    def norms(self) -> Tensor:
        """Return rms(latent) / sigma of each, shape (count,): 1 ± 1/sqrt(2 m) for noise of m values."""
        return rms(self.latents.double()) / self.inversions[0].sigmas[0]

    @property
    def log_densities(self) -> Tensor:
        """Return the log density of latent / sigma under the standard normal, shape (count,), in nats.

        It falls with the norm alone: `-(m norm^2 + m ln(2 pi)) / 2`.
        """
        m = self.latents[0].numel()
        return -0.5 * m * (self.norms.square() + math.log(2 * math.pi))

    def __str__(self) -> str:
        """Return a line for each latent."""
        lines = [f"{len(self.inversions)} latents of one image, {self.evaluations} evaluations"]
        columns = torch.stack([self.distances[0], self.norms, self.log_densities], 1).tolist()
        for found, (distance, norm, density) in zip(self.inversions, columns, strict=True):
            state = "exact" if bool(found.converged.all()) else "not converged"
            lines.append(
                f"  {distance:7.2%} from the first, norm {norm:.3f} (noise: 1), log density {density:.1f}, round-trip "
                f"error {float(found.round_trip_error):.2g}, {state}"
            )
        return "\n".join(lines)


@torch.no_grad()
def preimages(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    sampler: str | Rule = "euler",
    count: int = 4,
    starts: int = 8,
    curves: int = 0,
    max_evals: int | None = None,
    latent: Tensor | None = None,
    tol: float | None = None,
    cfg: Cfg = 1.0,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
) -> Preimages:
    """Look for several latents that a sampler maps to one image; each is certified by sampling it.

    Args:
        denoiser, sigmas, tol, cfg, positive, negative: as in `invert`.
        x: one image, shape (1, *event).
        sampler: deterministic, and of steps that remember nothing, such as "euler" or "heun".
        count: stop at so many latents.
        starts: other states to solve every step from, two and four times as far away as noise of that level.
        curves: curves of solutions to follow on from the known state of every step, after the starts; each takes
            hundreds of evaluations.
        max_evals: evaluations to spend on others than the first latent; None: those of 1,000 runs.
        latent: a latent that is known, e.g. the one that the image was made from, shape (1, *event); None takes that of
            `invert`.

    Returns:
        What was found, a `Preimages`. That no other was found does not say that there is none.

    Raises:
        ValueError: several images, a sampler that remembers earlier steps, or any other input that `invert` refuses.
    """
    x = check_image(x)
    if len(x) != 1:
        raise ValueError(f"x must be one image, shape (1, *event), got {tuple(x.shape)}; call preimages for each")
    check_count("count", count)
    check_count("starts", starts, 0)
    check_count("curves", curves, 0)
    coordinates, rule, schedule = settle(denoiser, sampler, sigmas)
    plan = compile_plan(rule, falling(schedule))
    check_invertible(plan)
    if plan.auxiliary or plan.is_multistep:
        raise ValueError(
            f"sampler must be one whose steps remember nothing, such as 'euler' or 'heun', got {rule.name}; the "
            "latents of other runs are not sought"
        )
    given = {"cfg": cfg, "positive": positive, "negative": negative}
    bound = guide(denoiser, step_cfg(cfg, schedule), positive, negative, pair=plan.is_guided, batch=1)
    known = latent
    first: list[Inversion] = []
    if known is None:
        first = [invert(denoiser, x, sigmas, sampler=sampler, tol=tol, **given)]  # type: ignore[arg-type]
        known = first[0].latent
    goal = tolerance(tol, x, network=getattr(denoiser, "network_dtype", None) or x.dtype)
    rows = max(1, min(64, 2**16 // x[0].numel()))
    task = Task(
        plan, FewBatches(bound, 1, most=rows), x, goal, 2**62, None, torch.zeros(1, dtype=torch.int64, device="cpu")
    )
    back = WayBack(plan.rule, plan.sigmas, coordinates, cfg, positive, negative, None, x)
    most = 1000 * plan.evaluations if max_evals is None else max_evals
    tree = _Tree(task, back, starts, curves, count, most)
    tree.take(tree.way_of(known), first)
    while tree.todo and not tree.is_full:
        tree.branch(*tree.todo.pop(0))
    spent = tree.spent + sum(int(found.evaluations) for found in first)
    return Preimages(tuple(tree.found), spent)


@dataclass(eq=False)
class _Tree:
    """The ways up that are known, and what is left to search.

    A way has a state for every level, the noisiest first. `todo` holds ways, the number of their steps in which others
    may branch off, and whether to follow curves.
    """

    task: Task
    back: WayBack
    starts: int
    curves: int
    count: int
    most: int
    spent: int = 0
    found: list[Inversion] = field(default_factory=list)
    todo: list[tuple[list[Tensor], int, bool]] = field(default_factory=list)

    @property
    def is_full(self) -> bool:
        """Tell whether there are enough latents, or no evaluations left."""
        return len(self.found) >= self.count or self.spent >= self.most

    def problem(self, k: int, value: Tensor, rows: int, budget: int) -> Problem:
        """Return the problem of step k for `rows` searches that all end at `value`, shape (1, *event)."""
        plan, task = self.task.plan, self.task
        y = value.expand(rows, *value.shape[1:]).clone()
        denoiser: BoundDenoiser = task.solving.take(torch.zeros(rows, dtype=torch.int64, device=y.device))
        step, unlimited = plan.steps[k], torch.full((rows,), budget, dtype=torch.int64, device=y.device)
        return step_problem(plan, step, denoiser, y, levels_of(plan, y)[k], self.allowed(k).expand(rows), unlimited)

    def allowed(self, k: int) -> Tensor:
        """Return the residual at which step k is solved, shape (1,)."""
        task = self.task
        eps, step = torch.finfo(task.wide.dtype).eps, task.plan.steps[k]
        share = 0.45 * len(task.plan.steps) ** -0.5
        return (share * task.aim * task.unit(step.sigma_next)).clamp(min=eps * step.sigma)

    def way_of(self, latent: Tensor) -> list[Tensor]:
        """Return the states that the sampler goes through from a latent."""
        states, row = [latent.to(self.task.wide)], torch.zeros(1, dtype=torch.int64, device=latent.device)
        for k in range(len(self.task.plan.steps)):
            states.append(self.problem(k, states[-1], 1, 0).function(states[-1], row))
        self.spent += self.task.plan.evaluations
        return states

    def take(self, way: list[Tensor], known: Sequence[Inversion] = ()) -> None:
        """Certify the latent of a way, and keep it if it is exact and new; the first one is kept in any case."""
        task, latent = self.task, way[0]
        certified = list(known)
        if not certified:
            restored, once = task.sample(latent), task.plan.evaluations
            self.spent += once
            found = Found(latent, restored, once, once, otherwise=Reason.STALLED)
            certified = [certify(task.plan, task.x, task.tol, found, self.back)]
        others = [rms(other.latent.to(latent) - latent) / rms(latent) for other in self.found]
        new = all(float(distance) > APART for distance in others)
        if not self.found or (new and bool(certified[0].converged)):
            self.found += certified
            steps = len(task.plan.steps)
            self.todo += [(way, steps, False)] + ([(way, steps, True)] if self.curves else [])
            self.todo.sort(key=lambda entry: entry[2])  # curves last

    def branch(self, way: list[Tensor], steps: int, along: bool) -> None:
        """Look for other solutions of the steps of a way, from the cleanest to the noisiest."""
        for k in reversed(range(steps)):
            for state in self.others(k, way, along):
                if self.is_full:
                    return
                self.climb(k, [state, *way[k + 1 :]])
            if self.is_full:
                return

    def others(self, k: int, way: list[Tensor], along: bool) -> list[Tensor]:
        """Return other states that step k takes to where the way goes on."""
        rows = 2 * self.curves if along else self.starts  # a curve goes on both ways
        if not rows:
            return []
        problem = self.problem(k, way[k + 1], rows, max(0, (self.most - self.spent) // rows))
        root, sigma = way[k].expand_as(problem.value).clone(), self.task.plan.sigmas[k]
        numbers = [i // 2 if along else i for i in range(rows)]
        noise = torch.cat([white(i).bind(way[k])(1.0, 0.0) for i in numbers])
        scale = sigma * torch.tensor([2.0 + 2.0 * (i % 2) for i in numbers], dtype=noise.dtype, device=noise.device)
        start = problem.value + scale.reshape(-1, *(1,) * (noise.ndim - 1)) * noise
        if along:
            upwards = torch.arange(rows, device=noise.device) % 2 == 0
            ends = follow_on(problem, root, start, upwards, Continuation(max_points=80, accuracy=1e-3))
        else:
            ends = _SEARCH.solve(problem, Guess(start))
        self.spent += int(ends.evaluations.sum())
        solved = (ends.residual <= problem.tolerance).tolist()
        kept = [way[k]]
        for u in (u for u, good in zip(ends.u.split(1), solved, strict=True) if good):
            if all(self.differ(k, u, other) for other in kept):
                kept.append(u)
        return kept[1:]

    def differ(self, k: int, a: Tensor, b: Tensor) -> bool:
        """Tell whether two solutions of step k are different ones."""
        return float(rms(a - b)) > max(APART * float(rms(b)), 100 * float(self.allowed(k)))

    def climb(self, k: int, way: list[Tensor]) -> None:
        """Invert the steps before step k, from its state `way[0]` up, and keep what comes out."""
        task, plan = self.task, self.task.plan
        if k:
            above = _above(plan, k)
            left = torch.full((1,), max(0, self.most - self.spent), dtype=torch.int64, device=way[0].device)
            path = invert_steps(
                above, task.solving, way[0], lambda step: self.allowed(step.index), _CLIMB, left, eps=task.eps
            )
            self.spent += int(path.evaluations)
            if not bool((path.residuals[:, 0] <= torch.cat([self.allowed(i) for i in range(k)])).all()):
                return
            way = [*path.states[:-1], *way]
        before = len(self.found)
        self.take(way)
        if len(self.found) > before:  # the steps from k on were searched on the way that it left
            self.todo = [(w, k if w is way else n, along) for w, n, along in self.todo]


def _above(plan: Plan, k: int) -> Plan:
    """Return the first k steps of a Plan."""
    return replace(plan, steps=plan.steps[:k], sigmas=plan.sigmas[: k + 1])


_SEARCH: Solver = Solvers((Attempt(Anderson(window=10, max_iterations=30)), Attempt(NewtonKrylov(max_iterations=6))))
_CLIMB: Solver = Auto()
