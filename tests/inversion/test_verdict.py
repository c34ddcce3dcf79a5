"""What an inversion is judged by: the law of scale, half precision, budgets, mixed batches, the processed region."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import guided_mixture, mixture, noise_like
from torch import Tensor

import kinvert as ki
from kinvert.bench.problems import make_problem
from kinvert.inversion import METHODS, baselines
from kinvert.inversion.result import Inversion
from kinvert.tensors import rms

pytestmark = pytest.mark.filterwarnings("ignore:(invert|.* magnifies rounding|tol=):RuntimeWarning")
MIXTURE = mixture()
SIGMAS = torch.tensor([10.0, 5.0, 2.5, 1.1, 0.4, 0.1], dtype=torch.float64)
# Rules that are functions of absolute noise levels: in the time of a VP or flow model (edict and bdia as published,
# rf_solver and fireflow; ddim_inverse upwards), or by options that are levels or of their size.
ABSOLUTE = {"deis", "edict", "bdia", "er_sde", "rf_solver", "fireflow", "sa_solver", "sa_solver_pece", "ddim_inverse", "restart"}  # fmt: skip
REFUSED = {"exp_heun_2_x0_sde", "shark"}  # by extract_noise: its noise is in its last evaluation
# DDIM at the noisier level is a VP rule, and these start from it; EasyInv, RF-Solver, FireFlow and Uni-Inv know it or
# flow time. GNRI adds a distance to a log-density.
ABSOLUTE_BASELINES = {
    "ddim_noisy", "easyinv", "rf_solver", "fireflow", "aidi", "aidi_anderson", "renoise", "dpm_solver_1",
    "dpm_solver_2", "direct_inversion", "null_text", "uni_inv", "forward_first", "gnri",
}  # fmt: skip
SCALES = [(torch.float64, 2.0**-20), (torch.float32, 2.0**20)]


def images(count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return (0.8 * noise_like((count, 6), seed=5)).to(dtype)


def scaled(denoiser: Any, c: float) -> Callable[..., Any]:
    """The same denoiser where data and levels are c times as large."""

    def denoise(x: Tensor, sigma: Tensor, **given: Any) -> Any:
        out = denoiser(x / c, sigma / c, **given)
        return ki.Guided(c * out.denoised, c * out.uncond) if isinstance(out, ki.Guided) else c * out

    return denoise


def assert_scaled(one: Inversion, other: Inversion, c: float) -> None:
    """Every field, verdicts and counts included, to the last bit."""
    for name in ("latent", "restored", "round_trip_error", "residuals", "allowed"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None and b is None) or torch.equal(c * a, b), name
    for name in ("converged", "evaluations"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.tolerance == other.tolerance and one.amplification == other.amplification
    if one.contraction is not None:
        torch.testing.assert_close(one.contraction, other.contraction, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "c"), SCALES)
@pytest.mark.parametrize("name", sorted({*ki.SAMPLERS} - ABSOLUTE - REFUSED - {"dpm_adaptive"}))
def test_every_sampler_obeys_the_law_of_scale(name: str, dtype: torch.dtype, c: float) -> None:
    """Powers of two change no digit: any constant with a unit shows."""
    plan, x = ki.compile_plan(name, SIGMAS), images(dtype=dtype)
    denoiser = guided_mixture() if plan.is_guided else MIXTURE
    verb: Any = ki.invert
    given: list[dict[str, Any]] = [{"sampler": name}] * 2
    if plan.is_stochastic and plan.auxiliary:
        given = [one | {"noise": ki.noise.white(3)} for one in given]
    elif plan.is_stochastic:
        verb = ki.extract_noise
        given = [{"sampler": name, "generator": torch.Generator().manual_seed(0)} for _ in range(2)]
    if plan.is_stochastic and name.startswith("dpmpp_2s_ancestral_cfg_pp"):
        given = [one | {"path": "chain"} for one in given]
    assert_scaled(verb(denoiser, x, SIGMAS, **given[0]), verb(scaled(denoiser, c), c * x, c * SIGMAS, **given[1]), c)
    for run in (ki.sample, ki.unsample):
        if plan.is_stochastic and run is ki.unsample:
            continue
        noise: dict[str, Any] = {"noise": ki.noise.white(3)} if plan.is_stochastic else {}
        noise |= {"sigma_offset": 0.0} if run is ki.unsample else {}
        one = run(denoiser, x, SIGMAS, sampler=name, **noise)
        assert torch.equal(c * one, run(scaled(denoiser, c), c * x, c * SIGMAS, sampler=name, **noise))


@pytest.mark.parametrize(("dtype", "c"), SCALES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_obeys_the_law_of_scale(method: str, dtype: torch.dtype, c: float) -> None:
    if method == "continuation":  # which follows a curve: in float32 another last digit somewhere is another way
        dtype = torch.float64
    for given in ({}, {"max_evals": 60}, {"mask": torch.tensor([1.0, 1, 1, 1, 0, 0])}):
        one = ki.invert(MIXTURE, images(dtype=dtype), SIGMAS, method=method, **given)
        other = ki.invert(scaled(MIXTURE, c), c * images(dtype=dtype), c * SIGMAS, method=method, **given)
        assert_scaled(one, other, c)


@pytest.mark.parametrize(("dtype", "c"), SCALES)
@pytest.mark.parametrize("name", sorted({*baselines.BASELINES} - ABSOLUTE_BASELINES))
def test_baselines_obey_the_law_of_scale(name: str, dtype: torch.dtype, c: float) -> None:
    x, given = images(dtype=dtype), {"noise": noise_like((2, 6)).to(dtype)} if name == "rf_inversion" else {}
    find: Any = baselines.BASELINES[name]
    assert_scaled(find(MIXTURE, x, SIGMAS, **given), find(scaled(MIXTURE, c), c * x, c * SIGMAS, **given), c)


@pytest.mark.parametrize(("dtype", "c"), SCALES)
def test_images_of_zeros_and_steps_to_zero_have_a_scale(dtype: torch.dtype, c: float) -> None:
    for x, sigmas in ((0 * images(dtype=dtype), SIGMAS), (0 * images(dtype=dtype), [1.0, 0.5, 0.0])):
        levels = torch.as_tensor(sigmas, dtype=torch.float64)
        found = [
            ki.invert(denoiser, x, unit * levels, last_step="least_change")
            for denoiser, unit in ((MIXTURE, 1.0), (scaled(MIXTURE, c), c))
        ]
        assert (found[0].allowed > 0).all()
        assert_scaled(found[0], found[1], c)


@pytest.mark.parametrize("c", [1e-6, 1e-4, 0.02879934012889862, 255.0, 5e3, 1e6])
def test_any_unit_has_the_same_verdicts(c: float) -> None:
    """To rounding, with its own means and stds, and dpm_adaptive with its absolute tolerance in the same unit.

    In three of these units (which, depends on the version of torch) the sweeps of dpmpp_2m end in rounding that is 1.3
    times what is allowed, and another search ends below it.
    """
    for dtype, sampler in ((torch.float32, "euler"), (torch.float32, "dpmpp_2m"), (torch.float64, "heun")):
        x = images(dtype=dtype)
        one = ki.invert(MIXTURE, x, SIGMAS, sampler=sampler)
        other = ki.invert(scaled(MIXTURE, c), c * x, c * SIGMAS, sampler=sampler)
        assert one.converged.all() and other.converged.all()
        assert float((other.round_trip_error / other.allowed).max()) <= 1
        torch.testing.assert_close(other.latent / c, one.latent, rtol=1e-3, atol=1e-3)
    adaptive = [ki.sampler("dpm_adaptive", atol=0.0078 * unit) for unit in (1.0, c)]
    start = 10 * images()
    end = ki.sample(MIXTURE, start, SIGMAS, sampler=adaptive[0])
    torch.testing.assert_close(
        ki.sample(scaled(MIXTURE, c), c * start, c * SIGMAS, sampler=adaptive[1]) / c, end, rtol=1e-8, atol=1e-8
    )


def test_the_report_has_both_tolerances() -> None:
    found = ki.invert(MIXTURE, images(), SIGMAS, tol=1e-8)
    torch.testing.assert_close(found.allowed, 1e-8 * rms(images()), rtol=1e-12, atol=0)
    assert f"tolerance 1e-08 of its size, an rms error of {found.allowed.min():.3g}" in str(found)
    parts = ki.invert(MIXTURE, images(), SIGMAS, tol=1e-8, max_batch=1)
    assert torch.equal(parts.allowed, found.allowed)


# -- half precision ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "o_belm"])
@pytest.mark.parametrize("returns", ["x's dtype", "float32"])
def test_half_precision_is_no_worse_than_unsample(sampler: str, dtype: torch.dtype, returns: str) -> None:
    """Where the denoiser is called with x's own dtype, whatever it returns."""

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        assert x.dtype == dtype
        out = MIXTURE(x.double(), sigma.double()).float()
        return out if returns == "float32" else out.to(dtype)

    x = images(4, dtype)
    found = ki.invert(denoiser, x, SIGMAS, sampler=sampler)
    assert found.latent.dtype == dtype and found.round_trip_error.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    assert found.tolerance == 8 * eps
    if sampler == "o_belm":
        return
    up = ki.unsample(denoiser, x, SIGMAS, sampler=sampler, sigma_offset=0.0)
    plain = rms(ki.sample(denoiser, up, SIGMAS, sampler=sampler).float() - x.float())
    assert (found.round_trip_error <= plain).all()
    again = ki.sample(denoiser, found.latent, SIGMAS, sampler=sampler)
    assert torch.equal(rms(again.float() - x.float()), found.round_trip_error)
    assert float(found.evaluations.double().median()) <= 60 * ki.compile_plan(sampler, SIGMAS).evaluations


def test_a_tolerance_below_rounding_is_said_to_be_one() -> None:
    def half(x: Tensor, sigma: Tensor) -> Tensor:
        return MIXTURE(x.double(), sigma.double()).to(x.dtype)

    with pytest.warns(RuntimeWarning, match=r"tol=1e-05 is below the rounding of torch.bfloat16, 0.0078.*x.float\(\)"):
        found = ki.invert(half, images(dtype=torch.bfloat16), SIGMAS, tol=1e-5)
    assert not found.converged.any() and "below the rounding" in found.warnings[0]
    with pytest.warns(RuntimeWarning, match=r"below the rounding of torch.float32.*x.double\(\)"):
        ki.invert(MIXTURE, images(dtype=torch.float32), SIGMAS, tol=1e-9)


# -- budgets -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", pytest.param("uni_pc", marks=pytest.mark.slow)])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("problem", ["mixture", pytest.param("digits", marks=pytest.mark.slow)])
def test_more_evaluations_are_never_worse(problem: str, cfg: float, sampler: str) -> None:
    """Per sample; and no latent is worse than that of plain unsampling, nor costs more than was allowed."""
    one = make_problem(problem, 3, 0, torch.float64)
    sigmas = ki.schedules.karras(7, 0.03, 15.0)[:-1]
    given: dict[str, Any] = {"sampler": sampler, "cfg": cfg, "positive": one.positive}
    given |= {"negative": one.negative} if cfg != 1 else {}
    up = ki.unsample(one.denoiser, one.images, sigmas, sigma_offset=0.0, **given)
    before = rms(ki.sample(one.denoiser, up, sigmas, **given) - one.images)
    runs = ki.compile_plan(sampler, sigmas).evaluations
    errors = []
    for most in (*range(3, 14), 24, 200):
        found = ki.invert(one.denoiser, one.images, sigmas, max_evals=most * runs, **given)
        assert int(found.evaluations.max()) <= most * runs
        assert (found.round_trip_error <= (before * (1 + 1e-6)).maximum(found.allowed)).all(), most
        before = found.round_trip_error
        errors.append(float(before.sum()))
    assert errors[-1] < errors[0]


def test_what_no_solver_inverts_is_no_worse_than_unsampling() -> None:
    """Without a limit too."""
    close = ki.denoisers.GaussianMixture(
        torch.tensor([[2.0, 0.0], [-2.0, 0.0]], dtype=torch.float64), torch.tensor([0.2, 0.2], dtype=torch.float64)
    )
    x, sigmas = torch.tensor([[0.05, 0.2]], dtype=torch.float64), [4.0, 1.0, 0.5]
    plain = rms(ki.sample(close, ki.unsample(close, x, sigmas, sigma_offset=0.0), sigmas) - x)
    for iterations in (1, 2, 3):
        found = ki.invert(close, x, sigmas, method=ki.inversion.Anderson(window=0, max_iterations=iterations))
        assert not found.converged.any()
        assert (found.round_trip_error <= plain).all()


# -- the denoiser --------------------------------------------------------------------------------------------------------
def mixing(x: Tensor, sigma: Tensor) -> Tensor:
    return MIXTURE(x, sigma) + 0.3 * x.mean(0, keepdim=True) / (1 + sigma[:, None])


class Normalised(torch.nn.Module):
    """With batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(6, dtype=torch.float64)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        skip = 1 / (1 + sigma[:, None] ** 2)
        return skip * x + sigma[:, None] * skip.sqrt() * torch.tanh(self.norm(x * skip.sqrt()))


@pytest.mark.parametrize("max_batch", [None, 1])
def test_a_denoiser_that_mixes_its_batch_is_found_out(max_batch: int | None) -> None:
    message = r"the denoiser mixes the samples of its batch.*model.eval\(\).*max_batch=1"
    network = Normalised()
    for denoiser in (mixing, network):
        with pytest.raises(ValueError, match=message):
            ki.invert(denoiser, images(3), SIGMAS, max_batch=max_batch)
    with pytest.raises(ValueError, match=message):
        ki.extract_noise(mixing, images(3), SIGMAS)
    assert ki.invert(network.eval(), images(3), SIGMAS, max_batch=max_batch).converged.all()
    assert ki.invert(mixing, images(1), SIGMAS).converged.all()  # alone it is as good as any


def test_precision_that_depends_on_the_batch_is_not_mixing() -> None:
    def coarse(x: Tensor, sigma: Tensor) -> Tensor:
        return MIXTURE(x, sigma) * (1 + 0.01 * len(x))

    ki.invert(coarse, images(2), SIGMAS, tol=0.1)


def test_dropout_has_a_message_of_its_own() -> None:
    generator = torch.Generator().manual_seed(0)

    def dropout(x: Tensor, sigma: Tensor) -> Tensor:
        kept = torch.rand(x.shape, generator=generator, dtype=x.dtype) > 0.5
        return MIXTURE(x, sigma) * kept

    with pytest.warns(RuntimeWarning, match="does not return the same for the same input.*dropout"):
        found = ki.invert(dropout, images(2), SIGMAS, max_evals=100)
    assert not found.converged.any()


def test_a_masked_image_is_judged_where_it_is_processed() -> None:
    """One value of six: the rms over all of them would be smaller by the root of 6."""
    mask = torch.zeros(6, dtype=torch.float64)
    mask[2] = 1
    for sampler in ("euler", "dpmpp_2m", "o_belm"):
        found = ki.invert(MIXTURE, images(), SIGMAS, sampler=sampler, mask=mask, tol=1e-7)
        assert found.converged.all() and found.restored is not None
        off = (found.restored - images())[:, 2].abs()
        torch.testing.assert_close(found.round_trip_error, off, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(found.allowed, 1e-7 * images()[:, 2].abs().clamp(min=0.1), rtol=1e-9, atol=0)
    assert found.allowed.shape == (2,)


def test_no_memory_for_two_rows_is_no_reason_to_fail() -> None:
    """`max_batch=1` is for networks that fill the memory with one sample."""

    def large(x: Tensor, sigma: Tensor) -> Tensor:
        if len(x) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return MIXTURE(x, sigma)

    found = ki.invert(large, images(3), SIGMAS, max_batch=1)
    assert found.converged.all() and found.row_checks is not None and not found.row_checks.any()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        ki.invert(large, images(3), SIGMAS)
