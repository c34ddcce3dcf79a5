"""A latent in a file, with everything that the way back needs.

The file is safetensors: "latents" is the state of kinvert at the first noise level, shape (1, *event); auxiliary state
is in "memory/<name>", noises are in "noises/<i>". The rest is JSON in the metadata "kinvert", see `kinvert.records`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

import kinvert as ki
from kinvert.coordinates import Coordinates
from kinvert.jsontext import canonical_json
from kinvert.packing import from_fields
from kinvert.records import KEY, check_kind, header_of, known_entries, read_tree, write_tree

__all__ = ["KIND", "LatentFile", "Record"]

KIND = "latent"


@dataclass(frozen=True)
class Record:
    """How a latent was made.

    Attributes:
        verb: "unsample" or "invert".
        model: the directory of the pipeline.
        call: arguments of the pipeline's call: prompt, negative_prompt, guidance_scale, height, width.
        steps: steps of the pipeline's schedule.
        sampler, options: the sampler, a name of `ki.SAMPLERS`.
        coordinates: what the levels are.
        sigmas: the levels of the way down.
        schedule: the name of the schedule; None: the pipeline's own levels.
        dtype: of the network.
        method: how it was made.
        limits: the tolerance and the most evaluations that were asked for.
        image: the name of the image, and a hash of its contents.
        size: height and width of the image, in pixels.
        result: what the inversion says of itself: converged, round_trip_error, evaluations, reason.
        version: of kinvert.
    """

    verb: str
    model: str
    call: dict[str, Any]
    steps: int
    sampler: str
    options: dict[str, Any]
    coordinates: Coordinates
    sigmas: tuple[float, ...]
    schedule: str | None
    dtype: str
    method: str
    limits: tuple[float | None, int | None]
    image: tuple[str, str]
    size: tuple[int, int]
    result: dict[str, Any] = field(default_factory=dict)
    version: str = ki.__version__

    @property
    def settings(self) -> dict[str, Any]:
        """What the latent depends on, as JSON has it."""
        kept = {key: value for key, value in asdict(self).items() if key not in ("result", "version")}
        plain: dict[str, Any] = json.loads(canonical_json(kept))
        return plain


@dataclass(frozen=True, eq=False)
class LatentFile:
    """A latent, what belongs to it, and how it was made."""

    latent: Tensor
    record: Record
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    noises: tuple[Tensor, ...] = ()

    def save(self, path: Path) -> None:
        """Write the file.

        Raises:
            ValueError: it cannot be written.
        """
        tree = {"latents": self.latent, "memory": dict(self.memory), "noises": list(self.noises)}
        write_tree(path, KIND, tree | {"record": asdict(self.record)})

    @classmethod
    def load(cls, path: Path) -> LatentFile:
        """Read a file that `save` wrote.

        Raises:
            ValueError: another file.
        """
        header = header_of(path)
        if header is None:
            return _of_version_0(path)
        entries = {"latents": True, "memory": False, "noises": False, "record": True}
        what, tree = repr(str(path)), read_tree(path, check_kind(path, header, KIND))
        tree = known_entries(what, tree, entries)
        record = from_fields(Record, tree["record"], what)
        return cls(tree["latents"], record, tree.get("memory", {}), tuple(tree.get("noises", ())))


def _of_version_0(path: Path) -> LatentFile:
    """Read a file of kinvert 0.1.0, whose metadata is the record alone."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        given = json.loads((file.metadata() or {}).get(KEY, "{}"))
    if "latents" not in tensors or "verb" not in given:
        raise ValueError(
            f"{str(path)!r} does not say how its latent was made: it was not written by `kinvert unsample` or "
            "`kinvert invert`"
        )
    given |= {name: tuple(given[name]) for name in ("sigmas", "image", "size", "limits")}
    noises = {int(name[7:]): value for name, value in tensors.items() if name.startswith("noises/")}
    memory = {name[7:]: value for name, value in tensors.items() if name.startswith("memory/")}
    record = from_fields(Record, given, repr(str(path)))
    return LatentFile(tensors["latents"], record, memory, tuple(noises[i] for i in sorted(noises)))
