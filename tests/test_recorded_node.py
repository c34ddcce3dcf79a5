"""`unsample` against outputs of the real ComfyUI node *Unsampler*, in float32 as the node computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from recordings import Case, array, index, load, relative_error
from torch import Tensor

import kinvert as ki
from kinvert.engine import plain_loop
from kinvert.engine.adaptive import run_adaptive

LATENT_SCALE = {"sd15": 0.18215, "sdxl": 0.13025, "sd21v": 0.18215, "zsnr": 0.18215}
# Samplers that the node runs with results that are no inversion (it returns the last denoised image, or NaN), or
# that it cannot run at all; kinvert refuses the first and runs the others.
REFUSED = {"euler_ancestral"}
# A single step of uni_pc evaluates nothing: the node returns the latent times a constant, kinvert too, and says so.
EVALUATES_NOTHING = {"0123", "0124", "0127"}
FAIL_IN_NODE = {"ddim", "uni_pc", "uni_pc_bh2"}


def network(tc: float) -> Callable[..., Tensor]:
    """The network of the recordings: tanh(w x + b + tc sin(t / 200)), w and b from the conditioning."""

    def f(x: Tensor, t: Tensor, ctx: Tensor) -> Tensor:
        w, b = (ctx[:, k, : x.shape[1]].to(x.dtype)[:, :, None, None] for k in (0, 1))
        return torch.tanh(w * x + b + tc * torch.sin(t.to(x.dtype).reshape(-1, 1, 1, 1) / 200))

    return f


def node_inputs(case: Case) -> tuple[Tensor, Tensor | None]:
    arrays = load("part3_shared")
    name = case["latent"]
    latent = torch.zeros(1, 4, 4, 4) if name == "zeros4" else torch.tensor(arrays[f"latent/{name}"])
    if "mask" not in case:
        return latent, None
    # The node prepares masks twice, so every item gets item 0's mask; ours are per item, so give it that one.
    mask = torch.tensor(arrays[f"mask/{case['mask']}"])
    return latent, mask[:1] if mask.ndim > 2 else mask


def run_node(case: Case, dtype: torch.dtype) -> Tensor:
    model = case["model"]
    levels = ki.levels.stable_diffusion(zero_snr=model == "zsnr")
    adapter = ki.denoisers.from_v if model in ("sd21v", "zsnr") else ki.denoisers.from_eps
    arrays = load("part3_shared")
    positive, negative = ({"ctx": torch.tensor(arrays[f"ctx/ctx4_{sign}"])} for sign in ("pos", "neg"))
    sigmas = ki.schedule(case["scheduler"], case["steps"], levels, sampler=case["sampler"])
    # The node counts steps from the clean end of the schedule, which may have more of them than asked for.
    run_steps = case["steps"] - min(case["end_at_step"], case["steps"] - 1)
    latent, mask = node_inputs(case)
    scale = LATENT_SCALE[model]
    out = ki.unsample(
        adapter(network(case["tc"]), levels),
        latent.to(dtype) * scale,
        sigmas,
        sampler=case["sampler"],
        end_at_step=max(0, len(sigmas) - 1 - run_steps),
        cfg=case["cfg"],
        positive=positive,
        negative=negative,
        mask=mask,
        normalize=False,
    )
    out = out / scale  # the node normalizes what it hands out, after the scale
    return (out - out.mean()) / out.std() if case["normalize"] else out


CASES = [c for c in index()["node"] if c["model"] in LATENT_SCALE and c["sampler"] in ki.SAMPLERS]
# Where float32 decides: the first step up starts at sigma = 1e-4, and its slope (x - D)/sigma multiplies the rounding of
# x by 1e4; multistep samplers extrapolate that slope, the adaptive one also chooses other steps. These cases (by the
# number they begin with) are held to ten times the distance of our own float32 run from our float64 run, both by sums
# of products as the node takes them: they round more than the engine's interpolations.
BOUND_BY_ROUNDING = {
    "dpmpp_2m": "0015 0017 0087 0102 0103 0214 0215 0231 0233 0235 0237 0239 0241 0245 0247 0252 0277 0279",
    "lms": "0024 0025 0026 0028 0116 0117 0121 0122 0186 0187 0188 0189 0218 0219 0258 0263 0268 0286 0288",
    "dpm_adaptive": "0048 0049 0050 0051 0052 0053 0144 0145 0146 0147 0149 0150 0202 0203 0205 0226 0227 0369 0370 0371 "
    "0372 0301 0302 0303",
    "deis": "0062 0314",
    "ipndm_v": "0066",
    "heunpp2": "0068 0069",
    "euler": "0084 0088 0089 0210 0230 0232 0234 0236 0238 0240 0244 0246",
    "heun": "0095 0096 0212",
    "dpm_2": "0109 0110 0183 0216 0281",
    "dpm_fast": "0137 0138 0224",
}
FINITE = [c for c in CASES if c.get("finite") and c["sampler"] not in REFUSED]


def assert_matches(case: Case, run: Callable[[Case, torch.dtype], Tensor]) -> None:
    got = run(case, torch.float32)
    error = relative_error(got, array(case, "out"))
    if case["id"][:4] in BOUND_BY_ROUNDING.get(case["sampler"], ""):
        with plain_loop():
            rounding = relative_error(run(case, torch.float32), run(case, torch.float64).numpy())
        assert error <= max(3e-4, 10 * rounding)
    else:
        assert error <= 3e-4


@pytest.mark.parametrize("case", FINITE, ids=lambda c: c["id"])
def test_matches_node(case: Case) -> None:
    if case["id"][:4] in EVALUATES_NOTHING:
        assert case["sampler"] == "uni_pc"
        with pytest.warns(RuntimeWarning, match="uni_pc returns x as it came, or a multiple of it"):
            assert_matches(case, run_node)
        return
    assert_matches(case, run_node)


# -- rectified-flow models: the node runs on flow times, from (1 - 1e-4) times the latent, and divides by 1 - t at the end
FLOW_LATENT = {"sd3": (1.5305, 0.0609, 3.0), "flow_sd15fmt": (0.18215, 0.0, 1.0)}  # scale, shift, shift of the levels
FLOW = [c for c in index()["node"] if c["model"] in FLOW_LATENT and c.get("finite") and c["sampler"] in ki.SAMPLERS]


def run_flow_node(case: Case, dtype: torch.dtype) -> Tensor:
    scale, shift, level_shift = FLOW_LATENT[case["model"]]
    levels = ki.levels.flow(shift=level_shift)
    arrays, channels = load("part3_shared"), 16 if case["model"] == "sd3" else 4
    context = {sign: {"ctx": torch.tensor(arrays[f"ctx/ctx{channels}_{sign}"])} for sign in ("pos", "neg")}
    sigmas = ki.schedule(case["scheduler"], case["steps"], levels, sampler=case["sampler"])
    run_steps = case["steps"] - min(case["end_at_step"], case["steps"] - 1)
    if case["latent"] == "zeros16":
        x = torch.zeros(1, 16, 4, 4, dtype=dtype)  # an empty latent is not taken to the network's units
    else:
        x = (torch.tensor(arrays[f"latent/{case['latent']}"]).to(dtype) - shift) * scale
    end = max(0, len(sigmas) - 1 - run_steps)
    denoiser = ki.denoisers.from_velocity(network(case["tc"]), levels)
    guidance = {"cfg": case["cfg"], "positive": context["pos"], "negative": context["neg"]}
    if end == 0 and sigmas[0] == 1:  # the node goes on to 1.0001, where no flow is: only a Plan of its levels does
        guided = ki.denoisers.guide(lambda *args, **kwargs: denoiser(*args, **kwargs), **guidance)  # says nothing of t
        rising = sigmas.flip(0) + 1e-4
        if case["sampler"] == "dpm_adaptive":
            out = run_adaptive(ki.sampler("dpm_adaptive"), guided, (1 - 1e-4) * x, rising)[0]
        else:
            out = ki.run(ki.compile_plan(case["sampler"], rising), guided, (1 - 1e-4) * x)
    else:
        x = (1 - 1e-4) * x  # as the host takes it to the time where the run starts
        out = ki.unsample(denoiser, x, sigmas, sampler=case["sampler"], end_at_step=end, **guidance)
    out = out / (1 - (float(sigmas[end]) + 1e-4)) / scale + shift
    return (out - out.mean()) / out.std() if case["normalize"] else out


@pytest.mark.parametrize("case", [c for c in FLOW if c["sampler"] not in REFUSED], ids=lambda c: c["id"])
def test_matches_node_on_flow_models(case: Case) -> None:
    assert_matches(case, run_flow_node)


@pytest.mark.parametrize("case", [c for c in CASES if c["sampler"] in REFUSED][:3], ids=lambda c: c["id"])
def test_refuses_what_is_no_inversion(case: Case) -> None:
    with pytest.raises(ValueError, match=f"{case['sampler']} cannot unsample.*eta=0.*'heun'"):
        run_node(case, torch.float32)


@pytest.mark.parametrize("case", [c for c in CASES if c["sampler"] in FAIL_IN_NODE][:6], ids=lambda c: c["id"])
def test_runs_where_the_node_fails(case: Case) -> None:
    assert torch.isfinite(run_node(case, torch.float32)).all()


def test_mask_of_the_node() -> None:
    """The resized mask is the one that the node really used."""
    for case in (c for c in CASES if "mask" in c and c.get("finite")):
        latent, mask = node_inputs(case)
        assert mask is not None
        ours = ki.denoisers.resize_mask(mask, latent).expand(len(latent), -1, -1, -1)[:, 0]
        torch.testing.assert_close(ours, torch.tensor(array(case, "mask_used")), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", index()["unet"], ids=lambda c: c["id"])
def test_matches_node_with_a_real_network(case: Case) -> None:
    """The k-th network call returns the k-th recorded output, unconditional rows first: the same calls in the same order."""
    outputs = iter(torch.tensor(array(case, "eps_calls")))
    times = iter(array(case, "call_t"))
    levels = ki.levels.stable_diffusion()

    def replayed(x: Tensor, t: Tensor, branch: Tensor) -> Tensor:
        assert torch.equal(t, torch.full_like(t, next(times)))
        assert branch.flatten().tolist() == ([1.0] if len(x) == 1 else [0.0, 1.0])
        return next(outputs)

    out = ki.unsample(
        ki.denoisers.from_eps(replayed, levels),
        torch.tensor(array(case, "latent")) * LATENT_SCALE["sd15"],
        ki.schedule(case["scheduler"], case["steps"], levels, sampler=case["sampler"]),
        sampler=case["sampler"],
        end_at_step=case["end_at_step"],
        cfg=case["cfg"],
        positive={"branch": torch.ones(1, 1)},
        negative={"branch": torch.zeros(1, 1)},
    )
    assert next(outputs, None) is None
    assert relative_error(out / LATENT_SCALE["sd15"], array(case, "out")) <= 3e-4
