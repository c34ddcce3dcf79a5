"""Sigma schedules: closed forms, laws and errors. Recordings of other hosts are in test_recorded_schedules.py."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinvert import levels, schedules
from kinvert.schedules import DISCARD_PENULTIMATE, SCHEDULES, schedule

SD = levels.stable_diffusion()
MODELS = {
    "sd15": SD,
    "sdxl": SD,
    "vpred_zsnr": levels.stable_diffusion(zero_snr=True),
    "edm": levels.edm(),
    "flow_shift3": levels.flow(shift=3),
}
F32 = torch.float32


def zero32(sigmas):
    return torch.cat([sigmas, sigmas.new_zeros(1)])


# --- Closed forms, to 1e-12 ----------------------------------------------------------------------


def assert_exact(sigmas, expected):
    assert sigmas.dtype == torch.float64
    assert sigmas.device.type == "cpu"
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(sigmas, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n", [2, 3, 10, 37])
def test_closed_forms(n):
    low, high, u = 0.03, 14.6, [j / (n - 1) for j in range(n)]
    a, b = high ** (1 / 7), low ** (1 / 7)
    assert_exact(schedules.karras(n, low, high), [*((a + v * (b - a)) ** 7 for v in u), 0])
    ratio = low / high
    assert_exact(schedules.exponential(n, low, high), [*(high * ratio**v for v in u), 0])
    poly = [low * ratio ** -((1 - v) ** 3) for v in u]
    assert_exact(schedules.polyexponential(n, low, high, rho=3), [*poly, 0])
    angles = [math.atan(high) + v * (math.atan(low) - math.atan(high)) for v in u]
    assert_exact(schedules.kl_optimal(n, low, high), [*map(math.tan, angles), 0])
    times = [1 + v * (0.01 - 1) for v in u]
    exponents = [6 * t * t + 0.2 * t for t in times]
    assert_exact(
        schedules.vp(n, beta_d=12, beta_min=0.2, eps_s=0.01),
        [*(math.sqrt(math.expm1(e)) for e in exponents), 0],
    )


def test_laplace_is_the_quantile_function_of_its_law():
    n, mu, scale = 101, 0.3, 0.8
    log = schedules.laplace(n, 1e-9, 1e9, mu=mu, beta=scale).log()
    assert len(log) == n
    u = torch.linspace(0, 1, n, dtype=torch.float64)[1:-1]
    z = (log[1:-1] - mu) / scale
    upper_tail = torch.where(z > 0, (-z.abs()).exp() / 2, 1 - (-z.abs()).exp() / 2)
    torch.testing.assert_close(upper_tail, u, rtol=0, atol=5e-6 + 1e-12)  # the law's own 1e-5 / 2
    assert log[n // 2].item() == pytest.approx(mu, rel=1e-14)


def test_laplace_clamps_and_may_repeat():
    sigmas = schedules.laplace(50, 0.5, 2.0, beta=2.0)
    assert (sigmas.diff() <= 0).all()
    assert (sigmas == 2.0).sum() > 1
    assert (sigmas == 0.5).sum() > 1


@pytest.mark.parametrize(("n", "steps"), [(2, None), (3, None), (20, None), (20, 5), (7, 6)])
def test_linear_quadratic_shape(n, steps):
    sigmas = schedules.linear_quadratic(n, 2.0, 0.03, linear_steps=steps)
    k = n // 2 if steps is None else steps
    y = 1 - sigmas / 2
    assert_exact(y[: k + 1], [0.03 * j / k for j in range(k + 1)])
    assert y[-1] == 1
    if n - k > 2:
        second = y[k:].diff().diff()
        torch.testing.assert_close(second, second[:1].expand_as(second), rtol=1e-11, atol=1e-13)
        slope_at_k = y[k + 1] - y[k] - second[0] / 2
        assert abs(slope_at_k - 0.03 / k) < 1e-13


def test_linear_quadratic_takes_levels_or_sigma_max():
    from_levels = schedules.linear_quadratic(9, MODELS["edm"])
    assert from_levels.equal(schedules.linear_quadratic(9, MODELS["edm"].sigma_max))


def test_level_schedules_by_index():
    table = SD.sigmas
    assert schedules.simple(1000, SD).equal(torch.cat([table.flip(0), torch.zeros(1)]))
    assert schedules.simple(4, SD).equal(zero32(table[[999, 749, 499, 249]]))
    assert schedules.simple(3, SD).equal(zero32(table[[999, 666, 333]]))
    assert schedules.ddim_uniform(4, SD).equal(zero32(table[[751, 501, 251, 1]]))
    assert schedules.ddim_uniform(1, SD).equal(zero32(table[[1]]))
    assert schedules.beta(1, SD).equal(zero32(table[[999]]))
    # Beta(1, 1) is uniform: index = round((1 - j / n) 999)
    assert schedules.beta(3, SD, alpha=1, beta=1).equal(zero32(table[[999, 666, 333]]))
    assert schedules.beta57(6, SD).equal(schedules.beta(6, SD, alpha=0.5, beta=0.7))


def test_normal_and_sgm_uniform_share_their_times():
    normal, sgm = schedules.normal(11, SD), schedules.sgm_uniform(10, SD)
    torch.testing.assert_close(sgm[:-1], normal[:-2], rtol=1e-13, atol=0)
    assert normal[[0, -2]].tolist() == [SD.sigma_max, SD.sigma_min]


@pytest.mark.parametrize("shift", [0.1, 1.0, 1.7, 3.0, 12.5])
@pytest.mark.parametrize("name", sorted(SCHEDULES.keys() - {"vp", "ays", "ddim_uniform", "laplace", "leading"}))
def test_flow_schedules_start_at_exactly_1(name, shift):
    assert schedule(name, 7, levels.flow(shift=shift))[0] == 1


@pytest.mark.parametrize("model", MODELS)
def test_documented_lengths(model):
    table = MODELS[model]
    assert len(schedules.ddim_uniform(30, table)) == 32
    assert len(schedules.ddim_uniform(1000, table)) == 1000
    assert len(schedules.beta(1000, table)) == 848


def test_lowest_level_at_zero_is_not_followed_by_another():
    table = levels.flow(shift=0.05)  # sigma(t(sigma_min)) = Sh(Sh(0.001)) = 2.5e-6
    sigmas = schedules.normal(8, table)
    assert len(sigmas) == 9
    assert 0 < sigmas[-1] <= 1e-5
    assert schedules.sgm_uniform(8, table)[-1] == 0
    table = levels.flow(shift=1e-3)
    assert table.sigmas[1] <= 1e-5
    assert schedules.ddim_uniform(9, table).equal(table.sigmas[1::100].flip(0))


def test_simple_repeats_beyond_the_table():
    small = levels.from_betas([0.1, 0.2, 0.3])
    sigmas = schedules.simple(6, small)
    assert sigmas.equal(zero32(small.sigmas[[2, 2, 1, 1, 0, 0]]))


PUBLISHED = {  # https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html; the times belong to the sigmas
    "sd15": (
        "14.615 6.475 3.861 2.697 1.886 1.396 0.963 0.652 0.399 0.152 0.029",
        "999 850 736 645 545 455 343 233 124 24",
    ),
    "sdxl": (
        "14.615 6.315 3.771 2.181 1.342 0.862 0.555 0.380 0.234 0.113 0.029",
        "999 845 730 587 443 310 193 116 53 13",
    ),
    "svd": ("700.00 54.5 15.886 7.977 4.248 1.789 0.981 0.403 0.173 0.034 0.002", ""),
}


@pytest.mark.parametrize("model", schedules.ALIGN_YOUR_STEPS)
def test_ays_is_as_published(model):
    """The sigmas, digit by digit; those of Stable Diffusion have the published timesteps in its table of levels."""
    sigmas, times = ([float(word) for word in words.split()] for words in PUBLISHED[model])
    assert schedules.ays(10, model).tolist() == pytest.approx([*sigmas[:-1], 0], rel=1e-13)
    assert schedules.ALIGN_YOUR_STEPS[model][-1] == sigmas[-1]
    found = levels.stable_diffusion().timestep(torch.tensor(sigmas[: len(times)], dtype=torch.float64))
    assert found.tolist() == pytest.approx(times, abs=1)


@pytest.mark.parametrize("model", schedules.ALIGN_YOUR_STEPS)
def test_ays(model):
    table = torch.tensor(schedules.ALIGN_YOUR_STEPS[model], dtype=torch.float64)
    ten, twenty = schedules.ays(10, model), schedules.ays(20, model)
    assert_exact(ten, [*table[:-1].tolist(), 0])
    torch.testing.assert_close(twenty[::2], ten, rtol=1e-13, atol=0)
    between = twenty[1:-1:2] ** 2
    torch.testing.assert_close(between, table[:-1] * table[1:], rtol=1e-13, atol=0)
    assert schedules.ays(1, model).tolist() == pytest.approx([table[0].item(), 0], rel=1e-13)


@pytest.mark.parametrize("name", ["karras", "exponential", "polyexponential", "kl_optimal"])
def test_one_step_starts_at_sigma_max(name):
    assert_exact(SCHEDULES[name].function(1, 0.03, 14.6), [14.6, 0])


# --- Laws ----------------------------------------------------------------------------------------

steps = st.integers(1, 200)
bounds = st.tuples(st.floats(1e-3, 10), st.floats(1.01, 1e4)).map(lambda p: (p[0], p[0] * p[1]))
ramps = st.sampled_from(["karras", "exponential", "polyexponential", "kl_optimal"])


@given(ramps, steps, bounds)
def test_bounded_schedules_fall_from_sigma_max_to_sigma_min_to_0(name, n, bound):
    sigmas = SCHEDULES[name].function(n, *bound)
    assert sigmas.shape == (n + 1,)
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    assert sigmas[0] == bound[1]
    if n > 1:
        assert sigmas[-2] == bound[0]


@given(
    st.sampled_from(["karras", "exponential", "polyexponential"]),
    steps,
    bounds,
    st.floats(0.5, 12),
    st.floats(1e-3, 1e3),
)
def test_scale_equivariance(name, n, bound, rho, scale):
    options = {} if name == "exponential" else {"rho": rho}
    function = SCHEDULES[name].function
    scaled = function(n, scale * bound[0], scale * bound[1], **options)
    torch.testing.assert_close(scaled, scale * function(n, *bound, **options), rtol=1e-10, atol=0)


@given(st.sampled_from(["exponential", "kl_optimal"]), st.integers(2, 100), bounds)
def test_inversion_symmetry(name, n, bound):
    """Uniform in ln sigma or in atan sigma: sigma -> 1 / sigma turns the schedule round."""
    function = SCHEDULES[name].function
    there, back = function(n, *bound), function(n, 1 / bound[1], 1 / bound[0])
    torch.testing.assert_close(back[:-1].flip(0), 1 / there[:-1], rtol=1e-8, atol=0)


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 60), st.sampled_from(sorted(MODELS)))
def test_schedules_by_name_fall(name, n, model):
    sigmas = schedule(name, n, MODELS[model])
    assert sigmas.dtype == torch.float64
    assert sigmas.ndim == 1
    falls = sigmas.diff() <= 0 if name == "laplace" else sigmas.diff() < 0
    assert falls.all()
    assert (sigmas[-1] == 0) == (name != "laplace")
    if name not in ("ddim_uniform", "beta", "beta57", "laplace"):
        assert len(sigmas) == n + 1


@given(st.integers(2, 100), st.floats(0.01, 0.6))
def test_linear_quadratic_falls_wherever_it_is_allowed(n, theta):
    limit = 2 * (n // 2) / (n + n // 2)
    if theta < limit:
        sigmas = schedules.linear_quadratic(n, 1.0, theta)
        assert (sigmas.diff() < 0).all()
        assert sigmas[-1] == 0
    else:
        with pytest.raises(ValueError, match="threshold_noise"):
            schedules.linear_quadratic(n, 1.0, theta)


@settings(max_examples=50)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 40), st.floats(0.02, 1))
def test_denoise_is_the_tail_of_a_longer_schedule(name, n, denoise):
    total = n if denoise > 0.9999 else int(n / denoise)
    part, whole = schedule(name, n, SD, denoise=denoise), schedule(name, total, SD)
    assert part.equal(whole if denoise > 0.9999 else whole[-(n + 1) :])


@given(st.sampled_from(sorted(SCHEDULES)), st.sampled_from(sorted(DISCARD_PENULTIMATE)), steps)
def test_discarded_sigma_is_the_penultimate(name, sampler, n):
    longer = schedule(name, n + 1, SD)
    shorter = schedule(name, n, SD, sampler=sampler)
    assert shorter.equal(torch.cat([longer[:-2], longer[-1:]]))


def test_sampler_may_be_a_name_an_object_or_nothing():
    rule = SimpleNamespace(name="dpm_2")
    assert schedule("karras", 5, SD, sampler=rule).equal(schedule("karras", 5, SD, sampler="dpm_2"))
    assert schedule("karras", 5, SD, sampler="euler").equal(schedule("karras", 5, SD))
    assert schedule("karras", 5, SD, denoise=None).equal(schedule("karras", 5, SD))
    assert schedule("karras", 5, SD, denoise=0.99995).equal(schedule("karras", 5, SD))


def test_options_reach_the_function():
    expected = schedules.karras(5, SD.sigma_min, SD.sigma_max, rho=3)
    assert schedule("karras", 5, SD, rho=3).equal(expected)
    assert schedule("ays", 10, SD, model="sdxl").equal(schedules.ays(10, "sdxl"))


# --- Registry and errors -------------------------------------------------------------------------


def test_registry():
    hosts = ["simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal"]
    assert {*hosts, "linear_quadratic", "kl_optimal"} <= SCHEDULES.keys()
    for name, entry in SCHEDULES.items():
        assert entry.name == name
        assert entry.function is getattr(schedules, name)
        assert entry.needs in ("bounds", "levels", "nothing")
        assert entry.summary.endswith(".")
        assert not entry.options.keys() & {"steps", "levels", "sigma_min", "sigma_max"}
    assert SCHEDULES["karras"].options == {"rho": 7.0}
    assert SCHEDULES["karras"].source.endswith("(2022), arXiv 2206.00364, eq. 5.")
    assert SCHEDULES["exponential"].source == ""


@pytest.mark.parametrize(
    "name", [name for name in SCHEDULES if SCHEDULES[name].function.__module__ == schedules.__name__]
)
def test_the_old_name_of_steps_is_deprecated(name):
    bounds = {"bounds": (0.1, 10.0), "levels": (SD,), "nothing": ()}[SCHEDULES[name].needs]
    names = {"bounds": ("sigma_min", "sigma_max"), "levels": ("levels",), "nothing": ()}[SCHEDULES[name].needs]
    rest = dict(zip(names, bounds, strict=True))
    with pytest.warns(DeprecationWarning, match=f"{name}: the argument n is now steps"):
        old = SCHEDULES[name].function(n=5, **rest)
    assert torch.equal(old, SCHEDULES[name].function(steps=5, **rest))


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: schedules.karras(0, 1, 2), ValueError, "steps must be at least 1, got 0; pass"),
        (lambda: schedules.vp(-3), ValueError, "steps must be at least 1, got -3"),
        (lambda: schedules.ays(2.0), TypeError, r"steps must be an int, got 2\.0; pass"),
        (lambda: schedules.simple(True, SD), TypeError, "steps must be an int, got True; pass"),
        (lambda: schedules.karras(5, 0, 2), ValueError, "sigma_min must be positive and finite, got 0"),
        (lambda: schedules.laplace(5, -1, 2), ValueError, r"sigma_min .* got -1"),
        (lambda: schedules.karras(5, NAN, 2), ValueError, "sigma_min .* got nan"),
        (lambda: schedules.kl_optimal(5, 1, INF), ValueError, "sigma_max .* got inf"),
        (lambda: schedules.exponential(5, 2, 2), ValueError, "sigma_min must be below sigma_max"),
        (lambda: schedules.exponential(5, 3, 2), ValueError, "got 3.0 >= 2.0; swap"),
        (lambda: schedules.exponential(5, "1", 2), TypeError, "sigma_min must be a number, got '1'"),
        (lambda: schedules.karras(5, torch.ones(1), 2), TypeError, r"sigma_min .* got Tensor of shape \(1,\)"),
        (lambda: schedules.karras(5, 1, 2, rho=0), ValueError, "rho must be positive and finite, got 0"),
        (lambda: schedules.polyexponential(5, 1, 2, rho=-1), ValueError, "rho"),
        (lambda: schedules.laplace(5, 1, 2, mu=NAN), ValueError, "mu must be finite, got nan"),
        (lambda: schedules.laplace(5, 1, 2, beta=0), ValueError, "beta must be"),
        (lambda: schedules.vp(5, beta_d=0), ValueError, "beta_d"),
        (lambda: schedules.vp(5, beta_min=0), ValueError, "beta_min"),
        (lambda: schedules.vp(5, eps_s=1), ValueError, "eps_s .* above 0 and below 1, got 1"),
        (lambda: schedules.ays(5, "sd51"), ValueError, "unknown model 'sd51'; did you mean 'sd15'"),
        (lambda: schedules.beta(5, SD, alpha=0), ValueError, "alpha"),
        (lambda: schedules.beta(5, SD, beta=NAN), ValueError, "beta"),
        (lambda: schedules.normal(5, SD.sigmas), TypeError, "levels must be .* got Tensor; pass"),
        (lambda: schedules.linear_quadratic(5, None), TypeError, "levels .* got NoneType"),
        (lambda: schedules.linear_quadratic(5, 0.0), ValueError, "levels must be positive and finite, got 0.0"),
        (lambda: schedules.linear_quadratic(5, SD, linear_steps=5), ValueError, "below n = 5"),
        (lambda: schedules.linear_quadratic(5, SD, linear_steps=0), ValueError, "linear_steps must"),
        (lambda: schedules.linear_quadratic(5, SD, 0), ValueError, "threshold_noise must"),
        (lambda: schedule("kerras", 5, SD), ValueError, "schedule 'kerras'; did you mean 'karras'?"),
        (lambda: schedule("zzzz", 5, SD), ValueError, "unknown schedule 'zzzz' \\(all names: simple, sgm_uniform"),
        (lambda: schedule("karras", 0, SD), ValueError, "steps must be at least 1"),
        (lambda: schedule("karras", 5, (1, 2)), TypeError, "levels must be .* got tuple"),
        (lambda: schedule("karras", 5, SD, ro=3), TypeError, "karras has no option 'ro'; did you mean 'rho'"),
        (lambda: schedule("normal", 5, SD, rho=3), TypeError, "normal has no option 'rho'; there are none"),
        (lambda: schedule("karras", 5, SD, denoise=0), ValueError, "got 0.0, which leaves nothing"),
        (lambda: schedule("karras", 5, SD, denoise=-1), ValueError, "nothing to do"),
        (lambda: schedule("karras", 5, SD, denoise=1.5), ValueError, "more than all of the noise"),
        (lambda: schedule("karras", 5, SD, denoise=NAN), ValueError, "denoise must be finite"),
        (lambda: schedule("karras", 5, SD, denoise="1"), TypeError, "denoise must be a number"),
        (lambda: schedule("karras", 5, SD, sampler=3), TypeError, "sampler must be a name .* int"),
    ],
)
def test_errors_name_the_argument_the_value_and_the_fix(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", ["karras", "ays", "simple"])
def test_a_schedule_without_levels_says_what_to_pass(name):
    with pytest.raises(TypeError, match=r"got NoneType; pass ki\.levels\.stable_diffusion.*edm.*flow.*karras\("):
        schedule(name, 20)


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("karras", {"rho": 1e-30}, "levels beyond all numbers"),
        ("vp", {"beta_d": 1e30}, "levels beyond all numbers"),
        ("karras", {"rho": 1e30}, "do not fall"),
        ("polyexponential", {"rho": 1e30}, "do not fall"),
        ("polyexponential", {"rho": 60.0}, "do not fall"),
        ("polyexponential", {"rho": 1e-30}, "do not fall"),
    ],
)
def test_options_that_leave_no_schedule(name: str, options: dict[str, float], what: str) -> None:
    with pytest.raises(ValueError, match=rf"the options of {name}, .*{what}.*; they are too extreme"):
        schedule(name, 6, levels.edm(), **options)


def test_bounds_that_laplace_repeats_are_kept() -> None:
    sigmas = schedule("laplace", 6, levels.edm(), mu=30.0)
    assert (sigmas.diff() == 0).any()
