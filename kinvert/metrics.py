r"""How far a reconstruction is from its original, and how far a latent is from noise: one number per sample.

**Reconstructions.** `reconstruction` and `original` have shape (batch, *event), the result (batch,). With
`e = reconstruction - original`: `mse = mean e^2`, `psnr = 10 log10(range^2 / mse)` in dB,
`nmse = 10 log10(sum e^2 / sum original^2)` in dB, `max_error = max |e|`; `ssim` compares local means, variances and
correlations. A reconstruction with a NaN or an infinity counts as infinitely far away: `mse`, `nmse` and `max_error`
are inf, `psnr` is -inf and `ssim` 0. These are the limits of an error that grows without bound.

**Latents.** A latent of noise level `sigma` should be `sigma z` with `z` a draw from N(0, I). The statistics of
`z = latent / sigma` below are computed in float64 on the CPU, for z of any dtype and device, and returned there. Those
that ignore positions take any event and reduce over all of it (`per="sample"`, shape (batch,)) or over each channel
(`per="channel"`, shape (batch, channels), for `z` of shape (batch, channels, *rest)). The spatial ones need images of
shape (batch, channels, H, W). A statistic that is not defined, because a latent is not finite or has no variance, is
nan.

For n independent values from N(0, 1), by chance alone: `mean` is 0 ± 1/sqrt(n), `std` 1 ± 1/sqrt(2n), `skew` 0 ±
sqrt(6/n), `kurtosis` 0 ± sqrt(24/n), `norm_score` 0 ± 1; and 5 % exceed 1.36/sqrt(n) in `ks`, 2.49 in `anderson` and
5.99 in `dagostino`. With n in the thousands any bias is significant: compare the statistics, not their p-values.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kinvert.checks import check_count, is_integer
from kinvert.fidelity import check_images, is_image, max_error, mse, nmse, psnr, reconstruction_metrics, ssim

__all__ = [
    "Per",
    "anderson",
    "autocorrelation",
    "cosine",
    "dagostino",
    "ks",
    "kurtosis",
    "latent_metrics",
    "max_error",
    "mean",
    "mse",
    "nmse",
    "norm_score",
    "patch_correlation",
    "psnr",
    "radial_spectrum",
    "reconstruction_metrics",
    "skew",
    "spectrum_slope",
    "ssim",
    "std",
]

Per = Literal["sample", "channel"]


# -- latents: the distribution of the values ---------------------------------------------------------------------------
def mean(z: Tensor, per: Per = "sample") -> Tensor:
    """Compute the mean of the values: 0 for noise."""
    return _values(z, per).mean(-1)


def std(z: Tensor, per: Per = "sample") -> Tensor:
    """Compute the standard deviation of the values, from the unbiased variance: 1 for noise, 0 for a single value."""
    values = _values(z, per)
    squares = (values - values.mean(-1, keepdim=True)).square().sum(-1)
    return (squares / max(1, values.shape[-1] - 1)).sqrt()


def skew(z: Tensor, per: Per = "sample") -> Tensor:
    """Compute the skewness `m3 / m2^1.5` of the values, `m_k` their k-th central moment: 0 for noise."""
    m2, m3, _ = _central_moments(_values(z, per))
    return m3 / m2**1.5


def kurtosis(z: Tensor, per: Per = "sample") -> Tensor:
    """Compute the excess kurtosis `m4 / m2^2 - 3` of the values, `m_k` their k-th central moment: 0 for noise."""
    m2, _, m4 = _central_moments(_values(z, per))
    return m4 / m2**2 - 3


def ks(z: Tensor, per: Per = "sample") -> Tensor:
    """Compute the Kolmogorov-Smirnov statistic: the largest distance between the distribution functions of z and noise.

    It lies in [0, 1] and is most sensitive in the middle of the distribution, also to a wrong mean or variance. A
    p-value is `scipy.stats.kstwo.sf(statistic, n)`.
    """
    values = _values(z, per).sort(-1).values
    n = values.shape[-1]
    below, rank = torch.special.ndtr(values), torch.arange(n + 1, dtype=torch.float64, device="cpu") / n
    return torch.maximum(rank[1:] - below, below - rank[:-1]).amax(-1)


def anderson(z: Tensor, per: Per = "sample") -> Tensor:
    """Compute the Anderson-Darling statistic `A^2` against N(0, 1), which weighs the tails; about 1 for noise.

    `A^2 = -n - sum_i (2i - 1) (ln F(z_i) + ln F(-z_(n+1-i))) / n` over the sorted values, where F is the distribution
    function of N(0, 1). Unlike `scipy.stats.anderson`, it does not fit mean and variance to the values: a latent claims
    mean 0 and variance 1.

    Source: Anderson and Darling, Asymptotic Theory of Certain 'Goodness of Fit' Criteria Based on Stochastic Processes
    (1952), doi 10.1214/aoms/1177729437.
    """
    values = _values(z, per).sort(-1).values
    n = values.shape[-1]
    tails = torch.special.log_ndtr(values) + torch.special.log_ndtr(-values.flip(-1))
    return -n - ((2 * torch.arange(n, dtype=torch.float64, device="cpu") + 1) * tails).sum(-1) / n


def dagostino(z: Tensor, per: Per = "sample") -> Tensor:
    """Compute D'Agostino's `K^2`, the sum of the squared z-scores of skewness and kurtosis; about 2 for noise.

    It depends on the shape of the distribution alone, not on mean or variance. A p-value is
    `scipy.stats.chi2.sf(statistic, 2)`.

    Raises:
        ValueError: fewer than 20 values, for which the approximation does not hold.

    Source: D'Agostino and Pearson, Tests for Departure from Normality. Empirical Results for the Distributions of b2
    and sqrt(b1) (1973), doi 10.1093/biomet/60.3.613.
    """
    from scipy.stats import normaltest

    values = _values(z, per)
    if values.shape[-1] < 20:
        raise ValueError(f"dagostino needs at least 20 values per {per}, got {values.shape[-1]}")
    statistic = torch.full(values.shape[:-1], math.nan, dtype=torch.float64, device="cpu")
    varied = _central_moments(values)[0] > 0  # scipy warns about the others
    statistic[varied] = torch.from_numpy(normaltest(values[varied].numpy(), axis=-1).statistic)
    return statistic


def norm_score(z: Tensor, per: Per = "sample") -> Tensor:
    """Compute `(|z|^2 - n) / sqrt(2n)`: 0 ± 1 for noise, whose norm is chi-distributed; above that z is too long."""
    values = _values(z, per)
    n = values.shape[-1]
    return (values.square().sum(-1) - n) / math.sqrt(2 * n)


def cosine(z: Tensor, image: Tensor) -> Tensor:
    """Compute the cosine of the angle between a latent and its image, shape (batch,): 0 ± 1/sqrt(n) for noise.

    Args:
        z: shape (batch, *event).
        image: the same shape.
    """
    if z.shape != image.shape:
        raise ValueError(f"z has shape {tuple(z.shape)} and image {tuple(image.shape)}; they must be equal")
    a, b = _values(z, "sample"), _values(image, "sample")
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


# -- latents: what lies beside what ------------------------------------------------------------------------------------
def patch_correlation(z: Tensor, patch: int | None = None, pairs: int = 20) -> Tensor:
    """Measure how strongly neighbouring pixels are correlated, shape (batch,): in [0, 1], smaller is better.

    Each window of `patch` x `patch` pixels, in each channel, is one observation of `patch^2` variables. The result is
    the mean of `|r|` over the `pairs` pairs of variables whose Pearson correlation r is largest in magnitude. Noise
    does not reach 0, since r is 0 ± 1/sqrt(m) with m windows and the largest are averaged: compare with
    `randn_like(z)`.

    Args:
        z: shape (batch, channels, H, W), H and W at least 4.
        patch: side of the windows in pixels; by default 8, or half the shorter side if that is less.
        pairs: how many of the strongest pairs to average; all if there are fewer.

    Raises:
        ValueError: not images of at least 4 x 4 pixels; a window side below 2 or above the shorter side; no pairs.

    Source: Staniszewski, Kuciński and Deja, There and Back Again: On the Relation between Noise and Image Inversions in
    Diffusion Models (2024), arXiv 2410.23530; there it is computed over a set of samples.
    """
    check_images("z", z, 4)
    side = min(z.shape[2:])
    patch = min(8, side // 2) if patch is None else patch
    pairs = check_count("pairs", pairs)
    if not is_integer(patch) or not 2 <= patch <= side:
        raise ValueError(f"patch must be an int from 2 to {side}, the shorter side of z, got {patch!r}")
    values = torch.where(_flat(z)[:, None, None, None], math.nan, _values(z, "sample").reshape(z.shape))
    upper = torch.triu_indices(patch**2, patch**2, offset=1, device="cpu")
    strongest = []
    for sample in values:  # one at a time: the windows hold each pixel patch^2 times
        windows = sample.unfold(1, patch, 1).unfold(2, patch, 1).reshape(-1, patch**2)
        centred = windows - windows.mean(0)
        r = torch.nn.functional.normalize(centred, dim=0, eps=0.0)
        strongest.append((r.T @ r)[upper[0], upper[1]].abs().topk(min(pairs, upper.shape[1])).values.mean())
    return torch.stack(strongest)


def autocorrelation(z: Tensor) -> Tensor:
    """Compute the rms of the autocorrelation over shifts and scales, shape (batch,): 0 at best, 1 for a flat image.

    `r(k) = sum z roll(z, k) / sum z^2` for each shift k from 1 to half the side, along rows and columns, in each
    channel. It is computed at full size, and again after each halving by averaging 2 x 2 pixels, as long as the shorter
    side has more than 8. The mean is not subtracted: an offset is a correlation over any distance. For noise, r(k) is 0
    ± 1/sqrt(pixels).

    Args:
        z: shape (batch, channels, H, W), H and W at least 4.

    Source: Parmar, Singh, Zhang, Li, Lu and Zhu, Zero-shot Image-to-Image Translation (2023), arXiv 2302.03027; there
    the shifts are random.
    """
    check_images("z", z, 4)
    values, squares = _values(z, "sample").reshape(z.shape), []
    while True:
        for dim in (2, 3):
            n = values.shape[dim]
            power = torch.fft.rfft(values, dim=dim).abs().square()
            r = torch.fft.irfft(power, n=n, dim=dim).sum(5 - dim)  # over the other axis: one value per shift
            squares.append((r[:, :, 1 : n // 2 + 1] / r[:, :, :1]).square().flatten(1))
        if min(values.shape[2:]) <= 8:
            return torch.cat(squares, 1).mean(1).sqrt()
        values = torch.nn.functional.avg_pool2d(values, 2)


def radial_spectrum(z: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the power at each distance from frequency 0: the mean of `|FFT z|^2 / pixels` over ring and channels.

    Noise has power 1 at every frequency.

    Args:
        z: shape (batch, channels, H, W), H and W at least 4.

    Returns:
        Frequencies in cycles per pixel, shape (rings,), up to 0.5; power, shape (batch, rings). Each ring is one
        cycle per shorter side wide; no ring contains frequency 0, which is the mean.
    """
    rings = _rings(z)
    spectrum = torch.fft.fft2(_values(z, "sample").reshape(z.shape), norm="ortho").abs().square().mean(1).flatten(1)
    count = min(z.shape[2:]) // 2
    totals = spectrum.new_zeros(len(z), count + 2).index_add(1, rings, spectrum)
    power = totals / torch.bincount(rings, minlength=count + 2)
    return torch.arange(1, count + 1, dtype=torch.float64, device="cpu") / min(z.shape[2:]), power[:, 1:-1]


def spectrum_slope(z: Tensor) -> Tensor:
    """Compute the slope of ln power over ln frequency, shape (batch,): 0 for noise, near -2 for photographs.

    The line is fitted to `radial_spectrum` by least squares. Each ring is weighted by its number of frequencies, since
    the variance of its power falls with it.

    Args:
        z: shape (batch, channels, H, W), H and W at least 4.
    """
    frequency, power = radial_spectrum(z)
    weights = torch.bincount(_rings(z), minlength=len(frequency) + 2)[1:-1].double()
    x = frequency.log() - (weights * frequency.log()).sum() / weights.sum()
    return torch.where(_flat(z), math.nan, (weights * x * power.log()).sum(1) / (weights * x * x).sum())


def latent_metrics(latent: Tensor, sigma: float, image: Tensor) -> dict[str, Tensor]:
    """Compute all statistics of a latent, each float64 of shape (batch,) on the CPU, under the names that records use.

    These are `latent_mean`, `latent_std`, `latent_skew`, `latent_kurtosis`, `latent_ks`, `latent_anderson`,
    `latent_dagostino` (from 20 values a sample), `latent_norm` (the `norm_score`), `cosine`; and for images (batch,
    channels, H, W) of at least 4 x 4 pixels `patch_correlation`, `autocorrelation` and `spectrum_slope`. Statistics
    that an event is too small for, or has too few dimensions for, are left out.

    Args:
        latent: shape (batch, *event).
        sigma: its noise level: the statistics are those of `latent / sigma`.
        image: the image of the latent, for `cosine`, the same shape.

    Raises:
        ValueError: sigma is not positive and finite, or the shapes differ.
    """
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, got {sigma}; it is the noise level of the latent")
    z = _values(latent, "sample").reshape(latent.shape) / sigma
    measured = {
        "latent_mean": mean(z),
        "latent_std": std(z),
        "latent_skew": skew(z),
        "latent_kurtosis": kurtosis(z),
        "latent_ks": ks(z),
        "latent_anderson": anderson(z),
        "latent_norm": norm_score(z),
        "cosine": cosine(z, image),
    }
    if math.prod(z.shape[1:]) >= 20:
        measured["latent_dagostino"] = dagostino(z)
    if is_image(z, 4):
        measured |= {
            "patch_correlation": patch_correlation(z),
            "autocorrelation": autocorrelation(z),
            "spectrum_slope": spectrum_slope(z),
        }
    return measured


# -- parts -------------------------------------------------------------------------------------------------------------
def _values(z: Tensor, per: Per) -> Tensor:
    """Return values of shape (batch, n) or (batch, channels, n), float64 on the CPU; all nan if one is not finite."""
    if per not in ("sample", "channel"):
        raise ValueError(f"per must be 'sample' or 'channel', got {per!r}")
    first = 1 if per == "sample" else 2
    if z.ndim < first or not z.is_floating_point() or z.numel() == 0:
        shape = "(batch, *event)" if first == 1 else "(batch, channels, *rest)"
        raise ValueError(f"z must be floating point of shape {shape} and not empty, got {z.dtype} of {tuple(z.shape)}")
    values = z.detach().to("cpu", torch.float64).reshape(*z.shape[:first], -1)
    return torch.where(values.isfinite().all(-1, keepdim=True), values, math.nan)


def _central_moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the central moments 2 to 4; the second is nan if the values are equal up to rounding."""
    centre = values.mean(-1, keepdim=True)
    m2, m3, m4 = ((values - centre).pow(k).mean(-1) for k in (2, 3, 4))
    # The mean itself is rounded at each stage of the summation.
    flat = m2 <= (32 * torch.finfo(torch.float64).eps * centre.squeeze(-1)).square()
    return torch.where(flat, math.nan, m2), m3, m4


def _flat(z: Tensor) -> Tensor:
    return _central_moments(_values(z, "sample"))[0].isnan()


def _rings(z: Tensor) -> Tensor:
    """Return the ring of each frequency of `fft2`, shape (H * W,): ring 0 is the mean, the last one the corners."""
    check_images("z", z, 4)
    side = min(z.shape[2:])
    y, x = (torch.fft.fftfreq(n, dtype=torch.float64, device="cpu") for n in z.shape[2:])
    return (torch.hypot(y[:, None], x) * side).round().long().clamp(max=side // 2 + 1).flatten()
