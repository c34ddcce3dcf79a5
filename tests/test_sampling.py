"""`sample`, `unsample` and `round_trip`: convergence to exact answers, every input of the node, every bad input."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import mixture, noise_like, order_slope, schedules
from torch import Tensor

import kinvert as ki
from kinvert.engine import plain_loop

KARRAS = ki.schedules.karras(10, 0.05, 10.0)
GAUSSIAN = ki.denoisers.Gaussian(0.3, 0.5)
UNSAMPLERS = ["euler", "heun", "dpm_2", "lms", "dpmpp_2m"]


def data(*shape: int) -> Tensor:
    return 0.3 + 0.5 * noise_like(shape or (2, 1, 8, 8), seed=7)


# -- exact answers -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", UNSAMPLERS)
def test_unsample_converges_to_the_ode_latent(name: str) -> None:
    """On Gaussian data the latent has a closed form; the error falls at the rule's order."""
    steps, x = [20, 40, 80, 160], data()
    errors = []
    for n in steps:
        sigmas = ki.schedules.karras(n, 0.05, 10.0)[:-1]
        latent = ki.unsample(GAUSSIAN, x, sigmas, sampler=name)
        exact = GAUSSIAN.ode(x, 0.05 + 1e-4, 10.0 + 1e-4)
        errors.append(float((latent - exact).norm() / exact.norm()))
    order = ki.sampler(name).ode_order
    assert order_slope(errors, steps) > order - 0.25
    assert errors[-1] < 0.1 ** (order + 0.3)


def test_unsample_by_hand() -> None:
    """One Euler step up from 1e-4, by its formula."""
    x, sigmas = data(), [1.0, 0.0]
    step = 1.0 / 1e-4
    expected = x + step * (x - GAUSSIAN(x, torch.full((2,), 1e-4, dtype=torch.float64))) * 1e-4 / 1e-4
    torch.testing.assert_close(ki.unsample(GAUSSIAN, x, sigmas), expected, rtol=1e-9, atol=1e-9)


@given(sigmas=schedules(min_steps=3, max_steps=6, zero=True), end=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_end_at_step_drops_the_noisy_end(sigmas: list[float], end: int) -> None:
    """`end_at_step` is the same as leaving out the first sigmas of the schedule, and one step always runs."""
    x, kept = data(2, 6), max(2, len(sigmas) - end)
    got = ki.unsample(mixture(), x, sigmas, end_at_step=end)
    assert torch.equal(got, ki.unsample(mixture(), x, sigmas[-kept:]))


def test_sigma_offset_is_added_to_every_entry() -> None:
    seen: list[float] = []
    ki.unsample(
        GAUSSIAN, data(), [2.0, 1.0, 0.0], sigma_offset=0.25, callback=lambda s: seen.extend([s.sigma, s.sigma_next])
    )
    assert seen == [0.25, 1.25, 1.25, 2.25]


def trip_mse(name: str, sigmas: Tensor) -> float:
    return float(ki.round_trip(mixture(), data(16, 6), sigmas, sampler=name, sigma_offset=0.0).mse.mean())


@pytest.mark.parametrize("name", ["heun", "dpm_2", "dpmpp_2m"])
def test_round_trip_converges(name: str) -> None:
    """The amplitude of the round-trip error falls at the rule's order once the schedule is all of the way."""
    steps = [20, 40, 80, 160]
    errors = []
    for n in steps:
        sigmas = ki.schedules.karras(n, 0.05, 10.0)[:-1]
        errors.append(trip_mse(name, sigmas) ** 0.5)
    assert order_slope(errors, steps) > ki.sampler(name).ode_order - 0.25
    assert errors[-1] < 1e-4


# -- the inputs of the node --------------------------------------------------------------------------------------------
def test_normalize() -> None:
    x = data(3, 2, 5, 5)
    raw = ki.unsample(GAUSSIAN, x, KARRAS)
    whole = ki.unsample(GAUSSIAN, x, KARRAS, normalize=True)
    torch.testing.assert_close(whole, (raw - raw.mean()) / raw.std(unbiased=True))
    each = ki.unsample(GAUSSIAN, x, KARRAS, normalize="sample")
    torch.testing.assert_close(each.flatten(1).std(1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(each.flatten(1).mean(1), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(ki.unsample(GAUSSIAN, x, KARRAS, normalize="sigma"), raw / 10.0001)


def test_samples_of_one_value_are_normalized_over_the_batch_alone() -> None:
    raw = ki.unsample(GAUSSIAN, data(4, 1), KARRAS)
    torch.testing.assert_close(
        ki.unsample(GAUSSIAN, data(4, 1), KARRAS, normalize=True), (raw - raw.mean()) / raw.std()
    )
    with pytest.raises(ValueError, match=r"normalize='sample' needs a latent that varies.*shape \(4, 1\)"):
        ki.unsample(GAUSSIAN, data(4, 1), KARRAS, normalize="sample")


def labelled(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
    """A class-conditional Gaussian: the label is the mean."""
    mean = label.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return ki.denoisers.Gaussian(0.0, 0.5)(x - mean, sigma) + mean


def test_guidance_is_linear_in_the_scale() -> None:
    x, ones, zeros = data(2, 6), torch.ones(2), torch.zeros(2)

    def run(cfg: float) -> Tensor:
        return ki.unsample(labelled, x, KARRAS, cfg=cfg, positive={"label": ones}, negative={"label": zeros})

    guided, moved = run(3.0), ki.unsample(labelled, x, KARRAS, positive={"label": 3 * ones})
    torch.testing.assert_close(guided, moved)  # U + 3 (C - U) of these two is the Gaussian with mean 3
    assert torch.equal(run(1.0), ki.unsample(labelled, x, KARRAS, positive={"label": ones}))


def test_mask_keeps_the_image_and_only_there() -> None:
    x, mask = data(2, 1, 8, 8), torch.zeros(2, 8, 8)
    mask[0, :, :4] = 1  # item 0: left half; item 1: nothing
    latent = ki.unsample(GAUSSIAN, x, KARRAS, sampler="heun", mask=mask)
    torch.testing.assert_close(latent[1], x[1])
    torch.testing.assert_close(latent[0, :, :, 4:], x[0, :, :, 4:])
    whole = ki.unsample(GAUSSIAN, x, KARRAS, sampler="heun")
    torch.testing.assert_close(latent[0, :, :, :4], whole[0, :, :, :4])  # the Gaussian denoises each pixel alone


def test_masked_sampling_shows_the_latent_where_kept() -> None:
    x, latent, mask = 10 * noise_like((2, 1, 8, 8)), data(2, 1, 8, 8), torch.zeros(8, 8)
    mask[:4] = 1
    result = ki.sample(GAUSSIAN, x + latent, KARRAS, sampler="dpmpp_2m", mask=mask, latent=latent)
    torch.testing.assert_close(result[:, :, 4:], latent[:, :, 4:])
    assert (result[:, :, :4] - latent[:, :, :4]).abs().mean() > 0.1


def test_masked_round_trip() -> None:
    trip = ki.round_trip(GAUSSIAN, data(2, 1, 8, 8), KARRAS, sampler="heun", mask=torch.eye(8))
    assert float(trip.psnr.min()) > 50


@pytest.mark.parametrize("shape", [(1, 3), (1,), (5,), (2, 4, 7), (1, 3, 4, 4), (2, 3, 2, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_event_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = data(*shape).to(dtype)
    trip = ki.round_trip(GAUSSIAN, x, KARRAS, sampler="heun")
    assert trip.latent.shape == trip.reconstruction.shape == shape
    assert trip.latent.dtype == trip.reconstruction.dtype == dtype
    if dtype in (torch.float32, torch.float64):
        assert float(trip.max_error.max()) < 0.1


def test_sigmas_in_any_dtype_are_brought_over() -> None:
    x = data().float()
    wanted = ki.unsample(GAUSSIAN, x, KARRAS)
    assert torch.equal(wanted, ki.unsample(GAUSSIAN, x, KARRAS.tolist()))
    torch.testing.assert_close(wanted, ki.unsample(GAUSSIAN, x, KARRAS.float()), rtol=1e-3, atol=1e-3)


def test_callback_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    latent = ki.unsample(GAUSSIAN, data(), KARRAS, sampler="heun", callback=seen.append, progress=True)
    assert [s.index for s in seen] == list(range(10))
    assert seen[0].sigma == 1e-4 and seen[-1].sigma_next == pytest.approx(10.0001)
    assert torch.equal(seen[0].x, data()) and seen[0].denoised.shape == latent.shape
    assert "unsample heun: 100%" in capsys.readouterr().err


def test_verbs_keep_no_graph_and_run_does() -> None:
    """And they say where it is to be had; not where the caller wants none."""
    x = data().requires_grad_()
    for verb in (ki.sample, ki.unsample):
        with pytest.warns(UserWarning, match=rf"x requires grad, but {verb.__name__} keeps no graph.*ki.run\("):
            assert not verb(GAUSSIAN, x, KARRAS).requires_grad
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            verb(GAUSSIAN, x=x, sigmas=KARRAS)
    trip = ki.round_trip(GAUSSIAN, x, KARRAS)
    assert not any(value.requires_grad for value in vars(trip).values() if isinstance(value, Tensor))
    assert ki.run(ki.compile_plan("heun", KARRAS), GAUSSIAN, x).requires_grad


def test_noise_follows_the_seed() -> None:
    x = 10 * noise_like((3, 1, 4, 4))

    def run(noise: Any = None) -> Tensor:
        return ki.sample(GAUSSIAN, x, KARRAS, sampler="euler_ancestral", noise=noise)

    assert torch.equal(run(ki.noise.white(1)), run(ki.noise.white(1)))
    assert not torch.equal(run(ki.noise.white(1)), run(ki.noise.white(2)))
    torch.manual_seed(5)
    first = run()
    torch.manual_seed(5)
    assert torch.equal(first, run())
    plan = ki.compile_plan("euler_ancestral", KARRAS)
    maps = [noise_like((3, 1, 4, 4), seed=k) for k in range(plan.draws)]
    rest = iter(maps)
    assert torch.equal(run(ki.noise.replay(maps)), run(lambda sigma_from, sigma_to: next(rest)))


# -- bad input ---------------------------------------------------------------------------------------------------------
X = data()


def nan_below(level: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, sigma: GAUSSIAN(x, sigma) * (math.nan if sigma[0] < level else 1.0)


BAD_INPUTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "rising schedule": (lambda: ki.unsample(GAUSSIAN, X, KARRAS.flip(0)[1:]), ValueError, r"decreasing.*sigmas.flip\(0\)"),
    "rising schedule to sample": (lambda: ki.sample(GAUSSIAN, X, KARRAS.flip(0)[1:]), ValueError, "use unsample"),
    "x is a list": (lambda: ki.unsample(GAUSSIAN, [1.0], KARRAS), TypeError, "x must be a tensor"),  # type: ignore[arg-type]
    "integer x": (lambda: ki.sample(GAUSSIAN, torch.ones(2, 3).int(), KARRAS), TypeError, r"floating point.*x.float\(\)"),
    "scalar x": (lambda: ki.sample(GAUSSIAN, torch.tensor(1.0), KARRAS), ValueError, "at least one sample"),
    "no samples": (lambda: ki.sample(GAUSSIAN, torch.empty(0, 3), KARRAS), ValueError, "at least one sample"),
    "shape": (lambda: ki.unsample(lambda x, s: x[:, :, :4], X, KARRAS), ValueError, r"\(2, 1, 8, 8\), got \(2, 1, 4, 8\)"),
    "dtype": (lambda: ki.unsample(lambda x, s: x.float(), X, KARRAS), TypeError, r"dtype torch.float64, got torch.float32"),
    "integers": (lambda: ki.unsample(lambda x, s: x.int(), X, KARRAS), TypeError, "torch.int32"),
    "no tensor": (lambda: ki.unsample(lambda x, s: (x,), X, KARRAS), TypeError, "tensor.*got tuple"),
    "none": (lambda: ki.unsample(lambda x, s: None, X, KARRAS), TypeError, "tensor.*got NoneType"),
    "not callable": (lambda: ki.unsample("unet", X, KARRAS), TypeError, "denoiser must be callable"),  # type: ignore[arg-type]
    "nan": (lambda: ki.sample(nan_below(1.0), X, KARRAS), ValueError, r"euler: the denoiser returned NaN.*sigma 0.866\d+ in step 5"),
    "nan upwards": (lambda: ki.unsample(nan_below(math.inf), X, KARRAS), ValueError, r"sigma 0.0001 in step 0 \(0.0001 -> "),
    "nan in x": (lambda: ki.unsample(GAUSSIAN, X * math.nan, KARRAS), ValueError, "x has 128 NaN or infinite values"),
    "overflow": (lambda: ki.sample(GAUSSIAN, (X * 1e5).half() / 0, KARRAS), ValueError, "NaN or infinite values"),
    "mask shape": (lambda: ki.unsample(GAUSSIAN, X, KARRAS, mask=torch.ones(3, 8, 8)), ValueError, r"mask has shape \(3, 8, 8\)"),
    "mask values": (lambda: ki.unsample(GAUSSIAN, X, KARRAS, mask=torch.full((8, 8), 255.0)), ValueError, "divide a mask of bytes by 255"),
    "mask alone": (lambda: ki.sample(GAUSSIAN, X, KARRAS, mask=torch.ones(8, 8)), ValueError, "mask was given without latent"),
    "latent alone": (lambda: ki.sample(GAUSSIAN, X, KARRAS, latent=X), ValueError, "latent was given without mask"),
    "latent shape": (lambda: ki.sample(GAUSSIAN, X, KARRAS, latent=X[:1], mask=torch.ones(8, 8)), ValueError, r"latent.*\(2, 1, 8, 8\)"),
    "end_at_step": (lambda: ki.unsample(GAUSSIAN, X, KARRAS, end_at_step=-1), ValueError, "end_at_step must not be negative, got -1"),
    "end_at_step type": (lambda: ki.unsample(GAUSSIAN, X, KARRAS, end_at_step=1.5), TypeError, "end_at_step must be an int"),  # type: ignore[arg-type]
    "no negative": (lambda: ki.unsample(labelled, X, KARRAS, cfg=3.0, positive={"label": torch.ones(2)}), ValueError, "negative= is missing"),
    "positive": (lambda: ki.unsample(labelled, X, KARRAS, positive=torch.ones(2)), TypeError, "positive must be a mapping"),  # type: ignore[arg-type]
    "cfg": (lambda: ki.unsample(GAUSSIAN, X, KARRAS, cfg=math.nan, negative={}), ValueError, "cfg must be finite"),
    "normalize": (lambda: ki.unsample(GAUSSIAN, X, KARRAS, normalize="batch"), ValueError, "normalize must be.*got 'batch'"),  # type: ignore[arg-type]
    "normalize 1": (lambda: ki.unsample(GAUSSIAN, X, KARRAS, normalize=1), ValueError, "normalize must be"),  # type: ignore[arg-type]
    "normalize one value": (lambda: ki.unsample(GAUSSIAN, X[:1, :, :1, :1], KARRAS, normalize=True), ValueError, "needs a latent that varies"),
    "offset": (lambda: ki.unsample(GAUSSIAN, X, KARRAS, sigma_offset=-1e-4), ValueError, "sigma_offset must be finite and not negative"),
    "no offset": (lambda: ki.unsample(GAUSSIAN, X, KARRAS, sigma_offset=0.0), ValueError, "sigmas start at 0"),
    "sampler": (lambda: ki.unsample(GAUSSIAN, X, KARRAS, sampler="dpmpp2m"), ValueError, "did you mean 'dpmpp_2m'"),
    "method": (lambda: ki.round_trip(GAUSSIAN, X, KARRAS, method="ddim"), ValueError, "unknown method 'ddim'; did you mean 'ddim_noisy'. It must be one of unsample, invert"),  # type: ignore[arg-type]
    "noise": (lambda: ki.sample(GAUSSIAN, X, KARRAS, sampler="euler_ancestral", noise=3), TypeError, "noise must be a noise source"),  # type: ignore[arg-type]
    "noise shape": (lambda: ki.sample(GAUSSIAN, X, KARRAS, sampler="euler_ancestral", noise=lambda a, b: X[:1]), ValueError, r"noise\(10, .*shape \(1, 1, 8, 8\)"),
    "noise runs out": (lambda: ki.sample(GAUSSIAN, X, KARRAS, sampler="euler_ancestral", noise=ki.noise.replay([X])), ValueError, "ran out of noise"),
    "seeds": (lambda: ki.sample(GAUSSIAN, X, KARRAS, sampler="euler_ancestral", noise=ki.noise.white([1, 2, 3])), ValueError, "3 seeds for a batch of 2"),
    "seed": (lambda: ki.noise.white("7"), TypeError, "seed must be an int"),
    "replay": (lambda: ki.noise.replay(X), TypeError, "replay takes a list of tensors"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_named(name: str) -> None:
    call, error, message = BAD_INPUTS[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde"])
def test_stochastic_samplers_do_not_unsample(name: str) -> None:
    """The node gives NaN or an image without noise; here the error names the sampler and what to use, before any call."""

    def forbidden(x: Tensor, sigma: Tensor) -> Tensor:
        raise AssertionError("evaluated")

    with pytest.raises(ValueError, match=f"{name}.*eta=0"):
        ki.unsample(forbidden, X, KARRAS, sampler=name)
    latent = ki.unsample(GAUSSIAN, X, KARRAS, sampler=ki.sampler(name, eta=0))
    assert torch.isfinite(latent).all()


def test_churn_upwards_needs_noise_given_on_purpose() -> None:
    rule = ki.sampler("heun", s_churn=3.0, s_tmin=0.5)
    with pytest.raises(ValueError, match=r"heun draws noise \d+ times.*s_churn=0"):
        ki.unsample(GAUSSIAN, X, KARRAS, sampler=rule)
    assert torch.isfinite(ki.unsample(GAUSSIAN, X, KARRAS, sampler=rule, noise=ki.noise.white(0))).all()


def test_the_error_of_a_stochastic_run_is_found_with_the_same_noise() -> None:
    """The checked second run sees the noise of the first, so it finds the same step."""

    def fragile(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(x.abs().amax() > 25.0, math.nan, 0.3) + 0 * x

    x = 10 * noise_like((2, 1, 8, 8))
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"euler_ancestral: the denoiser returned NaN or infinity at sigma .* in step"):
        ki.sample(fragile, x, KARRAS * 10, sampler=ki.sampler("euler_ancestral", s_noise=3.0))


def test_a_noise_function_may_use_its_memory_again() -> None:
    """Two draws in a step: the plain loop and the fused one take the values as they were returned."""
    plan, buffer = ki.compile_plan("dpmpp_sde", [10.0, 3.0, 1.0, 0.1]), torch.empty(4, 2, dtype=torch.float64)
    x = 10 * torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for gradients in (True, False):
        generator = torch.Generator().manual_seed(1)
        with torch.set_grad_enabled(gradients):
            results.append(ki.run(plan, GAUSSIAN, x, lambda a, b, g=generator: buffer.normal_(generator=g)))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_plans_of_equal_rules_say_their_own_name() -> None:
    levels = [10.0, 3.0, 1.0]
    assert ki.compile_plan("ddim", levels).rule.name == "ddim"
    assert ki.compile_plan(ki.sampler("euler_ancestral", eta=0), levels).rule.name == "euler_ancestral"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: ki.run("euler", GAUSSIAN, x), TypeError, "plan must be a Plan, got str; use ki.compile_plan"),
        (lambda x: ki.graphs.capture("euler", GAUSSIAN, x), TypeError, "plan must be a Plan, got str"),
        (lambda x: ki.run(ki.compile_plan("euler", [3.0, 1.0]), None, x), TypeError, "denoiser must be callable"),
        (lambda x: ki.sample(GAUSSIAN, x, [3.0, 1.0], callback=3), TypeError, "callback must be callable"),
        (lambda x: ki.sample(GAUSSIAN, x, [3.0, 1.0], sampler="euler_ancestral", noise=ki.noise.white), TypeError, r"call it: white\(seed\)"),
        (lambda x: ki.sample(GAUSSIAN, x, [3.0, 0.0], sampler="dpm_adaptive"), ValueError, "needs two of them, got 3 alone"),
        (lambda x: ki.sample(GAUSSIAN, x, [3.0, 1.0], mask=x[0], latent=x * math.nan), ValueError, "latent has .* NaN"),
        (lambda x: ki.sample(GAUSSIAN, x, [3.0, 1.0], mask=x[0], latent=x.int()), TypeError, "latent must be a floating point"),
        (lambda x: ki.noise.white(2**64), ValueError, "seed must have 64 bits"),
        (lambda x: ki.schedule("karras", 5, ki.levels.edm(), rho=0.001), ValueError, "too extreme"),
    ],
)  # fmt: skip
def test_plausible_mistakes_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "rk4", "uni_pc"])
def test_a_denoiser_that_writes_into_x_is_named(sampler: str, plain: bool, call: int) -> None:
    """In whichever evaluation it does so; the caller's own tensor is the input of the first alone."""
    calls = itertools.count()

    def careless(x: Tensor, sigma: Tensor) -> Tensor:
        return GAUSSIAN(x.clamp_(-1.0, 1.0) if next(calls) == call else x, sigma)

    named = pytest.raises(ValueError, match="wrote into x in step .* work on a copy")
    with plain_loop() if plain else nullcontext(), named:
        ki.sample(careless, 10 * torch.ones(2, 3), [10.0, 6.0, 3.0, 2.0, 1.0], sampler=sampler)


# -- what would be wrong without a word --------------------------------------------------------------------------------
SHORT = {"one step": [10.0, 0.0], "one step, ends above 0": [10.0, 1.0], "two steps": [10.0, 1.0, 0.0]}


@pytest.mark.parametrize("schedule", SHORT)
@pytest.mark.parametrize("name", [name for name in ki.SAMPLERS if name != "dpm_adaptive"])
def test_what_no_evaluation_enters_is_refused(name: str, schedule: str) -> None:
    """Of every sampler: either the result moves with the denoiser, or there is an error."""
    x, plan = 10 * noise_like((2, 6)), ki.compile_plan(name, SHORT[schedule])

    def run(size: float) -> Tensor:
        def denoise(x: Tensor, sigma: Tensor) -> Any:
            D = size * torch.tanh(x)
            return ki.Guided(D, 0.9 * D) if plan.is_guided else D

        return ki.sample(denoise, x, SHORT[schedule], sampler=name, noise=ki.noise.replay([x] * 9))

    try:
        moved = not torch.equal(run(1.0), run(2.0))
    except ValueError as error:
        assert "no evaluation of the denoiser enters its result; give a longer schedule, or use" in str(error)
        assert torch.equal(ki.run(plan, lambda x, s: x, x), ki.run(plan, lambda x, s: 2 * x, x))
    else:
        assert moved


def test_dpm_fast_with_one_level_is_refused_by_name() -> None:
    x = noise_like((1, 4))
    for verb in (lambda: ki.sample(GAUSSIAN, x, [10.0, 0.0], sampler="dpm_fast"),
                 lambda: ki.round_trip(GAUSSIAN, x, [10.0, 0.0], sampler="dpm_fast")):  # fmt: skip
        with pytest.raises(ValueError, match=r"dpm_fast returns x as it came.*from sigma 10 to 10 in 1 step"):
            verb()


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
def test_a_masked_run_can_be_split_if_its_noise_is_given(name: str) -> None:
    """Exactly, with a soft mask; with the noise guessed from x in the middle it differs."""
    image, noise = data(1, 4, 8, 8), noise_like((1, 4, 8, 8), seed=3)
    start, mask = image + KARRAS[0] * noise, torch.linspace(0, 1, 8, dtype=torch.float64).expand(8, 8)
    shared: dict[str, Any] = {"sampler": name, "mask": mask, "latent": image}
    whole = ki.sample(GAUSSIAN, start, KARRAS, **shared)
    half = ki.sample(GAUSSIAN, start, KARRAS[:6], mask_noise=noise, **shared)
    rest = ki.sample(GAUSSIAN, half, KARRAS[5:], mask_noise=noise, **shared)
    torch.testing.assert_close(rest, whole, rtol=1e-12, atol=1e-12)
    assert float((ki.sample(GAUSSIAN, half, KARRAS[5:], **shared) - whole).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="mask_noise must be a tensor of x's shape"):
        ki.sample(GAUSSIAN, start, KARRAS, mask_noise=noise[:, :1], **shared)
    with pytest.raises(ValueError, match="mask_noise was given without mask"):
        ki.sample(GAUSSIAN, start, KARRAS, mask_noise=noise)


# -- half precision ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_offset_is_the_node_s_or_what_the_dtype_allows(dtype: torch.dtype) -> None:
    """Whatever the other items of the batch are; data that it is too small for are named."""
    small, large = (torch.full((1, 6), size, dtype=dtype) for size in (0.5, 400.0))
    seen: list[float] = []
    job = dict(sigmas=[1e3, 1e2, 10.0, 0.0], callback=lambda p: seen.append(p.sigma))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ki.unsample(lambda y, sigma: y, small, **job)
    with pytest.warns(RuntimeWarning, match="can drown it") if dtype.itemsize < 4 else nullcontext():
        ki.unsample(lambda y, sigma: y, torch.cat([small, large]), **job)
    assert set(seen[::3]) == {max(1e-4, 2 * torch.finfo(dtype).eps)}


def test_an_offset_that_drowns_the_latent_is_named_with_the_number() -> None:
    x = torch.ones(2, 6, dtype=torch.bfloat16)  # eps = 1/128: 78 sigma at 1e-4
    with pytest.warns(
        RuntimeWarning, match=r"at sigma 0.0001 in torch.bfloat16 .* 78 sigma.*x.float\(\).*sigma_offset=0.016"
    ):
        ki.unsample(lambda y, sigma: y, x, [10.0, 1.0, 0.0], sigma_offset=1e-4)
    with pytest.warns(RuntimeWarning, match=r"the noise of the kept region.*or give mask_noise"):
        ki.sample(lambda y, s: y, x, [0.005, 0.001], mask=torch.ones(6), latent=x)


def test_a_plan_upwards_that_drowns_is_named_too() -> None:
    x, plan = torch.ones(2, 6, dtype=torch.bfloat16), ki.compile_plan("euler", [1e-4, 1.0, 10.0])
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.warns(RuntimeWarning, match=r"78 sigma.*or a higher first level"):
            ki.run(plan, lambda y, sigma: y, x)
    torch.func.vmap(lambda one: ki.run(plan, lambda y, sigma: y, one))(x[None])  # nothing can be read there
    ki.run(plan, lambda y, sigma: y, x.float())


def test_half_precision_finds_the_latent() -> None:
    """On the embedded digits, with the default offset; with the node's, bfloat16 is off by more than 3 sigma."""
    from kinvert import models

    images, labels = models.held_out("digits")
    images, given = images[:4], {"positive": {"label": labels[:4]}}
    sigmas = ki.schedule("karras", 50, ki.levels.edm(0.02, 80.0))
    want = ki.unsample(models.load("digits"), images, sigmas, **given)
    for dtype in (torch.bfloat16, torch.float16):
        net = models.load("digits", dtype=dtype)
        got = ki.unsample(net, images.to(dtype), sigmas, **given)
        back = ki.sample(net, got, sigmas, **given)
        assert float((got.float() - want).square().mean().sqrt()) / 80 < 0.25
        assert float((back.float() - images).square().mean().sqrt()) < 0.04
