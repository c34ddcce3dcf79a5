r"""How likely an image is: the density of a sampler's images, and that of the probability-flow ODE.

A deterministic sampler is an invertible function of its latent z, which is drawn from a normal distribution. So it is a
normalising flow, and its images x = f(z) have the density

    log p(x) = log N(z; 0, sigma_0^2) - log |det f'(z)|.

`invert` finds z. The run falls into pieces that start from x alone, single steps or, for multistep samplers, the whole
run, and the log-determinant is the sum over the pieces, whose derivatives are computed row by row.

For infinitely many steps this tends to the density of the ODE `dx/dsigma = (x - D) / sigma`,

    log p(x) = log N(z; 0, sigma_0^2) + integral of (n - tr D') / sigma dsigma,    n the values of an event,

along the path from x up to z. The trace is summed exactly, or estimated without bias by random vectors v of signs,
`E v^T D' v = tr D'`. The integral is one more coordinate m of the state, and the sampler runs on both: where `m` has
the "denoised value" `m + tr D' - n`, it obeys the same equation as x does. What data of a normal distribution would
have is taken off beforehand, so that m stays small.

Source: Chen, Rubanova, Bettencourt and Duvenaud, Neural Ordinary Differential Equations (2018), arXiv 1806.07366; Song
et al., Score-Based Generative Modeling through Stochastic Differential Equations (2021), arXiv 2011.13456, section
D.2; Hutchinson, A Stochastic Estimator of the Trace of the Influence Matrix (1989).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kinvert import linalg
from kinvert.analysis import properties
from kinvert.checks import check_choice, check_integer, check_positive
from kinvert.coordinates import Coordinates, settle
from kinvert.denoisers import BoundDenoiser, Cfg, Denoiser, Guided, guide, step_cfg
from kinvert.devices import widest
from kinvert.engine import run
from kinvert.flowtimes import FlowTimes
from kinvert.inversion import Inversion, invert
from kinvert.inversion.exact import check_image, falling
from kinvert.plan import Plan, compile_plan
from kinvert.rules import Rule
from kinvert.showing.brief import brief_repr
from kinvert.tensors import per_sample, rms, wide_dtype

__all__ = ["MAX_VALUES", "LogProb", "dequantize", "latent_log_prob", "log_prob"]

MAX_VALUES = 4096
"""Values of an event whose derivative is computed as a whole: 134 MB a sample in float64."""
EXACT_TRACE = 256
"""Values of an event up to which the trace is summed exactly, if `probes` is None."""
PROBES = 8
NO_GRAPH = (
    "the denoiser's result does not depend on x in its graph; it has to be differentiable: no torch.no_grad(), "
    "inference mode or detach() inside"
)


@dataclass(frozen=True, eq=False)
class LogProb:
    """How likely images are, as densities with respect to their values; `print` gives a short report.

    Attributes:
        log_prob: natural logarithm of the density, shape (batch,), float64; NaN if the image was not inverted.
        std_error: standard error of `log_prob` from the random estimate of the trace, shape (batch,); 0 if it is exact.
        step_error: what half the steps change of `log_prob`, shape (batch,): an estimate of how far the integral of the
            ODE is off, large at few steps; 0 for the density of a sampler, and NaN for a schedule of one step.
        log_det: `log |det|` of the derivative of the image with respect to the latent, shape (batch,).
        latent: shape (batch, *event), at the first level of the schedule.
        values: number of values of an event.
        evaluations: of the denoiser, shape (batch,), int64; a pass backwards is not counted.
        backward: passes backwards through an evaluation of the denoiser.
        inversion: the inversion that found the latent, for the density of a sampler; None for that of the ODE.
    """

    log_prob: Tensor
    std_error: Tensor
    step_error: Tensor
    log_det: Tensor
    latent: Tensor
    values: int
    evaluations: Tensor
    backward: int
    inversion: Inversion | None = None

    __repr__ = brief_repr

    def bits_per_dim(self, bin_width: float = 1.0) -> Tensor:
        r"""Return `-(log p / n + log w) / log 2`, the bits of a value that is known to an interval of width w.

        Args:
            bin_width: the distance of neighbouring values of the data, e.g. 2/255 for images of 256 levels in [-1, 1].
                For images that `dequantize` spread over their intervals the mean is an upper bound of the bits that
                the discrete data takes.

        Returns:
            Shape (batch,), float64.
        """
        width = check_positive("bin_width", bin_width)
        return -(self.log_prob / self.values + math.log(width)) / math.log(2)

    def __str__(self) -> str:
        bits = self.bits_per_dim()
        lines = [f"log p of {len(bits)} images of {self.values} values, {self.backward} passes backwards"]
        columns = (self.log_prob, self.std_error, self.step_error, bits)
        for i, (value, error, steps, each) in enumerate(zip(*columns, strict=True)):
            random = f" +- {float(error):.2g}" if error > 0 else ""
            random += f" (steps: +- {float(steps):.2g})" if steps != 0 else ""
            lines.append(f"  {i:<4} {float(value):.4f}{random}   {float(each):+.4f} bits a value (density)")
        return "\n".join(lines)


def dequantize(x: Tensor, bin_width: float, *, seed: int = 0) -> Tensor:
    """Spread values that lie `bin_width` apart evenly over the intervals around them: `x + w (u - 1/2)`.

    A density of discrete data is unbounded; of spread data it is not. Source: Theis, van den Oord and Bethge, A note on
    the evaluation of generative models (2016), arXiv 1511.01844.

    Args:
        x: images, shape (batch, *event).
        bin_width: the distance of neighbouring values.
        seed: of the random numbers u, which are the same on every device.
    """
    width = check_positive("bin_width", bin_width)
    generator = torch.Generator("cpu").manual_seed(check_integer("seed", seed, 0))
    u = torch.rand(x.shape, generator=generator, dtype=wide_dtype(x.dtype), device="cpu").to(x.device)
    return (x + width * (u - 0.5)).to(x.dtype)


@torch.no_grad()
def log_prob(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    sampler: str | Rule = "heun",
    of: str = "sampler",
    probes: int | None = None,
    seed: int = 0,
    tol: float | None = None,
    max_evals: int | None = None,
    cfg: Cfg = 1.0,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
) -> LogProb:
    r"""Compute the log-density of images under a sampler, or under the probability-flow ODE.

    Args:
        denoiser: as in `sample`; it is differentiated with respect to x.
        x: images, shape (batch, *event): states at `sigmas[-1]`, whose noise belongs to the density.
        sigmas: the decreasing schedule, ending above 0. A flow schedule starts at time 1.
        sampler: "sampler": a deterministic sampler that is no pair of states. "ode": the sampler that integrates the
            ODE upwards on this schedule; the value tends to that of the ODE with its order. Every other level is
            integrated over as well, which `step_error` is told from.
        of: "sampler": the density of the images that this sampler makes on this schedule, exact to the accuracy of
            the inversion. It takes n passes backwards through the run. "ode": that of the probability-flow ODE.
        probes: random vectors for the trace in "ode"; None sums it exactly for events of up to 256 values, which takes
            n passes backwards for each evaluation, and takes 8 vectors for larger ones.
        seed: of these vectors.
        tol, max_evals: of `invert`, for "sampler".
        cfg, positive, negative: as in `sample`. The density is that of the guided sampler, or of the guided ODE.

    Returns:
        A `LogProb`. The latent is taken to be normal with standard deviation `sigmas[0]`, as a user draws it; the
        images noised to that level have a little more, and the difference falls with `sigmas[0]`.

    Raises:
        ValueError: a sampler that has no such density; an event of more than 4,096 values with "sampler"; a denoiser
            that cannot be differentiated; as in `invert`.

    Warns:
        RuntimeWarning: a sample that was not inverted; its density is NaN.
    """
    check_choice("of", of, ("sampler", "ode"))
    x = check_image(x)
    coordinates, rule, schedule = settle(denoiser, sampler, sigmas)
    plan = compile_plan(rule, falling(schedule))
    _check_density(plan, coordinates, of, probes, x[0].numel())
    scales = step_cfg(cfg, schedule)
    bound = guide(denoiser, scales, positive, negative, pair=plan.is_guided, batch=len(x), coordinates=coordinates)
    if of == "ode":
        return _of_ode(plan, bound, x, coordinates, probes, check_integer("seed", seed, 0))
    levels = FlowTimes(schedule) if coordinates == "flow" else schedule
    found = invert(
        denoiser, x, levels, sampler=sampler, tol=tol, max_evals=max_evals, cfg=cfg, positive=positive,
        negative=negative,
    )  # fmt: skip
    return _of_sampler(plan, bound, found)


@torch.no_grad()
def latent_log_prob(
    denoiser: Denoiser,
    latent: Tensor,
    sigmas: Any,
    *,
    sampler: str | Rule = "heun",
    cfg: Cfg = 1.0,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
) -> Tensor:
    """Compute the log-density, under a sampler, of the images that it makes of latents.

    Where `log_prob` inverts an image, this takes what any inversion found; the value is that of the image which the
    latent gives, not of the one that was inverted.

    Args:
        denoiser, sigmas, sampler, cfg, positive, negative: as in `log_prob`.
        latent: shape (batch, *event), at the first level of the schedule.

    Returns:
        Shape (batch,), float64.

    Raises:
        ValueError: a sampler that draws noise; as `log_prob`.
    """
    latent = check_image(latent)
    coordinates, rule, schedule = settle(denoiser, sampler, sigmas)
    plan = compile_plan(rule, falling(schedule))
    _check_density(plan, coordinates, "sampler", None, latent[0].numel())
    if plan.is_stochastic:
        raise ValueError(f"{rule.name} draws noise, so its images have no density from a latent alone; use 'heun'")
    scales, count = step_cfg(cfg, schedule), len(latent)
    bound = guide(denoiser, scales, positive, negative, pair=plan.is_guided, batch=count, coordinates=coordinates)
    return _log_normal(latent, plan.sigmas[0]) - _log_det(plan, bound, latent)


def _check_density(plan: Plan, coordinates: Coordinates, of: str, probes: int | None, values: int) -> None:
    """Raise ValueError if the run has no density of this kind."""
    name = plan.rule.name
    if coordinates == "flow" and plan.sigmas[0] != 1:
        raise ValueError(f"sigmas must start at flow time 1, where x is normal, got {plan.sigmas[0]:g}")
    if plan.sigmas[-1] == 0:
        raise ValueError("sigmas end at 0, where data has no density in general; stop above it, e.g. sigmas[:-1]")
    if of == "sampler":
        if probes is not None:
            raise ValueError(f"probes estimate the trace in of='ode', got probes={probes!r} with of='sampler'")
        if plan.auxiliary:
            raise ValueError(
                f"{name} maps pairs of states to pairs, so an image alone has no density; use 'heun' or 'dpmpp_2m'"
            )
        if values > MAX_VALUES:
            raise ValueError(
                f"x has events of {values} values, and of='sampler' needs the whole derivative, at most {MAX_VALUES}; "
                "use of='ode', which estimates a trace"
            )
        return
    if probes is not None:
        check_integer("probes", probes, 2, fix="two or more random vectors tell the error; None sums small events")
    if plan.is_guided:
        raise ValueError(f"{name} does not solve the ODE of the guided denoiser; use 'heun'")
    if not properties(plan.rule).unsamples:
        raise ValueError(f"{name} cannot run upwards; use a deterministic sampler such as 'heun' or 'dpmpp_2m'")


def _of_sampler(plan: Plan, bound: BoundDenoiser, found: Inversion) -> LogProb:
    """Return the density of a sampler at images whose latents were found."""
    z, n = found.latent, found.latent[0].numel()
    log_det = _log_det(plan, bound, z)
    value = _log_normal(z, plan.sigmas[0]) - log_det
    value = torch.where(found.converged, value, math.nan)
    evaluations = found.evaluations + plan.evaluations
    exact = torch.zeros_like(value)
    return LogProb(value, exact, exact, log_det, z, n, evaluations, n * plan.evaluations, found)


def _log_det(plan: Plan, bound: BoundDenoiser, z: Tensor) -> Tensor:
    """Sum the log-determinants of the pieces of a run from latents z, shape (batch,)."""
    log_det, state = torch.zeros(len(z), dtype=widest(z.device), device=z.device), z
    for piece in _pieces(plan):
        matrix, state = _derivative(piece, bound, state)
        log_det += linalg.log_abs_det(matrix)
    return log_det


def _pieces(plan: Plan) -> list[Plan]:
    """Cut a Plan wherever a step starts from x alone."""
    cuts = [i for i, step in enumerate(plan.steps) if i == 0 or step.reads <= {"x"}]
    pieces = []
    for first, end in zip(cuts, [*cuts[1:], len(plan.steps)], strict=True):
        steps = tuple(replace(step, index=i) for i, step in enumerate(plan.steps[first:end]))
        pieces.append(replace(plan, sigmas=plan.sigmas[first : end + 1], steps=steps))
    return pieces


def _derivative(piece: Plan, bound: BoundDenoiser, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivative of a piece of a run, shape (batch, n, n), and the state after it."""

    def watched(state: Tensor, sigma: Tensor) -> Any:
        out: Any = bound(state, sigma)
        if not (out.denoised if isinstance(out, Guided) else out).requires_grad:  # the state itself has a graph
            raise ValueError(NO_GRAPH)
        return out

    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        end = run(piece, watched, leaf)
        outputs = end.flatten(1)
        n = outputs.shape[1]
        rows = [_grad(outputs[:, j].sum(), leaf).flatten(1) for j in range(n)]
    return torch.stack(rows, 1).to(widest(x.device)), end.detach()


def _grad(value: Tensor, leaf: Tensor, v: Tensor | None = None) -> Tensor:
    """Return the gradient of a value with respect to the state; the graph is kept.

    Raises:
        ValueError: there is no graph.
    """
    if value.requires_grad:
        (found,) = torch.autograd.grad(value, leaf, v, retain_graph=True, allow_unused=True)
        if found is not None:
            return found
    raise ValueError(NO_GRAPH)


def _log_normal(z: Tensor, std: float) -> Tensor:
    """Return `log N(z; 0, std^2)` per sample, in the widest dtype."""
    u = z.flatten(1).to(widest(z.device)) / std
    return -0.5 * u.square().sum(1) - u.shape[1] * math.log(std * math.sqrt(2 * math.pi))


def _of_ode(
    plan: Plan, bound: BoundDenoiser, x: Tensor, coordinates: Coordinates, probes: int | None, seed: int
) -> LogProb:
    """Integrate the state and the trace along its path upwards."""
    n = x[0].numel()
    exact = probes is None and n <= EXACT_TRACE
    vectors = torch.eye(n, device="cpu") if exact else _signs(probes or PROBES, n, seed)
    wide = x.flatten(1).to(wide_dtype(x.dtype))
    augmented = _Augmented(bound, x.shape[1:], vectors.to(wide), exact, rms(wide), coordinates)
    z, log_det, evaluations = augmented.up(plan, plan.sigmas[::-1], wide)
    value, step_error = _log_normal(z, plan.sigmas[0]) - log_det.mean(1), torch.full_like(log_det[:, 0], math.nan)
    if len(plan.steps) > 1:
        half = augmented.up(plan, (plan.sigmas[-1], *plan.sigmas[-3:0:-2], plan.sigmas[0]), wide)
        step_error = (value - _log_normal(half[0], plan.sigmas[0]) + half[1].mean(1)).abs()
        evaluations += half[2]
    columns = log_det.shape[1]
    error = log_det.std(1) / columns**0.5 if columns > 1 else torch.zeros_like(value)
    spent = torch.full((len(x),), evaluations, dtype=torch.int64, device=x.device)
    latent = z.reshape(x.shape).to(x.dtype)
    return LogProb(value, error, step_error, log_det.mean(1), latent, n, spent, len(vectors) * evaluations)


def _signs(count: int, n: int, seed: int) -> Tensor:
    """Return random vectors of signs, shape (count, n), the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, 2, (count, n), generator=generator, device="cpu") * 2.0 - 1.0


@dataclass(frozen=True, eq=False)
class _Augmented:
    """A denoiser of the state and of the integral of the trace; see the module.

    Attributes:
        bound: the denoiser of x.
        event: the shape of an event.
        vectors: of the trace, shape (count, n).
        exact: whether the vectors are a basis, whose products are summed; otherwise each has a coordinate of its own.
        size: the standard deviation of the data whose trace is taken off, per sample.
        coordinates: of x.
    """

    bound: BoundDenoiser
    event: torch.Size
    vectors: Tensor
    exact: bool
    size: Tensor
    coordinates: Coordinates

    def up(self, plan: Plan, levels: tuple[float, ...], x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Run the sampler of a Plan up the levels; return z, `log |det|` for each vector or their sum, and the cost."""
        up = compile_plan(plan.rule, FlowTimes(levels) if plan.coordinates == "flow" else levels)
        n, columns = x.shape[1], 1 if self.exact else len(self.vectors)
        end = run(up, self, torch.cat([x, x.new_zeros(len(x), columns)], 1))
        m = end[:, n:].to(widest(x.device))
        spread = (self.std(levels[-1]) / self.std(levels[0])).to(m)
        return end[:, :n], -(n * spread.log()[:, None] + m), up.evaluations

    def std(self, sigma: float) -> Tensor:
        """Return the standard deviation of normal data at a level, per sample."""
        return (self._kept(sigma) ** 2 * self.size**2 + sigma**2).sqrt()

    def _kept(self, sigma: Any) -> Any:
        """Return the factor of x0 in the state."""
        return 1 - sigma if self.coordinates == "flow" else 1.0

    def __call__(self, state: Tensor, sigma: Tensor) -> Tensor:
        n = self.vectors.shape[1]
        flat, m = state[:, :n], state[:, n:]
        with torch.enable_grad():
            leaf = flat.detach().reshape(-1, *self.event).requires_grad_()
            out: Any = self.bound(leaf, sigma)
            denoised = out.denoised if isinstance(out, Guided) else out
            found = []
            for v in self.vectors:
                direction = v.expand(len(flat), n)
                along = _grad(denoised, leaf, direction.reshape(denoised.shape).to(denoised.dtype)).flatten(1)
                found.append((along.to(flat.dtype) * direction).sum(1))
        traces = torch.stack(found, 1)
        if self.exact:
            traces = traces.sum(1, keepdim=True)
        kept, level = self._kept(sigma), sigma.to(flat.dtype)
        gain = kept * self.size**2 / (kept**2 * self.size**2 + level**2)
        own = m + traces - n * per_sample(gain, traces)
        return torch.cat([denoised.detach().flatten(1).to(flat.dtype), own], 1)
