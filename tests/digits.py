"""Images of digits that the embedded models never saw, as files."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from kinvert import models

PIXELS = (((models.held_out("digits")[0][:, 0] + 1) * 127.5).round()).to(torch.uint8).numpy()


def write_digits(folder: Path) -> Path:
    """Write five images, two of them in a folder below, and a file that is neither image nor latent."""
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.PNG", "c.png", "more/a.png", "more/d.png")):
        Image.fromarray(PIXELS[i]).save(folder / name)
    (folder / "readme.txt").write_text("not an image")
    return folder
