"""A pipeline as a network: the scheduler of one timestep, remembered prompts, and what belongs to which row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from pipelines import CALLS, EVENTS, build, noise_for

from kinvert.adapters.diffusers import host
from kinvert.adapters.diffusers.evaluation import KEPT, Memo, OneTimestep, PipelineNetwork, Rows

PIPELINES = [family for family in CALLS if family != "ddpm"]


def network_of(pipe: Any, steps: int = 6, **call: Any) -> PipelineNetwork:
    return PipelineNetwork(pipe, Rows.of(call), steps)


def evaluate(network: PipelineNetwork, x: torch.Tensor, t: float = 501.0) -> torch.Tensor:
    return network(x, torch.tensor([t]), 0.5)


# -- rows -------------------------------------------------------------------------------------------------------------
def test_one_prompt_is_that_of_all_rows() -> None:
    rows = Rows.of({"prompt": "a cat", "guidance_scale": 3.0, "negative_prompt": None, "original_size": (8, 8)})
    assert rows.batch is None
    assert rows.call(2) == {
        "prompt": ["a cat"] * 2, "guidance_scale": 3.0, "negative_prompt": None, "original_size": (8, 8)
    }  # fmt: skip


def test_rows_take_their_own_prompts_and_embeddings() -> None:
    embeddings = torch.arange(6.0).reshape(3, 2)
    rows = Rows.of({"prompt": ["a", "b", "c"], "prompt_embeds": embeddings, "negative_prompt_embeds": embeddings[:1]})
    taken = rows.take(torch.tensor([2, 0, 2, 2]))
    call = taken.call(4)
    assert rows.batch == 3 and taken.batch == 4
    assert call["prompt"] == ["c", "a", "c", "c"]
    assert torch.equal(call["prompt_embeds"], embeddings[[2, 0, 2, 2]])
    assert torch.equal(call["negative_prompt_embeds"], embeddings[[0] * 4])


def test_several_images_of_a_prompt_are_rows() -> None:
    rows = Rows.of({"prompt": ["a", "b"], "negative_prompt": "c", "num_images_per_prompt": 2})
    assert rows.call(4) == {
        "prompt": ["a", "a", "b", "b"], "negative_prompt": ["c"] * 4, "num_images_per_prompt": 1
    }  # fmt: skip


def test_other_arguments_replace_those_of_the_call() -> None:
    rows = Rows.of({"prompt": ["a", "b"], "guidance_scale": 3.0}).joined({"prompt": "c", "guidance_scale": 1.0})
    assert rows.call(2) == {"prompt": ["c", "c"], "guidance_scale": 1.0}
    assert Rows.of({"prompt": "a"}).joined({"prompt": ["b", "c"]}).call(2) == {"prompt": ["b", "c"]}


@pytest.mark.parametrize(
    ("call", "batch", "message"),
    [
        ({"prompt": ["a", "b"], "negative_prompt": ["c"] * 3}, 2, "prompt 2, negative_prompt 3"),
        ({"prompt": ["a", "b"]}, 3, r"prompt has 2 entries, but there are 3 latents"),
        ({"prompt": []}, 1, "prompt is empty; give one"),
    ],
)
def test_numbers_of_prompts_that_do_not_fit_are_refused(call: dict[str, Any], batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rows.of(call).call(batch)


# -- the call ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", PIPELINES)
def test_a_row_of_a_batch_is_the_evaluation_of_its_own_prompt(family: str) -> None:
    call = CALLS[family] | {"prompt": ["a cat", "the dog", "a photo"]}
    network, x = network_of(build(family), **call), noise_for(family, 3)
    every = evaluate(network, x)
    assert every.shape == x.shape
    for row in range(3):
        alone = evaluate(network.take(torch.tensor([row])), x[[row]])
        assert torch.allclose(alone, every[[row]], atol=1e-5)
    others = evaluate(network_of(build(family), **CALLS[family]), x)
    assert not torch.allclose(others[1], every[1], atol=1e-5)
    assert torch.allclose(others[0], every[0], atol=1e-5)


@pytest.mark.parametrize("family", PIPELINES)
def test_a_call_leaves_the_pipeline_as_it_was(family: str) -> None:
    pipe = build(family)
    before, config = dict(vars(pipe)), dict(pipe.config)
    state = torch.get_rng_state()
    evaluate(network_of(pipe, **CALLS[family]), noise_for(family))
    assert vars(pipe) == before and dict(pipe.config) == config
    assert all(value is before[name] for name, value in vars(pipe).items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_call_that_fails_leaves_the_pipeline_as_it_was() -> None:
    pipe = build("sdxl")
    before = dict(vars(pipe))
    with pytest.raises(ValueError, match="divisible by 8"):
        evaluate(network_of(pipe, **CALLS["sdxl"] | {"height": 15}), noise_for("sdxl"))
    assert vars(pipe) == before


def test_prompts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, count = build("sd15"), 0
    encode = type(pipe).encode_prompt

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return encode(*args, **kwargs)

    monkeypatch.setattr(type(pipe), "encode_prompt", counted)
    network = network_of(pipe, **CALLS["sd15"])
    first = evaluate(network, noise_for("sd15"))
    assert torch.equal(evaluate(network, noise_for("sd15")), first)
    assert count == 1
    evaluate(network.with_arguments({"prompt": "the dog"}), noise_for("sd15"))
    evaluate(network, noise_for("sd15", 2))
    assert count == 3


def test_a_memo_forgets_the_oldest_and_tells_tensors_apart() -> None:
    calls = []

    def double(value: torch.Tensor, scale: int = 2) -> torch.Tensor:
        calls.append(value)
        return scale * value

    remembered = Memo().around(double, {})
    values = [torch.zeros(1) for _ in range(KEPT)]
    for value in (*values, *values):
        remembered(value)
    assert len(calls) == KEPT
    remembered(values[0], scale=3)
    remembered(values[0])
    assert len(calls) == KEPT + 2


def test_guidance_is_the_pipelines_own() -> None:
    pipe, x = build("sd15"), noise_for("sd15")
    call = {"height": 16, "width": 16, "prompt": "a cat", "negative_prompt": "a dog"}

    def at(scale: float, **more: Any) -> torch.Tensor:
        return evaluate(network_of(pipe, guidance_scale=scale, **call | more), x)

    cond, uncond = at(1.0), at(1.0, prompt="a dog")
    assert torch.allclose(at(3.0), uncond + 3 * (cond - uncond), atol=1e-4)


def test_the_scheduler_of_one_timestep_answers_as_the_pipelines_own() -> None:
    pipe = build("sd15")
    one = OneTimestep(pipe.scheduler, torch.tensor([501]), 0.5)
    assert one.config is pipe.scheduler.config and one.alphas_cumprod is pipe.scheduler.alphas_cumprod
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        one.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("factor", "steps", "message"),
    [
        (2.0, 1, r"changes the latents that it is given, .*its from_pipe\(pipe\)"),
        (1.0, 2, "calls its scheduler 2 times a step"),
        (1.0, 0, "calls its scheduler 0 times a step"),
    ],
)
def test_a_pipeline_whose_step_is_no_evaluation_is_refused(factor: float, steps: int, message: str) -> None:
    class Other(type(build("sd15"))):  # type: ignore[misc]
        def __call__(self, latents: torch.Tensor, **_: Any) -> None:
            for _ in range(steps):
                self.scheduler.step(latents, 0, factor * latents)

    pipe = build("sd15")
    pipe.__class__ = Other
    with pytest.raises(ValueError, match=f"Other {message}"):
        evaluate(network_of(pipe), noise_for("sd15"))


def test_an_unconditional_network_is_called_by_itself() -> None:
    pipe, x = build("ddpm"), noise_for("ddpm")
    assert torch.equal(evaluate(network_of(pipe), x), pipe.unet(x, 501).sample)


def test_a_pipeline_without_latents_is_refused_with_the_way_out() -> None:
    class NoLatents(type(build("sd15"))):  # type: ignore[misc]
        def __call__(self, prompt: str) -> None:
            pass

    pipe = build("sd15")
    pipe.__class__ = NoLatents
    with pytest.raises(ValueError, match=r"NoLatents has no argument latents=.*from_eps\(lambda x, t"):
        evaluate(network_of(pipe), noise_for("sd15"))


def test_networks_tell_their_dtype() -> None:
    pipe = build("flux")
    assert host.network_dtype(pipe) == torch.float32
    assert EVENTS["flux"] == tuple(noise_for("flux").shape[1:])
