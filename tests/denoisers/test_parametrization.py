"""Adapters from networks to denoisers: networks with known answers must give those answers back."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kinvert import levels as levels_module
from kinvert.denoisers import (
    Dataset,
    Gaussian,
    GaussianMixture,
    Masked,
    expand,
    from_edm,
    from_eps,
    from_v,
    from_velocity,
    from_x0,
    guide,
    step_cfg,
)

DDPM = levels_module.stable_diffusion()
EVENTS = [(), (3,), (2, 4, 5), (2, 3, 2, 2)]
GAUSSIAN = Gaussian(mean=0.3, std=0.7)
sigmas = st.floats(0.03, 14.0)


def draw(event: tuple[int, ...], *sigma: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A sample at each of the given noise levels."""
    level = torch.tensor(sigma, dtype=torch.float64)
    noise = torch.randn(len(sigma), *event, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clean = 0.3 + 0.7 * torch.randn(noise.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return (clean + expand(level, noise) * noise).to(dtype), level


class Exact:
    """The network that a perfect training on N(0.3, 0.7²) would give, for each thing a network can predict.

    It recovers sigma from what it is handed (the timestep is `level`, standing for the map sigma -> t), rebuilds x from
    the scaled input, and answers in the network's own terms.
    """

    def __init__(self, prediction: str, data: float = 1.0) -> None:
        self.prediction, self.data = prediction, data
        self.times: list[Tensor] = []
        self.inputs: list[Tensor] = []

    def __call__(self, scaled: Tensor, t: Tensor) -> Tensor:
        self.times.append(t)
        self.inputs.append(scaled)
        sigma, data = expand(t, scaled), self.data
        if self.prediction == "velocity":
            level = t / (1 - t)
            return (scaled - GAUSSIAN(scaled / (1 - sigma), level)) / sigma
        x = scaled * (sigma**2 + data**2).sqrt()
        denoised = GAUSSIAN(x, t)
        if self.prediction == "eps":
            return (x - denoised) / sigma
        if self.prediction == "edm":  # (D - c_skip x) / c_out, as Karras et al. have it
            total = sigma**2 + data**2
            return (denoised - data**2 / total * x) / (sigma * data / total.sqrt())
        if self.prediction == "v":  # alpha eps - sigma_vp x0 with alpha² + sigma_vp² = 1, in units of sigma_data
            total = (sigma**2 + data**2).sqrt()
            return data / total * (x - denoised) / sigma - sigma / (total * data) * denoised
        return denoised


def continuous(data: float = 1.0) -> SimpleNamespace:
    """Levels whose network time is sigma itself."""
    return SimpleNamespace(timestep=lambda sigma, quantize=True: sigma, sigma_data=data)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("data", [1.0, 0.5])
@pytest.mark.parametrize(("make", "prediction"), [(from_eps, "eps"), (from_x0, "x0"), (from_v, "v"), (from_edm, "edm")])
def test_exact_network_gives_the_exact_denoiser(make, prediction: str, data: float, event: tuple[int, ...]) -> None:
    x, sigma = draw(event, 0.05, 0.6, 4.0)
    network = Exact(prediction, data)
    denoised = make(network, continuous(data))(x, sigma)
    torch.testing.assert_close(denoised, GAUSSIAN(x, sigma), rtol=0, atol=1e-12)
    torch.testing.assert_close(network.inputs[0], x / (expand(sigma, x) ** 2 + data**2).sqrt(), rtol=0, atol=1e-14)
    assert network.times[0].shape == (3,)


@pytest.mark.parametrize("event", EVENTS)
def test_exact_velocity_gives_the_exact_denoiser_in_both_coordinates(event: tuple[int, ...]) -> None:
    x, sigma = draw(event, 0.05, 0.6, 4.0)
    t, scaled = sigma / (1 + sigma), x / (1 + expand(sigma, x))
    network = Exact("velocity")
    exact = GAUSSIAN(x, sigma)
    torch.testing.assert_close(from_velocity(network)(x, sigma), exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(from_velocity(network, coordinates="flow")(scaled, t), exact, rtol=0, atol=1e-12)
    for time, given_x in zip(network.times, network.inputs, strict=True):
        torch.testing.assert_close(time, t, rtol=0, atol=1e-15)
        torch.testing.assert_close(given_x, scaled, rtol=0, atol=1e-14)


@settings(deadline=None, max_examples=50)
@given(sigma=sigmas, value=st.floats(-3, 3), output=st.floats(-3, 3))
def test_formulas(sigma: float, value: float, output: float) -> None:
    x = torch.full((1, 2), value, dtype=torch.float64)
    level = torch.tensor([sigma], dtype=torch.float64)

    def network(scaled: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(scaled, output)

    total = math.sqrt(sigma**2 + 1)
    expected = {
        from_eps: value - sigma * output,
        from_v: value / total**2 - output * sigma / total,
        from_edm: value / total**2 + output * sigma / total,
        from_x0: output,
    }
    for make, number in expected.items():
        torch.testing.assert_close(make(network, DDPM)(x, level), torch.full_like(x, number), rtol=1e-12, atol=1e-12)
    flow = value / (1 + sigma) - sigma / (1 + sigma) * output
    torch.testing.assert_close(from_velocity(network)(x, level), torch.full_like(x, flow), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("quantize", [True, False])
def test_the_network_is_told_the_timestep_of_its_levels(quantize: bool) -> None:
    x, sigma = draw((2, 2), 0.05, 1.23, 9.0)
    network = Exact("eps")
    from_eps(network, DDPM, quantize)(x, sigma)
    torch.testing.assert_close(network.times[0], DDPM.timestep(sigma, quantize=quantize), rtol=0, atol=0)
    assert bool((network.times[0] == network.times[0].round()).all()) == quantize


@pytest.mark.parametrize("coordinates", ["ve", "flow"])
def test_velocity_with_levels_is_told_a_thousand_t(coordinates) -> None:
    x, sigma = draw((2, 2), 0.1, 0.5)
    seen = []

    def network(scaled: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.zeros_like(scaled)

    from_velocity(network, levels_module.flow(shift=3.0), coordinates)(x, sigma)
    t = sigma if coordinates == "flow" else sigma / (1 + sigma)
    torch.testing.assert_close(seen[0], 1000 * t, rtol=1e-15, atol=0)


def test_conditioning_reaches_the_network() -> None:
    seen = {}

    def network(scaled: Tensor, t: Tensor, **conditioning: object) -> Tensor:
        seen.update(conditioning)
        return scaled

    x, sigma = draw((2,), 1.0)
    from_eps(network, DDPM)(x, sigma, context="c", scale=2)
    assert seen == {"context": "c", "scale": 2}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sigma_dtype", ["half", torch.float32, torch.float64])
@pytest.mark.parametrize("prediction", ["eps", "v", "edm", "x0", "velocity"])
def test_half_precision_rounds_once(prediction: str, sigma_dtype, dtype: torch.dtype) -> None:
    x, sigma = draw((64,), 0.25, 4.0, dtype=dtype)  # noise levels that half precision holds exactly
    sigma = sigma.to(dtype if sigma_dtype == "half" else sigma_dtype)
    seen = []

    def network(scaled: Tensor, t: Tensor) -> Tensor:
        seen.append((scaled, t))
        return (scaled.double() * 0.9 + 0.1).to(scaled.dtype)

    def make(data_type: torch.dtype) -> Tensor:
        if prediction == "velocity":
            return from_velocity(rounded)(x.to(data_type), sigma)
        builders = {"eps": from_eps, "v": from_v, "edm": from_edm, "x0": from_x0}
        return builders[prediction](rounded, DDPM)(x.to(data_type), sigma)

    def rounded(scaled: Tensor, t: Tensor) -> Tensor:
        """Sees and gives the same half-precision values whatever the dtype around it."""
        return network(scaled.to(dtype), t).to(scaled.dtype)

    exact, half = make(torch.float64), make(dtype)
    assert half.dtype == dtype
    assert seen[-1][0].dtype == dtype
    assert seen[-1][1].dtype == torch.float32
    # Half a unit in the last place of the result, and what float32 adds to it where x - sigma F cancels.
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5
    assert bool(((half.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_time_keep_the_precision_of_x(dtype: torch.dtype) -> None:
    x, _ = draw((3,), 1.0, dtype=dtype)
    for sigma_dtype in (torch.float32, torch.float64):
        for make in (lambda net: from_eps(net, DDPM), from_velocity):
            network = Exact("velocity")
            assert make(network)(x, torch.ones(1, dtype=sigma_dtype)).dtype == dtype
            assert network.inputs[0].dtype == network.times[0].dtype == dtype


def test_inputs_are_not_modified_and_gradients_flow() -> None:
    x, sigma = draw((2, 3), 0.5, 2.0)
    before = x.clone()
    x.requires_grad_()
    from_v(Exact("v"), continuous())(x, sigma).sum().backward()
    assert torch.equal(x, before)
    gain = 0.49 / (0.49 + expand(sigma, x) ** 2)
    torch.testing.assert_close(x.grad, gain.expand_as(x), rtol=1e-12, atol=0)


def test_below_the_table_x0_keeps_the_slope_of_its_end() -> None:
    """A run upwards starts there: an image denoised for the lowest level is too far away for a lower one."""
    denoiser = from_x0(lambda x, t: 0.5 * x, DDPM)
    x = draw((2, 3), 0.5, 2.0)[0]
    low = DDPM.sigma_min

    def slope(sigma: float) -> torch.Tensor:
        return (x - denoiser(x, x.new_full((2,), sigma))) / sigma

    torch.testing.assert_close(slope(1e-4), slope(low), rtol=1e-3, atol=0)  # but for c_in
    assert float((slope(1e-4) - slope(1e-6)).abs().max()) < 1e-3 * float(slope(low).abs().max())


class NoHostReads(TorchDispatchMode):
    """Fails where a tensor's value is read back, which on a GPU waits for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"), name
        return func(*args, **(kwargs or {}))


def test_a_call_reads_no_value_back() -> None:
    x, sigma = draw((2, 4, 4), 0.5, 2.0)

    def network(scaled: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        return scaled / 2

    conditions = {"context": x[:1]}, {"context": x}
    denoisers = [
        *(make(network, DDPM) for make in (from_eps, from_v, from_edm, from_x0)),
        from_v(network, levels_module.v_diffusion()),
        from_eps(network, levels_module.from_table([1.0, 3.0], [5.0, 9.0])),
        guide(from_eps(network, DDPM), step_cfg([1.0, 3.0], [4.0, 2.0, 1.0]), *conditions),
        from_velocity(network, levels_module.flow()),
        guide(from_eps(network, DDPM), 3.0, *conditions),
        guide(from_eps(network, DDPM), 1.0, *conditions, pair=True),
        Masked(from_eps(network, DDPM), torch.ones(8, 8), x, x),
        Gaussian(0.1, x[0].abs()),
        GaussianMixture(x, 0.5),
        Dataset(x),
    ]
    with NoHostReads():
        with pytest.raises(AssertionError):
            x.sum().item()
        for denoiser in denoisers:
            denoiser(x, sigma)


def test_repr_names_the_network_not_its_layers() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    text = repr(from_eps(network, continuous(), quantize=False))
    assert text.startswith("from_eps(Sequential, levels=")
    assert text.endswith("quantize=False)")
    assert (
        repr(from_velocity(network, coordinates="flow")) == "from_velocity(Sequential, levels=None, coordinates='flow')"
    )


def test_adapters_are_frozen() -> None:
    with pytest.raises(AttributeError):
        from_eps(Exact("eps"), DDPM).quantize = False


@pytest.mark.parametrize("make", [lambda net: from_eps(net, DDPM), from_velocity])
def test_a_wrong_output_is_refused_with_the_fix(make) -> None:
    x, sigma = draw((4, 3, 3), 1.0, 2.0)
    cases = [
        (lambda s, t: torch.cat([s, s], 1), ValueError, r"twice the channels is a learned variance.*\[:, :4\]"),
        (lambda s, t: s[:, :2], ValueError, r"shape of its input, \(2, 4, 3, 3\), got \(2, 2, 3, 3\)"),
        (lambda s, t: SimpleNamespace(sample=s), TypeError, r"SimpleNamespace; wrap it: .*\(x, t, \*\*c\)\.sample"),
        (lambda s, t: (s,), TypeError, r"got tuple; wrap it: lambda x, t, \*\*c: model\(x, t, \*\*c\)\[0\]"),
        (lambda s, t: None, TypeError, r"model must return a tensor, got NoneType; return the prediction"),
    ]
    for network, error, message in cases:
        with pytest.raises(error, match=message):
            make(network)(x, sigma)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: from_eps(3, DDPM), TypeError, r"model must be callable as model\(x, t, .*got int"),
        (lambda: from_eps(torch.sin, None), TypeError, r"levels must map .*stable_diffusion\(\), got NoneType"),
        (lambda: from_velocity(torch.sin, 1000), TypeError, r"levels must map .*flow\(\), got int"),
        (lambda: from_velocity(torch.sin, None, "vp"), ValueError, r"coordinates must be 've' or 'flow', got 'vp'"),
        (
            lambda: from_v(torch.sin, levels_module.flow()),
            ValueError,
            r"flow model do not fit from_v; use from_velocity",
        ),
        (
            lambda: from_velocity(torch.sin, DDPM),
            ValueError,
            r"discrete model do not fit from_velocity; pass .*flow\(\)",
        ),
    ],
)
def test_wrong_arguments_are_refused_with_the_fix(build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
