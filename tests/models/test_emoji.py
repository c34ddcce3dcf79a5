"""The reader of the pictures that the model "emoji" learns from."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from kinvert.models.emoji import read_pictures, role

MODIFIERS = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")


def entry(name: str, order: int, tones: tuple[str, ...]) -> dict[str, Any]:
    """An entry of `emoji.json`; the file of a picture is its name and tone."""
    variations = {tone: {"image": f"{name}-{tone}.png"} for tone in tones}
    shown: dict[str, Any] = {"short_name": name, "image": f"{name}.png", "sort_order": order}
    return shown | ({"skin_variations": variations} if tones else {})


def archive(path: Path, table: list[dict[str, Any]]) -> Path:
    """Write a package whose pictures have one colour: red is the entry, green the tone, the right half is clear."""
    image = pytest.importorskip("PIL.Image")
    contents = {"emoji.json": json.dumps(table).encode()}
    for shown in table:
        files = [shown["image"], *(tone["image"] for tone in shown.get("skin_variations", {}).values())]
        for tone, file in enumerate(files):
            picture, stream = image.new("RGBA", (64, 64)), io.BytesIO()
            picture.paste((10 * shown["sort_order"], 8 * tone, 0, 255), (0, 0, 32, 64))
            picture.save(stream, format="png")
            contents[f"img/google/64/{file}"] = stream.getvalue()
    with tarfile.open(path, "w:gz") as file:
        for name, data in contents.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def test_pictures_come_in_order_with_their_tone(tmp_path: Path) -> None:
    pairs = tuple(f"{a}-{b}" for a in MODIFIERS for b in MODIFIERS)
    table = [
        entry("cook", 4, MODIFIERS),
        entry("rocket", 3, ()),
        entry("two_people", 2, pairs),
        entry("male-cook", 1, MODIFIERS),
    ]
    found = read_pictures(archive(tmp_path / "package.tgz", table))
    assert found.names == ("male-cook",) * 6 + ("two_people",) * 6 + ("cook",) * 6
    assert found.labels.tolist() == [0, 1, 2, 3, 4, 5] * 3
    assert found.images.shape == (18, 3, 32, 32) and found.images.dtype == torch.uint8
    red, green = found.images[:, 0, 8, 4], found.images[:, 1, 8, 4]
    assert red.tolist() == [10] * 6 + [20] * 6 + [40] * 6
    assert green[:6].tolist() == [0, 8, 16, 24, 32, 40] == green[12:].tolist()
    assert green[6:12].tolist() == [0, 8, 56, 104, 152, 200]  # two people of one tone: pairs 1, 7, 13, 19 and 25
    assert (found.images[..., 28:] == 255).all()  # clear is white
    # The cook is shown, so no cook of any gender is learned from.
    assert found.held.tolist() == list(range(12, 18)) and found.kept.tolist() == list(range(6, 12))


def test_roles_have_no_gender() -> None:
    assert role("male-cook") == role("woman_cook") == role("cook") == "cook"
    assert role("man_climbing") == role("person_climbing") == "climbing"
    assert role("red_haired_woman") == role("red_haired_man") != role("curly_haired_woman")
    assert role("woman") == role("man") == "person"


def test_a_missing_archive_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="npm pack emoji-datasource-google@16"):
        read_pictures(tmp_path / "none.tgz")
