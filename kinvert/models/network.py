r"""A small class-conditional U-Net under Karras preconditioning.

With `x = x0 + sigma * eps`, `E[x0**2] = sigma_data**2` and a network `F` the denoiser is

    D(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4, label)

    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out  = sigma sigma_data / sqrt(sigma**2 + sigma_data**2)
    c_in   = 1 / sqrt(sigma**2 + sigma_data**2)

The input and the training target of `F` then have unit variance at every sigma. An error of `F` reaches `D` scaled by
`c_out`, which vanishes with sigma.

Every operation of `F` is smooth (SiLU, group norm, softmax), acts on each item of a batch separately and runs in the
dtype of `x`: in float64 the inverse of a sampling step can be solved to rounding.

Source: Karras, Aittala, Aila and Laine, Elucidating the Design Space of Diffusion-Based Generative Models (2022), arXiv
2206.00364, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle, pixel_unshuffle, silu

from kinvert.checks import is_integer

__all__ = ["Architecture", "EmbeddedDenoiser"]


@dataclass(frozen=True)
class Architecture:
    """The sizes of a denoiser: with the weights, all that is needed to build it."""

    name: str
    shape: tuple[int, int, int]
    """`(channels, H, W)` of one image."""
    sigma_data: float
    channels: tuple[int, int]
    """Channels at full and at half resolution."""
    patch: int = 1
    """Side of the pixel unshuffle: `F` works on images that are smaller by this factor."""
    blocks: int = 2
    """Number of residual blocks on the way down, at the bottom, and on the way up."""
    embedding: int = 128
    dropout: float = 0.0
    """Rate of dropout inside a residual block, in training only."""
    num_classes: int = 10
    sigma_min: float = 0.002
    sigma_max: float = 80.0


class ResBlock(nn.Module):
    """Two 3x3 convolutions around a residual; the embedding scales and shifts the second norm."""

    def __init__(self, inputs: int, outputs: int, arch: Architecture) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(arch.embedding, 2 * outputs)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.dropout = nn.Dropout(arch.dropout)
        self.conv2 = _zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Map (batch, inputs, H, W) and (batch, embedding) to (batch, outputs, H, W)."""
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        r = self.conv1(silu(self.norm1(h)))
        r = self.conv2(self.dropout(silu(self.norm2(r) * (1 + scale) + shift)))
        return self.skip(h) + r


class Attention(nn.Module):
    """Self-attention over the pixels, written out so that `torch.func` can take every derivative."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, h: Tensor) -> Tensor:
        """Map (batch, channels, H, W) to the same shape."""
        q, k, v = self.qkv(self.norm(h)).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)
        weights = torch.softmax(q.mT @ k * q.shape[-2] ** -0.5, dim=-1)
        return h + self.out((v @ weights.mT).flatten(1, 2).unflatten(2, h.shape[2:]))


class UNet(nn.Module):
    """`F`: down to half resolution, attention there, and up again with one skip connection a block."""

    frequencies: Tensor

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        full, half = arch.channels
        emb, pixels = arch.embedding, arch.shape[0] * arch.patch**2
        # Powers of two are exact in every dtype, and low ones keep D smooth in sigma.
        self.register_buffer("frequencies", torch.tensor([2.0**k for k in range(-1, 5)]))
        self.noise = nn.Linear(12, emb)
        self.label = nn.Embedding(arch.num_classes + 1, emb)
        self.mix = nn.Linear(emb, emb)
        self.patch = arch.patch
        self.stem = nn.Conv2d(pixels, full, 3, padding=1)
        self.down = nn.ModuleList(ResBlock(full, full, arch) for _ in range(arch.blocks))
        self.shrink = nn.Conv2d(full, half, 3, stride=2, padding=1)
        self.bottom = nn.ModuleList(ResBlock(half, half, arch) for _ in range(arch.blocks))
        self.attention = Attention(half)
        self.grow = nn.Conv2d(half, full, 3, padding=1)
        self.up = nn.ModuleList(ResBlock(2 * full, full, arch) for _ in range(arch.blocks))
        self.norm = nn.GroupNorm(8, full)
        self.head = _zeroed(nn.Conv2d(full, pixels, 3, padding=1))

    def forward(self, x: Tensor, noise: Tensor, label: Tensor) -> Tensor:
        """Map an image (batch, C, H, W), `ln(sigma) / 4` (batch,) and a label (batch,) to an image."""
        angles = noise[:, None] * self.frequencies
        e = self.noise(torch.cat((angles.cos(), angles.sin()), dim=1)) + self.label(label)
        e = silu(self.mix(silu(e)))
        h = self.stem(pixel_unshuffle(x, self.patch))
        skips = [h := block(h, e) for block in self.down]
        h = self.shrink(h)
        first, *rest = self.bottom
        h = self.attention(first(h, e))
        for block in rest:
            h = block(h, e)
        h = self.grow(interpolate(h, scale_factor=2.0, mode="nearest"))
        for block, skip in zip(self.up, reversed(skips), strict=True):
            h = block(torch.cat((h, skip), dim=1), e)
        return pixel_shuffle(self.head(silu(self.norm(h))), self.patch)


class EmbeddedDenoiser(nn.Module):
    """A class-conditional denoiser `D(x, sigma, label) = E[x0 | x, label]`.

    Attributes:
        name: the data that it was trained on.
        shape: `(channels, H, W)` of one image.
        sigma_data, sigma_min, sigma_max: root mean square of the data, and the range of sigma to use it in.
        num_classes, null_label: labels are `0 .. num_classes - 1`; `null_label` stands for "no label".
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.name, self.shape = arch.name, arch.shape
        self.sigma_data, self.sigma_min, self.sigma_max = arch.sigma_data, arch.sigma_min, arch.sigma_max
        self.num_classes = self.null_label = arch.num_classes
        self.net = UNet(arch)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | int | None = None) -> Tensor:
        """Denoise.

        Args:
            x: `x0 + sigma * eps`, shape `(batch, channels, H, W)`, with `x0` in [-1, 1], in the model's dtype.
            sigma: noise level, shape `(batch,)`. Outside [sigma_min / 2, 5 sigma_max] `F` is told the nearest end; at 0
                the result is `x`.
            label: classes, int64, shape `(batch,)`, or one int for all; `null_label`, like `None`, means unconditional.

        Returns:
            The denoised images, shape, dtype and device of `x`.

        Raises:
            ValueError: another shape or dtype, or a label out of range.
        """
        self._check(x, sigma)
        label = self._labels(x, label)
        sigma = sigma.to(x.dtype)
        s, data = sigma[:, None, None, None], self.sigma_data
        c_in = (s.square() + data**2).rsqrt()
        noise = sigma.clamp(self.sigma_min / 2, self.sigma_max * 5).log() / 4  # the range seen in training
        try:
            f = self.net(c_in * x, noise, label)
        except IndexError as e:  # only the CPU raises it; other devices cannot check labels without waiting
            raise ValueError(f"label must lie in 0..{self.null_label} ({self.null_label}: none)") from e
        return (data * c_in).square() * x + data * s * c_in * f

    def _check(self, x: Tensor, sigma: Tensor) -> None:
        dtype = self.net.stem.weight.dtype
        if x.shape[1:] != self.shape:
            raise ValueError(f"x must have shape (batch, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        if x.dtype != dtype:
            raise ValueError(f"x is {x.dtype}, the model {dtype}; use model.to(x.dtype) or x.to({dtype})")
        if sigma.shape != x.shape[:1]:
            raise ValueError(f"sigma must have shape ({len(x)},), one level an item, got {tuple(sigma.shape)}")

    def _labels(self, x: Tensor, label: Tensor | int | None) -> Tensor:
        """Return a class for each image of x."""
        if label is None:
            label = self.null_label
        if is_integer(label):
            if not 0 <= label <= self.null_label:
                raise ValueError(f"label must lie in 0..{self.null_label} ({self.null_label}: none), got {label}")
            return torch.full(x.shape[:1], int(label), device=x.device)
        if not isinstance(label, Tensor) or label.shape != x.shape[:1] or label.dtype != torch.int64:
            got = f"{label.dtype} of shape {tuple(label.shape)}" if isinstance(label, Tensor) else repr(label)
            raise ValueError(
                f"label must be int64 of shape ({len(x)},), a class for each image, or one int, got {got}; in positive "
                "and negative of ki.sample, e.g. positive={'label': torch.tensor([3, 8])}"
            )
        return label


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """Set a layer to zero: before training, a block is the identity and `F` is 0."""
    nn.init.zeros_(layer.weight)
    return layer
