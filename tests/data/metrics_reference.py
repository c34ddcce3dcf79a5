"""Write metrics.npz: images and what scikit-image and torchmetrics make of them.

    pip install scikit-image torchmetrics && python tests/data/metrics_reference.py

Both fix the Gaussian window of SSIM at 3.5 standard deviations, so that a smaller window is asked for by its sigma.
torchmetrics averages over windows that reach across the reflected border too; here its map is cropped to those inside.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import skimage
import torch
import torchmetrics
from skimage import metrics
from torchmetrics.functional import image

SHAPES = {"digits": (3, 1, 8, 8), "small": (2, 2, 9, 13), "mnist": (3, 1, 28, 28), "colour": (2, 3, 24, 17)}


def pair(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A smooth image in [-1, 1], and the same disturbed by more noise from sample to sample."""
    y, x = (np.linspace(0, 1, n) for n in shape[2:])
    phase = rng.uniform(0, 6, shape[:2])[..., None, None]
    original = np.sin(phase + 5 * y[:, None] * x + 7 * x)
    noise = np.logspace(-2, 0, shape[0])[:, None, None, None] * rng.standard_normal(shape)
    return original, original + noise


def inside(similarity: torch.Tensor, border: int) -> np.ndarray:
    """The mean of each sample's map without its border."""
    return similarity[:, :, border:-border, border:-border].mean((1, 2, 3)).numpy()


def main() -> None:
    """Compute and write."""
    rng = np.random.default_rng(0)
    arrays = {"versions": np.array([f"scikit-image {skimage.__version__}", f"torchmetrics {torchmetrics.__version__}"])}
    for name, shape in SHAPES.items():
        a, b = pair(shape, rng)
        side = min(shape[2:])
        size = min(11, side - 1 + side % 2)
        sigma, border = 1.5 * size / 11, size // 2
        window = {"gaussian_weights": True, "sigma": sigma, "use_sample_covariance": False, "channel_axis": 0}
        pairs = list(zip(a, b, strict=True))
        t = torch.from_numpy(a), torch.from_numpy(b)
        arrays |= {
            f"{name}/original": a,
            f"{name}/reconstruction": b,
            f"{name}/skimage/mse": np.array([metrics.mean_squared_error(*p) for p in pairs]),
            f"{name}/skimage/psnr": np.array([metrics.peak_signal_noise_ratio(*p, data_range=2) for p in pairs]),
            f"{name}/skimage/nmse": 20 * np.log10([metrics.normalized_root_mse(*p) for p in pairs]),
            f"{name}/skimage/ssim": np.array([metrics.structural_similarity(*p, data_range=2, **window) for p in pairs]),
            f"{name}/torchmetrics/psnr": image.peak_signal_noise_ratio(
                t[1], t[0], data_range=2.0, dim=(1, 2, 3), reduction="none"
            ).numpy(),
            f"{name}/torchmetrics/ssim": inside(
                image.structural_similarity_index_measure(
                    t[1], t[0], data_range=2.0, sigma=sigma, reduction="none", return_full_image=True
                )[1],
                border,
            ),
        }  # fmt: skip
    path = Path(__file__).with_name("metrics.npz")
    partial = path.with_suffix(f".{os.getpid()}.npz")
    np.savez_compressed(partial, **arrays)
    partial.replace(path)


if __name__ == "__main__":
    main()
