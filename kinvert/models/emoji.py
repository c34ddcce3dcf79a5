"""Read the pictures of Noto Emoji that the model "emoji" learns from.

The npm package `emoji-datasource-google` holds them as 64x64 PNG files, with a table `emoji.json` that says what each
shows. 323 pictures of people and hands come in the neutral yellow and in five skin tones. Hair goes with the tone in
many of them; all else is equal. So an edit of the tone has a true answer. The tones are the classes. Two people in one
picture have the same tone here.

Each picture is put on white and reduced to 32x32. Some people and hands are held out in all their tones and genders.
Pillow reads the files.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["PACKAGE", "TONES", "Pictures", "read_pictures", "role"]

PACKAGE = "emoji-datasource-google@16.0.0"
"""The npm package, for `npm pack`."""

TONES = ("yellow", "light", "medium-light", "medium", "medium-dark", "dark")
"""The skin tones, which are the classes 0 to 5."""

_MODIFIERS = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
_GENDER = re.compile(r"\b(woman|women|man|men|person|people|female|male|girl|boy|bride|he|she)\b")
_SHOWN = (
    "+1",
    "wave",
    "v",
    "ear",
    "astronaut",
    "cook",
    "judge",
    "superhero",
    "vampire",
    "red_haired_woman",
    "person_climbing",
    "bath",
)


class Pictures(NamedTuple):
    """The pictures, and which of them are for training and which are shipped as held out."""

    images: Tensor
    """uint8 (N, 3, 32, 32)."""
    labels: Tensor
    """int64 (N,), indices of `TONES`."""
    kept: Tensor
    """int64, the pictures to learn from."""
    held: Tensor
    """int64, the pictures to ship: 12 people or hands, six tones each in the order of `TONES`."""
    names: tuple[str, ...]
    """The short name of each picture."""


def role(short_name: str) -> str:
    """Return the name without words of gender and direction: 'male-cook' and 'cook' are one role."""
    words = short_name.replace("-", " ").replace("_", " ").replace(" facing right", "")
    return " ".join(_GENDER.sub(" ", words).split()) or "person"


def read_pictures(archive: Path, size: int = 32) -> Pictures:
    """Read the archive that `npm pack emoji-datasource-google@16.0.0` writes.

    Args:
        archive: the `.tgz` file.
        size: side of the pictures.

    Raises:
        FileNotFoundError: no such file; the message says how to get it.
    """
    if not archive.is_file():
        raise FileNotFoundError(f"{archive} is missing; get it with: npm pack {PACKAGE}")
    with tarfile.open(archive) as file:
        members = {m.name.removeprefix("package/"): file.extractfile(m) for m in file if m.isfile()}
        found: dict[str, bytes] = {
            name: stream.read()
            for name, stream in members.items()
            if stream is not None and (name == "emoji.json" or name.startswith("img/google/64/"))
        }
    table: list[dict[str, Any]] = sorted(json.loads(found["emoji.json"]), key=lambda entry: entry["sort_order"])
    images, labels, names = [], [], []
    for entry in table:
        for label, picture in _variants(entry):
            path = f"img/google/64/{picture}"
            if path in found:
                images.append(_reduced(found[path], size))
                labels.append(label)
                names.append(entry["short_name"])
    return Pictures(torch.stack(images), torch.tensor(labels, device="cpu"), *_split(names), tuple(names))


def _variants(entry: dict[str, Any]) -> list[tuple[int, str]]:
    """Return the class and the file of each picture of an entry, none if it has no tones."""
    tones = entry.get("skin_variations", {})
    if all(modifier in tones for modifier in _MODIFIERS):
        return [(0, entry["image"]), *((1 + i, tones[m]["image"]) for i, m in enumerate(_MODIFIERS))]
    pair = {f"{m}-{m}": 1 + i for i, m in enumerate(_MODIFIERS)}
    if pair.keys() <= tones.keys():  # two people: both of one tone
        return [(0, entry["image"]), *((label, tones[m]["image"]) for m, label in pair.items())]
    return []


def _split(names: list[str]) -> tuple[Tensor, Tensor]:
    """Return indices of the pictures for training and of those to ship; all genders of a held-out role are left out."""
    held = [i for shown in _SHOWN for i, name in enumerate(names) if name == shown]
    roles = {role(names[i]) for i in held}
    kept = [i for i, name in enumerate(names) if role(name) not in roles]
    return torch.tensor(kept, device="cpu"), torch.tensor(held, device="cpu")


def _reduced(png: bytes, size: int) -> Tensor:
    """Return a picture on white, uint8 (3, size, size)."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    small = Image.alpha_composite(white, picture).convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    return (
        torch.tensor(list(small.tobytes()), dtype=torch.uint8, device="cpu")
        .view(size, size, 3)
        .permute(2, 0, 1)
        .contiguous()
    )
