"""What people pass: numbers of NumPy, tensors of other kinds, tensors without values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import kinvert as ki
from kinvert.bench import Cell
from kinvert.checks import has_values, is_integer, plain
from kinvert.engine import Progress
from kinvert.engine.eager import run_eager
from kinvert.inversion import baselines
from kinvert.reference import solve_ode

SIGMAS = ki.schedule("karras", 5, ki.levels.edm(0.1, 10.0))
X = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
GAUSSIAN = ki.denoisers.Gaussian(0.1, 0.5)
GUIDED = {"cfg": 2.0, "positive": {}, "negative": {}}
DETERMINISTIC = [
    name for name, entry in ki.SAMPLERS.items() if name == "dpm_adaptive" or ki.analysis.properties(name).unsamples
]


class Image(Tensor):
    """As fastai's TensorImage or MONAI's MetaTensor: it survives operations."""


IMAGE = X.as_subclass(Image)


def half(x: Tensor, sigma: Tensor) -> Tensor:
    return 0.5 * x


# -- numbers -----------------------------------------------------------------------------------------------------------
INTEGERS: dict[str, Callable[[Any], Any]] = {
    "end_at_step": lambda n: ki.unsample(GAUSSIAN, X, SIGMAS, end_at_step=n),
    "max_batch": lambda n: ki.sample(GAUSSIAN, X, SIGMAS, max_batch=n),
    "max_evals": lambda n: ki.invert(GAUSSIAN, X, SIGMAS[:-1], max_evals=type(n)(250) if is_integer(n) else n).latent,
    "invert max_batch": lambda n: ki.invert(GAUSSIAN, X, SIGMAS[:-1], max_batch=n).latent,
    "seed": lambda n: ki.sample(GAUSSIAN, X, SIGMAS, sampler="euler_ancestral", noise=ki.noise.white(n)),
    "brownian": lambda n: ki.sample(GAUSSIAN, X, SIGMAS, sampler="dpmpp_sde", noise=ki.noise.brownian(n, depth=5 * n)),
    "steps": lambda n: ki.schedule("karras", n, ki.levels.edm()),
    "order": lambda n: ki.sample(GAUSSIAN, X, SIGMAS, sampler=ki.sampler("lms", order=n)),
    "iterations": lambda n: baselines.renoise(GAUSSIAN, X, SIGMAS[:-1], iterations=n, average=n).latent,
    "krylov": lambda n: ki.invert(GAUSSIAN, X, SIGMAS[:-1], method=ki.inversion.NewtonKrylov(krylov=n)).latent,
    "patch": lambda n: ki.metrics.patch_correlation(X, patch=n, pairs=n),
    "cfg": lambda n: ki.sample(GAUSSIAN, X, SIGMAS, cfg=n, negative={}),
}  # fmt: skip
FLOATS: dict[str, Callable[[Any], Any]] = {
    "sigma_offset": lambda v: ki.unsample(GAUSSIAN, X, SIGMAS, sigma_offset=v),
    "tol": lambda v: ki.invert(GAUSSIAN, X, SIGMAS[:-1], tol=v).latent,
    "extract tol": lambda v: ki.extract_noise(GAUSSIAN, X, SIGMAS[:-1], sampler="euler_ancestral", tol=v, generator=torch.Generator().manual_seed(0)).latent,
    "cfg": lambda v: ki.sample(GAUSSIAN, X, SIGMAS, cfg=v, negative={}),
    "eta": lambda v: ki.sample(GAUSSIAN, X, SIGMAS, sampler=ki.sampler("dpmpp_2m_sde", eta=v), noise=ki.noise.white(0)),
    "rho": lambda v: ki.schedules.karras(5, v, 10.0, rho=v + 1),
    "rtol": lambda v: solve_ode(GAUSSIAN, X.double(), 1.0, 2.0, rtol=v, atol=v),
    "cfg of a step": lambda v: ki.sample(GAUSSIAN, X, SIGMAS, cfg=[v] + [1.5] * (len(SIGMAS) - 2), negative={}),
    "std of clipped noise": lambda v: ki.sample(GAUSSIAN, X, SIGMAS, sampler="ddpm", noise=ki.noise.clipped(ki.noise.white(0), v)),
    "eta of rf_inversion": lambda v: baselines.rf_inversion(GAUSSIAN, X, SIGMAS[:-1], eta=v, noise=X).latent,
}  # fmt: skip


@pytest.mark.parametrize("what", INTEGERS)
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy_are_integers(what: str, kind: type) -> None:
    job = INTEGERS[what]
    assert torch.equal(job(kind(2)), job(2))


@pytest.mark.parametrize("what", FLOATS)
@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_floats_of_numpy_are_floats(what: str, kind: type) -> None:
    job, value = FLOATS[what], kind(2**-6)
    assert torch.equal(job(value), job(float(value)))


@pytest.mark.parametrize("job", [*INTEGERS.values(), *FLOATS.values()])
@pytest.mark.parametrize("bad", [True, np.True_, "2"])
def test_a_bool_is_no_number(job: Callable[[Any], Any], bad: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        job(bad)


def test_seeds_may_be_an_array() -> None:
    assert ki.noise.white(np.arange(2)) == ki.noise.white([0, 1])
    assert ki.noise.brownian(np.arange(2)) == ki.noise.brownian([0, 1])
    for bad in (np.arange(2.0), np.zeros((2, 2), dtype=int), np.array([True, False]), "12", []):
        with pytest.raises(TypeError, match="seed must be an int"):
            ki.noise.white(bad)  # type: ignore[arg-type]


def test_cells_of_the_benchmark_are_the_same_cell() -> None:
    assert Cell(model="digits", steps=np.int64(5), cfg=np.float32(2)).key == Cell(model="digits", steps=5, cfg=2).key


# -- schedules ---------------------------------------------------------------------------------------------------------
SCHEDULED: dict[str, Callable[[Any], Tensor]] = {
    "sample": lambda s: ki.sample(GAUSSIAN, X, s),
    "unsample": lambda s: ki.unsample(GAUSSIAN, X, s),
    "round_trip": lambda s: ki.round_trip(GAUSSIAN, X, s).reconstruction,
    "round_trip, invert": lambda s: ki.round_trip(GAUSSIAN, X, s, method="invert").reconstruction,
    "invert": lambda s: ki.invert(GAUSSIAN, X, s).latent,
    "compile_plan": lambda s: ki.run(ki.compile_plan("heun", s), GAUSSIAN, X),
    "direct_inversion": lambda s: baselines.direct_inversion(GAUSSIAN, X, s).latent,
}  # fmt: skip


@pytest.mark.parametrize("verb", SCHEDULED)
def test_a_schedule_may_be_a_generator(verb: str) -> None:
    levels = SIGMAS[:-1]

    def one_by_one() -> Iterator[float]:
        yield from levels.tolist()

    assert torch.equal(SCHEDULED[verb](one_by_one()), SCHEDULED[verb](levels))


@pytest.mark.parametrize("verb", SCHEDULED)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([SIGMAS], r"got a list of Tensor of shape \(6,\); pass it as it is"),
        ((SIGMAS.numpy(),), r"got a tuple of ndarray of shape \(6,\); pass it as it is"),
        (SIGMAS.to("meta"), "have values that can be read"),
        (SIGMAS.to_sparse(), "have values that can be read"),
        (FakeTensorMode().from_tensor(SIGMAS), "have values that can be read"),
        (SIGMAS[:, None], "1-D"),
    ],
)
def test_a_schedule_that_cannot_be_is_named(verb: str, bad: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"sigmas must .*{message}"):
        SCHEDULED[verb](bad)


# -- subclasses --------------------------------------------------------------------------------------------------------
def tensors(value: Any) -> list[Tensor]:
    """Every tensor of a result."""
    if dataclasses.is_dataclass(value):
        return [t for f in dataclasses.fields(value) for t in tensors(getattr(value, f.name))]
    if isinstance(value, dict):
        return tensors(list(value.values()))
    if isinstance(value, (list, tuple)):
        return [t for one in value for t in tensors(one)]
    return [value] if isinstance(value, Tensor) else []


def is_plain(value: Any) -> bool:
    found = tensors(value)
    return bool(found) and all(type(t) is Tensor for t in found)


def spy(x: Tensor, sigma: Tensor) -> Any:
    """A denoiser that sees plain tensors, and returns a subclass."""
    assert type(x) is Tensor and type(sigma) is Tensor
    return GAUSSIAN(x, sigma).as_subclass(Image)


@pytest.mark.parametrize("name", ki.SAMPLERS)
def test_every_sampler_returns_a_plain_tensor(name: str) -> None:
    seen: list[Progress] = []
    options: dict[str, Any] = {**GUIDED, "noise": ki.noise.white(0), "callback": seen.append}
    result = ki.sample(
        spy, IMAGE, SIGMAS, sampler=name, mask=torch.ones(4, 4).as_subclass(Image), latent=IMAGE, **options
    )
    assert is_plain(result) and is_plain(seen)
    assert torch.equal(result, ki.sample(GAUSSIAN, X, SIGMAS, sampler=name, mask=torch.ones(4, 4), latent=X, **options))
    if name != "dpm_adaptive" and not ki.compile_plan(name, SIGMAS).is_guided:
        assert is_plain(ki.run(ki.compile_plan(name, SIGMAS), spy, IMAGE))
        assert is_plain(run_eager(ki.sampler(name), spy, IMAGE, SIGMAS))


def loses_what_a_mask_keeps(name: str) -> bool:
    """Which `unsample` refuses with a mask."""
    return name in ("edict", "ddim_inverse") or "cfg" in name


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_way_up_returns_plain_tensors(name: str) -> None:
    mask = None if loses_what_a_mask_keeps(name) else torch.ones(4, 4).as_subclass(Image)
    assert is_plain(ki.unsample(spy, IMAGE, SIGMAS, sampler=name, mask=mask, **GUIDED))


@pytest.mark.filterwarnings("ignore:x requires grad, but invert")
@pytest.mark.filterwarnings("ignore:.*not inverted")
@pytest.mark.filterwarnings("ignore:.*magnifies rounding")
@pytest.mark.filterwarnings("ignore:.*below the rounding of")
@pytest.mark.parametrize(
    "job",
    [
        lambda x: ki.round_trip(spy, x, SIGMAS),
        lambda x: ki.round_trip(spy, x, SIGMAS[:-1], method="invert"),
        lambda x: ki.invert(spy, x, SIGMAS[:-1]),
        lambda x: ki.invert(spy, x, SIGMAS[:-1], tol=1e-13),
        lambda x: ki.invert(spy, x, SIGMAS[:-1], sampler="heun", max_batch=1, mask=torch.ones(4, 4).as_subclass(Image)),
        lambda x: ki.invert(spy, x, SIGMAS[:-1], sampler="dpmpp_2m", tol=1e-13, max_evals=60),
        lambda x: ki.invert(spy, x, SIGMAS[:-1], sampler="mccallum_foster"),
        lambda x: ki.extract_noise(spy, x, SIGMAS[:-1], sampler="euler_ancestral"),
        lambda x: baselines.ddim_inversion(spy, x, SIGMAS[:-1]),
        lambda x: baselines.easyinv(spy, x, SIGMAS[:-1]),
        lambda x: baselines.aidi(spy, x, SIGMAS[:-1], window=2),
        lambda x: baselines.renoise(spy, x, SIGMAS[:-1]),
        lambda x: baselines.direct_inversion(spy, x, SIGMAS[:-1]),
        lambda x: baselines.rf_inversion(spy, x, SIGMAS[:-1]),
    ],
)
@pytest.mark.parametrize("x", [IMAGE, nn.Parameter(X)], ids=["subclass", "parameter"])
def test_results_are_plain_have_no_graph_and_can_be_printed(job: Callable[[Tensor], Any], x: Tensor) -> None:
    result = job(x)
    assert is_plain(result) and not any(t.requires_grad for t in tensors(result))
    assert str(job(x))


def test_a_parameter_keeps_its_graph_in_run() -> None:
    x = nn.Parameter(X)
    (gradient,) = torch.autograd.grad(ki.run(ki.compile_plan("heun", SIGMAS), GAUSSIAN, x).sum(), x)
    assert gradient.isfinite().all()
    assert plain(x).data_ptr() == x.data_ptr() and plain(X) is X


def test_round_trip_returns_no_graph() -> None:
    trip = ki.round_trip(GAUSSIAN, X.clone().requires_grad_(), SIGMAS)
    assert not any(t.requires_grad for t in tensors(trip))
    trip.psnr.numpy()


def test_progress_is_compared_by_identity() -> None:
    seen: list[Progress] = []
    ki.sample(half, X, SIGMAS, callback=seen.append)
    twin = dataclasses.replace(seen[0], x=seen[0].x.clone())
    assert seen[0] in seen and twin != seen[0] and twin not in seen


# -- tensors that cannot be used ---------------------------------------------------------------------------------------
UNUSABLE = {
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "must be float64, float32, bfloat16 or float16, got torch.float8"),
    "sparse": (lambda t: t.to_sparse(), "must be a dense tensor, got torch.sparse_coo; use {}.to_dense()"),
    "nested": (lambda t: torch.nested.nested_tensor([t[0], t[1]]), "must be a dense tensor, got nested; pad it"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_tensors_are_named(kind: str) -> None:
    make, message = UNUSABLE[kind]
    bad, mask = make(X), make(torch.ones(2, 4, 4))
    jobs: dict[str, list[Callable[[], Any]]] = {
        "x": [
            lambda: ki.sample(half, bad, SIGMAS),
            lambda: ki.sample(half, bad, SIGMAS, sampler="dpm_adaptive"),
            lambda: ki.unsample(half, bad, SIGMAS),
            lambda: ki.run(ki.compile_plan("euler", SIGMAS), half, bad),
            lambda: ki.round_trip(half, bad, SIGMAS),
            lambda: ki.invert(half, bad, SIGMAS[:-1]),
            lambda: ki.extract_noise(half, bad, SIGMAS[:-1], sampler="euler_ancestral"),
        ],
        "mask": [
            lambda: ki.unsample(half, X, SIGMAS, mask=mask),
            lambda: ki.sample(half, X, SIGMAS, mask=mask, latent=X),
            lambda: ki.invert(half, X, SIGMAS[:-1], mask=mask),
        ],
        "latent": [lambda: ki.sample(half, X, SIGMAS, mask=torch.ones(4, 4), latent=bad)],
        "noise": [
            lambda: ki.sample(half, X, SIGMAS, sampler="euler_ancestral", noise=lambda a, b: bad),
            lambda: ki.sample(half, X, SIGMAS, sampler="euler_ancestral", noise=ki.noise.replay([bad] * 5)),
        ],
    }
    for name, calls in jobs.items():
        for call in calls:
            with pytest.raises(TypeError) as error:
                call()
            assert f"{name} {message.format(name)}" in str(error.value)


# -- tensors without values --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("name", ki.SAMPLERS)
def test_a_shape_goes_through_every_sampler(name: str, kind: str) -> None:
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        x = torch.empty(2, 3)
        assert not has_values(x)
        if name == "dpm_adaptive":
            with pytest.raises(ValueError, match="x has a shape but no values .*dpm_adaptive chooses its steps"):
                ki.sample(half, x, SIGMAS.tolist(), sampler=name)
            return
        sigmas, options = [8.0, 4.0, 2.0, 1.0, 0.5, 0.0], {"mask": torch.empty(2, 3), **GUIDED}
        for noise in (None, ki.noise.white([1, 2]), ki.noise.brownian(3)):
            result = ki.sample(half, x, sigmas, sampler=name, noise=noise, latent=x, max_batch=1, **options)
            assert (result.shape, result.dtype, result.device, type(result)) == (x.shape, x.dtype, x.device, type(x))
        if name in DETERMINISTIC:
            options["mask"] = None if loses_what_a_mask_keeps(name) else options["mask"]
            assert ki.unsample(half, x, sigmas, sampler=name, normalize=True, **options).shape == x.shape


def test_values_are_asked_for_where_they_matter() -> None:
    x, real = torch.empty(2, 3, device="meta"), torch.ones(2, 3)
    for job in (
        lambda: ki.invert(half, x, SIGMAS[:-1]),
        lambda: ki.extract_noise(half, x, SIGMAS[:-1], sampler="euler_ancestral"),
        lambda: solve_ode(half, x, 1.0, 2.0),
    ):
        with pytest.raises(ValueError, match="x has a shape but no values"):
            job()
    options: dict[str, Any] = {"sampler": "euler_ancestral"}
    for name, call in {
        "mask": lambda: ki.unsample(half, real, SIGMAS, mask=x),
        "latent": lambda: ki.sample(half, real, SIGMAS, mask=real, latent=x),
        "noise": lambda: ki.sample(half, real, SIGMAS, noise=lambda a, b: x, **options),
        "noise ": lambda: ki.sample(half, real, SIGMAS, noise=ki.noise.replay([x] * 5), **options),
    }.items():
        with pytest.raises(ValueError, match=f"{name.strip()} has a shape but no values"):
            call()
