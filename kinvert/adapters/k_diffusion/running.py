r"""A run as k-diffusion makes it, on the engine of kinvert: arguments, callbacks, draws of noise, progress bars."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from kinvert import torch_hooks
from kinvert.adapters.k_diffusion.brownian import BrownianTreeNoiseSampler
from kinvert.adapters.k_diffusion.faces import NOISE, Draws, Face, function_name
from kinvert.checks import check_integer, check_number, has_values
from kinvert.coordinates import coordinates_of, settle
from kinvert.engine import run_state
from kinvert.engine.adaptive import Trial, run_adaptive
from kinvert.engine.contract import check_state
from kinvert.noise import NoiseSource, bind, brownian
from kinvert.plan import Plan, compile_plan
from kinvert.rules import DPMAdaptive, sampler
from kinvert.tensors import is_half

__all__ = ["NoiseSampler", "make_function"]

NoiseSampler = Callable[[Any, Any], Tensor]


def make_function(face: Face, white: Callable[[Tensor], NoiseSampler]) -> Callable[..., Any]:
    """Return the function of a face, with its signature.

    Args:
        face: the sampler, its options and its differences.
        white: makes the white noise of a run for a state, `default_noise_sampler`.
    """
    name, signature = function_name(face.sampler), face.signature

    @torch.no_grad()
    def sample(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}: {error}; it takes {signature}") from None
        bound.apply_defaults()
        return _sample(face, white, dict(bound.arguments))

    sample.__name__ = sample.__qualname__ = name
    sample.__doc__ = (
        f"Sample with {face.sampler!r}, with the arguments of k-diffusion (docs/k-diffusion.md).\n\n"
        f"For the other direction use `ki.unsample(model, x, sigmas, sampler={face.sampler!r}, positive=extra_args)`."
    )
    sample.__signature__ = signature  # type: ignore[attr-defined]
    return sample


def _sample(face: Face, white: Callable[[Tensor], NoiseSampler], given: dict[str, Any]) -> Any:
    """Run a sampler with the arguments of one call."""
    options = {name: given[name] for name in face.options}
    noise_sampler, return_info = options.pop(NOISE, None), options.pop("return_info", False)
    x, model = check_state(given["x"]), _Model(**{name: given[name] for name in ("model", "extra_args", "callback")})
    if face.levels == ("sigmas",):
        schedule = sigmas = given["sigmas"]
        if not isinstance(sigmas, Tensor):
            sigmas = torch.as_tensor(sigmas, device="cpu")
        if sigmas.shape in ((0,), (1,)):
            return x  # no step
    else:
        ends = given["sigma_max"], given["sigma_min"]
        schedule = [check_number(name, float(given[name]), above=0) for name in ("sigma_max", "sigma_min")]
        dtype = next((end.dtype for end in ends if isinstance(end, Tensor)), torch.get_default_dtype())
        sigmas = torch.tensor(schedule, dtype=dtype, device="cpu")
    if "n" in face.levels:
        options["evaluations"] = check_integer("n", given["n"], fix="it is the number of evaluations")
    rule = sampler(face.sampler, **face.fixed, **options)
    if noise_sampler is None:  # a Brownian source is seeded here even if nothing is drawn, as k-diffusion does
        noise_sampler = brownian() if rule.default_noise == "brownian" else white(x)
    disable = given["disable"]
    if isinstance(rule, DPMAdaptive):
        result, info = _run_adaptive(model, rule, x, _Levels(sigmas, schedule), noise_sampler, disable)
    else:
        _, rule, schedule = settle(model.model, rule, schedule)
        plan, levels = compile_plan(rule, schedule), _Levels(sigmas, schedule)
        if plan.is_rising and any(step.forgets_x for step in plan.steps):
            raise ValueError(
                f"{function_name(face.sampler)} cannot run up a rising schedule: a step forgets x, so that the result "
                "would not depend on it; use eta=0 or a deterministic sampler such as sample_heun"
            )
        draws = _Draws(noise_sampler, levels, x, plan, face.draws)
        result, info = _run_plan(model, plan, x, levels, draws, disable, "n" in face.levels), {}
    if has_values(result) and not bool(torch.isfinite(result).all()):
        raise ValueError(
            f"{function_name(face.sampler)}: the result is not finite; ki.sample(model, x, sigmas, "
            f"sampler={face.sampler!r}, positive=extra_args) says in which step it happens"
        )
    return (result, info) if return_info else result


class _Model:
    """The caller's model with its extra arguments, and the caller's callback."""

    def __init__(self, model: Any, extra_args: Any, callback: Any) -> None:
        extra_args = {} if extra_args is None else extra_args
        if not isinstance(extra_args, Mapping):
            raise TypeError(f"extra_args must be a mapping of arguments of the model, got {type(extra_args).__name__}")
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, sigma, **extra_args), got {type(model).__name__}")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable with one dictionary, got {type(callback).__name__}")
        self.model, self.extra_args, self.callback = model, dict(extra_args), callback
        self.coordinates = coordinates_of(model)
        self.knows_dtypes = hasattr(model, "network_dtype")

    def __call__(self, x: Tensor, sigma: Tensor) -> Any:
        """Evaluate the model; what it computed in a narrower dtype, as under autocast, is widened to x's."""
        if is_half(x.dtype) and not self.knows_dtypes:
            sigma = sigma.to(x.dtype)  # k-diffusion's models get sigma in x's dtype
        out = self.model(x, sigma, **self.extra_args)
        narrower = isinstance(out, Tensor) and torch.promote_types(out.dtype, x.dtype) == x.dtype != out.dtype
        return out.to(x.dtype) if narrower else out

    def tell(self, info: dict[str, Any]) -> None:
        """Call the callback; what it gets is its own or the model's, and must not be written into.

        Raises:
            RuntimeError: it wrote into x or denoised. In k-diffusion it depends on the sampler what comes of that.
        """
        if self.callback is None:
            return
        shown = [info["x"], info["denoised"]]
        before = [torch_hooks.version(value) for value in shown]
        self.callback(info)
        if before != [torch_hooks.version(value) for value in shown]:
            raise RuntimeError(
                "the callback wrote into x or denoised, which has no effect on the run here; clone them to change a "
                "copy, or make the run with ki.stepwise(plan, x) and change its state with run.replace(x)"
            )


class _Levels:
    """The noise levels of a run as tensors of shape (): the entries of the caller's tensor, or others like them."""

    def __init__(self, sigmas: Tensor, schedule: Sequence[float]) -> None:
        self.like = sigmas if sigmas.is_floating_point() else sigmas.to(torch.get_default_dtype())
        self.schedule = tuple(schedule)
        self.known = dict(zip(self.schedule, self.like.unbind(), strict=True))

    def __call__(self, sigma: float) -> Tensor:
        known = self.known.get(sigma)
        return torch.tensor(sigma, dtype=self.like.dtype, device=self.like.device) if known is None else known


class _Draws:
    """The noise of a run, drawn whenever k-diffusion draws it.

    k-diffusion draws in each step also where the weight of the noise is 0. The run asks only for the noise that it
    needs; what lies between is drawn first, and what is left, by `finish`. So the same seed gives the same noise.
    """

    def __init__(self, source: Any, levels: _Levels, x: Tensor, plan: Plan | None, draws: Draws) -> None:
        self.takes_floats = isinstance(source, NoiseSource | BrownianTreeNoiseSampler)
        known = () if plan is None else plan.noise_levels
        self.source: Callable[[Any, Any], Tensor] = (
            bind(source, x, known) if isinstance(source, NoiseSource) else source
        )
        if not callable(self.source):
            got = type(source).__name__
            raise TypeError(f"noise_sampler must be callable as noise_sampler(sigma, sigma_next), got {got}")
        self.levels, self.count = levels, 0
        steps = () if plan is None or draws == "as needed" else plan.steps
        self.due = deque((s.sigma, s.sigma_next) for s in steps if s.sigma_next > 0 or draws == "every step")

    def __call__(self, sigma_from: float, sigma_to: float) -> Tensor:
        while self.due and any(start == sigma_from for start, _ in self.due):
            start, end = self.due.popleft()
            noise = self.draw(start, end)
            if start == sigma_from:
                return noise
        return self.draw(sigma_from, sigma_to)

    def draw(self, sigma_from: float, sigma_to: float) -> Tensor:
        """Draw from the source, which gets tensors if it is the caller's."""
        self.count += 1
        if self.takes_floats:
            return self.source(sigma_from, sigma_to)
        return self.source(self.levels(sigma_from), self.levels(sigma_to))

    def finish(self) -> None:
        """Draw what the run did not ask for."""
        while self.due:
            self.draw(*self.due.popleft())


def _run_plan(
    model: _Model, plan: Plan, x: Tensor, levels: _Levels, draws: _Draws, disable: bool | None, is_fast: bool
) -> Tensor:
    """Run a Plan. `is_fast` is for `sample_dpm_fast`, whose bar counts evaluations and whose callback is told t."""
    places = iter([(step, k) for step in plan.steps for k in range(len(step.stages))])

    def evaluate(x: Tensor, sigma: Tensor) -> Any:
        step, k = next(places)
        out = model(x, sigma)
        if k == 0 and model.callback is not None:
            level, hat = levels(step.sigma), levels(step.stages[0].sigma)
            times = {"t": level.log().neg(), "t_up": hat.log().neg()} if is_fast else {}
            denoised = out if isinstance(out, Tensor) else out.denoised
            told = {"x": x.clone(), "i": step.index, "sigma": level, "sigma_hat": hat, "denoised": denoised}
            model.tell(told | times)
        if is_fast or k == len(step.stages) - 1:
            bar.update()
        return out

    total = sum(len(step.stages) for step in plan.steps) if is_fast else len(plan.steps)
    with tqdm(total=total, disable=disable) as bar:
        result = run_state(plan, evaluate, {"x": x}, draws)["x"]
    draws.finish()
    return result


def _run_adaptive(
    model: _Model, rule: DPMAdaptive, x: Tensor, levels: _Levels, source: Any, disable: bool | None
) -> tuple[Tensor, dict[str, int]]:
    """Run `sample_dpm_adaptive`; return the result, and what it cost."""
    cost = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    draws, before = _Draws(source, levels, x, None, "as needed"), levels.schedule[0]

    def watch(trial: Trial) -> None:
        nonlocal before
        info = trial.info
        if info.accepted > cost["n_accept"] and draws.count < info.accepted:
            draws.draw(before, trial.sigma)  # its weight is 0, and k-diffusion draws it
        before = trial.sigma
        cost.update(steps=info.steps, nfe=info.evaluations, n_accept=info.accepted, n_reject=info.rejected)
        level = levels(trial.sigma)
        told = {"sigma": level, "sigma_hat": level, "x": trial.x, "i": info.steps - 1, "t": level.log().neg()}
        told |= {"t_up": told["t"], "denoised": trial.denoised, "error": trial.x.new_tensor(trial.error), "h": trial.h}
        model.tell(told | cost)

    with tqdm(disable=disable) as bar:

        def evaluate(x: Tensor, sigma: Tensor) -> Any:
            bar.update()
            return model(x, sigma)

        evaluate.coordinates = model.coordinates  # type: ignore[attr-defined]
        result, _ = run_adaptive(rule, evaluate, x, levels.schedule, draws, watch=watch)
    return result, cost
