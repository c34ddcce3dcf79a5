"""Wrappers of networks, and Brownian noise, with the interfaces of k-diffusion."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import noise_like
from torch import Tensor, nn

import kinvert as ki
import kinvert.adapters.k_diffusion as K

LEVELS = ki.levels.stable_diffusion()
ABAR = 1 / (1 + LEVELS.sigmas**2)


class Network(nn.Module):
    """A small network with the interface of latent-diffusion."""

    alphas_cumprod: Tensor

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("alphas_cumprod", ABAR.float())
        self.requires_grad_(False)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | float = 0.0) -> Tensor:
        self.seen.append(t)
        return self.inner(x) + 1e-4 * t.reshape(-1, 1, 1, 1) + cond

    def apply_model(self, x: Tensor, t: Tensor, cond: Tensor | float = 0.0) -> Tensor:
        return self(x, t, cond)


NETWORK = Network()
X, SIGMA = noise_like((3, 4, 8, 8)).float(), torch.tensor([0.05, 1.3, 14.0])
WRAPPERS: dict[str, tuple[Any, Any]] = {
    "CompVisDenoiser": (K.CompVisDenoiser(NETWORK), ki.denoisers.from_eps),
    "CompVisVDenoiser": (K.CompVisVDenoiser(NETWORK), ki.denoisers.from_v),
    "DiscreteEpsDDPMDenoiser": (K.DiscreteEpsDDPMDenoiser(NETWORK, ABAR, False), ki.denoisers.from_eps),
    "DiscreteVDDPMDenoiser": (K.DiscreteVDDPMDenoiser(NETWORK, ABAR, False), ki.denoisers.from_v),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_the_denoisers_of_kinvert(name: str) -> None:
    wrapper, make = WRAPPERS[name]
    torch.testing.assert_close(wrapper(X, SIGMA, cond=0.1), make(NETWORK, LEVELS, quantize=False)(X, SIGMA, cond=0.1))
    assert isinstance(wrapper, nn.Module) and isinstance(wrapper, K.DiscreteSchedule)
    assert set(wrapper.state_dict()) >= {"sigmas", "log_sigmas", "inner_model.inner.weight"}
    assert wrapper.inner_model is NETWORK


def test_levels_of_a_wrapper() -> None:
    wrapper, _ = WRAPPERS["CompVisDenoiser"]
    torch.testing.assert_close(wrapper.sigmas, LEVELS.sigmas.float())
    assert (wrapper.sigma_min, wrapper.sigma_max) == (wrapper.sigmas[0], wrapper.sigmas[-1])
    torch.testing.assert_close(wrapper.get_sigmas(9), ki.schedules.normal(9, LEVELS).float(), rtol=1e-4, atol=0)
    assert torch.equal(wrapper.get_sigmas(), torch.cat([wrapper.sigmas.flip(0), torch.zeros(1)]))
    t = wrapper.sigma_to_t(SIGMA)
    torch.testing.assert_close(wrapper.t_to_sigma(t), SIGMA, rtol=1e-5, atol=0)
    whole = wrapper.sigma_to_t(SIGMA, quantize=True)
    assert whole.dtype == torch.int64 and float((whole - t).abs().max()) <= 0.51
    assert torch.equal(wrapper.t_to_sigma(whole), wrapper.sigmas[whole])


def test_a_quantized_network_gets_whole_times() -> None:
    NETWORK.seen.clear()
    K.CompVisDenoiser(NETWORK, quantize=True)(X, SIGMA)
    assert NETWORK.seen[0].dtype == torch.int64
    assert torch.equal(NETWORK.seen[0], LEVELS.timestep(SIGMA).long())


def test_learned_variances_are_left_out() -> None:
    both = lambda x, t: torch.cat([NETWORK(x, t), x], 1)  # noqa: E731
    diffusion = SimpleNamespace(alphas_cumprod=ABAR.numpy())
    want = WRAPPERS["DiscreteEpsDDPMDenoiser"][0](X, SIGMA)
    torch.testing.assert_close(K.OpenAIDenoiser(both, diffusion)(X, SIGMA), want)
    torch.testing.assert_close(K.OpenAIDenoiser(NETWORK, diffusion, has_learned_sigmas=False)(X, SIGMA), want)


def test_a_network_of_v_diffusion_is_told_the_angle() -> None:
    seen: list[Tensor] = []
    wrapper = K.VDenoiser(lambda x, t: seen.append(t) or x)
    want = X / (1 + SIGMA**2).reshape(-1, 1, 1, 1) - (SIGMA / (1 + SIGMA**2)).reshape(-1, 1, 1, 1) * X
    torch.testing.assert_close(wrapper(X, SIGMA), want)
    torch.testing.assert_close(seen[0], SIGMA.atan() * 2 / math.pi)


def test_a_preconditioned_network_is_told_sigma() -> None:
    seen: list[Tensor] = []
    wrapper = K.Denoiser(lambda x, t: seen.append(t) or x, sigma_data=0.5)
    s = SIGMA.reshape(-1, 1, 1, 1)
    want = 0.25 / (s**2 + 0.25) * X + s * 0.5 / (s**2 + 0.25) * X
    torch.testing.assert_close(wrapper(X, SIGMA), want)
    assert torch.equal(seen[0], SIGMA)


def test_wrappers_go_through_the_verbs() -> None:
    wrapper = K.CompVisDenoiser(NETWORK)
    sigmas = wrapper.get_sigmas(8)
    image = 0.3 * X
    latent = ki.unsample(wrapper, image, sigmas, sampler="heun", positive={"cond": 0.1})
    assert latent.shape == X.shape
    found = ki.invert(wrapper, image, sigmas[:-1], positive={"cond": 0.1})
    assert bool(found.converged.all())
    back = K.sample_euler(wrapper, found.latent, sigmas[:-1], {"cond": 0.1})
    torch.testing.assert_close(back, image, atol=1e-3, rtol=0)


def test_brownian_noise_is_one_path() -> None:
    x = torch.zeros(2, 4, 8, 8)
    noise = K.BrownianTreeNoiseSampler(x, 0.1, 10.0, seed=3)
    path = ki.noise.brownian(3, depth=16).bind(x)
    torch.testing.assert_close(noise(torch.tensor(4.0), torch.tensor(1.0)), path(4.0, 1.0))
    torch.testing.assert_close(noise(1.0, 4.0), -noise(4.0, 1.0))
    whole = noise(4.0, 1.0) * 3**0.5
    torch.testing.assert_close(noise(4.0, 2.0) * 2**0.5 + noise(2.0, 1.0), whole, rtol=1e-4, atol=1e-5)


def test_brownian_noise_in_another_time() -> None:
    x = torch.zeros(4, 5000)
    noise = K.BrownianTreeNoiseSampler(x, 0.1, 10.0, seed=3, transform=lambda sigma: -sigma.log())
    steps = [noise(sigma, sigma_next) for sigma, sigma_next in ((10.0, 3.0), (3.0, 1.0), (1.0, 0.1))]
    for n in steps:
        assert abs(float(n.std()) - 1) < 0.03
    assert abs(float((steps[0] * steps[1]).mean())) < 0.03
    with pytest.raises(ValueError, match="the path begins"):
        noise(20.0, 10.0)


def test_brownian_noise_of_each_item_has_its_seed() -> None:
    x = torch.zeros(2, 3, 4)
    both = K.BrownianTreeNoiseSampler(x, 0.1, 10.0, seed=[3, 8])(5.0, 2.0)
    alone = K.BrownianTreeNoiseSampler(x[:1], 0.1, 10.0, seed=[8])(5.0, 2.0)
    assert torch.equal(both[1], alone[0])
    tree = K.BatchedBrownianTree(x, 0.0, 1.0, seed=[3, 8])
    torch.testing.assert_close(tree(0.0, 0.5) + tree(0.5, 1.0), tree(0.0, 1.0))
    with pytest.raises(TypeError, match="no cache_size"):
        K.BatchedBrownianTree(x, 0.0, 1.0, cache_size=3)


def test_sde_samplers_take_it() -> None:
    x = 10 * X
    sigmas = K.get_sigmas_karras(8, 0.1, 10.0)
    wrapper = K.CompVisDenoiser(NETWORK)
    runs = [
        K.sample_dpmpp_2m_sde(
            wrapper, x, sigmas, noise_sampler=K.BrownianTreeNoiseSampler(x, 0.1, 10.0, seed=[1, 2, 3])
        )
        for _ in range(2)
    ]
    assert torch.equal(*runs)
    torch.manual_seed(5)
    one = K.sample_dpmpp_sde(wrapper, x, sigmas)
    torch.manual_seed(5)
    assert torch.equal(one, K.sample_dpmpp_sde(wrapper, x, sigmas))
