"""Noise extraction: every stochastic sampler reproduces the image, and the noises have the laws that they should."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from problems import guided_mixture, mixture, noise_like, schedules
from torch import Tensor

import kinvert as ki
from kinvert.inversion.extract import Path, extract_noise
from kinvert.models import held_out, load
from kinvert.tensors import rms

SIGMAS = ki.schedules.karras(8, 0.1, 10)[:-1]
MIXTURE, GUIDED = mixture(), guided_mixture()
PATHS = get_args(Path)


def steerable(name: str) -> ki.Rule:
    """The sampler; SA-Solver draws in an interval of levels, unless told otherwise."""
    return ki.sampler(name, **({"sde_end": 0} if name.startswith("sa_solver") else {}))


PLANS = {name: ki.compile_plan(steerable(name), SIGMAS) for name in ki.SAMPLERS if name != "dpm_adaptive"}
# The noise of a step is in its last evaluation, which no later noise can make up for: there is nothing to solve.
THROUGH_THE_DENOISER = {"exp_heun_2_x0_sde", "shark", "rex_sde", "restart"}
STOCHASTIC = [name for name, plan in PLANS.items() if plan.is_stochastic and name not in THROUGH_THE_DENOISER]


def denoiser_for(plan: ki.Plan) -> ki.Denoiser:
    return GUIDED if plan.is_guided else MIXTURE


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 3) -> Tensor:
    return MIXTURE.sample(n, seeded(7))


def size(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


# -- exactness ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_every_stochastic_sampler_reproduces_the_image(name: str, path: Path) -> None:
    plan, x = PLANS[name], images()
    denoise = denoiser_for(plan)
    kept = x.clone()
    found = extract_noise(denoise, x, SIGMAS, sampler=plan.rule, path=path, generator=seeded())
    again = ki.sample(denoise, found.latent, SIGMAS, sampler=plan.rule, noise=ki.noise.replay(found.noises))
    assert size(again - x) <= 1e-12 * size(x)
    assert torch.equal(x, kept) and found.converged.all() and found.round_trip_error.max() <= 1e-12 * size(x)
    assert found.residuals.shape == (len(plan.steps), 3) and found.residuals.max() <= 1e-13 * plan.sigmas[0]
    assert len(found.noises) == plan.draws and found.sigmas == plan.sigmas
    assert all(n.shape == x.shape and n.dtype == x.dtype for n in found.noises)
    assert (found.evaluations - 2 * plan.evaluations).tolist() == [3, 1, 0]  # what tells rows that are mixed
    assert found.checking == plan.evaluations


@pytest.mark.parametrize("name", STOCHASTIC)
@given(sigmas=schedules(min_steps=1, zero=False))
@settings(max_examples=8, deadline=None)
def test_exact_on_any_schedule(name: str, sigmas: list[float]) -> None:
    rule = steerable(name)
    plan = ki.compile_plan(rule, sigmas)
    if not plan.steps[-1].noises:  # SA-Solver above `sde_start`
        assert name.startswith("sa_solver")
        return
    found = extract_noise(denoiser_for(plan), images(), sigmas, sampler=rule, generator=seeded())
    rounding = 64 * torch.finfo(torch.float64).eps * moved(found, denoiser_for(plan), rule)
    assert found.round_trip_error.max() <= max(1e-12 * max(size(images()), sigmas[-1]), rounding)


def moved(found: ki.Inversion, denoiser: Any, rule: ki.Rule, by: float = 1e-8) -> float:
    """How many times as far the end moves if latent, noises and outputs move by small parts of them; the most of three.

    Steps of very different lengths magnify what their evaluations round.
    """
    generator, ends = seeded(), []

    def nudge(value: Any) -> Any:
        if isinstance(value, ki.Guided):
            return ki.Guided(*map(nudge, value))
        return value * (1 + by * torch.randn(value.shape, generator=generator, dtype=value.dtype))

    def nudged(x: Tensor, sigma: Tensor) -> Any:
        return nudge(denoiser(x, sigma))

    for _ in range(3):
        noise = ki.noise.replay([nudge(one) for one in found.noises])
        ends.append(ki.sample(nudged, nudge(found.latent), found.sigmas, sampler=rule, noise=noise))
    return float((torch.stack(ends) - images()).abs().max()) / by


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_guided_network(name: str) -> None:
    """The digits model with labels and guidance 3; replayed with another label it gives another image."""
    model = load("digits", dtype=torch.float64)
    x, labels = (t[::14] for t in held_out("digits"))
    rule = steerable(name)
    shared: dict[str, Any] = dict(cfg=3.0, negative={}, sampler=rule)
    x = x.double()
    found = extract_noise(model, x, SIGMAS, generator=seeded(), positive={"label": labels}, **shared)
    assert found.converged.all() and found.round_trip_error.max() <= 1e-12 * size(x)
    noise = ki.noise.replay(found.noises)
    edited = ki.sample(model, found.latent, SIGMAS, noise=noise, positive={"label": (labels + 1) % 10}, **shared)
    assert size(edited - x) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_other_dtypes(name: str, path: Path, dtype: torch.dtype) -> None:
    """Rounding errors hardly add up: every step starts from the rounded state, so that the last one is left.

    In float32 a run adds in another order than `advance`, by which the noises are found, so its states are off by a
    rounding error or two, which the sampler may amplify.
    """
    plan, x = PLANS[name], images(8).to(dtype)
    allowed = (100 if dtype == torch.float32 else 20) * torch.finfo(dtype).eps * size(x)
    found = extract_noise(denoiser_for(plan), x, SIGMAS, sampler=plan.rule, path=path, generator=seeded())
    assert found.latent.dtype == dtype and all(n.dtype == dtype for n in found.noises)
    assert found.converged.all() and found.round_trip_error.max() <= allowed


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_sde", "dpmpp_3m_sde", "sa_solver"])
def test_samples_of_a_batch_are_reproduced_alone(name: str) -> None:
    plan, x = PLANS[name], images()
    found = extract_noise(MIXTURE, x, SIGMAS, sampler=plan.rule, generator=seeded())
    alone = ki.run(plan, MIXTURE, found.latent[1:2], ki.noise.replay([n[1:2] for n in found.noises]))
    torch.testing.assert_close(alone, x[1:2], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "seeds_2", "sa_solver_pece"])
def test_long_runs(name: str) -> None:
    """A hundred steps, from 80, still end at the image."""
    sigmas = ki.schedules.karras(100, 0.01, 80)[:-1]
    for path in PATHS:
        found = extract_noise(MIXTURE, images(), sigmas, sampler=steerable(name), path=path, generator=seeded())
        assert found.round_trip_error.max() <= 1e-12


def test_steps_without_noise_in_between_run_on_their_own() -> None:
    """SA-Solver draws below `sde_start` only: above, the run follows its own course, and is steered afterwards."""
    rule = ki.sampler("sa_solver", sde_end=0)
    plan = ki.compile_plan(rule, SIGMAS)
    quiet = [step.index for step in plan.steps if not step.noises]
    assert quiet == [0]
    found = extract_noise(MIXTURE, images(), SIGMAS, sampler=rule, generator=seeded())
    assert found.residuals[0].abs().max() == 0 and found.residuals[1].max() > 0 and found.converged.all()


def test_one_step_and_one_pixel() -> None:
    denoise = ki.denoisers.Gaussian(0.0, 1.0)
    x = noise_like((4,))
    found = extract_noise(denoise, x, [5.0, 1.0], generator=seeded())
    assert len(found.noises) == 1 and found.round_trip_error.max() < 1e-15


# -- laws --------------------------------------------------------------------------------------------------------------
GAUSSIAN = ki.denoisers.Gaussian(0.2, 0.5)
LEVELS = ki.schedules.karras(13, 0.1, 10)[:-1]
COUNT = 40_000


def gaussian_noises(path: Path, name: str = "euler_ancestral", sigmas: Tensor = LEVELS) -> tuple[ki.Plan, Tensor]:
    """Noises extracted from data that has exactly the law of the state at the last level, (draws, COUNT)."""
    x = 0.2 + math.hypot(0.5, float(sigmas[-1])) * noise_like((COUNT, 1), 5)
    found = extract_noise(GAUSSIAN, x, sigmas, sampler=name, path=path, generator=seeded())
    return ki.compile_plan(name, sigmas), torch.stack(found.noises)[:, :, 0]


def exact_covariances(path: Path, sigmas: Tensor = LEVELS) -> tuple[list[float], list[float]]:
    """Variances of the noises of `euler_ancestral` on N(m, s^2), and covariances of successive ones.

    `n_i = (x_{i+1} - k_i x_i) / c_i` around the mean, with `k = q^2 + (1 - q^2) s^2 / (s^2 + sigma^2)`,
    `q = sigma_next / sigma` and `c = sigma_next sqrt(1 - q^2)`.
    """
    levels = sigmas.tolist()
    k = [(b / a) ** 2 + (1 - (b / a) ** 2) * 0.25 / (0.25 + a**2) for a, b in pairwise(levels)]
    c = [b * math.sqrt(1 - (b / a) ** 2) for a, b in pairwise(levels)]

    def cov(i: int, j: int) -> float:
        common = levels[max(i, j)] if path == "chain" or i == j else levels[-1]
        return 0.25 + common**2

    def noise_cov(i: int, j: int) -> float:
        total = cov(i + 1, j + 1) - k[j] * cov(i + 1, j) - k[i] * cov(i, j + 1) + k[i] * k[j] * cov(i, j)
        return total / (c[i] * c[j])

    return [noise_cov(i, i) for i in range(len(c))], [noise_cov(i, i + 1) for i in range(len(c) - 1)]


@pytest.mark.parametrize("path", PATHS)
def test_covariances_of_the_noises_are_exact_on_gaussian_data(path: Path) -> None:
    _, noises = gaussian_noises(path)
    variances, successive = exact_covariances(path)
    bound = 5 / math.sqrt(COUNT)
    assert noises.mean(1).abs().max() < 2 * bound * max(variances) ** 0.5
    for i, variance in enumerate(variances):
        assert float(noises[i].var()) == pytest.approx(variance, rel=2 * bound)
    for i, covariance in enumerate(successive):
        scale = math.sqrt(variances[i] * variances[i + 1])
        assert float((noises[i] * noises[i + 1]).mean()) == pytest.approx(covariance, abs=2 * bound * scale)


def test_chain_noises_are_nearly_those_of_a_run_and_independent_ones_are_not() -> None:
    """Chain: variance near 1, uncorrelated. Independent: larger, and successive ones negatively correlated."""
    (_, chain), (_, independent) = gaussian_noises("chain"), gaussian_noises("independent")
    correlation = torch.corrcoef(chain) - torch.eye(len(chain))
    assert correlation.abs().max() < 5 / math.sqrt(COUNT)
    assert (torch.corrcoef(independent).diagonal(1) < -0.1).all()
    assert (independent[:-1].var(1) > 1.3 * chain[:-1].var(1)).all()


@pytest.mark.parametrize("path", PATHS)
def test_the_state_above_is_the_image_and_the_noise_of_the_source(path: Path) -> None:
    """`x + sqrt(sigma_0^2 - sigma_1^2) n` with its first draw, for one step."""
    x = images()
    found = extract_noise(MIXTURE, x, [2.0, 0.5], path=path, noise=ki.noise.white(3))
    torch.testing.assert_close(found.latent, x + math.sqrt(3.75) * ki.noise.white(3).bind(x)(2.0, 0.5))


def test_chain_variances_tend_to_one_and_independent_ones_grow_with_the_number_of_steps() -> None:
    excess, largest, first = [], [], []
    for steps in (10, 40, 160):
        sigmas = ki.schedules.karras(steps, 0.1, 10)[:-1]
        variances, covariances = exact_covariances("chain", sigmas)
        assert max(map(abs, covariances)) < 1e-11 and min(variances) > 1  # the innovations of a Markov chain
        excess.append(max(variances) - 1)
        variances, covariances = exact_covariances("independent", sigmas)
        largest.append(max(variances))
        first.append(covariances[0] / math.sqrt(variances[0] * variances[1]))
    assert excess[1] < excess[0] / 3 and excess[2] < excess[1] / 3
    assert largest[0] > 4 and largest[1] > 2.5 * largest[0] and largest[2] > 2.5 * largest[1]
    assert first[0] < -0.3 and first[-1] == pytest.approx(-0.5, abs=1e-2)


@pytest.mark.parametrize("name", ["dpmpp_sde", "seeds_2", "seeds_3", "dpmpp_2m_sde", "euler_ancestral"])
def test_chain_noises_of_fine_runs_have_unit_variance(name: str) -> None:
    """Noises of intermediate stages included, with the correlation that they have in a run."""
    plan, noises = gaussian_noises("chain", name, ki.schedules.karras(40, 1.0, 10)[:-1])
    assert ((noises.var(1) - 1).abs() < 0.1).all()
    covariance = torch.cov(noises)
    for step in plan.steps:
        assert step.noises == plan.steps[step.index].noises
        block = covariance[step.index * len(step.noises) :][: len(step.noises), step.index * len(step.noises) :]
        off = block[:, : len(step.noises)] - torch.eye(len(step.noises))
        if name == "dpmpp_sde":  # Brownian increments of nested intervals
            (a, m), (_, b) = step.noises
            assert float(off[0, 1]) == pytest.approx(math.sqrt((a - m) / (a - b)), abs=0.1)
        else:
            assert off.abs().max() < 0.1


@pytest.mark.parametrize("path", PATHS)
def test_latent_has_the_marginal_of_the_first_level(path: Path) -> None:
    x = 0.2 + math.hypot(0.5, 0.1) * noise_like((COUNT, 1), 5)
    latent = extract_noise(GAUSSIAN, x, LEVELS, path=path, generator=seeded()).latent
    assert float(latent.var()) == pytest.approx(0.25 + 100, rel=10 / math.sqrt(COUNT))


# -- flow time ---------------------------------------------------------------------------------------------------------
def flow_denoiser(x: Tensor, t: Tensor) -> Tensor:
    """N(0.2, 0.5^2) for `x_t = (1 - t) x0 + t eps`: E[x0 | x_t] is linear in x_t, also at t = 1."""
    t = t.reshape(-1, 1)
    return 0.2 + 0.25 * (1 - t) / (0.25 * (1 - t) ** 2 + t**2) * (x - 0.2 * (1 - t))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "rule",
    [
        ki.sampler("euler_ancestral", flow=True),
        ki.sampler("lcm", flow=True),
        ki.rules.Flow(ki.sampler("euler_ancestral")),
        ki.rules.Flow(ki.sampler("dpmpp_2m_sde")),
        ki.rules.Flow(ki.sampler("seeds_3")),
    ],
    ids=repr,
)
def test_flow_time(rule: ki.Rule, path: Path) -> None:
    """From t = 1 down: exact, the states have flow marginals, and the noises of a chain the variance of a run."""
    times = torch.linspace(1, 0.1, 30, dtype=torch.float64)
    x = 0.2 * 0.9 + math.hypot(0.5 * 0.9, 0.1) * noise_like((4000, 1), 5)
    found = extract_noise(flow_denoiser, x, times, sampler=rule, path=path, generator=seeded())
    assert found.round_trip_error.max() < 1e-13
    assert float(found.latent.var()) == pytest.approx(1, rel=0.1)
    if path == "chain" and rule.name != "lcm":
        variances = torch.stack(found.noises).var(dim=(1, 2))
        assert float((variances[len(variances) // 3 : 2 * len(variances) // 3]).mean()) == pytest.approx(1.1, abs=0.15)


# -- reports -----------------------------------------------------------------------------------------------------------
def test_generator_decides_and_global_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    first, second = (extract_noise(MIXTURE, images(), SIGMAS, generator=seeded(3)) for _ in range(2))
    other = extract_noise(MIXTURE, images(), SIGMAS, generator=seeded(4))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.latent, second.latent) and not torch.equal(first.latent, other.latent)
    torch.manual_seed(1)
    one = extract_noise(MIXTURE, images(), SIGMAS).latent
    torch.manual_seed(1)
    assert torch.equal(one, extract_noise(MIXTURE, images(), SIGMAS).latent)


def test_callback_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []
    extract_noise(
        MIXTURE, images(), SIGMAS, sampler="dpmpp_sde", callback=seen.append, progress=True, generator=seeded()
    )
    assert [(p.index, p.evaluations) for p in seen] == [(i, 2 * i + 2) for i in range(7)]
    assert [p.sigma_next for p in seen] == SIGMAS[1:].tolist()
    assert "7/7" in capsys.readouterr().err


def test_report() -> None:
    found = extract_noise(MIXTURE, images(), SIGMAS, path="chain", generator=seeded())
    assert found.warnings == () and "7 maps" in str(found) and "3 of 3" in str(found)


def test_tolerance() -> None:
    x = images()
    cases = (
        (x, None, 1e-10, rms(x)),
        (x.float(), None, 1e-4, rms(x)),
        (0 * x, None, 1e-10, 0.1),
        (x, 1e-3, 1e-3, rms(x)),
    )
    for image, tol, relative, unit in cases:
        found = extract_noise(MIXTURE, image, SIGMAS, tol=tol)
        assert found.tolerance == relative
        torch.testing.assert_close(
            found.allowed.double(), relative * torch.as_tensor(unit).expand(3).double(), rtol=1e-6, atol=0
        )


def test_a_denoiser_that_is_not_a_function_is_found_out() -> None:
    calls = iter(range(1000))

    def forgetful(x: Tensor, sigma: Tensor) -> Tensor:
        out = MIXTURE(x, sigma)
        out[1] += 1e-3 * next(calls)
        return out

    with pytest.warns(RuntimeWarning, match="does not return the same for the same input"):
        found = extract_noise(forgetful, images(), SIGMAS, generator=seeded())
    assert found.converged.tolist() == [True, False, True]
    assert "samples 1 are not reproduced" in found.warnings[0] and "samples 1" in str(found)


def test_noises_far_from_what_a_run_draws_are_named() -> None:
    far = extract_noise(MIXTURE, images() + 50, SIGMAS, generator=seeded())
    assert far.converged.all()
    (warning,) = far.warnings
    assert warning.startswith("noise map 5 (sigma 0.520989 -> 0.239604) has rms 5")


# -- errors ------------------------------------------------------------------------------------------------------------
ZERO = ki.schedules.karras(8, 0.1, 10)


@pytest.mark.parametrize("name", [name for name in STOCHASTIC if not name.startswith("sa_solver")])
def test_schedule_to_zero_names_the_fix(name: str) -> None:
    with pytest.raises(ValueError, match=r"from sigma 0.1 to 0, draws no noise.*use sigmas\[:-1\]"):
        extract_noise(denoiser_for(PLANS[name]), images(), ZERO, sampler=name)


@pytest.mark.parametrize("name", [name for name, plan in PLANS.items() if not plan.is_stochastic])
def test_deterministic_samplers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} draws no noise on this schedule.*use invert .* or unsample"):
        extract_noise(MIXTURE, images(), SIGMAS, sampler=name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=[1.0]), TypeError, "x must be a tensor"),
        (dict(x=torch.ones(2, 6, dtype=torch.int64)), TypeError, "x must be a floating point tensor"),
        (dict(x=torch.full((2, 6), torch.nan)), ValueError, "x has 12 NaN or infinite values"),
        (dict(sigmas=SIGMAS.flip(0)), ValueError, r"sigmas must be the decreasing.*sigmas.flip\(0\)"),
        (dict(sigmas=[1.0, 1.0]), ValueError, "strictly monotone"),
        (dict(sigmas=[1.0]), ValueError, "at least two noise levels"),
        (dict(sigmas=[1.0, 0.0]), ValueError, "draws no noise on this schedule.*ends above 0"),
        (dict(sampler="eular"), ValueError, "did you mean 'euler'"),
        (dict(sampler="dpm_adaptive"), ValueError, "has no Plan"),
        (
            dict(sampler=ki.sampler("sa_solver", keep_last=False)),
            ValueError,
            "last step.*set its options.*sde_end, keep_last",
        ),
        (dict(sampler="sa_solver"), ValueError, r"stop at sigma 1.04.*sigmas\[:-3\]"),
        (
            dict(sampler="exp_heun_2_x0_sde"),
            ValueError,
            "passes its noise through the denoiser, .*for it; take a sampler",
        ),
        (dict(sampler=ki.sampler("heun", s_churn=2)), ValueError, "passes its noise through.*s_churn=0.*invert"),
        (dict(path="forward"), ValueError, "unknown path 'forward'; it must be one of independent, chain"),
        (dict(generator=0), TypeError, "generator must be a torch.Generator or None, got int"),
        (dict(tol="1e-3"), TypeError, "tol must be a float"),
        (dict(tol=0.0), ValueError, "tol must be a positive number"),
        (dict(tol=math.nan), ValueError, "tol must be a positive number"),
        (dict(cfg=2.0), ValueError, "negative= is missing"),
        (dict(positive=[1]), TypeError, "positive must be a mapping"),
        (dict(denoiser=3), TypeError, "denoiser must be callable"),
        (dict(denoiser=lambda x, sigma: x[:, :1]), ValueError, "must return the shape of its input"),
        (dict(denoiser=lambda x, sigma: x * math.nan), ValueError, "denoiser returned NaN or infinity at sigma 10"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = dict(denoiser=MIXTURE, x=images(), sigmas=SIGMAS) | change
    with pytest.raises(error, match=message):
        extract_noise(**arguments)


def test_errors_come_before_the_first_evaluation() -> None:
    def forbidden(x: Tensor, sigma: Tensor) -> Tensor:
        raise AssertionError("called")

    for change in (dict(sigmas=ZERO), dict(sampler="heun"), dict(path="no"), dict(tol=-1)):
        arguments: dict[str, Any] = dict(denoiser=forbidden, x=images(), sigmas=SIGMAS) | change
        with pytest.raises(ValueError):
            extract_noise(**arguments)


def test_the_fixes_in_the_messages_work() -> None:
    rule = ki.sampler("sa_solver")
    assert extract_noise(MIXTURE, images(), SIGMAS[:-3], sampler=rule).converged.all()
    assert extract_noise(MIXTURE, images(), ZERO[:-1]).converged.all()
    assert extract_noise(MIXTURE, images(), SIGMAS, sampler=replace(rule, sde_end=0.0)).converged.all()
