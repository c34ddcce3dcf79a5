"""Training noise levels: exact maps, round trips, dtypes, devices, errors.

The recorded tables and maps of the hosts are compared in test_recorded_schedules.py.
"""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kinvert as ki
from kinvert import levels
from kinvert.levels import DiscreteLevels, EDMLevels, FlowLevels, Levels

SD = levels.stable_diffusion()
ZERO_SNR = levels.stable_diffusion(zero_snr=True)
ALL = {
    "sd": SD,
    "zero_snr": ZERO_SNR,
    "edm": levels.edm(),
    "v": levels.v_diffusion(),
    "table": levels.from_table([12.0, 5.0, 0.8, 0.1, 0.0], [990.5, 600.25, 210.0, 3.0]),
    "flow": levels.flow(),
    "flow_shift": levels.flow(shift=3),
    "flux": levels.flux(),
}
DISCRETE = {name: ALL[name] for name in ("sd", "zero_snr")}
F64 = torch.float64


def f64(*values):
    return torch.tensor(values, dtype=F64)


# --- Tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_tables(name):
    table = ALL[name]
    assert isinstance(table, Levels)
    assert table.sigmas.dtype == F64
    assert (table.sigmas.diff() > 0).all()
    assert table.sigma_min == table.sigmas[0].item()
    assert table.sigma_max == table.sigmas[-1].item()


def test_stable_diffusion_by_hand():
    variance, abar = [], 1.0
    for j in range(1000):
        root = 0.00085**0.5 + j / 999 * (0.012**0.5 - 0.00085**0.5)
        abar *= 1 - root**2
        variance.append((1 - abar) / abar)
    torch.testing.assert_close(SD.sigmas, f64(*variance).sqrt(), rtol=1e-12, atol=0)
    assert SD.kind == "discrete"


def test_zero_terminal_snr():
    """sqrt(abar) is affine in the original one, keeps its first value and ends at (almost) 0."""
    before, after = ((1 + t.sigmas**2).rsqrt() for t in (SD, ZERO_SNR))
    slope = after[0] / (before[0] - before[-1])
    torch.testing.assert_close(after[:-1], ((before - before[-1]) * slope)[:-1], rtol=1e-12, atol=0)
    assert ZERO_SNR.sigma_min == pytest.approx(SD.sigma_min, rel=1e-12)
    assert ZERO_SNR.sigma_max == pytest.approx((1 / 4.8973451890853435e-08 - 1) ** 0.5, rel=1e-14)


def test_from_betas_and_from_alphas_cumprod_agree():
    betas = np.linspace(0.01, 0.3, 7)
    abar = np.cumprod(1 - betas)
    expected = torch.from_numpy(np.sqrt(1 / abar - 1))
    for table in (
        levels.from_betas(betas),
        levels.from_betas(betas.tolist()),
        levels.from_betas(torch.from_numpy(betas)),
        levels.from_alphas_cumprod(abar),
        levels.from_alphas_cumprod(torch.from_numpy(abar).requires_grad_()),
    ):
        torch.testing.assert_close(table.sigmas, expected, rtol=1e-14, atol=0)
    halves = levels.from_alphas_cumprod(torch.tensor([0.5, 0.2], dtype=torch.float32))
    torch.testing.assert_close(halves.sigmas, f64(1, 2), rtol=1e-7, atol=0)


def test_arguments_are_not_modified():
    abar = np.array([0.9, 0.5, 0.1])
    levels.from_alphas_cumprod(abar, zero_snr=True)
    assert abar.tolist() == [0.9, 0.5, 0.1]


def test_zero_snr_accepts_a_table_that_ends_at_zero():
    rescaled = levels.from_alphas_cumprod([0.9, 0.5, 0.0], zero_snr=True)
    assert rescaled.sigmas[:2].tolist() == pytest.approx([(1 / 9) ** 0.5, 1])
    assert rescaled.sigma_max == ZERO_SNR.sigma_max
    assert levels.from_betas([0.1, 0.5, 1.0], zero_snr=True).sigma_max == ZERO_SNR.sigma_max


def test_edm():
    table = levels.edm(0.002, 80.0, sigma_data=0.5)
    assert isinstance(table, EDMLevels)
    assert table.sigma_data == 0.5
    assert table.sigmas[[0, -1]].tolist() == [0.002, 80]
    ratio = table.sigmas[1:] / table.sigmas[:-1]
    torch.testing.assert_close(ratio, ratio[:1].expand(999), rtol=1e-12, atol=0)
    assert levels.edm().sigma_data == SD.sigma_data == 1.0


def test_flow_and_flux():
    plain, three = levels.flow(), levels.flow(shift=3)
    torch.testing.assert_close(plain.sigmas, torch.arange(1, 1001) / f64(1000), rtol=0, atol=0)
    u = plain.sigmas
    torch.testing.assert_close(three.sigmas, 3 * u / (1 + 2 * u), rtol=1e-14, atol=0)
    assert three.sigma_max == 1.0
    flux, t = levels.flux(0.7), f64(0.01, 0.3, 1)
    e = math.exp(0.7)
    torch.testing.assert_close(flux.sigma(t), e / (e + 1 / t - 1), rtol=1e-14, atol=0)
    assert flux.timestep(t).equal(t)
    assert len(flux.sigmas) == 10000
    assert isinstance(flux, FlowLevels)


# --- Maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISCRETE)
def test_every_level_maps_to_its_index_and_back(name):
    table = ALL[name]
    index = torch.arange(len(table.sigmas), dtype=F64)
    assert table.timestep(table.sigmas).equal(index)
    assert table.timestep(table.sigmas.float()).equal(index.float())
    assert table.sigma(index).equal(table.sigmas)
    torch.testing.assert_close(table.timestep(table.sigmas, quantize=False), index, rtol=0, atol=1e-9)


@given(st.floats(0, 999), st.sampled_from(sorted(DISCRETE)))
def test_interpolated_time_inverts_sigma(t, name):
    table = ALL[name]
    assert table.timestep(table.sigma(t), quantize=False).item() == pytest.approx(t, abs=1e-9)


@given(st.floats(0, 1000), st.sampled_from(["edm", "flow", "flux"]))
def test_continuous_round_trips(x, name):
    table = ALL[name]
    t = {"edm": x / 500 - 1, "flow": x, "flux": x / 1000}[name]
    if name == "flux":  # its maps are inverse up to the shift e^1.15
        expected = levels.flow(math.exp(1.15)).sigma(1000 * t)
        assert table.timestep(table.sigma(t)).item() == pytest.approx(expected.item(), abs=1e-12)
    else:
        assert table.timestep(table.sigma(t)).item() == pytest.approx(t, abs=1e-9)


@given(st.floats(1e-4, 1e4), st.sampled_from(sorted(DISCRETE)))
def test_quantized_time_is_the_argmin(sigma, name):
    table = ALL[name]
    distance = (table.sigmas.log() - math.log(sigma)).abs()
    t = int(table.timestep(sigma))
    assert distance[t] <= distance.min() + 2e-6


@pytest.mark.parametrize("name", DISCRETE)
def test_ties_go_to_the_lower_level_in_every_precision(name):
    table = ALL[name]
    t = torch.arange(999, dtype=F64)
    middle = table.sigma(t + 0.5)
    assert table.timestep(middle).equal(t)
    assert table.timestep(middle.float()).equal(t.float())


def test_discrete_maps_clamp():
    assert SD.timestep(f64(0, 1e-9, 1e9, math.inf)).tolist() == [0, 0, 999, 999]
    assert SD.timestep(f64(0, 1e-9, 1e9, math.inf), quantize=False).tolist() == [0, 0, 999, 999]
    assert SD.sigma(f64(-5, 2000)).tolist() == [SD.sigma_min, SD.sigma_max]


def test_flow_maps_apply_the_shift_once():
    three = levels.flow(shift=3)
    assert three.timestep(0.5).item() == 500
    assert three.sigma(500.0).item() == 0.75
    assert levels.flow(multiplier=1).timestep(0.5).item() == 0.5


def test_edm_maps():
    assert levels.edm().timestep(math.e).item() == 0.25
    assert levels.edm().sigma(0.25).item() == pytest.approx(math.e, rel=1e-15)


def test_quantize_means_nothing_to_continuous_levels():
    for name in ("edm", "flow", "flux"):
        assert ALL[name].timestep(0.3, quantize=False).equal(ALL[name].timestep(0.3))


def test_nan_stays_nan():
    for table in ALL.values():
        for quantize in (True, False):
            assert table.timestep(f64(math.nan, 1), quantize).isnan().tolist() == [True, False]
        assert table.sigma(f64(math.nan)).isnan().all()
    for quantize in (True, False):
        assert SD.timestep(-1.0, quantize).isnan()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("p", [-1, 0, 0.25, 0.5, 1, 1.5])
def test_percent_to_sigma(name, p):
    table = ALL[name]
    got = table.percent_to_sigma(p)
    assert isinstance(got, float)
    if p <= 0:
        expected = 1.0 if table.kind == "flow" else 999999999.9
    elif p >= 1:
        expected = 0.0
    elif table.kind == "discrete":
        low = int(999 * (1 - p))
        log, w = table.sigmas.log(), 999 * (1 - p) - low
        expected = math.exp((1 - w) * log[low] + w * log[low + 1])
    elif table.kind == "edm":
        expected = table.sigma_max ** (1 - p) * table.sigma_min**p
    elif table.kind == "v":
        first, last = (2 / math.pi * math.atan(sigma) for sigma in (table.sigma_min, table.sigma_max))
        expected = math.tan(math.pi / 2 * ((1 - p) * last + p * first))
    elif table.kind == "table":
        expected = table.sigma((1 - p) * 990.5 + p * 3.0).item()
    else:
        expected = table.shift * (1 - p) / (1 + (table.shift - 1) * (1 - p))
    assert got == pytest.approx(expected, rel=1e-12)


# --- Shapes, dtypes, devices ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (2, 3, 4)])
def test_any_shape(name, shape):
    table = ALL[name]
    x = torch.linspace(0.1, 0.9, max(math.prod(shape), 1), dtype=F64)[: math.prod(shape)].reshape(shape)
    for result in (table.timestep(x), table.timestep(x, quantize=False), table.sigma(x)):
        assert result.shape == shape
    for y in (x.mT if x.ndim > 1 else x, x.expand(2, *shape)):  # not contiguous
        assert table.timestep(y).equal(table.timestep(y.clone()))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float64),
    ],
)
def test_dtypes(name, dtype, expected):
    table, x = ALL[name], torch.ones(3, dtype=dtype)
    for result in (table.timestep(x), table.timestep(x, quantize=False), table.sigma(x)):
        assert result.dtype == expected
    assert table.sigma(0.5).dtype == torch.float64


def test_a_number_is_a_scalar_tensor():
    assert SD.timestep(1).shape == ()
    assert SD.timestep(np.float32(1)).equal(SD.timestep(1.0))


def test_buffers_move_once():
    table = levels.stable_diffusion()
    first = table._on(f64(1))
    assert table._on(f64(2))[0] is first[0]
    meta = table.timestep(torch.ones(2, 3, device="meta"))
    assert meta.device.type == "meta"
    assert meta.shape == (2, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_without_synchronisation():
    x = torch.linspace(0.01, 20, 257, dtype=F64)
    on_gpu = x.cuda()
    for table in ALL.values():
        table.timestep(on_gpu), table.sigma(on_gpu)
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = [table.timestep(on_gpu), table.timestep(on_gpu, False), table.sigma(on_gpu)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected = [table.timestep(x), table.timestep(x, False), table.sigma(x)]
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result.cpu(), wanted, rtol=1e-12, atol=1e-12)


def test_sigma_is_differentiable():
    t = torch.tensor(10.25, dtype=F64, requires_grad=True)
    for table in ALL.values():
        (slope,) = torch.autograd.grad(table.sigma(t), t)
        step = 1e-5
        numeric = (table.sigma(t.item() + step) - table.sigma(t.item() - step)) / (2 * step)
        assert slope.item() == pytest.approx(numeric.item(), rel=1e-5)


def test_first_use_in_inference_mode_does_not_break_autograd():
    with torch.inference_mode():
        table = levels.stable_diffusion()
        table.timestep(f64(1))
    t = torch.tensor(10.25, dtype=F64, requires_grad=True)
    table.sigma(t).backward()
    assert t.grad > 0


def test_vmap():
    sigma = torch.linspace(0.1, 10, 8, dtype=F64)
    for function in (SD.timestep, SD.sigma, partial(SD.timestep, quantize=False)):
        assert torch.func.vmap(function)(sigma).equal(function(sigma))


def test_copies_work():
    for copied in (copy.deepcopy(SD), pickle.loads(pickle.dumps(SD))):
        assert copied.sigmas.equal(SD.sigmas)
        assert copied.timestep(1.0).equal(SD.timestep(1.0))


# --- Flow time and VE sigma ----------------------------------------------------------------------


@given(st.floats(0, 0.9999))
def test_flow_ve_round_trip(t):
    assert levels.ve_to_flow(levels.flow_to_ve(t)).item() == pytest.approx(t, abs=1e-12)


def test_flow_to_ve():
    assert levels.flow_to_ve(f64(0.75, 0.5, 0)).equal(f64(3, 1, 0))
    assert levels.ve_to_flow(f64(3, 1, 0)).equal(f64(0.75, 0.5, 0))
    assert levels.flow_to_ve(torch.tensor([0.5])).dtype == torch.float32
    sigmas = levels.flow_to_ve(levels.flow(shift=3).sigmas[:-1])
    assert sigmas.isfinite().all()


# --- Errors --------------------------------------------------------------------------------------

BF = f64(0.1, 0.2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: levels.from_betas([0.1]), ValueError, r"betas must be 1-D .* got shape \(1,\)"),
        (lambda: levels.from_betas(torch.ones(2, 2)), ValueError, "betas must be 1-D"),
        (lambda: levels.from_betas([0.1, 0.0]), ValueError, "betas must be in"),
        (lambda: levels.from_betas([0.1, 1.0]), ValueError, "pass zero_snr=True"),
        (lambda: levels.from_betas([0.1, math.nan]), ValueError, "must descend strictly"),
        (lambda: levels.from_alphas_cumprod([1.0, 0.5]), ValueError, "got 1.0 ... 0.5"),
        (lambda: levels.from_alphas_cumprod([0.5, 0.7]), ValueError, "descend strictly"),
        (lambda: levels.from_alphas_cumprod([0.5, 0.0]), ValueError, "zero_snr=True"),
        (lambda: levels.from_alphas_cumprod([0.5, -0.1], True), ValueError, "got 0.5 ... -0.1"),
        (lambda: levels.edm(0, 1), ValueError, "sigma_min must be positive and finite, got 0"),
        (lambda: levels.edm(2, 1), ValueError, "sigma_max must be finite and above 2, got 1"),
        (lambda: levels.edm(sigma_data=0), ValueError, "sigma_data"),
        (lambda: levels.edm("1"), TypeError, "sigma_min must be a number, got '1'; pass a float"),
        (lambda: levels.flow(shift=0), ValueError, "shift must be positive and finite, got 0"),
        (lambda: levels.flow(multiplier=-1), ValueError, "multiplier"),
        (lambda: levels.flow(shift=True), TypeError, "shift must be a number, got True"),
        (lambda: levels.flux(math.inf), ValueError, "mu must be finite, got inf"),
        (lambda: SD.percent_to_sigma(math.nan), ValueError, "p must be finite, got nan"),
        (lambda: SD.percent_to_sigma(None), TypeError, "p must be a number, got None"),
        (lambda: SD.timestep("1"), TypeError, "sigma must be a number, got '1'; pass a float"),
        (lambda: SD.timestep(torch.ones(1, dtype=torch.cfloat)), TypeError, "complex64; convert"),
        (lambda: SD.sigma(torch.ones(1, dtype=torch.bool)), TypeError, "t must be real"),
        (lambda: levels.flow_to_ve(f64(1, 0)), ValueError, r"got 1\.0: .* start at t = 1 - eps"),
        (lambda: levels.flow_to_ve(f64(0.5, -0.1)), ValueError, r"t must be in \[0, 1\), got -0.1"),
        (lambda: levels.flow_to_ve(math.nan), ValueError, "t must be finite"),
        (lambda: levels.flow_to_ve(f64(math.nan)), ValueError, "got nan; clamp"),
        (lambda: levels.ve_to_flow(f64(1, -1)), ValueError, "sigma must be finite and >= 0"),
        (lambda: levels.ve_to_flow(f64(math.inf)), ValueError, "sigma must be finite"),
        (lambda: DiscreteLevels(BF.float()), ValueError, r"got torch.float32 \(2,\) on cpu"),
        (lambda: DiscreteLevels(BF[:1]), ValueError, "2 or more float64 values"),
        (lambda: DiscreteLevels(BF.flip(0)), ValueError, "strictly ascending; sort them"),
        (lambda: DiscreteLevels(f64(0, 1)), ValueError, "positive"),
        (lambda: DiscreteLevels(f64(1, math.inf)), ValueError, "finite"),
        (lambda: Levels(BF), TypeError, "abstract"),
    ],
)
def test_errors_name_the_argument_the_value_and_the_fix(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_levels_and_schedules_are_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):  # stands for torch.set_default_device("cuda")
        for make in (levels.edm, levels.flow, levels.flux, levels.stable_diffusion):
            assert make().sigmas.device.type == "cpu"
        for name in ki.SCHEDULES:
            assert ki.schedule(name, 5, levels.stable_diffusion()).device.type == "cpu", name
        assert levels.flow().timestep(0.5).device.type == "cpu"
