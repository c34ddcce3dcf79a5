"""Levels whose times are listed in a table, and the angle of the cosine process."""

from __future__ import annotations

import math

import pytest
import torch

import kinvert as ki
from kinvert import levels

F64 = torch.float64
ALL = {
    "v": levels.v_diffusion(),
    "table": levels.from_table([12.0, 5.0, 0.8, 0.1, 0.0], [990.5, 600.25, 210.0, 3.0]),
}


def f64(*values):
    return torch.tensor(values, dtype=F64)


@pytest.mark.parametrize("flip", [False, True])
def test_a_table_gives_its_times_and_interpolates_in_ln_sigma(flip):
    sigmas, times = f64(0.1, 0.8, 5.0, 12.0), f64(3.0, 210.0, 600.25, 990.5)
    table = levels.from_table(*(v.flip(0) if flip else v for v in (sigmas, times)))
    assert table.timestep(sigmas).equal(times)
    assert table.timestep(sigmas.float()).tolist() == pytest.approx(times.tolist(), rel=1e-6)
    torch.testing.assert_close(table.sigma(times), sigmas, rtol=1e-15, atol=0)
    between = math.exp(0.25 * math.log(0.8) + 0.75 * math.log(5.0))
    assert table.timestep(between).item() == pytest.approx(0.25 * 210 + 0.75 * 600.25, rel=1e-12)
    assert table.timestep(between, quantize=True).item() == table.timestep(between, quantize=False).item()
    assert table.sigma(0.25 * 210 + 0.75 * 600.25).item() == pytest.approx(between, rel=1e-12)
    assert table.timestep(f64(1e-9, 1e9)).tolist() == [3.0, 990.5]
    assert table.timestep(f64(-1.0, math.nan)).isnan().all()


def test_a_table_may_repeat_times():
    table = levels.from_table([4.0, 2.0, 1.0, 0.5], [30.0, 10.0, 10.0, 0.0])
    assert table.timestep(f64(4.0, 2.0, 1.5, 1.0, 0.5)).tolist() == [30.0, 10.0, 10.0, 10.0, 0.0]
    assert table.sigma(10.0).item() == pytest.approx(1.0)


def test_a_network_gets_the_times_of_the_table():
    seen = []
    table = levels.from_table(f64(12.0, 5.0, 0.8, 0.0), f64(990.5, 600.25, 210.0))
    denoiser = ki.denoisers.from_eps(lambda x, t: seen.append(t[0].item()) or x, table)
    ki.sample(denoiser, torch.ones(2, 3, dtype=F64), [12.0, 5.0, 0.8, 0.0])
    assert seen == [990.5, 600.25, 210.0]


def test_the_angle_of_the_cosine_process():
    """x_t = cos(pi t / 2) x0 + sin(pi t / 2) eps has sigma = sin / cos."""
    table = levels.v_diffusion(0.01, 100.0)
    assert (table.sigma_min, table.sigma_max) == pytest.approx((0.01, 100.0))
    assert table.timestep(1.0).item() == pytest.approx(0.5, rel=1e-15)
    for t in (1e-3, 0.2, 0.9, 0.999):
        assert table.sigma(t).item() == pytest.approx(math.sin(t * math.pi / 2) / math.cos(t * math.pi / 2), rel=1e-12)
        assert table.timestep(table.sigma(t)).item() == pytest.approx(t, rel=1e-14)
    times = table.timestep(ki.schedule("normal", 10, table)[:-1])
    torch.testing.assert_close(times.diff(), times.diff()[:1].expand(9))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("schedule", ki.SCHEDULES)
def test_every_schedule_runs_on_them(name, schedule):
    sigmas = ki.schedule(schedule, 4, ALL[name])
    assert (sigmas.diff() < 0).all() and sigmas.isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: levels.from_table([2, 1], [1]), ValueError, "timesteps must be 1-D with 2 values"),
        (lambda: levels.from_table([3, 2, 1], [2, 1]), ValueError, "one timestep for each sigma, got 2 for 3"),
        (lambda: levels.from_table([2, 1], [1, 2]), ValueError, "timesteps must rise with sigma"),
        (lambda: levels.from_table([2, 1, 1], [3, 2, 1]), ValueError, "strictly ascending"),
        (lambda: levels.from_table([2, 1], [2, 1], sigma_data=0), ValueError, "sigma_data"),
        (lambda: levels.v_diffusion(2, 1), ValueError, "sigma_max"),
    ],
)
def test_errors_of_tables_and_angles_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
