"""The functions `sample_*`: signatures against facts of k-diffusion, runs against its recorded outputs."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from problems import mixture, noise_like
from recordings import Case, array, index, recorded_denoiser, relative_error, shared
from torch import Tensor

import kinvert as ki
import kinvert.adapters.k_diffusion as K

# Facts about k-diffusion 4601bf0: the names and defaults of the arguments.
FIRST = {"model": ..., "x": ..., "sigmas": ...}
COMMON = {"extra_args": None, "callback": None, "disable": None}
CHURN = FIRST | COMMON | {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}
NOISY = {"s_noise": 1.0, "noise_sampler": None}
ANCESTRAL = FIRST | COMMON | {"eta": 1.0} | NOISY
ENDS = {"model": ..., "x": ..., "sigma_min": ..., "sigma_max": ...}
SIGNATURES: dict[str, dict[str, Any]] = {
    "sample_euler": CHURN,
    "sample_heun": CHURN,
    "sample_dpm_2": CHURN,
    "sample_euler_ancestral": ANCESTRAL,
    "sample_dpm_2_ancestral": ANCESTRAL,
    "sample_dpmpp_2s_ancestral": ANCESTRAL,
    "sample_dpmpp_3m_sde": ANCESTRAL,
    "sample_dpmpp_sde": ANCESTRAL | {"r": 0.5},
    "sample_dpmpp_2m_sde": ANCESTRAL | {"solver_type": "midpoint"},
    "sample_dpmpp_2m": FIRST | COMMON,
    "sample_lms": FIRST | COMMON | {"order": 4},
    "sample_dpm_fast": ENDS | {"n": ...} | COMMON | {"eta": 0.0} | NOISY,
    "sample_dpm_adaptive": ENDS
    | COMMON
    | {"order": 3, "rtol": 0.05, "atol": 0.0078, "h_init": 0.05, "pcoeff": 0.0, "icoeff": 1.0, "dcoeff": 0.0}
    | {"accept_safety": 0.81, "eta": 0.0}
    | NOISY
    | {"return_info": False},
    "get_sigmas_karras": {"n": ..., "sigma_min": ..., "sigma_max": ..., "rho": 7.0, "device": "cpu"},
    "get_sigmas_exponential": {"n": ..., "sigma_min": ..., "sigma_max": ..., "device": "cpu"},
    "get_sigmas_polyexponential": {"n": ..., "sigma_min": ..., "sigma_max": ..., "rho": 1.0, "device": "cpu"},
    "get_sigmas_vp": {"n": ..., "beta_d": 19.9, "beta_min": 0.1, "eps_s": 1e-3, "device": "cpu"},
    "to_d": {"x": ..., "sigma": ..., "denoised": ...},
    "append_zero": {"x": ...},
    "append_dims": {"x": ..., "target_dims": ...},
    "get_ancestral_step": {"sigma_from": ..., "sigma_to": ..., "eta": 1.0},
    "default_noise_sampler": {"x": ...},
    "DiscreteEpsDDPMDenoiser": {"model": ..., "alphas_cumprod": ..., "quantize": ...},
    "DiscreteVDDPMDenoiser": {"model": ..., "alphas_cumprod": ..., "quantize": ...},
    "CompVisDenoiser": {"model": ..., "quantize": False, "device": "cpu"},
    "CompVisVDenoiser": {"model": ..., "quantize": False, "device": "cpu"},
    "VDenoiser": {"inner_model": ...},
    "Denoiser": {"inner_model": ..., "sigma_data": 1.0, "weighting": "karras", "scales": 1},
    "OpenAIDenoiser": {
        "model": ..., "diffusion": ..., "quantize": False, "has_learned_sigmas": True, "device": "cpu",
    },
}  # fmt: skip
PLAIN = [name for name, facts in SIGNATURES.items() if name.startswith("sample_") and "sigmas" in facts]
MIXTURE = mixture()
SIGMAS = K.get_sigmas_karras(6, 0.1, 10.0).double()
X = 10 * noise_like((3, 6))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_k_diffusion(name: str) -> None:
    parameters = inspect.signature(getattr(K, name)).parameters
    got = {key: ... if value.default is value.empty else value.default for key, value in parameters.items()}
    assert list(got.items()) == list(SIGNATURES[name].items())


def test_every_sampler_has_a_function() -> None:
    for name in ki.SAMPLERS:
        function = getattr(K.sampling, f"sample_{name}".replace("-", "_"))
        assert function is getattr(K, function.__name__)
        assert set(list(inspect.signature(function).parameters)[:2]) == {"model", "x"}
    assert not hasattr(K.sampling, "sample_nothing")
    assert not hasattr(K, "nothing")
    with pytest.raises(AttributeError, match="did you mean 'sample_euler'"):
        K.sampling.sample_eulr  # noqa: B018
    options = list(inspect.signature(K.sampling.sample_lcm).parameters)[6:]
    assert options[:2] == ["s_noise", "noise_sampler"]  # as in k-diffusion
    assert {"sample_res_multistep", "sample_euler"} <= set(dir(K.sampling))


@pytest.mark.parametrize("name", ["res_multistep", "ipndm", "er_sde", "lcm", "uni_pc", "ddim"])
def test_other_samplers_run_as_in_sample(name: str) -> None:
    run = getattr(K, f"sample_{name}")
    source = ki.noise.white(3)
    noise = {"noise_sampler": source} if "noise_sampler" in inspect.signature(run).parameters else {}
    want = ki.sample(MIXTURE, X, SIGMAS, sampler=name, noise=source)
    assert torch.equal(run(MIXTURE, X, SIGMAS, **noise), want)


class Bank:
    """The recorded noise bank: its k-th tensor at the k-th draw; the draws are kept."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.bank, self.calls = shared("noise_bank", dtype), list[tuple[float, float]]()

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        assert sigma.shape == sigma_next.shape == ()
        self.calls.append((float(sigma), float(sigma_next)))
        return self.bank[len(self.calls) - 1]


RECORDED = [c for c in index()["samplers"] if c["peer"] == "kdiff" and c["error"] is None and c["finite"]]


@pytest.mark.parametrize("case", RECORDED, ids=lambda c: c["id"])
def test_the_recorded_runs_of_k_diffusion(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results, levels of all evaluations, draws and callbacks; noise is counted in the order of k-diffusion."""
    dtype = getattr(torch, case["dtype"])
    sigmas, bank = shared(f"sigmas_{case['schedule']}", torch.float64), Bank(dtype)
    function, denoiser = getattr(K, f"sample_{case['sampler']}"), recorded_denoiser(case, dtype)
    unit = shared("x_init_unit", torch.float32) * sigmas[0].float()
    x = unit.to(dtype) if case["direction"] == "sample" else shared(f"x0_clean_{case['denoiser']}", dtype)
    if case["direction"] == "unsample" and ("ancestral" in case["sampler"] or case["sampler"] == "dpmpp_sde"):
        with pytest.raises(ValueError, match="a step forgets x.*use eta=0"):
            function(denoiser, x, sigmas, **case["kwargs"])
        return
    levels: list[float] = []
    told: list[dict[str, Any]] = []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (len(x),) and sigma.dtype == x.dtype
        levels.append(float(sigma[0]))
        return denoiser(x, sigma)

    given = dict(case["kwargs"], callback=told.append)
    if "noise_sampler" in inspect.signature(function).parameters:
        given["noise_sampler"] = bank
    monkeypatch.setattr(K.sampling, "default_noise_sampler", lambda x: bank)  # what churn draws from
    if case["sampler"] in ("dpm_fast", "dpm_adaptive"):
        positive = sigmas[sigmas > 0]
        given |= {"sigma_min": positive[-1], "sigma_max": positive[0]}
        given |= {"n": len(sigmas) - 1} if case["sampler"] == "dpm_fast" else {}
        result = function(model, x, **given)
    else:
        result = function(model, x, sigmas, **given)
    if case["kwargs"].get("return_info"):
        result, info = result
        assert info["nfe"] == case["n_calls"] and info["steps"] == info["n_accept"] + info["n_reject"] == len(told)
    assert relative_error(result, array(case, "final")) <= 1e-9
    np.testing.assert_allclose(levels, array(case, "calls"), rtol=1e-6)
    if "noise_calls" in case["arrays"]:
        np.testing.assert_allclose(bank.calls, array(case, "noise_calls"), rtol=1e-6)
    elif case["direction"] == "sample":
        assert len(bank.calls) == case.get("randn_like_calls", 0)
    if "cbinfo" in case["arrays"]:
        assert len(told) == len(array(case, "cbinfo"))


def test_seeded_noise_is_drawn_as_k_diffusion_draws_it() -> None:
    """Once a step, used or not: so the generator stands where k-diffusion leaves it."""
    for name, draws in {
        "euler": 6,
        "heun": 6,
        "dpm_2": 6,
        "euler_ancestral": 5,
        "dpm_2_ancestral": 5,
        "lms": 0,
    }.items():
        for options in ({}, {"eta": 0.0}) if "ancestral" in name else ({},):
            torch.manual_seed(0)
            getattr(K, f"sample_{name}")(MIXTURE, X, SIGMAS, **options)
            left = torch.randn(3)
            torch.manual_seed(0)
            for _ in range(draws):
                torch.randn_like(X)
            assert torch.equal(left, torch.randn(3)), name


def test_churn_in_some_steps_gets_the_noise_of_those_steps() -> None:
    torch.manual_seed(0)
    got = K.sample_euler(MIXTURE, X, SIGMAS, s_churn=3.0, s_tmax=5.0)
    torch.manual_seed(0)
    noises = [torch.randn_like(X) for _ in range(6)]
    churned = [noise for noise, sigma in zip(noises, SIGMAS, strict=False) if sigma <= 5]
    rule = ki.sampler("euler", s_churn=3.0, s_tmax=5.0)
    assert torch.equal(got, ki.sample(MIXTURE, X, SIGMAS, sampler=rule, noise=ki.noise.replay(churned)))


@pytest.mark.parametrize("name", PLAIN)
def test_a_callback_is_told_in_every_step_before_it_ends(name: str) -> None:
    told: list[dict[str, Any]] = []
    calls: list[Tensor] = []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(sigma)
        return MIXTURE(x, sigma)

    def callback(info: dict[str, Any]) -> None:
        assert torch.equal(info["denoised"], MIXTURE(info["x"], info["sigma_hat"].expand(3)))
        told.append(info | {"calls": len(calls)})

    getattr(K, name)(model, X, SIGMAS, callback=callback, disable=True)
    assert [info["i"] for info in told] == list(range(6))
    assert [info["sigma"] for info in told] == list(SIGMAS[:-1])
    assert all(info["sigma"].shape == () and info["sigma"].dtype == SIGMAS.dtype for info in told)
    assert told[1]["calls"] == told[0]["calls"] + (1 if len(calls) == 6 else 2)  # before the second evaluation
    assert told[0]["calls"] == 1


def test_a_callback_that_writes_is_an_error() -> None:
    kept = X.clone()
    for key in ("x", "denoised"):
        with pytest.raises(RuntimeError, match=r"wrote into x or denoised.*run\.replace"):
            K.sample_euler(MIXTURE, X, SIGMAS, callback=lambda info, key=key: info[key].clamp_(-1, 1))
    assert torch.equal(X, kept)


def test_a_callback_may_keep_all_tensors() -> None:
    told: list[dict[str, Any]] = []
    K.sample_dpmpp_2m(MIXTURE, X, SIGMAS, callback=told.append)
    for info in told:
        assert torch.equal(info["denoised"], MIXTURE(info["x"], info["sigma"].expand(3)))


def test_extra_args_reach_the_model_and_no_graph_is_kept() -> None:
    x = X.clone().requires_grad_()
    got = K.sample_heun(lambda x, sigma, shift: MIXTURE(x, sigma) + shift, x, SIGMAS, {"shift": 1.0})
    assert not got.requires_grad
    torch.testing.assert_close(got, ki.sample(lambda x, s: MIXTURE(x, s) + 1, X, SIGMAS, sampler="heun"))


def test_adaptive_callback_and_info() -> None:
    told: list[dict[str, Any]] = []
    got, info = K.sample_dpm_adaptive(MIXTURE, X, 0.1, 10.0, callback=told.append, return_info=True)
    assert set(told[0]) == {
        "sigma", "sigma_hat", "x", "i", "t", "t_up", "denoised", "error", "h", "steps", "nfe", "n_accept", "n_reject",
    }  # fmt: skip
    assert {key: told[-1][key] for key in info} == info
    assert torch.equal(told[-1]["x"], got) and float(told[-1]["sigma"]) == pytest.approx(0.1)
    assert torch.equal(K.sample_dpm_adaptive(MIXTURE, X, 0.1, 10.0), got)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_adaptive_draws_once_an_accepted_step(eta: float) -> None:
    torch.manual_seed(0)
    _, info = K.sample_dpm_adaptive(MIXTURE, X, 0.1, 10.0, eta=eta, return_info=True)
    left = torch.randn(3)
    torch.manual_seed(0)
    for _ in range(info["n_accept"]):
        torch.randn_like(X)
    assert torch.equal(left, torch.randn(3))


def test_half_precision_and_narrow_results() -> None:
    seen: list[torch.dtype] = []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma.dtype)
        return MIXTURE(x.double(), sigma.double()).to(x.dtype)

    half = K.sample_euler(model, X.half(), SIGMAS.float())
    assert half.dtype == torch.float16 and set(seen) == {torch.float16}
    narrow = K.sample_euler(lambda x, s: MIXTURE(x, s.double()).bfloat16(), X, SIGMAS)  # as under autocast
    assert narrow.dtype == torch.float64


def test_no_step_returns_x() -> None:
    assert K.sample_euler(MIXTURE, X, SIGMAS[:1]) is X


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: K.sample_euler(MIXTURE, X), TypeError, r"sample_euler: missing .*'sigmas'; it takes \(model, x"),
        (lambda: K.sample_euler(MIXTURE, X, SIGMAS, eta=1), TypeError, "unexpected keyword argument 'eta'"),
        (lambda: K.sample_euler(3, X, SIGMAS), TypeError, "model must be callable"),
        (lambda: K.sample_euler(MIXTURE, X, SIGMAS, callback=3), TypeError, "callback must be callable"),
        (lambda: K.sample_euler(MIXTURE, X, SIGMAS, [3]), TypeError, "extra_args must be a mapping"),
        (lambda: K.sample_dpm_fast(MIXTURE, X, 0.0, 1.0, 9), ValueError, "sigma_min must be positive"),
        (lambda: K.sample_dpm_fast(MIXTURE, X, 0.1, 1.0, 0), ValueError, "n must be"),
        (lambda: K.sample_euler_ancestral(MIXTURE, X, SIGMAS, noise_sampler=3), TypeError, "noise_sampler must be"),
        (lambda: K.sample_euler(lambda x, s: x * math.nan, X, SIGMAS), ValueError, "not finite; ki.sample"),
        (lambda: K.get_ancestral_step(1.0, 2.0), ValueError, "goes down"),
        (lambda: K.append_dims(X, 1), ValueError, "target_dims=1"),
    ],
)
def test_errors_name_the_argument(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_helpers() -> None:
    assert torch.equal(K.append_zero(SIGMAS[:2]), torch.tensor([*SIGMAS[:2].tolist(), 0.0], dtype=torch.float64))
    assert K.append_dims(torch.ones(3), 4).shape == (3, 1, 1, 1)
    assert torch.equal(K.to_d(X, torch.full((3,), 2.0), 0 * X), X / 2)
    down, up = K.get_ancestral_step(SIGMAS[0], SIGMAS[1], 0.5)
    assert isinstance(down, Tensor) and float(down**2 + up**2) == pytest.approx(float(SIGMAS[1] ** 2))
    assert K.get_ancestral_step(2.0, 1.0, 0.0) == (1.0, 0.0)
    assert K.default_noise_sampler(X)(1.0, 0.5).shape == X.shape
    for name, arguments in {
        "karras": (0.1, 10.0),
        "exponential": (0.1, 10.0),
        "polyexponential": (0.1, 10.0),
        "vp": (),
    }.items():
        sigmas = getattr(K, f"get_sigmas_{name}")(6, *arguments)
        torch.testing.assert_close(sigmas, getattr(ki.schedules, name)(6, *arguments).float())


def test_a_replaced_randn_like_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs replace `torch` in the sampling module, to make the noise of each image from its own seed."""

    class Hijack:
        def __getattr__(self, name: str) -> Any:
            return self.zeros if name == "randn_like" else getattr(torch, name)

        zeros = staticmethod(torch.zeros_like)

    monkeypatch.setattr(K.sampling, "torch", Hijack())
    want = ki.sample(MIXTURE, X, SIGMAS, sampler=ki.sampler("euler_ancestral", s_noise=0.0))
    torch.testing.assert_close(K.sample_euler_ancestral(MIXTURE, X, SIGMAS), want)


@pytest.mark.parametrize(("name", "total"), [("sample_euler", 6), ("sample_heun", 6), ("sample_dpmpp_sde", 6)])
def test_the_bar_counts_steps(name: str, total: int, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(K, name)(lambda x, sigma: 0.5 * x, X, SIGMAS, disable=False)
    assert f"{total}/{total} [" in capsys.readouterr().err


def test_the_bar_of_dpm_fast_counts_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    K.sample_dpm_fast(lambda x, sigma: 0.5 * x, X, 0.1, 10.0, 7, disable=False)
    assert "7/7 [" in capsys.readouterr().err
