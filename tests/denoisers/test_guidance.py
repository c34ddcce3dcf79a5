"""Guidance: D = U + cfg (C - U), and how often, with what, the denoiser is called for it."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kinvert.denoisers import Guided, guide

X = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.5, 2.0], dtype=torch.float64)


class Record(NamedTuple):
    embeds: Tensor
    kind: object


class Spy:
    """D = x / (1 + sigma) + mean of the context, which keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[SimpleNamespace] = []

    def __call__(self, x: Tensor, sigma: Tensor, **conditioning) -> Tensor:
        self.calls.append(SimpleNamespace(x=x, sigma=sigma, conditioning=conditioning))
        scale = (1 + sigma).reshape(-1, *[1] * (x.ndim - 1))
        shift = conditioning.get("context", x.new_zeros(len(x), 1)).flatten(1).mean(1)
        return x / scale + shift.reshape(scale.shape)

    @property
    def batches(self) -> list[int]:
        return [len(call.x) for call in self.calls]


def context(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


POSITIVE, NEGATIVE = {"context": context(2, 5, 6)}, {"context": context(2, 5, 6, seed=2)}


def test_cfg_1_is_the_positive_prediction_and_one_call_of_the_batch() -> None:
    spy = Spy()
    for cfg in (1.0, 1, 1 + 1e-10):
        for negative in (NEGATIVE, None):
            guided = guide(spy, cfg, POSITIVE, negative)(X, SIGMA)
            assert torch.equal(guided, spy(X, SIGMA, **POSITIVE))
    assert set(spy.batches) == {2}
    assert len(spy.calls) == 12


@pytest.mark.parametrize("cfg", [0.0, 1.0001, 7.5, -2])
def test_stacked_branches_are_one_call_of_twice_the_batch(cfg: float) -> None:
    spy = Spy()
    guided = guide(spy, cfg, POSITIVE, NEGATIVE)(X, SIGMA)
    assert spy.batches == [4]
    call = spy.calls[0]
    assert torch.equal(call.x, torch.cat([X, X]))
    assert torch.equal(call.sigma, torch.cat([SIGMA, SIGMA]))
    assert torch.equal(call.conditioning["context"], torch.cat([NEGATIVE["context"], POSITIVE["context"]]))
    uncond, cond = spy(X, SIGMA, **NEGATIVE), spy(X, SIGMA, **POSITIVE)
    torch.testing.assert_close(guided, uncond + cfg * (cond - uncond), rtol=1e-13, atol=1e-13)


@settings(deadline=None, max_examples=40)
@given(a=st.floats(-20, 20), b=st.floats(-20, 20), w=st.floats(0, 1))
def test_guidance_is_affine_in_cfg(a: float, b: float, w: float) -> None:
    def at(cfg: float) -> Tensor:
        return guide(Spy(), cfg, POSITIVE, NEGATIVE)(X, SIGMA)

    torch.testing.assert_close(at(w * a + (1 - w) * b), w * at(a) + (1 - w) * at(b), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(cfg=st.floats(-20, 20))
def test_equal_branches_make_cfg_irrelevant(cfg: float) -> None:
    guided = guide(Spy(), cfg, POSITIVE, POSITIVE)(X, SIGMA)
    torch.testing.assert_close(guided, Spy()(X, SIGMA, **POSITIVE), rtol=0, atol=1e-14)


APART = {
    "token lengths": ({"context": context(2, 5, 6)}, {"context": context(2, 7, 6)}),
    "keys": ({"context": context(2, 5), "scale": 1.0}, {"context": context(2, 5)}),
    "no keywords": (POSITIVE, {}),
    "dtypes": ({"context": context(2, 5)}, {"context": context(2, 5).float()}),
    "batch of neither 1 nor x": ({"frames": context(6, 5)}, {"frames": context(6, 5, seed=2)}),
    "the same tensor of such a batch": (shared := {"frames": context(6, 5)}, shared),
    "strings": ({"mode": "a"}, {"mode": "b"}),
    "numbers of another type": ({"flag": True}, {"flag": 1}),
    "arrays": ({"weights": np.ones(2)}, {"weights": np.ones(2)}),
    "0-d tensors": ({"strength": torch.tensor(1.0)}, {"strength": torch.tensor(1.0)}),
    "a tensor and a number": ({"strength": torch.ones(2)}, {"strength": 1.0}),
    "nested keys": ({"added": {"a": context(2, 5)}}, {"added": {"b": context(2, 5)}}),
    "nested lengths": ({"added": [context(2, 5)]}, {"added": [context(2, 5), context(2, 5)]}),
    "a list with one value per item": ({"names": ["a", "b"]}, {"names": ["a", "b"]}),
    "the same unknown mapping": (hidden := {"added": UserDict(a=context(2, 5))}, hidden),
    "a list with a tuple for each item": (crops := {"crops": [(1.0, 0), (2.0, 0)]}, crops),
    "the same list of lists for each item": (boxes := {"boxes": [[1.0], [2.0]]}, boxes),
    "the same array for each item": (array := {"array": np.arange(2.0)}, array),
    "a tensor that all share": (table := {"table": context(3, 5)}, table),
}


@pytest.mark.parametrize("name", APART)
def test_what_does_not_stack_takes_two_calls(name: str) -> None:
    positive, negative = APART[name]
    spy = Spy()
    guided = guide(spy, 3.0, positive, negative)(X, SIGMA)
    assert spy.batches == [2, 2]
    uncond, cond = spy(X, SIGMA, **negative), spy(X, SIGMA, **positive)
    torch.testing.assert_close(guided, uncond + 3 * (cond - uncond), rtol=1e-13, atol=1e-13)
    for call, conditioning in zip(spy.calls, (negative, positive), strict=False):
        for key, value in conditioning.items():
            assert call.conditioning[key] is value or isinstance(value, dict | list)


def test_what_stacks_in_containers_is_concatenated_there() -> None:
    marker = object()

    def conditioning(seed: int) -> dict:
        embeds = context(2, 7, seed=seed)
        return {
            "added": {"text_embeds": embeds, "nested": [embeds + 1, (embeds + 2,)]},
            "size": (64, 64, 0),
            "as many numbers as items": (64, 64),
            "ordered": OrderedDict(pooled=embeds + 3),
            "record": Record(embeds + 4, 7),
            "scale": 2.5,
            "name": "sd",
            "flag": True,
            "none": None,
            "model": marker,
            "strength": strength,
        }

    strength = torch.tensor(0.5)
    spy = Spy()
    positive, negative = conditioning(1), conditioning(2)
    guide(spy, 3.0, positive, negative)(X, SIGMA)
    assert spy.batches == [4]
    seen = spy.calls[0].conditioning
    both = torch.cat([negative["added"]["text_embeds"], positive["added"]["text_embeds"]])
    assert torch.equal(seen["added"]["text_embeds"], both)
    assert torch.equal(seen["added"]["nested"][0], both + 1)
    assert torch.equal(seen["added"]["nested"][1][0], both + 2)
    assert type(seen["added"]["nested"]) is list
    assert type(seen["added"]["nested"][1]) is tuple
    assert type(seen["ordered"]) is OrderedDict and torch.equal(seen["ordered"]["pooled"], both + 3)
    assert type(seen["record"]) is Record and torch.equal(seen["record"].embeds, both + 4)
    for key in ("size", "as many numbers as items", "scale", "name", "flag", "none"):
        assert seen[key] == positive[key]
    assert seen["model"] is marker
    assert seen["strength"] is strength


def test_a_part_of_the_batch_gets_its_own_conditioning() -> None:
    """Tensors, arrays, prompts and crops by item; what is as long as the part, but not as the batch, is shared."""
    x, sigma = torch.randn(6, 1, 4, generator=torch.Generator().manual_seed(0)), torch.ones(6)

    def conditioning(seed: int) -> dict[str, Any]:
        return {
            "emb": context(6, 5, seed=seed),
            "one": context(1, 5, seed=seed),
            "nested": [{"pooled": context(6, 2)}, Record(context(6, 3), "all")],
            "array": np.arange(6.0),
            "prompts": list("abcdef"),
            "crops": [(float(i), 0) for i in range(6)],
            "table": context(2, 5),
            "shared": (1, 2, 3, 4, 5, 6),
        }

    spy, index = Spy(), torch.tensor([4, 1])
    whole = guide(spy, 3.0, conditioning(1), conditioning(2), batch=6)
    part = whole.take(torch.tensor([0, 4, 1])).take(torch.tensor([1, 2]))(x[index], sigma[index])
    assert spy.batches == [2, 2]
    for call, values in zip(spy.calls, (conditioning(2), conditioning(1)), strict=True):
        seen = call.conditioning
        assert torch.equal(seen["emb"], values["emb"][index])
        assert torch.equal(seen["one"], values["one"].expand(2, -1))
        assert torch.equal(seen["nested"][0]["pooled"], values["nested"][0]["pooled"][index])
        assert torch.equal(seen["nested"][1].embeds, values["nested"][1].embeds[index])
        assert seen["array"].tolist() == [4.0, 1.0] and seen["prompts"] == ["e", "b"]
        assert seen["crops"] == [(4.0, 0), (1.0, 0)] and seen["shared"] == (1, 2, 3, 4, 5, 6)
        assert torch.equal(seen["table"], values["table"])
    torch.testing.assert_close(part, whole(x, sigma)[index])


def test_the_same_tensor_in_both_is_doubled_not_passed_through() -> None:
    pooled = context(2, 7)
    spy = Spy()
    guide(spy, 3.0, {"pooled": pooled, **POSITIVE}, {"pooled": pooled, **NEGATIVE})(X, SIGMA)
    assert spy.batches == [4]
    assert torch.equal(spy.calls[0].conditioning["pooled"], torch.cat([pooled, pooled]))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("negative_batch", [1, 2])
@pytest.mark.parametrize("tokens", [5, 7])
def test_a_batch_of_one_is_expanded_in_every_kind_of_call(cfg: float, negative_batch: int, tokens: int) -> None:
    one, other = context(1, 5, 6), context(negative_batch, tokens, 6, seed=2)
    spy = Spy()
    guided = guide(spy, cfg, {"context": one, "added": [one]}, {"context": other, "added": [other]})(X, SIGMA)
    assert spy.batches == ([2] if cfg == 1 else [4] if tokens == 5 else [2, 2])
    for call in spy.calls:
        assert len(call.conditioning["context"]) == len(call.conditioning["added"][0]) == len(call.x)
    uncond, cond = spy(X, SIGMA, context=other.expand(2, -1, -1)), spy(X, SIGMA, context=one.expand(2, -1, -1))
    torch.testing.assert_close(guided, uncond + cfg * (cond - uncond), rtol=1e-13, atol=1e-13)


def test_empty_conditioning_calls_the_denoiser_without_keywords() -> None:
    calls = []

    def plain(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(len(x))
        return x / 2

    assert torch.equal(guide(plain)(X, SIGMA), X / 2)
    assert torch.equal(guide(plain, 3.0, None, {})(X, SIGMA), X / 2)
    assert calls == [2, 4]


@pytest.mark.parametrize("cfg", [1.0, 0.0, 4.0])
@pytest.mark.parametrize("negative", [NEGATIVE, {}, {"context": context(2, 9, 6)}])
def test_pair_returns_both_predictions_and_always_computes_both(cfg: float, negative: dict) -> None:
    spy = Spy()
    result = guide(spy, cfg, POSITIVE, negative, pair=True)(X, SIGMA)
    assert isinstance(result, Guided)
    assert sum(spy.batches) == 4
    uncond, cond = spy(X, SIGMA, **negative), spy(X, SIGMA, **POSITIVE)
    torch.testing.assert_close(result.uncond, uncond, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(result.denoised, uncond + cfg * (cond - uncond), rtol=1e-13, atol=1e-13)
    if cfg == 1:
        torch.testing.assert_close(result.denoised, cond, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("pair", [False, True])
def test_a_denoiser_that_guides_itself_is_passed_through(pair: bool) -> None:
    answer = Guided(X + 1, X - 1)
    assert guide(lambda x, sigma: answer, pair=pair)(X, SIGMA) is answer
    with pytest.raises(TypeError, match=r"guided already; leave cfg=1 and negative=None"):
        guide(lambda x, sigma: answer, 2.0, negative={}, pair=pair)(X, SIGMA)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_combined_in_float32(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    values = {"a": x, "b": x.roll(1)}
    guided = guide(lambda x, sigma, pick: values[pick], 7.5, {"pick": "a"}, {"pick": "b"})(x, SIGMA)
    uncond, cond = values["b"].double(), values["a"].double()
    exact = uncond + 7.5 * (cond - uncond)
    assert guided.dtype == dtype
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5
    assert bool(((guided - exact).abs() <= bound).all())


def test_mappings_are_copied_at_the_start() -> None:
    positive = dict(POSITIVE)
    guided = guide(Spy(), 1.0, positive)
    positive.clear()
    assert torch.equal(guided(X, SIGMA), Spy()(X, SIGMA, **POSITIVE))


def test_gradients_reach_x_through_both_branches() -> None:
    x = X.clone().requires_grad_()
    guide(Spy(), 3.0, POSITIVE, NEGATIVE)(x, SIGMA).sum().backward()
    torch.testing.assert_close(x.grad, (1 / (1 + SIGMA)).reshape(-1, 1, 1).expand_as(x), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cfg": 7.0}, ValueError, r"cfg=7 needs .*negative= is missing; .*empty prompt, or negative=\{\}"),
        ({"cfg": 0}, ValueError, r"cfg=0 needs .*negative= is missing"),
        ({"cfg": float("nan"), "negative": {}}, ValueError, r"cfg must be finite, got nan"),
        ({"cfg": float("inf"), "negative": {}}, ValueError, r"cfg must be finite, got inf"),
        ({"cfg": torch.tensor(2.0), "negative": {}}, TypeError, r"got Tensor; pass a float, e.g. float\(cfg\)"),
        ({"cfg": "7", "negative": {}}, TypeError, r"cfg must be a Python number, got str; pass a float, e.g. 7.5"),
        ({"cfg": True}, TypeError, r"cfg must be a Python number, got bool"),
        ({"positive": X}, TypeError, r"positive must be a mapping .*got Tensor; e.g. positive=\{'encoder_hidden"),
        ({"cfg": 2, "negative": [X]}, TypeError, r"negative must be a mapping .*got list; e.g. negative=\{"),
        ({"denoiser": 3}, TypeError, r"denoiser must be callable as denoiser\(x, sigma, .*got int"),
    ],
)
def test_wrong_arguments_are_refused_with_the_fix(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        guide(**{"denoiser": Spy(), **arguments})


def test_a_missing_negative_is_found_in_the_first_call_of_a_pair() -> None:
    with pytest.raises(ValueError, match=r"a CFG\+\+ sampler needs .*negative= is missing"):
        guide(Spy(), pair=True)(X, SIGMA)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_wrong_output_is_refused_with_the_fix(cfg: float) -> None:
    with pytest.raises(TypeError, match=r"denoiser must return a tensor, got tuple; .*sigma, \*\*c\)\[0\]"):
        guide(lambda x, sigma: (x,), cfg, negative={})(X, SIGMA)
    with pytest.raises(ValueError, match=r"denoiser must return the shape of its input"):
        guide(lambda x, sigma: x[:1], cfg, negative={})(X, SIGMA)


def test_numpy_numbers_are_numbers() -> None:
    expected = guide(Spy(), 3.0, POSITIVE, NEGATIVE)(X, SIGMA)
    assert torch.equal(guide(Spy(), np.float32(3.0), POSITIVE, NEGATIVE)(X, SIGMA), expected)
