"""Guidance beyond a scale: each formula against another transcription of it, its limits, and how it is inverted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import mixture, noise_like
from torch import Tensor

import kinvert as ki
from kinvert.denoisers import guide, step_cfg
from kinvert.guidance import APG, CFGZeroStar, DynamicThreshold, Function, Interval, Rescale

MIXTURES = mixture(seed=0), mixture(seed=1)
SIGMAS = ki.schedules.karras(12, 0.1, 10)[:-1]
BRANCHES: dict[str, Any] = {"positive": {"label": 0}, "negative": {"label": 1}}
X = 2 * noise_like((3, 6))
SPACES = ["x0", "eps", "v", "velocity"]
LEVELS = torch.tensor([0.2, 1.0, 8.0], dtype=torch.float64)


def denoiser(x: Tensor, sigma: Tensor, label: int) -> Tensor:
    return MIXTURES[label](x, sigma)


class Momentum:
    """A function with a memory, which says so if it is asked to."""

    def __init__(self, stateful: bool) -> None:
        self.stateful, self.seen = stateful, 0.0

    def __call__(self, cond: Tensor, uncond: Tensor, sigma: Tensor) -> Tensor:
        self.seen = 0.5 * self.seen + (cond - uncond)
        return cond + self.seen


FUNCTIONS: dict[str, Any] = {
    "apg": APG(3.0, norm_threshold=1.0),
    "apg_eps": APG(3.0, eta=0.5, space="eps"),
    "zero_star": CFGZeroStar(3.0),
    "rescale_eps": Rescale(3.0, space="eps"),
    "rescale_v": Rescale(3.0, 0.5, space="v"),
    "interval": Interval(3.0, 0.5, 5.0),
    "threshold": DynamicThreshold(3.0, percentile=0.8),
    "own": lambda cond, uncond, sigma: uncond + 3 * (cond - uncond).tanh(),
    "own_eps": Function(lambda cond, uncond, sigma: uncond + 3 * (cond - uncond).tanh(), "eps"),
    "all": Interval(Rescale(APG(3.0), 0.5, "eps"), 0.3, 8.0),
    "steps": [1.0] * 3 + [Rescale(2.0, space="eps"), lambda cond, uncond, sigma: (cond + uncond) / 2] + [2.0] * 6,
}


# -- other transcriptions, for one sample, of the kind of prediction that they are defined on ------------------------
def rescaled(c: np.ndarray, u: np.ndarray, w: float, f: float) -> np.ndarray:
    """Eqs. 15 and 16 of arXiv 2305.08891."""
    x_cfg = u + w * (c - u)
    x_rescaled = x_cfg * (np.std(c) / np.std(x_cfg))
    return f * x_rescaled + (1 - f) * x_cfg


def projected(c: np.ndarray, u: np.ndarray, w: float, eta: float, r: float) -> np.ndarray:
    """APG of arXiv 2410.02416, by an orthonormal basis whose first vector is that of c."""
    d = c - u
    if np.linalg.norm(d) > r:
        d = d / np.linalg.norm(d) * r
    along = c / np.linalg.norm(c)
    return c + (w - 1) * ((np.eye(len(c)) - np.outer(along, along)) @ d + eta * np.outer(along, along) @ d)


def zero_star(c: np.ndarray, u: np.ndarray, w: float) -> np.ndarray:
    """The scale of arXiv 2503.18886 as the least squares solution of `s u = c`."""
    s = np.linalg.lstsq(u[:, None], c, rcond=None)[0][0]
    return (1 - w) * s * u + w * c


def clipped(d: np.ndarray, p: float, limit: float) -> np.ndarray:
    """Dynamic thresholding of arXiv 2205.11487."""
    s = max(limit, float(np.quantile(np.abs(d), p)))
    return np.clip(d, -s, s) / (s / limit)


def predicted(space: str, x: np.ndarray, d: np.ndarray, sigma: float) -> np.ndarray:
    eps = (x - d) / sigma
    if space == "v":
        return (eps - sigma * d) / math.sqrt(1 + sigma**2)
    return {"x0": d, "eps": eps, "velocity": eps - d}[space]


def per_sample(function: Callable[..., np.ndarray], space: str = "x0") -> tuple[Tensor, Tensor]:
    """What the formula gives for the two branches, and the conditional branch, both of the kind `space`."""
    cond, uncond = (MIXTURES[label](X, LEVELS).numpy() for label in (0, 1))
    x, sigma = X.numpy(), LEVELS.tolist()
    pairs = [[predicted(space, x[i], d[i], sigma[i]) for d in (cond, uncond)] for i in range(3)]
    return torch.tensor(np.stack([function(*pair) for pair in pairs])), torch.tensor(np.stack([c for c, _ in pairs]))


def guided(cfg: Any, space: str = "x0") -> Tensor:
    """What guidance gives, as a prediction of the kind `space`."""
    found = guide(denoiser, cfg, **BRANCHES)(X, LEVELS)
    return torch.stack(
        [torch.tensor(predicted(space, X[i].numpy(), found[i].numpy(), float(LEVELS[i]))) for i in range(3)]
    )


@pytest.mark.parametrize("space", SPACES)
def test_rescale_is_the_formula(space: Any) -> None:
    want, _ = per_sample(lambda c, u: rescaled(c, u, 5.0, 0.7), space)
    torch.testing.assert_close(guided(Rescale(5.0, 0.7, space), space), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("eta", "r"), [(0.0, math.inf), (0.3, 0.5), (1.0, 0.5)])
def test_apg_is_the_formula(space: Any, eta: float, r: float) -> None:
    want, _ = per_sample(lambda c, u: projected(c, u, 5.0, eta, r), space)
    torch.testing.assert_close(guided(APG(5.0, eta, r, space), space), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("space", SPACES)
def test_the_scale_of_cfg_zero_star_is_the_formula(space: Any) -> None:
    want, cond = per_sample(lambda c, u: zero_star(c, u, 5.0), space)
    torch.testing.assert_close(guided(CFGZeroStar(5.0, space), space), want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(guided(CFGZeroStar(1.0, space), space), cond, rtol=1e-10, atol=1e-10)


@given(p=st.floats(0.01, 0.99), limit=st.floats(0.1, 3.0))
@settings(deadline=None)
def test_dynamic_thresholding_is_the_formula(p: float, limit: float) -> None:
    want, _ = per_sample(lambda c, u: clipped(u + 5.0 * (c - u), p, limit))
    torch.testing.assert_close(guided(DynamicThreshold(5.0, p, limit)), want, rtol=1e-12, atol=1e-12)


def test_an_interval_is_open_below_and_closed_above() -> None:
    """Also for levels that are only nearly at its ends, as those of a run in float32 are."""
    levels = torch.tensor([0.5, 0.5 * (1 + 1e-8), 0.51, 2.0, 2.0 * (1 + 1e-8), 2.01], dtype=torch.float64)
    x = noise_like((6, 6))
    found = guide(denoiser, Interval(3.0, 0.5, 2.0), **BRANCHES)(x, levels)
    cond, full = (guide(denoiser, cfg, **BRANCHES)(x, levels) for cfg in (1.0, 3.0))
    inside = torch.tensor([False, False, True, True, True, False])
    torch.testing.assert_close(found, torch.where(inside[:, None], full, cond), rtol=0, atol=0)


# -- limits ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "cfg",
    [
        Rescale(5.0, 0.0, "eps"),
        APG(5.0, eta=1.0),
        APG(5.0, eta=1.0, norm_threshold=1e6, space="eps"),
        Interval(5.0, 0.0, math.inf),
        DynamicThreshold(5.0, limit=1e6),
        Function(lambda cond, uncond, sigma: uncond + 5.0 * (cond - uncond), "v"),
        lambda cond, uncond, sigma: uncond + 5.0 * (cond - uncond),
        lambda sigma: torch.full_like(sigma, 5.0),
    ],
    ids=["rescale", "apg", "apg far", "interval", "threshold", "in v", "function", "of sigma"],
)
def test_where_it_changes_nothing_it_is_plain_guidance(cfg: Any) -> None:
    torch.testing.assert_close(guided(cfg), guided(5.0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("factor", [0.3, 1.0])
def test_a_rescaled_prediction_has_the_spread_that_it_should(factor: float) -> None:
    _, cond = per_sample(lambda c, u: c, "eps")
    plain = guided(5.0, "eps").std(1)
    want = (1 - factor) * plain + factor * cond.std(1)
    torch.testing.assert_close(guided(Rescale(5.0, factor, "eps"), "eps").std(1), want)


def test_rescaling_another_kind_of_prediction_is_another_method() -> None:
    eps, x0 = (guided(Rescale(5.0, 0.7, space), "x0") for space in ("eps", "x0"))
    assert float((eps - x0).abs().max() / x0.abs().max()) > 0.05


def test_rescale_takes_the_kind_that_the_network_predicts() -> None:
    def network(x: Tensor, t: Tensor, by: float) -> Tensor:
        return torch.sin(by * x)

    for adapter, space in ((ki.denoisers.from_eps, "eps"), (ki.denoisers.from_v, "v"), (ki.denoisers.from_x0, "x0")):
        made = adapter(network, ki.levels.stable_diffusion())
        left, right = (
            guide(made, cfg, {"by": 1.0}, {"by": 0.5})(X, LEVELS) for cfg in (Rescale(4.0), Rescale(4.0, 0.7, space))
        )
        assert torch.equal(left, right)
    with pytest.raises(ValueError, match=r"the denoiser does not say what that is; give Rescale\(\.\.\., space=\)"):
        ki.sample(denoiser, X, SIGMAS, cfg=Rescale(4.0), **BRANCHES)


def test_equal_branches_stay_what_they_are_and_zeros_make_no_nan() -> None:
    cond = noise_like((2, 3, 4))
    for value in (cond, torch.zeros_like(cond), torch.ones_like(cond)):
        for name in ("apg", "apg_eps", "zero_star", "interval", "own"):
            bound = guide(lambda x, sigma, of: of, FUNCTIONS[name], {"of": value}, {"of": value})
            torch.testing.assert_close(bound(cond, LEVELS[:2]), value)
        for name in ("rescale_eps", "rescale_v", "threshold", "all"):
            bound = guide(lambda x, sigma, of: of, FUNCTIONS[name], {"of": value}, {"of": 0 * value})
            assert bound(0 * cond, LEVELS[:2]).isfinite().all()


# -- in runs -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_sample_does_not_depend_on_its_neighbours(name: str) -> None:
    x = 10 * noise_like((3, 6))
    whole = ki.sample(denoiser, x, SIGMAS, cfg=FUNCTIONS[name], **BRANCHES)
    alone = [ki.sample(denoiser, one[None], SIGMAS, cfg=FUNCTIONS[name], **BRANCHES) for one in x]
    parts = ki.sample(denoiser, x, SIGMAS, cfg=FUNCTIONS[name], max_batch=2, **BRANCHES)
    for other in (torch.cat(alone), parts):
        torch.testing.assert_close(whole, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_invert_is_exact(name: str) -> None:
    x = noise_like((2, 6)) / 2
    found = ki.invert(denoiser, x, SIGMAS, cfg=FUNCTIONS[name], **BRANCHES)
    assert found.converged.all()
    torch.testing.assert_close(found.sample(denoiser), x, rtol=0, atol=1e-7)
    again = ki.sample(denoiser, found.latent, SIGMAS, cfg=FUNCTIONS[name], **BRANCHES)
    torch.testing.assert_close(again, x, rtol=0, atol=1e-7)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("apg", "zero_star")]


@pytest.mark.parametrize("name", ["rescale", "threshold", *SLOW])
def test_invert_is_exact_on_digits(name: str) -> None:
    functions = {"rescale": Rescale(1.5, space="eps"), "threshold": DynamicThreshold(1.5)}
    model = ki.models.load("digits", dtype=torch.float64)
    images, labels = (value[:2] for value in ki.models.held_out("digits"))
    branches = {"positive": {"label": labels}, "negative": {"label": torch.full_like(labels, model.null_label)}}
    cfg, sigmas = functions.get(name, FUNCTIONS.get(name)), ki.schedules.karras(20, 0.02, 80.0)[:-1]
    found = ki.invert(model, images.double(), sigmas, cfg=cfg, **branches)
    assert found.converged.all()
    torch.testing.assert_close(found.sample(model), images.double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["rescale_eps", "own", "steps"])
def test_every_verb_takes_functions(name: str) -> None:
    x, cfg = noise_like((2, 6)) / 2, FUNCTIONS[name]
    for method in ("unsample", "invert", "extract_noise"):
        sampler = "ddpm" if method == "extract_noise" else "euler"
        trip = ki.round_trip(denoiser, x, SIGMAS, method=method, sampler=sampler, cfg=cfg, **BRANCHES)  # type: ignore[arg-type]
        assert float(trip.max_error.max()) < (1e-7 if method != "unsample" else 4.0)
    mask = torch.tensor([1.0, 1, 1, 0, 0, 0])
    masked = ki.invert(denoiser, x, SIGMAS, cfg=cfg, mask=mask, **BRANCHES)
    torch.testing.assert_close(masked.sample(denoiser), x, rtol=0, atol=1e-7)
    pair = ki.invert(denoiser, x, SIGMAS, sampler="o_belm", cfg=cfg, **BRANCHES)
    torch.testing.assert_close(pair.sample(denoiser), x, rtol=0, atol=1e-6)
    if name != "steps":
        for baseline in ("direct_inversion", "renoise", "rf_inversion"):
            found = ki.inversion.baselines.BASELINES[baseline](denoiser, x, SIGMAS, cfg=cfg, **BRANCHES)
            torch.testing.assert_close(found.sample(denoiser), found.restored, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("at_end", [0, 2])
def test_a_list_of_functions_is_undone_by_the_function_of_the_step(at_end: int) -> None:
    x, cfg = noise_like((2, 6)) / 2, FUNCTIONS["steps"]
    got = ki.unsample(denoiser, x, SIGMAS, cfg=cfg, sigma_offset=0.0, end_at_step=at_end, **BRANCHES)
    rising = SIGMAS.flip(0).tolist()[: len(SIGMAS) - at_end]
    for a, b, one in zip(rising[:-1], rising[1:], cfg[::-1], strict=False):
        sigma = torch.full((2,), a, dtype=torch.float64)
        x = x + (b - a) * (x - guide(denoiser, one, **BRANCHES)(x, sigma)) / a
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


def test_equal_functions_are_one() -> None:
    levels = SIGMAS.tolist()
    assert step_cfg([APG(3.0)] * 11, levels) == APG(3.0)
    mixed = step_cfg([APG(3.0)] * 5 + [1.0] * 3 + [APG(3.0)] * 3, levels)
    assert len(mixed.functions) == 2


def test_cfg_plus_plus_takes_functions_that_leave_the_unconditional_prediction() -> None:
    x = 10 * noise_like((2, 6))
    cfg = Rescale(0.6, 0.0, "eps")
    left, right = (ki.sample(denoiser, x, SIGMAS, sampler="euler_cfg_pp", cfg=c, **BRANCHES) for c in (cfg, 0.6))
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)
    for bad in (
        Interval(2.0, 1.0, 3.0),
        CFGZeroStar(2.0),
        Rescale(CFGZeroStar(2.0), space="eps"),
        [CFGZeroStar(2.0)] * 11,
    ):
        for verb in (ki.sample, ki.invert):
            with pytest.raises(ValueError, match=r"does not go with CFG\+\+ samplers"):
                verb(denoiser, x, SIGMAS, sampler="euler_cfg_pp", cfg=bad, **BRANCHES)


# -- what depends on more than one evaluation --------------------------------------------------------------------------
def test_what_says_that_it_has_a_memory_is_for_sample_alone() -> None:
    x = noise_like((2, 6))
    for cfg in (
        Momentum(True),
        Function(Momentum(False), stateful=True),
        Rescale(Momentum(True), space="x0"),
        [Momentum(True)] * 11,
    ):
        assert ki.sample(denoiser, x, SIGMAS, cfg=cfg, **BRANCHES).isfinite().all()
        for verb in (ki.unsample, ki.invert, ki.extract_noise, *ki.inversion.baselines.BASELINES.values()):
            with pytest.raises(ValueError, match=r"it depends on earlier evaluations \(stateful=True\)"):
                verb(denoiser, x, SIGMAS, cfg=cfg, **BRANCHES)
        with pytest.raises(ValueError, match="sample cannot take cfg=.* evaluates the parts of a batch in turn"):
            ki.sample(denoiser, x, SIGMAS, cfg=cfg, max_batch=1, **BRANCHES)


def counted(*before: int) -> Callable[[Tensor], Tensor]:
    calls = list(before)

    def cfg(sigma: Tensor) -> Tensor:
        calls.append(0)
        return torch.full_like(sigma, len(calls))

    return cfg


@pytest.mark.parametrize(
    "cfg", [Momentum(False), Interval(Momentum(False), 0.0, 20.0), counted()], ids=["object", "within", "function"]
)
def test_what_does_not_say_so_is_found_out(cfg: Any) -> None:
    for verb in (ki.invert, ki.extract_noise):
        with pytest.raises(ValueError, match="does not return the same for the same predictions"):
            verb(denoiser, noise_like((2, 6)), SIGMAS, cfg=cfg, **BRANCHES)


def test_a_function_that_mixes_the_batch_is_found_out() -> None:
    def cfg(cond: Tensor, uncond: Tensor, sigma: Tensor) -> Tensor:
        return cond * (uncond.std() / cond.std())

    with pytest.raises(ValueError, match="mixes the samples of a batch"):
        ki.invert(denoiser, noise_like((2, 6)), SIGMAS, cfg=cfg, **BRANCHES)


# -- dtypes, gradients, compiled runs ----------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*FUNCTIONS][:-1])
def test_half_precision_is_combined_in_float32(name: str, dtype: torch.dtype) -> None:
    cond, uncond, x = (noise_like((2, 6), seed).to(dtype) for seed in range(3))
    sigma = torch.tensor([0.5, 2.0])
    bound = guide(lambda x, sigma, of: of, FUNCTIONS[name], {"of": cond}, {"of": uncond})
    wide = guide(lambda x, sigma, of: of, FUNCTIONS[name], {"of": cond.float()}, {"of": uncond.float()})
    found = bound(x, sigma)
    assert found.dtype == dtype
    assert torch.equal(found, wide(x.float(), sigma).to(dtype))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_finite_and_right(name: str) -> None:
    cfg = step_cfg(FUNCTIONS[name], SIGMAS.tolist())
    bound = guide(lambda x, sigma, by: (x * by).sin(), cfg, {"by": 1.0}, {"by": 0.4})
    assert torch.autograd.gradcheck(lambda x: bound(x, LEVELS), X.clone().requires_grad_())


@pytest.mark.parametrize("name", ["all", "threshold", "steps"])
def test_guided_runs_compile_without_graph_breaks(name: str) -> None:
    torch._dynamo.reset()
    plan, x = ki.compile_plan("dpmpp_2m", SIGMAS[8:]), noise_like((2, 3))
    gaussian = ki.denoisers.Gaussian(0.0, 0.5)
    cfg = step_cfg(FUNCTIONS[name], SIGMAS.tolist())
    branches: list[dict[str, Any]] = [{"shift": noise_like((2, 3), seed)} for seed in (1, 2)]
    bound = guide(lambda x, sigma, shift: gaussian(x, sigma) + shift, cfg, *branches)
    compiled = torch.compile(lambda y: ki.run(plan, bound, y), fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), ki.run(plan, bound, x), rtol=1e-10, atol=1e-10)


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: APG("7"), TypeError, "scale must be a number, got '7'"),
        (lambda: APG(3.0, norm_threshold=0.0), ValueError, "norm_threshold must be positive and finite, got 0.0; math.inf"),
        (lambda: CFGZeroStar(math.nan), ValueError, "scale must be finite"),
        (lambda: CFGZeroStar(3.0, "flow"), ValueError, "unknown space 'flow'"),
        (lambda: Rescale(3.0, 1.5), ValueError, "factor must be .*, got 1.5; pass a number from 0 to 1"),
        (lambda: Rescale([3.0]), TypeError, "guidance must be a number, got a list of 3.0"),
        (lambda: Interval(3.0, 5.0, 1.0), ValueError, "high must be .*, got 1.0; it is the noisier end"),
        (lambda: Interval(3.0, -1.0, 1.0), ValueError, "low must be .*not negative, got -1.0"),
        (lambda: DynamicThreshold(3.0, 99.5), ValueError, "percentile must be .*, got 99.5; 0.995 is"),
        (lambda: guide(denoiser, lambda a, b: a, **BRANCHES), TypeError, r"arguments \(a, b\); it must be cfg\(sigma\)"),
        (lambda: guide(denoiser, lambda *a: a[0], **BRANCHES), TypeError, r"arguments \(\*a\); it must be cfg\(sigma\)"),
        (lambda: guide(denoiser, lambda a, b, c, d: a, **BRANCHES), TypeError, r"arguments \(a, b, c, d\)"),
        (lambda: guide(denoiser, min, **BRANCHES), TypeError, "cfg is "),
        (lambda: guide(denoiser, APG(3.0), positive={"label": 0}), ValueError, r"cfg=APG\(scale=3.0.* needs the uncond"),
        (lambda: step_cfg([1.0, lambda sigma: sigma], [3.0, 2.0, 1.0]), TypeError, "a function of sigma alone for a step"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_an_interval_of_sigmas_is_no_interval_of_flow_times() -> None:
    bound = ki.denoisers.from_velocity(lambda x, t, label: x, ki.levels.flow())
    with pytest.raises(ValueError, match=r"is for sigmas, and the model is in flow time.*t = sigma / \(1 \+ sigma\)"):
        ki.sample(bound, X, [1.0, 0.5, 0.1], cfg=Interval(3.0, 1.5, 5.0), **BRANCHES)


def test_a_number_of_arguments_says_what_a_function_is() -> None:
    scale = 3.0
    for cfg in (lambda sigma: scale + 0 * sigma, lambda sigma, by=scale: by + 0 * sigma):
        torch.testing.assert_close(guided(cfg), guided(scale))

    class Network(torch.nn.Module):
        def forward(self, cond: Tensor, uncond: Tensor, sigma: Tensor) -> Tensor:
            return uncond + scale * (cond - uncond)

    for cfg in (Network(), Network().forward, lambda cond, uncond, sigma=None: Network()(cond, uncond, sigma)):
        torch.testing.assert_close(guided(cfg), guided(scale))


def test_a_record_of_the_benchmark_holds_numbers_only() -> None:
    from kinvert.bench import Cell

    with pytest.raises(TypeError, match=r"cfg must be a number, got APG.*a record holds numbers.*ki.denoisers.guide"):
        Cell("digits", cfg=APG(3.0))  # type: ignore[arg-type]
