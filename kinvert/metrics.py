r"""How far a reconstruction is from its original, and how far a latent is from noise: one number per sample.

**Reconstructions.** `reconstruction` and `original` have shape (batch, *event), the result (batch,). With
`e = reconstruction - original`: `mse = mean e^2`, `psnr = 10 log10(range^2 / mse)` in dB,
`nmse = 10 log10(sum e^2 / sum original^2)` in dB, `max_error = max |e|`; `ssim` compares local means, variances and
correlations. A reconstruction with a NaN or an infinity in it counts as infinitely far away: `mse`, `nmse` and
`max_error` are inf, `psnr` is -inf and `ssim` 0, which are the limits of an error that grows without bound.

**Latents.** A latent of noise level `sigma` should be `sigma z` with `z` a draw from N(0, I). The statistics of
`z = latent / sigma` below are computed in float64 on the CPU, whatever `z` was, and returned there. Those that do not
look at positions take any event and reduce over all of it (`per="sample"`, shape (batch,)) or over each channel
(`per="channel"`, shape (batch, channels), `z` of shape (batch, channels, *rest)). The spatial ones need images,
(batch, channels, H, W). A statistic that is not defined, of a latent that is not finite or has no variance, is nan.

For n independent values from N(0, 1), by chance alone: `mean` is 0 ± 1/sqrt(n), `std` 1 ± 1/sqrt(2n), `skew`
0 ± sqrt(6/n), `kurtosis` 0 ± sqrt(24/n), `norm_score` 0 ± 1; and 5 % exceed 1.36/sqrt(n) in `ks`, 2.49 in `anderson`
and 5.99 in `dagostino`. With n in the thousands any bias is significant: compare the statistics, not their p-values.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kinvert.checks import check_count, is_integer
from kinvert.tensors import wide_dtype

Per = Literal["sample", "channel"]


# -- reconstructions ---------------------------------------------------------------------------------------------------
def mse(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Mean squared error per sample, shape (batch,)."""
    return _bounded(_flat_error(reconstruction, original).square()).mean(1)


def psnr(reconstruction: Tensor, original: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio per sample in dB, shape (batch,); infinite where the two are equal.

    Args:
        reconstruction: shape (batch, *event).
        original: the same shape.
        data_range: distance between the darkest and the brightest possible value: 2 for data in [-1, 1].
    """
    _check_range(data_range)
    return 10.0 * torch.log10(data_range**2 / mse(reconstruction, original))


def nmse(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Error relative to the energy of the original in dB, shape (batch,): -20 dB is 10% in amplitude.

    It is -inf where the two are equal, even if both are 0, and inf where only the original is 0.
    """
    difference = _flat_error(reconstruction, original)
    flat = original.reshape(len(original), -1).to(difference.dtype)
    size = flat.abs().amax(1, keepdim=True)  # squares of values in its units stay in the range of the dtype
    size = torch.where(size > 0, size, 1.0)
    error = _bounded((difference / size).square()).sum(1)
    decibels = 10.0 * torch.log10(error / (flat / size).square().sum(1))
    return torch.where(difference.eq(0).all(1), -math.inf, decibels)


def max_error(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Largest absolute error per sample, shape (batch,)."""
    return _bounded(_flat_error(reconstruction, original).abs()).amax(1)


def ssim(reconstruction: Tensor, original: Tensor, data_range: float = 2.0) -> Tensor:
    r"""Structural similarity of images per sample, shape (batch,): 1 where they are equal, 0 where nothing is alike.

    The mean over channels and windows inside the image of
    `(2 m_a m_b + c1) (2 cov + c2) / ((m_a^2 + m_b^2 + c1) (v_a + v_b + c2))`, with the means, variances and covariance
    under a Gaussian window of 11 x 11 pixels and standard deviation 1.5, `c1 = (0.01 range)^2`, `c2 = (0.03 range)^2`.
    In an image whose shorter side has fewer than 11 pixels the window is the largest odd one that fits, with its
    standard deviation in proportion: 7 x 7 and 0.95 in one of 8 x 8.

    Args:
        reconstruction: shape (batch, channels, H, W), H and W at least 3.
        original: the same shape.
        data_range: distance between the darkest and the brightest possible value: 2 for data in [-1, 1].

    Raises:
        ValueError: no images, images below 3 x 3 pixels, or a data range that is not positive.

    Source: "Image Quality Assessment: From Error Visibility to Structural Similarity" (Wang, Bovik, Sheikh, Simoncelli,
    2004, doi 10.1109/TIP.2003.819861).
    """
    _check_range(data_range)
    _check_images("original", original, 3)
    e = _flat_error(reconstruction, original)
    window = _window(min(original.shape[2:])).to(e)
    b = original.to(e.dtype).flatten(0, 1)[:, None]
    a = b + torch.where(e.isfinite(), e, 0.0).reshape(b.shape)

    def local(x: Tensor) -> Tensor:
        rows = torch.nn.functional.conv2d(x, window[None, None, :, None])
        return torch.nn.functional.conv2d(rows, window[None, None, None, :])

    mean_a, mean_b, product = local(a), local(b), local(a * b)
    squares = mean_a.square() + mean_b.square()
    variances = local(a.square() + b.square()) - squares
    covariance = product - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
    # Values so large that their squares overflow are as far away as those that are not finite.
    means = similarity.reshape(len(original), -1).mean(1)
    return torch.where(e.isfinite().all(1) & means.isfinite(), means, 0.0)


def reconstruction_metrics(restored: Tensor, image: Tensor, data_range: float = 2.0) -> dict[str, Tensor]:
    """All of the above, by the names they have in records, each of shape (batch,).

    `nmse_db`, `mse`, `psnr`, `max_error`, and `ssim` for images of at least 3 x 3 pixels, (batch, channels, H, W).

    Args:
        restored: what came back, shape (batch, *event).
        image: what it should be, the same shape.
        data_range: as in `psnr`.
    """
    measured = {
        "nmse_db": nmse(restored, image),
        "mse": mse(restored, image),
        "psnr": psnr(restored, image, data_range),
        "max_error": max_error(restored, image),
    }
    if _is_image(image, 3):
        measured["ssim"] = ssim(restored, image, data_range)
    return measured


# -- latents: the distribution of the values ---------------------------------------------------------------------------
def mean(z: Tensor, per: Per = "sample") -> Tensor:
    """Mean of the values: 0 for noise."""
    return _values(z, per).mean(-1)


def std(z: Tensor, per: Per = "sample") -> Tensor:
    """Standard deviation of the values, from the unbiased variance: 1 for noise; 0 of a single value."""
    values = _values(z, per)
    squares = (values - values.mean(-1, keepdim=True)).square().sum(-1)
    return (squares / max(1, values.shape[-1] - 1)).sqrt()


def skew(z: Tensor, per: Per = "sample") -> Tensor:
    """Skewness `m3 / m2^1.5` of the values, `m_k` their k-th central moment: 0 for noise."""
    m2, m3, _ = _central_moments(_values(z, per))
    return m3 / m2**1.5


def kurtosis(z: Tensor, per: Per = "sample") -> Tensor:
    """Excess kurtosis `m4 / m2^2 - 3` of the values, `m_k` their k-th central moment: 0 for noise."""
    m2, _, m4 = _central_moments(_values(z, per))
    return m4 / m2**2 - 3


def ks(z: Tensor, per: Per = "sample") -> Tensor:
    """Kolmogorov-Smirnov statistic: the largest distance of the empirical distribution function from that of N(0, 1).

    In [0, 1]. It sees the middle of the distribution best, a wrong mean and a wrong variance included. A p-value is
    `scipy.stats.kstwo.sf(statistic, n)`.
    """
    values = _values(z, per).sort(-1).values
    n = values.shape[-1]
    below, rank = torch.special.ndtr(values), torch.arange(n + 1, dtype=torch.float64) / n
    return torch.maximum(rank[1:] - below, below - rank[:-1]).amax(-1)


def anderson(z: Tensor, per: Per = "sample") -> Tensor:
    """Anderson-Darling statistic `A^2` against N(0, 1), which weighs the tails; about 1 for noise.

    `A^2 = -n - sum_i (2i - 1) (ln F(z_i) + ln F(-z_(n+1-i))) / n` over the sorted values, F of N(0, 1). Mean and
    variance are not fitted to the values, as `scipy.stats.anderson` does: they are part of what a latent claims to be.

    Source: "Asymptotic Theory of Certain 'Goodness of Fit' Criteria Based on Stochastic Processes" (Anderson, Darling,
    1952, doi 10.1214/aoms/1177729437).
    """
    values = _values(z, per).sort(-1).values
    n = values.shape[-1]
    tails = torch.special.log_ndtr(values) + torch.special.log_ndtr(-values.flip(-1))
    return -n - ((2 * torch.arange(n, dtype=torch.float64) + 1) * tails).sum(-1) / n


def dagostino(z: Tensor, per: Per = "sample") -> Tensor:
    """D'Agostino's `K^2`: the squared z-scores of skewness and kurtosis, added; about 2 for noise.

    It sees the shape alone, neither mean nor variance. A p-value is `scipy.stats.chi2.sf(statistic, 2)`.

    Raises:
        ValueError: fewer than 20 values, for which the approximation does not hold.

    Source: "Tests for Departure from Normality. Empirical Results for the Distributions of b2 and sqrt(b1)"
    (D'Agostino, Pearson, 1973, doi 10.1093/biomet/60.3.613).
    """
    from scipy.stats import normaltest

    values = _values(z, per)
    if values.shape[-1] < 20:
        raise ValueError(f"dagostino needs at least 20 values per {per}, got {values.shape[-1]}")
    statistic = torch.full(values.shape[:-1], math.nan, dtype=torch.float64)
    varied = _central_moments(values)[0] > 0  # of the others scipy would warn
    statistic[varied] = torch.from_numpy(normaltest(values[varied].numpy(), axis=-1).statistic)
    return statistic


def norm_score(z: Tensor, per: Per = "sample") -> Tensor:
    """`(|z|^2 - n) / sqrt(2n)`: 0 ± 1 for noise, whose norm is chi-distributed; above that z is too long."""
    values = _values(z, per)
    n = values.shape[-1]
    return (values.square().sum(-1) - n) / math.sqrt(2 * n)


def cosine(z: Tensor, image: Tensor) -> Tensor:
    """Cosine of the angle between a latent and its image per sample, shape (batch,): 0 ± 1/sqrt(n) for noise.

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
    """How strongly neighbouring pixels are correlated, shape (batch,): in [0, 1], the smaller the better.

    Every window of `patch` x `patch` pixels, in every channel, is one observation of `patch^2` variables. The result is
    the mean of `|r|` over the `pairs` pairs of variables whose Pearson correlation r is largest in magnitude. Noise
    does not reach 0: with m windows one r is 0 ± 1/sqrt(m), and these are the largest; compare with `randn_like(z)`.

    Args:
        z: shape (batch, channels, H, W), H and W at least 4.
        patch: side of the windows in pixels; by default 8, or half the shorter side where that is less.
        pairs: how many of the strongest pairs to average; all, where there are fewer.

    Raises:
        ValueError: no images of at least 4 x 4 pixels, or windows that are not from 2 pixels to the shorter side.

    Source: after "There and Back Again: On the Relation between Noise and Image Inversions in Diffusion Models"
    (Staniszewski, Kuciński, Deja, 2024, arXiv 2410.23530), there over a set of samples.
    """
    _check_images("z", z, 4)
    side = min(z.shape[2:])
    patch = min(8, side // 2) if patch is None else patch
    pairs = check_count("pairs", pairs)
    if not is_integer(patch) or not 2 <= patch <= side:
        raise ValueError(f"patch must be an int from 2 to {side}, the shorter side of z, got {patch!r}")
    values = torch.where(_flat(z)[:, None, None, None], math.nan, _values(z, "sample").reshape(z.shape))
    upper = torch.triu_indices(patch**2, patch**2, offset=1)
    strongest = []
    for sample in values:  # one at a time: the windows hold each pixel patch^2 times
        windows = sample.unfold(1, patch, 1).unfold(2, patch, 1).reshape(-1, patch**2)
        centred = windows - windows.mean(0)
        r = torch.nn.functional.normalize(centred, dim=0, eps=0.0)
        strongest.append((r.T @ r)[upper[0], upper[1]].abs().topk(min(pairs, upper.shape[1])).values.mean())
    return torch.stack(strongest)


def autocorrelation(z: Tensor) -> Tensor:
    """Root mean square of the autocorrelation over shifts and scales, shape (batch,): 0 at best, 1 for a flat image.

    `r(k) = sum z roll(z, k) / sum z^2` for every shift k from 1 to half the side, along rows and columns, in each
    channel; at full size and again after each halving by averaging 2 x 2 pixels, while the shorter side has more than
    8. The mean is not subtracted: an offset is a correlation over any distance. Noise has r(k) of 0 ± 1/sqrt(pixels).

    Args:
        z: shape (batch, channels, H, W), H and W at least 4.

    Source: after "Zero-shot Image-to-Image Translation" (Parmar, Singh, Zhang, Li, Lu, Zhu, 2023, arXiv 2302.03027),
    there with random shifts.
    """
    _check_images("z", z, 4)
    values, squares = _values(z, "sample").reshape(z.shape), []
    while True:
        for dim in (2, 3):
            n = values.shape[dim]
            power = torch.fft.rfft(values, dim=dim).abs().square()
            r = torch.fft.irfft(power, n=n, dim=dim).sum(5 - dim)  # over the other axis: one value for each shift
            squares.append((r[:, :, 1 : n // 2 + 1] / r[:, :, :1]).square().flatten(1))
        if min(values.shape[2:]) <= 8:
            return torch.cat(squares, 1).mean(1).sqrt()
        values = torch.nn.functional.avg_pool2d(values, 2)


def radial_spectrum(z: Tensor) -> tuple[Tensor, Tensor]:
    """Power at each distance from frequency 0, the mean over its ring of `|FFT z|^2 / pixels` and over the channels.

    Noise is white: 1 at every frequency.

    Args:
        z: shape (batch, channels, H, W), H and W at least 4.

    Returns:
        Frequencies in cycles per pixel, shape (rings,), up to 0.5; power, shape (batch, rings). The rings are one cycle
        per shorter side wide; frequency 0, which is the mean, is in none of them.
    """
    rings = _rings(z)
    spectrum = torch.fft.fft2(_values(z, "sample").reshape(z.shape), norm="ortho").abs().square().mean(1).flatten(1)
    count = min(z.shape[2:]) // 2
    totals = spectrum.new_zeros(len(z), count + 2).index_add(1, rings, spectrum)
    power = totals / torch.bincount(rings, minlength=count + 2)
    return torch.arange(1, count + 1, dtype=torch.float64) / min(z.shape[2:]), power[:, 1:-1]


def spectrum_slope(z: Tensor) -> Tensor:
    """Slope of ln power over ln frequency in `radial_spectrum`, shape (batch,): 0 for noise, near -2 for photographs.

    The line is fitted by least squares, each ring weighted by its number of frequencies: the variance falls with it.

    Args:
        z: shape (batch, channels, H, W), H and W at least 4.
    """
    frequency, power = radial_spectrum(z)
    weights = torch.bincount(_rings(z), minlength=len(frequency) + 2)[1:-1].double()
    x = frequency.log() - (weights * frequency.log()).sum() / weights.sum()
    return torch.where(_flat(z), math.nan, (weights * x * power.log()).sum(1) / (weights * x * x).sum())


def latent_metrics(latent: Tensor, sigma: float, image: Tensor) -> dict[str, Tensor]:
    """All statistics of a latent, by the names they have in records, each float64 of shape (batch,) on the CPU.

    `latent_mean`, `latent_std`, `latent_skew`, `latent_kurtosis`, `latent_ks`, `latent_anderson`, `latent_dagostino`
    (from 20 values a sample), `latent_norm` (the `norm_score`), `cosine`; and of images of at least 4 x 4 pixels,
    (batch, channels, H, W), `patch_correlation`, `autocorrelation` and `spectrum_slope`. What an event is too small or
    has too few dimensions for is left out.

    Args:
        latent: shape (batch, *event).
        sigma: its noise level: the statistics are those of `latent / sigma`.
        image: what the latent is of, for `cosine`, the same shape.

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
    if _is_image(z, 4):
        measured |= {
            "patch_correlation": patch_correlation(z),
            "autocorrelation": autocorrelation(z),
            "spectrum_slope": spectrum_slope(z),
        }
    return measured


# -- parts -------------------------------------------------------------------------------------------------------------
def _flat_error(reconstruction: Tensor, original: Tensor) -> Tensor:
    if reconstruction.shape != original.shape or original.numel() == 0:
        raise ValueError(
            f"reconstruction has shape {tuple(reconstruction.shape)} and original {tuple(original.shape)}; "
            "they must be equal, (batch, *event), and not empty"
        )
    if not original.isfinite().all():
        raise ValueError("original must be finite, got a NaN or an infinity in it")
    wide = wide_dtype(original.dtype)
    return (reconstruction.to(wide) - original.to(wide)).reshape(len(original), -1)


def _bounded(error: Tensor) -> Tensor:
    return torch.where(error.isnan(), math.inf, error)


def _check_range(data_range: float) -> None:
    if not data_range > 0:
        raise ValueError(f"data_range must be positive, got {data_range}; it is 2 for data in [-1, 1]")


def _is_image(x: Tensor, side: int) -> bool:
    return x.ndim == 4 and min(x.shape[2:]) >= side


def _check_images(name: str, x: Tensor, side: int) -> None:
    if not _is_image(x, side):
        raise ValueError(
            f"{name} must be images of shape (batch, channels, H, W) with H and W at least {side}, got {tuple(x.shape)}"
        )


def _window(side: int) -> Tensor:
    size = min(11, side - 1 + side % 2)
    offsets = torch.arange(size, dtype=torch.float64) - size // 2
    weights = torch.exp(-0.5 * (offsets / (1.5 * size / 11)) ** 2)
    return weights / weights.sum()


def _values(z: Tensor, per: Per) -> Tensor:
    """Shape (batch, n) or (batch, channels, n), float64 on the CPU; all nan where one of them is not finite."""
    if per not in ("sample", "channel"):
        raise ValueError(f"per must be 'sample' or 'channel', got {per!r}")
    first = 1 if per == "sample" else 2
    if z.ndim < first or not z.is_floating_point() or z.numel() == 0:
        shape = "(batch, *event)" if first == 1 else "(batch, channels, *rest)"
        raise ValueError(f"z must be floating point of shape {shape} and not empty, got {z.dtype} of {tuple(z.shape)}")
    values = z.detach().to("cpu", torch.float64).reshape(*z.shape[:first], -1)
    return torch.where(values.isfinite().all(-1, keepdim=True), values, math.nan)


def _central_moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The second to the fourth, nan where the values are equal up to round-off."""
    centre = values.mean(-1, keepdim=True)
    m2, m3, m4 = ((values - centre).pow(k).mean(-1) for k in (2, 3, 4))
    # The mean itself is rounded, at each of the stages in which values are added up.
    flat = m2 <= (32 * torch.finfo(torch.float64).eps * centre.squeeze(-1)).square()
    return torch.where(flat, math.nan, m2), m3, m4


def _flat(z: Tensor) -> Tensor:
    return _central_moments(_values(z, "sample"))[0].isnan()


def _rings(z: Tensor) -> Tensor:
    """Which ring each frequency of `fft2` belongs to, shape (H * W,): 0 is the mean, the last one the corners."""
    _check_images("z", z, 4)
    side = min(z.shape[2:])
    y, x = (torch.fft.fftfreq(n, dtype=torch.float64) for n in z.shape[2:])
    return (torch.hypot(y[:, None], x) * side).round().long().clamp(max=side // 2 + 1).flatten()
