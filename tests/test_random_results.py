"""Random results of every kind come back from their files: bits, dtypes, shapes, text; whatever the layout in memory."""

from __future__ import annotations

import math
import tempfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from randomruns import few
from torch import Tensor

import kinvert as ki
from kinvert import bench
from kinvert.cli.latents import LatentFile, Record
from kinvert.inversion import Inversion, Reason
from kinvert.inversion.back import Steering, WayBack
from kinvert.jsontext import content_key
from kinvert.resultfiles import write_result

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [math.nan, math.inf, -math.inf, -0.0, 5e-324]
ANY = st.floats(width=32) | st.sampled_from(SPECIAL)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(max_size=6)


# -- values ------------------------------------------------------------------------------------------------------------
@st.composite
def tensors(draw: Any, *shape: int, dtypes: Any = tuple(FLOATS)) -> Tensor:
    """Random numbers, NaN and infinities too, in one of the ways to lie in memory."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))), dtype=torch.float64)
    for value in draw(st.lists(ANY, max_size=3)):
        if x.numel():
            x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    x = x.to(draw(st.sampled_from(dtypes)))
    layout = draw(st.sampled_from(["plain", "every second", "turned", "expanded", "graph"]))
    if layout == "every second":
        return torch.stack([x, x], -1)[..., 0]
    if layout == "turned" and x.ndim > 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded" and x.ndim and x.shape[0]:
        return x[:1].expand(x.shape)
    return x.requires_grad_() if layout == "graph" and x.is_floating_point() else x


def bits(x: Tensor) -> bytes:
    flat = torch.empty(x.numel(), dtype=x.dtype).copy_(x.detach().flatten())
    return flat.view(torch.uint8).numpy().tobytes()


def same(a: Any, b: Any) -> bool:
    """Equal in type, dtype and bits; NaN is NaN."""
    if isinstance(a, Tensor):
        return type(a) is type(b) and (a.dtype, a.shape) == (b.dtype, b.shape) and bits(a) == bits(b)
    if isinstance(a, dict):
        return type(b) is dict and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if is_dataclass(a) and not isinstance(a, ki.rules.Rule):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return type(a) is type(b) and repr(a) == repr(b)


def returned(result: Any, read: Any = ki.load) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "file")
        return read(Path(folder) / "file")


CONDITIONING = st.none() | st.dictionaries(
    TEXT,
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**62), 2**62) | ANY | TEXT | tensors(2, 3) | tensors(0),
        lambda inner: st.lists(inner, max_size=2) | st.lists(inner, max_size=2).map(tuple) | st.dictionaries(TEXT, inner, max_size=2),
        max_leaves=4,
    ),
    max_size=3,
)  # fmt: skip
RULES = st.sampled_from(["euler", "dpmpp_2m", "heun"]).map(ki.sampler) | st.floats(0, 1).map(
    lambda eta: ki.sampler("euler_ancestral", eta=eta)
)


# -- results -----------------------------------------------------------------------------------------------------------
@st.composite
def ways_back(draw: Any, batch: int) -> WayBack:
    steering = st.none() | st.builds(Steering, FINITE, FINITE)
    return WayBack(
        draw(RULES), (4.0, 1.0, 0.1), draw(st.sampled_from(["ve", "flow"])), draw(st.just(1.0) | FINITE | tensors(2)),
        draw(CONDITIONING), draw(CONDITIONING), draw(st.none() | tensors(2, 3)), draw(st.none() | tensors(batch, 2, 3)),
        draw(steering),
    )  # fmt: skip


@st.composite
def inversions(draw: Any) -> Inversion:
    batch = draw(st.integers(0, 2))
    state, number = tensors(batch, 2, 3), tensors(batch, dtypes=(torch.float64, torch.float32))
    named = st.dictionaries(TEXT, state, max_size=2)
    return Inversion(
        draw(state), draw(tensors(2, batch)), torch.ones(batch, dtype=torch.bool), torch.arange(batch), draw(number),
        draw(ANY), draw(number), (4.0, draw(FINITE), 0.1), draw(st.integers(0, 9)), draw(st.none() | number),
        tuple(draw(st.lists(state, max_size=2))), draw(named), draw(st.none() | state), draw(st.none() | tensors(2, batch)),
        draw(st.none() | ANY), tuple(draw(st.lists(TEXT, max_size=2))), draw(named),
        tuple(draw(st.sampled_from(Reason)) for _ in range(batch)), draw(st.none() | ways_back(batch)),
        draw(st.none() | number),
    )  # fmt: skip


@given(inversions())
@few(25)
def test_an_inversion(found: Inversion) -> None:
    again = returned(found)
    for f in fields(Inversion):
        assert same(getattr(found, f.name), getattr(again, f.name)), f.name


@st.composite
def round_trips(draw: Any) -> ki.RoundTrip:
    batch = draw(st.integers(0, 3))
    states, numbers = ([draw(tensors(batch, *shape)) for _ in range(n)] for shape, n in (((2, 3), 2), ((), 5)))
    return ki.RoundTrip(*states, draw(ANY), draw(st.integers(0, 2**40)), *numbers, draw(FINITE))


@given(round_trips())
@few(15)
def test_a_round_trip(trip: ki.RoundTrip) -> None:
    assert same(trip, returned(trip))


@given(tensors(4), st.none() | TEXT, st.dictionaries(TEXT, ANY | TEXT | st.integers(0, 9), max_size=3), st.booleans())
@few(15)
def test_a_schedule(sigmas: Tensor, name: str | None, options: dict[str, Any], flow: bool) -> None:
    values: Any = ki.levels.FlowTimes([0.9, 0.5, 0.1]) if flow else sigmas
    levels = ki.levels.flow() if flow else None
    schedule, again = ki.Schedule(values, name, levels, options), returned(ki.Schedule(values, name, levels, options))
    assert again.name == name and same(options, again.options) and type(again.sigmas) is type(values)
    assert bits(again.sigmas) == bits(values) and repr(again.levels) == repr(levels) and repr(again) == repr(schedule)


@st.composite
def latent_files(draw: Any) -> LatentFile:
    batch = draw(st.integers(0, 2))
    call = draw(st.dictionaries(TEXT, st.none() | st.booleans() | FINITE | TEXT, max_size=3))
    record = Record(
        "invert", draw(TEXT), call, 3, "euler", {"eta": draw(FINITE)}, "ve", (2.0, draw(FINITE)), draw(st.none() | TEXT),
        "float32", "auto", (draw(st.none() | FINITE), draw(st.none() | st.integers(1, 9))), (draw(TEXT), "0"), (6, 8),
        {"reason": draw(TEXT), "round_trip_error": draw(ANY)},
    )  # fmt: skip
    state = tensors(batch, 2, 3)
    noises = tuple(draw(st.lists(state, max_size=2)))
    return LatentFile(draw(state), record, draw(st.dictionaries(TEXT, state, max_size=2)), noises)


@given(latent_files())
@few(15)
def test_a_latent_of_the_command_line(file: LatentFile) -> None:
    again = returned(file, LatentFile.load)
    assert same(file, again) and again.record.settings == file.record.settings


@st.composite
def records(draw: Any) -> dict[str, Any]:
    count = draw(st.integers(0, 3))
    numbers = st.lists(ANY, min_size=count, max_size=count)
    cell = {
        "model": draw(TEXT), "question": draw(TEXT), "method": "invert", "sampler": "euler", "options": {"eta": draw(FINITE)},
        "schedule": "karras", "steps": draw(st.integers(1, 2**40)), "cfg": draw(FINITE), "dtype": "float32",
        "seed": draw(st.integers(0, 2**62)), "count": count,
    }  # fmt: skip
    error = draw(st.none() | TEXT)
    curve = draw(st.none() | numbers.map(lambda values: {"sigma": values, "error": values[::-1]}))
    found = {
        "key": content_key(cell), "cell": cell, "versions": {"kinvert": draw(TEXT)}, "error": error,
        "metrics": draw(st.dictionaries(TEXT, numbers, max_size=3)), "trajectory": curve, "residuals": curve, "latent": None,
        "converged": draw(st.none() | st.lists(st.booleans(), min_size=count, max_size=count)),
    }  # fmt: skip
    return found | {f"{verb}_evaluations": draw(numbers) for verb in ("inversion", "sampling")}


@given(records())
@few(25)
def test_a_record_of_the_benchmark(record: dict[str, Any]) -> None:
    """Text that says "inf" in the place of a name stays text."""
    with tempfile.TemporaryDirectory() as name:
        write_result(Path(name), record["key"], record)
        (again,) = bench.load(name)
    assert all(same(value, again[key]) for key, value in record.items()), (record, again)
