"""Train a classifier of an embedded model's images.

    python -m kinvert.models.train_classifier digits --out kinvert/models

The loss is the cross entropy over the images that the denoiser was trained on. Most of them are slightly rotated,
scaled and shifted, and all get a little noise, since the images to judge come from a sampler. With the same `--seed` a
run is reproducible on one machine and one version of torch. To estimate the accuracy on new images, hold out more of
them, e.g. `--held 40`: the four of each class that `kinvert.models.held_out` returns are always among them. Training
needs scikit-learn and mlxtend.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from kinvert.models.classifier import Architecture, Classifier
from kinvert.models.train import RECIPES, augmented, save, split

__all__ = ["ARCHITECTURES", "main", "train"]

ARCHITECTURES = {
    "digits": Architecture("digits", (1, 8, 8), channels=(16, 24), strides=(1, 2), features=384),
    "mnist": Architecture("mnist", (1, 28, 28), channels=(12, 24, 32), strides=(2, 2, 2), features=512),
}


def train(name: str, out: Path, seed: int = 0, iterations: int = 4000, held: int = 4, batch: int = 128) -> Classifier:
    """Train and return a classifier; save it to `out/classifiers` and print its accuracy on held-out images."""
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    images, labels, _, _ = recipe.read()
    x = images.float() * (2 / recipe.maximum) - 1
    kept, test = split(labels, held)
    model = Classifier(ARCHITECTURES[name])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    for i in range(iterations):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (i + 1) / 100) * (1 + math.cos(math.pi * i / iterations)) / 2
        pick = kept[torch.randint(len(kept), (batch,))]
        x0 = augmented(x[pick], replace(recipe, augment=0.8))
        x0 = x0 + 0.1 * torch.rand(batch, 1, 1, 1) * torch.randn_like(x0)
        loss = cross_entropy(model(x0), labels[pick], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    half = {key: value.half() for key, value in model.state_dict().items()}
    model.load_state_dict(half)  # evaluated as stored
    with torch.no_grad():
        right = (model.eval()(x[test]).argmax(1) == labels[test]).sum().item()
    print(f"{name}: {right} of {len(test)} held-out images right, last loss {loss.item():.3f}")
    metadata = {
        "architecture": json.dumps(asdict(ARCHITECTURES[name])),
        "seed": str(seed),
        "iterations": str(iterations),
        "right": f"{right} of {len(test)}",
        "licence": recipe.licence,
        "torch": torch.__version__,
    }
    save(out / "classifiers" / f"{name}.safetensors", half, metadata)
    return model


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        prog="python -m kinvert.models.train_classifier", description="Train a classifier of a model's images."
    )
    parser.add_argument("name", choices=ARCHITECTURES)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets classifiers/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=4000)
    parser.add_argument("--held", type=int, default=4, help="images of each class to test on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.name, args.out, args.seed, args.iterations, args.held)


if __name__ == "__main__":
    main()
