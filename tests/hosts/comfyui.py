"""Run the nodes of kinvert in the real ComfyUI, compare, and print a table.

    python tests/hosts/comfyui.py CHECKOUT [--original ComfyUI_Noise] [--out results.json] [--server] [-k WORDS]

CHECKOUT is a checkout of ComfyUI, whose requirements are installed, but for torchvision, torchaudio, kornia and
spandrel, which are not used here. The models are tiny and exact (`comfyui_models.py`). Each check has a number and the
most that it may be. It is not a part of the test suite, which has a stand-in for the host.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from comfyui_models import conditioning, image, load_host, model
from torch import Tensor

import kinvert as ki

STEPS = 10
EXACT = ("euler", "dpm_fast", "ipndm", "res_multistep")  # agree with the original node to rounding
CLOSE = ("heun", "dpm_2", "lms", "dpmpp_2m", "deis", "ipndm_v", "gradient_estimation")
# Their formulas on flow models differ from the host's on purpose: see `ki.flow_sampler`.
DIFFERENT_ON_FLOW = [
    "ddpm",
    "res_multistep_ancestral",
    "res_multistep_ancestral_cfg_pp",
    "euler_ancestral_cfg_pp",
    "dpmpp_2s_ancestral_cfg_pp",
]
CHECKS: dict[str, Any] = {}


@dataclass
class Row:
    """A line of the table: what was compared, the number, and the most it may be (None: only told)."""

    check: str
    what: str
    value: float
    most: float | None

    @property
    def good(self) -> bool:
        return self.most is None or self.value <= self.most


def check(function: Callable[[], Iterator[tuple[str, float, float | None]]]) -> Any:
    name = function.__name__

    def rows() -> Iterator[Row]:
        for what, value, most in function():
            yield Row(name, what, float(value), most)

    CHECKS[name] = rows
    return function


# -- helpers ----------------------------------------------------------------------------------------------------------
def node(key: str, **inputs: Any) -> tuple[Any, ...]:
    from kinvert.adapters.comfyui import NODE_CLASS_MAPPINGS

    cls = NODE_CLASS_MAPPINGS[key]
    assert cls.INPUT_TYPES()["required"]
    return getattr(cls(), cls.FUNCTION)(**inputs)


def original() -> Any:
    spec = importlib.util.spec_from_file_location("original_nodes", OPTIONS.original / "nodes.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, in parts of the rms of b."""
    gap = (a.double() - b.double()).abs().max() / b.double().square().mean().sqrt()
    return float("inf") if gap.isnan() else float(gap)


def rms(a: Tensor, b: Tensor) -> float:
    """Rms of the difference, in parts of the rms of b."""
    return float(((a - b).double().square().mean() / b.double().square().mean()).sqrt())


def host_sample(
    patcher: Any, sampler: Any, sigmas: Tensor, cfg: float, latent: Tensor, noise: Tensor | None = None
) -> Tensor:
    import comfy.sample
    import comfy.samplers

    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    noise = torch.zeros_like(latent) if noise is None else noise
    return comfy.sample.sample_custom(
        patcher, noise, cfg, sampler, sigmas, POSITIVE, NEGATIVE, latent, disable_pbar=True, seed=5
    )


def schedule(patcher: Any, name: str = "normal", steps: int = STEPS) -> Tensor:
    return node("KinvertScheduler", model=patcher, scheduler=name, steps=steps)[0]


def up(patcher: Any, **changes: Any) -> dict[str, Any]:
    """Inputs of the Unsampler."""
    given = {
        "model": patcher, "steps": STEPS, "end_at_step": 0, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal",
        "normalize": "disable", "positive": POSITIVE, "negative": NEGATIVE, "latent_image": image(patcher),
    }  # fmt: skip
    return given | changes


def exact(patcher: Any, **changes: Any) -> dict[str, Any]:
    """Inputs of Invert."""
    given = {
        "model": patcher, "sampler_name": "euler", "sigmas": schedule(patcher), "cfg": 1.0, "tolerance": 0.0,
        "max_evaluations": 0, "positive": POSITIVE, "negative": NEGATIVE, "latent_image": image(patcher),
    }  # fmt: skip
    return given | changes


def refused(function: Callable[[], Any]) -> str:
    """The message of the error that a call raises, or ""."""
    try:
        function()
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


# -- the original node ------------------------------------------------------------------------------------------------
@check
def unsampler_as_the_original() -> Iterator[tuple[str, float, float | None]]:
    theirs = original().Unsampler().unsampler
    for kind in ("eps", "v"):
        patcher = model(kind)
        for sampler in (*EXACT, *CLOSE):
            worst = 0.0
            for cfg, end, normalize in (
                (1.0, 0, "disable"),
                (2.5, 3, "disable"),
                (1.0, 2, "enable"),
                (2.5, 0, "enable"),
            ):
                given = up(patcher, cfg=cfg, end_at_step=end, normalize=normalize, sampler_name=sampler)
                ours = node("KinvertUnsampler", **given)[0]["samples"]
                worst = max(worst, rms(ours, theirs(**given)[0]["samples"]))
            yield f"{kind}, {sampler}", worst, 3e-6 if sampler in EXACT else 2e-4


@check
def unsampler_conditioning() -> Iterator[tuple[str, float, float | None]]:
    """Everything that a host's conditioning and patches can do reaches the denoiser: as in the original node."""
    theirs = original().Unsampler().unsampler
    half = torch.zeros(1, 64, 64)
    half[:, :, :32] = 1.0
    two = conditioning(0.5)
    cases: dict[str, tuple[Any, Callable[[Any], Any]]] = {
        "two prompts": (POSITIVE + two, lambda p: p),
        "area": (POSITIVE + conditioning(0.5, area=(4, 4, 2, 2), strength=1.0), lambda p: p),
        "prompt mask": (POSITIVE + conditioning(0.5, mask=half, mask_strength=1.0), lambda p: p),
        "time range": (
            conditioning(0.3, start_percent=0.0, end_percent=0.5)
            + conditioning(0.5, start_percent=0.5, end_percent=1.0),
            lambda p: p,
        ),
        "ControlNet": (conditioning(0.3, control=TinyControl(), control_apply_to_uncond=False), lambda p: p),
        "hooks (a LoRA in the prompt)": (conditioning(0.3, hooks=lora_hook()), lambda p: p),
        "cfg function": (POSITIVE, cfg_patched),
        "after cfg": (POSITIVE, post_patched),
        "network wrapper": (POSITIVE, wrapped),
    }
    for name, (positive, patch) in cases.items():
        patcher = patch(model("eps").clone())
        given = up(patcher, cfg=2.0, positive=positive)
        ours, other = node("KinvertUnsampler", **given)[0]["samples"], theirs(**given)[0]["samples"]
        plain = node("KinvertUnsampler", **up(model("eps"), cfg=2.0))[0]["samples"]
        yield f"{name}", relative(ours, other), 3e-6
        yield f"{name}: has no effect", float(relative(ours, plain) < 1e-3), 0


def lora_hook() -> Any:
    """A change of the weights that belongs to one prompt."""
    import comfy.hooks

    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=0.0)
    hook.need_weight_init = False
    hook.weights = {"diffusion_model.centres": ("diff", (torch.full((3, 16), 0.3),))}
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return group


def cfg_patched(patcher: Any) -> Any:
    patcher.set_model_sampler_cfg_function(lambda a: a["uncond"] + 0.8 * a["cond_scale"] * (a["cond"] - a["uncond"]))
    return patcher


def post_patched(patcher: Any) -> Any:
    patcher.set_model_sampler_post_cfg_function(lambda a: 0.9 * a["denoised"] + 0.1 * a["cond_denoised"])
    return patcher


def wrapped(patcher: Any) -> Any:
    patcher.set_model_unet_function_wrapper(lambda f, a: 1.01 * f(a["input"], a["timestep"], **a["c"]))
    return patcher


class TinyControl:
    """What the host asks of a ControlNet, without a network."""

    previous_controlnet = None
    extra_hooks = None
    strength = 1.0
    multigpu_clones: dict[Any, Any] = {}  # noqa: RUF012

    def get_control(self, x: Tensor, *_: Any) -> dict[str, Any]:
        return {"input": [], "middle": [torch.full((len(x), 1), 0.2)], "output": []}

    def pre_run(self, *_: Any) -> None: ...

    def cleanup(self) -> None: ...

    def get_models(self) -> list[Any]:
        return []

    def get_models_only_self(self) -> list[Any]:
        return []

    def get_extra_hooks(self) -> list[Any]:
        return []

    def inference_memory_requirements(self, dtype: Any) -> int:
        return 0

    def is_clone(self) -> bool:
        return False

    def copy(self) -> TinyControl:
        return self


# -- samplers ---------------------------------------------------------------------------------------------------------
class Draws:
    """The same noises for the host's samplers and for kinvert's, by the number of the draw."""

    def __init__(self, like: Tensor, dtype: torch.dtype = torch.float32, stride: int = 1) -> None:
        self.like, self.dtype, self.count, self.stride = like, dtype, 1 - stride, stride

    def __call__(self, *_: Any) -> Tensor:
        self.count += self.stride
        return torch.randn(self.like.shape, generator=torch.Generator().manual_seed(self.count)).to(self.dtype)


@check
def samplers_as_the_host() -> Iterator[tuple[str, float, float | None]]:
    import comfy.samplers
    from comfy.k_diffusion import sampling as k

    from kinvert.adapters.comfyui import host
    from kinvert.adapters.comfyui.samplers import RuleSampler

    for kind in ("eps", "flow"):
        patcher = model(kind)
        latent = torch.zeros_like(image(patcher)["samples"])
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
        for name in comfy.samplers.KSampler.SAMPLERS:
            if name not in ki.SAMPLERS:
                yield f"{kind}, {name}: kinvert does not have it", 0.0, None
                continue
            sigmas = node_schedule(patcher, name)
            theirs = comfy.samplers.sampler_object(name)
            if (
                not name.startswith(("dpm_fast", "dpm_adaptive"))
                and "noise_sampler" in inspect.signature(getattr(k, f"sample_{name}", lambda: 0)).parameters
            ):
                theirs.extra_options = {**theirs.extra_options, "noise_sampler": Draws(latent)}  # the default is shared
            stride = (
                2 if name == "exp_heun_2_x0_sde" else 1
            )  # the host draws a second noise, which it multiplies with 0
            ours = host.to_sampler(RuleSampler(ki.sampler(name), noise=Draws(latent, torch.float64, stride)))
            cfg = 1.5
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    a = host_sample(patcher, ours, sigmas, cfg, latent, noise)
            except ValueError as error:
                yield f"{kind}, {name}: refused ({str(error)[:60]})", 0.0, None
                continue
            b = host_sample(patcher, theirs, sigmas, cfg, latent, noise)
            different = kind == "flow" and name in DIFFERENT_ON_FLOW
            rough = 5e-3 if kind == "flow" and "uni_pc" in name else 2e-4  # whose coefficients the host has in float32
            yield f"{kind}, {name}", rms(a, b), None if different else rough


def node_schedule(patcher: Any, sampler: str) -> Tensor:
    import comfy.samplers

    return comfy.samplers.KSampler(patcher, 12, "cpu", sampler, "sgm_uniform", 1.0).sigmas


@check
def sampler_upwards() -> Iterator[tuple[str, float, float | None]]:
    for kind in ("eps", "flow"):
        patcher = model(kind)
        rising = schedule(patcher).flip(0).clamp(min=1e-4)[:-1]
        for name in ("euler", "heun", "dpmpp_2m"):
            ours = node("KinvertSampler", sampler_name=name)[0]
            latent = image(patcher)["samples"]
            a, b = (host_sample(patcher, s, rising, 1.0, latent) for s in (ours, name))
            yield f"{kind}, {name} on a rising schedule", rms(a, b), 2e-4


@check
def schedules_as_the_host() -> Iterator[tuple[str, float, float | None]]:
    import comfy.samplers

    for kind in ("eps", "flow"):
        patcher = model(kind)
        for name in comfy.samplers.KSampler.SCHEDULERS:
            theirs = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), name, 20)
            ours = schedule(patcher, name, 20)
            yield f"{kind}, {name}", float((ours - theirs).abs().max()) if len(ours) == len(theirs) else 9.0, 1e-7
        for name in (n for n in ki.SCHEDULES if n not in comfy.samplers.KSampler.SCHEDULERS):
            text = refused(lambda name=name, patcher=patcher: schedule(patcher, name, 20))
            yield f"{kind}, {name}, of kinvert alone" + (f": {text[:50]}" if text else ""), 0.0, None


# -- inversion --------------------------------------------------------------------------------------------------------
@check
def invert_and_back_by_the_host() -> Iterator[tuple[str, float, float | None]]:
    for kind in ("eps", "v", "flow"):
        patcher = model(kind)
        for sampler in ("euler", "heun", "dpmpp_2m"):
            for cfg in (1.0, 3.0):
                given = exact(patcher, sampler_name=sampler, cfg=cfg)
                start = time.perf_counter()
                latent, noise, sigmas, report = node("KinvertInvert", **given)
                took = time.perf_counter() - start
                z = given["latent_image"]["samples"]
                if kind == "flow":
                    back = host_sample(patcher, sampler, sigmas, cfg, z * 0, noise.generate_noise({"samples": z * 0}))
                else:
                    back = host_sample(patcher, sampler, sigmas, cfg, latent["samples"])
                calls = report.split("called ")[1].split(" ")[0]
                told = f"{kind}, {sampler}, cfg {cfg:g} ({calls} evaluations, {took:.1f} s)"
                hard = kind == "flow" and sampler == "dpmpp_2m"
                yield told, rms(back, z), None if hard else 2e-4
                yield f"{told}: says so", float(("converged        2 of 2" in report) != (rms(back, z) < 2e-4)), 0
        by_node = node("KinvertUnsampler", **up(patcher, sampler_name="euler", end_at_step=1))
        sigmas = schedule(patcher)[1:]
        yield (
            f"{kind}, euler by Unsampler",
            rms(host_sample(patcher, "euler", sigmas, 1.0, by_node[0]["samples"]), z),
            None,
        )


@check
def noise_output() -> Iterator[tuple[str, float, float | None]]:
    """NOISE starts the host at the same state as LATENT does."""
    for kind in ("eps", "flow"):
        patcher = model(kind)
        empty = {"samples": torch.zeros_like(image(patcher)["samples"])}
        for end in (0, 1):
            latent, noise, _ = node("KinvertUnsampler", **up(patcher, end_at_step=end))
            sigmas = schedule(patcher)[end:]
            by_noise = host_sample(patcher, "euler", sigmas, 1.0, empty["samples"], noise.generate_noise(empty))
            if kind == "eps" or end:
                by_latent = host_sample(patcher, "euler", sigmas, 1.0, latent["samples"])
                yield f"{kind}, end_at_step {end}", relative(by_noise, by_latent), 1e-3
            text = refused(lambda noise=noise, latent=latent: noise.generate_noise(latent))
            yield (
                f"{kind}, end_at_step {end}: an image beside it is refused",
                float(not text),
                float(kind == "flow" and not end),
            )


@check
def extract_and_replay() -> Iterator[tuple[str, float, float | None]]:
    for kind in ("eps", "flow"):
        patcher = model(kind)
        for sampler in ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "dpmpp_3m_sde", "lcm", "ddpm"):
            for path in ("independent", "chain"):
                given = exact(patcher, sampler_name=sampler, cfg=2.0, path=path, seed=3)
                del given["tolerance"], given["max_evaluations"]
                message = ""
                try:
                    latent, replaying, sigmas, _ = node("KinvertExtractNoise", **given)
                except ValueError as error:
                    message = str(error)
                if message:
                    yield f"{kind}, {sampler}, {path}: refused ({message[:60]})", 0.0, None
                    continue
                back = host_sample(patcher, replaying, sigmas, 2.0, latent["samples"])
                yield f"{kind}, {sampler}, {path}", rms(back, given["latent_image"]["samples"]), 1e-3
        text = refused(lambda p=patcher, s=replaying, z=latent: host_sample(p, s, schedule(p), 2.0, z["samples"]))
        yield f"{kind}: another schedule is refused", float("replays noises" not in text), 0


@check
def round_trip_and_controllers() -> Iterator[tuple[str, float, float | None]]:
    for kind in ("eps", "flow"):
        patcher = model(kind)
        for name in ("euler", "heun", "rf_solver", "fireflow", "uni_pc", "ddim"):
            given = up(patcher, sampler_name=name, end_at_step=0)
            yield f"{kind}, {name}, rms", node("KinvertRoundTrip", **given)[1], None
        given = exact(patcher, gamma=0.5, eta=1.0, until=0.0, seed=1)
        for name in ("tolerance", "max_evaluations", "sampler_name"):
            del given[name]
        latent, steered, sigmas, report = node("KinvertRFInversion", **given)
        back = host_sample(patcher, steered, sigmas, 1.0, latent["samples"])
        yield f"{kind}, RF-Inversion with eta 1", rms(back, given["latent_image"]["samples"]), 1e-3
        given["eta"] = 0.0
        latent, steered, sigmas, report = node("KinvertRFInversion", **given)
        back = host_sample(patcher, steered, sigmas, 1.0, latent["samples"])
        told = float(report.split("rms of ")[1].split("\n")[0])
        size = float(node_image(patcher).square().mean().sqrt())
        yield (
            f"{kind}, RF-Inversion with eta 0 (the error told is right)",
            abs(rms(back, given["latent_image"]["samples"]) * 1.0 - told / size),
            0.02,
        )


def node_image(patcher: Any) -> Tensor:
    return patcher.model.process_latent_in(image(patcher)["samples"])


# -- what the original does wrong ---------------------------------------------------------------------------------------
@check
def masks_of_each_item() -> Iterator[tuple[str, float, float | None]]:
    for kind in ("eps", "flow"):
        patcher = model(kind)
        latent = image(patcher)
        mask = torch.ones(2, 64, 64)
        mask[0, :, :32], mask[1, :32] = 0.0, 0.0
        latent["noise_mask"] = mask
        z = latent["samples"]
        inside = torch.ones_like(z[:, :1])
        inside[0, :, :, :4], inside[1, :, :4] = 0.0, 0.0
        outside = (1 - inside).bool().expand_as(z)
        result = node("KinvertUnsampler", **up(patcher, latent_image=latent, end_at_step=1))[0]["samples"]
        yield f"{kind}, Unsampler: what is kept moves by", relative(result[outside], z[outside]), 1e-5
        yield f"{kind}, Unsampler: the rest stays", float(relative(result[~outside], z[~outside]) < 0.1), 0
        given = exact(patcher, latent_image=latent, sigmas=schedule(patcher)[1:], sampler_name="heun")
        found, _, sigmas, _ = node("KinvertInvert", **given)
        yield f"{kind}, Invert: what is kept moves by", relative(found["samples"][outside], z[outside]), 1e-5
        import comfy.sample
        import comfy.samplers

        back = comfy.sample.sample_custom(
            patcher, z * 0, 1.0, comfy.samplers.sampler_object("heun"), sigmas, POSITIVE, NEGATIVE, found["samples"],
            noise_mask=found["noise_mask"], disable_pbar=True,
        )  # fmt: skip
        yield f"{kind}, Invert: sampled back by the host", rms(back, z), 2e-4


@check
def conditioning_of_each_item() -> Iterator[tuple[str, float, float | None]]:
    """A batch with a prompt for each item: its rows are evaluated in their places while the search drops some."""
    patcher = model("eps")
    prompts = [torch.cat([conditioning(v)[0][0] for v in (0.1, 0.5, 0.9, 1.3)]), {}]
    latent = image(patcher, batch=4)
    given = exact(patcher, latent_image=latent, positive=[prompts], sampler_name="heun", cfg=1.0)
    found, _, sigmas, _ = node("KinvertInvert", **given)
    import comfy.sample
    import comfy.samplers

    back = comfy.sample.sample_custom(
        patcher, latent["samples"] * 0, 1.0, comfy.samplers.sampler_object("heun"), sigmas, [prompts], NEGATIVE,
        found["samples"], disable_pbar=True,
    )  # fmt: skip
    yield "a batch of 4 with 4 prompts", rms(back, latent["samples"]), 2e-4
    alone = [
        node(
            "KinvertInvert",
            **(
                given
                | {"latent_image": {"samples": latent["samples"][i : i + 1]}, "positive": [[prompts[0][i : i + 1], {}]]}
            ),
        )[0]["samples"]
        for i in range(4)
    ]
    yield "each item as if it were alone", relative(found["samples"], torch.cat(alone)), 1e-3


@check
def refused_before_the_first_evaluation() -> Iterator[tuple[str, float, float | None]]:
    patcher = model("eps")
    network = patcher.model.diffusion_model
    count = []
    hook = network.register_forward_pre_hook(lambda *_: count.append(1))
    for name in ("euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "lcm", "ddpm", "seeds_2", "er_sde"):
        for key, given in (("KinvertUnsampler", up(patcher)), ("KinvertInvert", exact(patcher))):
            count.clear()
            text = refused(lambda key=key, given=given, name=name: node(key, **(given | {"sampler_name": name})))
            yield f"{key}, {name}: {text.partition(';')[2][:70].strip()}", float(len(count) + (";" not in text)), 0
    for name in ("edict", "bdia"):
        count.clear()
        text = refused(lambda name=name: node("KinvertInvert", **exact(patcher, sampler_name=name)))
        yield f"KinvertInvert, {name}: {text[:70]}", float(len(count) + ("LATENT" not in text)), 0
    hook.remove()


@check
def interruption() -> Iterator[tuple[str, float, float | None]]:
    import comfy.model_management as management

    for key, given in (
        ("KinvertUnsampler", up(model("eps"), steps=30)),
        ("KinvertInvert", exact(model("eps"))),
        ("KinvertRoundTrip", up(model("eps"), steps=30)),
    ):
        count = []

        def stop(*_: Any, count: list[int] = count) -> None:
            count.append(1)
            if len(count) == 12:
                management.interrupt_current_processing()

        hook = given["model"].model.diffusion_model.register_forward_pre_hook(stop)
        try:
            node(key, **given)
            yield f"{key}: ran on", 1, 0
        except management.InterruptProcessingException:
            yield f"{key}: evaluations after the stop", len(count) - 12, 2
        finally:
            management.interrupt_current_processing(False)
            hook.remove()


@check
def kinds_of_latents() -> Iterator[tuple[str, float, float | None]]:
    patcher = model("eps")
    z = image(patcher)["samples"]
    reference = node("KinvertUnsampler", **up(patcher))[0]["samples"]
    for dtype, most in ((torch.float16, 2e-2), (torch.bfloat16, 2e-1), (torch.float64, 1e-4)):
        result = node("KinvertUnsampler", **up(patcher, latent_image={"samples": z.to(dtype)}))[0]["samples"]
        yield f"{dtype} latent", relative(result, reference), most
    half = node("KinvertUnsampler", **up(model("eps", torch.float16)))[0]["samples"]
    yield "float16 network", relative(half, reference), 5e-2
    given = exact(model("eps", torch.float16))
    found, _, sigmas, _ = node("KinvertInvert", **given)
    back = host_sample(given["model"], "euler", sigmas, 1.0, found["samples"])
    yield "float16 network, Invert and back", rms(back, z), 2e-2
    video = z[:, :, None].repeat(1, 1, 3, 1, 1)
    result = node("KinvertUnsampler", **up(patcher, latent_image={"samples": video}))[0]["samples"]
    yield "5-D latent, each frame as an image", relative(result[:, :, 1], reference), 1e-4
    before = {"samples": z.clone(), "batch_index": [0, 1]}
    after = node("KinvertUnsampler", **up(patcher, latent_image=before))[0]
    yield "the input is not modified", float(not torch.equal(before["samples"], z)), 0
    yield "other entries are kept", float(after["batch_index"] != [0, 1]), 0
    if importlib.util.find_spec("comfy.nested_tensor"):
        yield from nested_latents(patcher, z)


def nested_latents(patcher: Any, z: Tensor) -> Iterator[tuple[str, float, float | None]]:
    import comfy.conds
    import comfy.nested_tensor

    base = patcher.model
    plain = type(base).extra_conds

    def extra_conds(self: Any = None, **kwargs: Any) -> Any:
        out = plain(base, **kwargs)
        out["latent_shapes"] = comfy.conds.CONDConstant(kwargs["latent_shapes"])
        return out

    base.extra_conds = extra_conds
    second = 0.5 * z[:, :, :4, :4]
    both = comfy.nested_tensor.NestedTensor([z, second])
    found = node("KinvertUnsampler", **up(patcher, latent_image={"samples": both}))[0]["samples"].unbind()
    del base.extra_conds
    for part, one in zip(found, (z, second), strict=True):
        alone = node("KinvertUnsampler", **up(patcher, latent_image={"samples": one}))[0]["samples"]
        yield f"nested latent, the part of shape {tuple(one.shape)}", relative(part, alone), 1e-5


@check
def long_schedules_and_progress() -> Iterator[tuple[str, float, float | None]]:
    import comfy.utils

    patcher = model("eps")
    seen: list[tuple[int, int]] = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *_, **__: seen.append((value, total)))
    for steps in (7, 20):
        sigmas = schedule(patcher, "ddim_uniform", steps)
        text = node("KinvertUnsampler", **up(patcher, scheduler="ddim_uniform", steps=steps))[2]
        end = float(text.split(" to ")[1].split("\n")[0])
        yield (
            f"ddim_uniform, {steps} steps asked, {len(sigmas) - 1} made: misses the top by",
            abs(end - float(sigmas[0])) / end,
            1e-3,
        )
    for key, given in (
        ("KinvertUnsampler", up(patcher)),
        ("KinvertInvert", exact(patcher)),
        ("KinvertUnsampler", up(patcher, sampler_name="dpm_fast")),
    ):
        seen.clear()
        node(key, **given)
        yield f"{key}: the bar ends before its end by", 1 - seen[-1][0] / seen[-1][1], 0
    comfy.utils.set_progress_bar_global_hook(None)


@check
def small_nodes_as_the_original() -> Iterator[tuple[str, float, float | None]]:
    old = original()
    patcher = model("eps")
    a, b = image(patcher), image(patcher, seed=2)
    mask = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0))
    for name, m in (("", None), (", mask", mask)):
        ours = node("KinvertSlerpLatents", latents1=a, factor=0.3, latents2=b, mask=m)[0]["samples"]
        yield f"Slerp{name}", relative(ours, old.LatentSlerp().slerp_latents(a, 0.3, b, m)[0]["samples"]), 1e-5
        ours = node("KinvertInjectNoise", latents=a, strength=2.0, noise=b, mask=m)[0]["samples"]
        yield f"Inject Noise{name}", relative(ours, old.InjectNoise().inject_noise(a, 2.0, b, m)[0]["samples"]), 1e-6
    given = {
        "model": patcher,
        "sampler_name": "euler",
        "scheduler": "karras",
        "steps": 20,
        "start_at_step": 2,
        "end_at_step": 12,
    }
    yield "Get Sigma", abs(node("KinvertGetSigma", **given)[0] / float(old.GetSigma().calc_sigma(**given)[0]) - 1), 1e-6
    given = {"source": "CPU", "seed": 3, "width": 64, "height": 96, "batch_size": 2}
    ours, theirs = node("KinvertNoisyLatent", **given)[0], old.NoisyLatentImage().create_noisy_latents(**given)[0]
    yield "Noisy Latent Image", relative(ours["samples"], theirs["samples"]), 0
    flow = model("flow")
    sigma = node(
        "KinvertGetSigma",
        model=flow,
        sampler_name="euler",
        scheduler="normal",
        steps=10,
        start_at_step=4,
        end_at_step=10,
    )[0]
    t = float(schedule(flow)[4])
    z = image(flow)["samples"]
    n = torch.randn_like(z)
    noisy = node("KinvertInjectNoise", latents={"samples": z}, strength=sigma, noise={"samples": n})[0]["samples"]
    state = (1 - t) * flow.model.process_latent_in(noisy)
    yield "Get Sigma, flow: the state of t", relative(state, (1 - t) * flow.model.process_latent_in(z) + t * n), 1e-5


@check
def unsample_without_the_host() -> Iterator[tuple[str, float, float | None]]:
    """The node, and `ki.unsample` on a denoiser that is written down by hand."""
    patcher = model("eps")
    base = patcher.model
    context = POSITIVE[0][0]

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.reshape(-1, 1, 1, 1)
        t = base.model_sampling.timestep(sigma).float()
        return x - s * base.diffusion_model((x / (s**2 + 1) ** 0.5).float(), t.float(), context.expand(len(x), -1, -1))

    z = image(patcher)["samples"]
    for name in ("euler", "heun", "dpmpp_2m", "uni_pc", "ddim"):
        sigmas = node("KinvertScheduler", model=patcher, scheduler="normal", steps=STEPS)[0]
        ours = node("KinvertUnsampler", **up(patcher, sampler_name=name, sigmas=sigmas))[0]["samples"]
        plain = ki.unsample(denoiser, base.process_latent_in(z).double(), sigmas, sampler=name, sigma_offset=1e-4)
        yield name, rms(ours, base.process_latent_out(plain)), 1e-3 if name == "uni_pc" else 1e-4


# -- main -------------------------------------------------------------------------------------------------------------
def main() -> None:
    rows: list[Row] = []
    for name, run in CHECKS.items():
        if not any(word in name for word in OPTIONS.k):
            continue
        start = time.perf_counter()
        try:
            with torch.inference_mode():
                for row in run():
                    rows.append(row)
                    print(
                        f"{'ok ' if row.good else 'BAD'} {row.check:34} {row.value:9.2g} of {row.most}  {row.what}",
                        flush=True,
                    )
        except Exception as error:
            traceback.print_exc()
            rows.append(Row(name, f"{type(error).__name__}: {error}", float("inf"), 0.0))
        print(f"    {name}: {time.perf_counter() - start:.1f} s", flush=True)
    if OPTIONS.server:
        from comfyui_server import run_server

        for what, value, most in run_server(OPTIONS.checkout, OPTIONS.port):
            rows.append(Row("server", what, value, most))
            print(f"{'ok ' if rows[-1].good else 'BAD'} server {value:9.2g} of {most}  {what}", flush=True)
    bad = [row for row in rows if not row.good]
    print(f"{len(rows)} rows, {len(bad)} bad")
    if OPTIONS.out:
        about = {
            "ComfyUI": VERSION,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "kinvert": ki.__version__,
        }
        table = [asdict(row) | {"value": float(f"{row.value:.3g}")} for row in rows]
        lines = ",\n".join("  " + json.dumps(row) for row in table)
        OPTIONS.out.write_text(f'{{"about": {json.dumps(about)},\n "rows": [\n{lines}\n]}}\n')
    sys.exit(bool(bad))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--original", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--server", action="store_true")
    parser.add_argument("--port", type=int, default=8199)
    parser.add_argument("-k", nargs="*", default=[""])
    OPTIONS = parser.parse_args()
    VERSION = load_host(OPTIONS.checkout)
    POSITIVE, NEGATIVE = conditioning(0.3), conditioning(0.1)
    main()
