"""Invert a folder of images or latents: shard by shard, and resumable.

Files are taken in the order of their names, `shard_size` at a time. A shard's latents go to `<key>.safetensors`
("latents", "memory/<name>" and "noises/<i>" if they belong to the latents, and the settings, the sampler and the rows),
then its rows to `<key>.json`, which marks it as done, with the length and the checksum of the latents: a shard that is
damaged or gone is computed again. The key is a hash of the settings and of the names and contents of its files. When
all shards are done, their rows make `manifest.jsonl`: file, index in the file, shard, row in the shard, converged,
round_trip_error, evaluations and threads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinvert.bench.grid import Cell
from kinvert.bench.measurement import isolated, problem_of, setup_of
from kinvert.bench.methods import ITERATING, MethodResult, apply_method, restore
from kinvert.bench.problems import Problem
from kinvert.bench.runner import check_threads
from kinvert.checks import is_integer
from kinvert.files import make_folder, write_file
from kinvert.jobs import UnfinishedError, is_done, kept_in, run_tasks
from kinvert.jsontext import canonical_json, content_key
from kinvert.packing import to_tree
from kinvert.pictures import IMAGES, TENSORS, image_files, pillow, read
from kinvert.records import header_of, tree_bytes
from kinvert.resultfiles import check_data, read_result, set_aside, write_result
from kinvert.telling import warn_user
from kinvert.tensors import rms

__all__ = ["MANIFEST", "SETTINGS", "Shard", "as_conditioning", "invert_folder", "read_states", "try_conditioning"]

LATENTS = tuple(ending for ending in TENSORS if ending != ".latent")  # in the unit of a VAE that is not known here
MANIFEST, SETTINGS = "manifest.jsonl", "settings.json"


@dataclass(frozen=True)
class Shard:
    """The inversion of some files of a folder, as a task.

    Attributes:
        cell: model, method, sampler, schedule, steps, cfg, dtype and seed; its other settings have no meaning here.
        source: the folder.
        files: names in it, and hashes of their contents.
        positive, negative: conditioning: a value for each keyword of the denoiser.
        max_evals: denoiser evaluations that one sample may cost; None sets no limit.
    """

    cell: Cell
    source: Path
    files: tuple[tuple[str, str], ...]
    positive: tuple[tuple[str, Any], ...] = ()
    negative: tuple[tuple[str, Any], ...] = ()
    max_evals: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that all shards of a folder have in common."""
        kept = {key: value for key, value in self.cell.settings.items() if key not in ("question", "count")}
        own = {"positive": dict(self.positive), "negative": dict(self.negative), "max_evals": self.max_evals}
        return kept | own

    @property
    def key(self) -> str:
        """A hash of the settings and the files."""
        return content_key([self.settings, self.files])

    def run(self, folder: Path) -> None:
        """Invert the files, and write the latents, then the rows."""
        problem = problem_of(self.cell.model, 1, 0, self.cell.dtype, self.cell.device)
        for name, digest in self.files:
            if _digest(self.source / name) != digest:
                raise ValueError(f"{name} was changed since the run began; the same command takes it as it is now")
        batches = [read_states(self.source / name, problem) for name, _ in self.files]
        x = torch.cat(batches).to(problem.images)
        positive = as_conditioning(dict(self.positive), x.device)
        negative = as_conditioning(dict(self.negative), x.device) or None
        guidance = {"cfg": self.cell.cfg, "positive": positive, "negative": negative}
        setup = replace(setup_of(self.cell, problem), guidance=guidance, max_evals=self.max_evals)
        with isolated(self.cell):
            threads = torch.get_num_threads()
            found = apply_method(self.cell.method, setup, x)
            restored, _ = restore(setup, found)
        errors = rms((restored - x).float()).tolist()
        rows = [row | {"threads": threads} for row in self._rows([len(batch) for batch in batches], found, errors)]
        tree = {
            "latents": found.latent,
            "memory": dict(found.memory),
            "noises": list(found.noises),
            "settings": self.settings,
            "sampler": to_tree(found.sampler or setup.sampler),
            "rows": rows,
        }
        write_result(folder, self.key, {"key": self.key, "rows": rows}, tree_bytes("shard", tree))

    def check(self, folder: Path) -> None:
        """Raise ValueError if the rows or the latents are damaged."""
        self.rows(folder)
        check_data(folder / f"{self.key}.safetensors", read_result(folder / f"{self.key}.json"))

    def rows(self, folder: Path) -> list[dict[str, Any]]:
        """Read the rows that `run` wrote.

        Raises:
            ValueError: they are damaged, or those of other files.
        """
        record = read_result(folder / f"{self.key}.json")
        rows: list[dict[str, Any]] = record.get("rows", [])
        if record.get("key") != self.key or {row["file"] for row in rows} != {name for name, _ in self.files}:
            raise ValueError("its rows are those of other files")
        return rows

    def _rows(self, lengths: list[int], found: MethodResult, errors: list[float]) -> list[dict[str, Any]]:
        places = [(name, i) for (name, _), length in zip(self.files, lengths, strict=True) for i in range(length)]
        return [
            {
                "file": name,
                "index": index,
                "shard": f"{self.key}.safetensors",
                "row": row,
                "converged": None if found.converged is None else found.converged[row],
                "round_trip_error": errors[row],
                "evaluations": found.evaluations[row],
            }
            for row, (name, index) in enumerate(places)
        ]

    def __str__(self) -> str:
        return f"{self.files[0][0]} to {self.files[-1][0]}"


def invert_folder(
    source: Path | str,
    folder: Path | str,
    cell: Cell,
    *,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
    max_evals: int | None = None,
    shard_size: int = 64,
    workers: int = 1,
    threads: int | None = None,
    imports: Sequence[str] = (),
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Invert every image and latent of a folder, and of the folders in it.

    Args:
        source: a folder of images (PNG, JPEG, WebP; values from 0 to 255 become -1 to 1) or of latents (.safetensors
            with one tensor, .npy, .npz, .pt), each of the shape of the model's images, or a batch of them. Other files
            are left alone.
        folder: where the shards and `manifest.jsonl` go.
        cell: the model and how to invert; its question, its count and the seed of its images have no meaning here.
        positive, negative: conditioning, a number or a string for each keyword of the denoiser, for all files alike.
        max_evals: denoiser evaluations that one sample may cost, for methods that iterate; None sets no limit.
        shard_size: number of files that are inverted as one batch and kept in one file.
        workers, threads, imports, progress: as in `kinvert.bench.run`.

    Returns:
        The rows of the manifest, in the order of the files: file, index (in the file), shard, row (in the shard),
        converged (None if the method makes no claim), round_trip_error (root mean square), evaluations, and the number
        of torch's threads. The list is empty if other processes of torchrun are not ready yet.

    Raises:
        ValueError: a source without images or latents; a folder with results of other settings; as `kinvert.bench.run`.
        UnfinishedError: files that cannot be read; the others are done and in the manifest first. Also a shard that
            cannot be inverted, or a worker that ended early; the other shards are done.
    """
    source, folder = Path(source), Path(folder)
    if not is_integer(shard_size) or shard_size < 1:
        raise ValueError(f"shard_size must be a positive int, got {shard_size!r}")
    if max_evals is not None and cell.method not in ITERATING:
        raise ValueError(f"max_evals is for {' and '.join(ITERATING)}, which iterate, got method {cell.method!r}")
    conditioning = _check_conditioning("positive", positive or {}), _check_conditioning("negative", negative or {})
    check_threads(threads, [cell])
    cell = replace(cell, question="reconstruction", count=1)
    problem = problem_of(cell.model, 1, 0, cell.dtype, cell.device)
    files, unread = _readable_files(source, folder, problem)
    for name, values in zip(("positive", "negative"), conditioning, strict=True):
        try_conditioning(problem, name, values)
    total = len(files) + len(unread)
    complaint = f"{len(unread)} of {total} are not done; the others are, and in {MANIFEST}:\n" + "\n".join(unread)
    if not files:
        raise UnfinishedError(complaint)
    shards = [
        Shard(cell, source, tuple(files[i : i + shard_size]), *conditioning, max_evals)
        for i in range(0, len(files), shard_size)
    ]
    _check_settings(folder, shards[0].settings)
    run_tasks(shards, folder, workers=workers, threads=threads, imports=imports, progress=progress, unit="shard")
    if not all(is_done(folder, shard.key) for shard in shards):
        return []
    rows = [row for shard in shards for row in shard.rows(folder)]
    with kept_in(folder, shards, "shard"):
        write_file(folder / MANIFEST, "".join(canonical_json(row) + "\n" for row in rows).encode())
    if unread:
        raise UnfinishedError(complaint)
    return rows


def _readable_files(source: Path, folder: Path, problem: Problem) -> tuple[list[tuple[str, str]], list[str]]:
    """Return names and hashes of the files that can be inverted, and a complaint about each of the others."""
    files, unread = [], []
    for path in _files(source, folder):
        try:
            read_states(path, problem)
            files.append((path.relative_to(source).as_posix(), _digest(path)))
        except Exception as error:  # whatever a reader raises costs this file alone
            said = str(error) or type(error).__name__
            unread.append(f"  {said}" if str(path) in said else f"  cannot read {path}: {said}")
    return files, unread


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()[:16]


def _files(source: Path, folder: Path) -> list[Path]:
    """Return the images and latents of a folder, sorted by name."""
    if not source.is_dir():
        raise ValueError(f"source must be a folder of images or latents, got {str(source)!r}, which is none")
    out = folder.resolve()
    found = [path for path in image_files(source, (*IMAGES, *LATENTS)) if out not in path.resolve().parents]
    if not found:
        raise ValueError(f"there are no images or latents in {str(source)!r} but the results")
    if any(path.suffix.lower() in IMAGES for path in found):
        pillow()  # before the work
    return found


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of the latents to the folder; refuse a folder whose latents have other settings."""
    now = json.loads(canonical_json(settings))
    before = _recall_settings(folder)
    if before is None:
        try:
            make_folder(folder)
            write_file(folder / SETTINGS, (canonical_json(settings) + "\n").encode())
        except OSError as error:
            raise ValueError(f"cannot write to {str(folder)!r}: {error.strerror}; choose another folder") from error
        return
    for key in before | now:
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{str(folder)!r} holds latents that were made with {key}={before.get(key)!r}, got {now.get(key)!r}; "
                "choose another folder"
            )


def _recall_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings of the latents that a folder holds; None if there are none, or nobody knows.

    They are in a file of their own. If that is damaged, those that a shard has are taken.

    Warns:
        RuntimeWarning: the file is damaged, and set aside.
    """
    path, shards = folder / SETTINGS, sorted(folder.glob("*.safetensors"))
    if not shards:
        return None
    if path.exists():
        try:
            found = json.loads(path.read_bytes())
            if isinstance(found, dict):
                return found
            why = f"it holds {type(found).__name__}"
        except (OSError, ValueError, RecursionError) as error:
            why = str(error)
        warn_user(f"{path} is damaged ({why}); it is set aside as {set_aside(path)}, and written again")
    for shard in shards:
        with suppress(ValueError, KeyError, TypeError):
            header = header_of(shard)
            if header is not None and header.kind == "shard":
                settings: dict[str, Any] = header.content["settings"]
                write_file(path, (canonical_json(settings) + "\n").encode())
                return settings
    return None


def _check_conditioning(name: str, values: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    for key, value in values.items():
        number = isinstance(value, (bool, int, float)) and math.isfinite(value)
        if not number and not isinstance(value, str):
            raise ValueError(f"{name} must have a finite number or a string for {key!r}, got {value!r}")
    return tuple(sorted(values.items()))


def as_conditioning(values: Mapping[str, Any], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return conditioning for every item: numbers become tensors with one row."""
    return {k: value if isinstance(value, str) else torch.tensor([value], device=device) for k, value in values.items()}


def try_conditioning(problem: Problem, name: str, values: tuple[tuple[str, Any], ...]) -> None:
    """Evaluate the model once before the work; raise ValueError if it does not take the conditioning."""
    if not values:
        return
    x, sigma = problem.images[:1], torch.full((1,), problem.levels.sigma_max, device=problem.images.device)
    try:
        with torch.no_grad():
            problem.denoiser(x, sigma.to(x.dtype), **as_conditioning(dict(values), x.device))
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in values)
        raise ValueError(f"the model does not take {name} {given}: {type(error).__name__}: {error}") from error


def read_states(path: Path, problem: Problem) -> Tensor:
    """Return the images or latents of a file, shape (n, *event).

    Raises:
        ValueError: a file that cannot be read, or that is none of this problem, with its name.
    """
    event = tuple(problem.images.shape[1:])
    channels = None
    if path.suffix.lower() in IMAGES:
        channels = event[0] if len(event) == 3 and event[0] in (1, 3) else None
        if channels is None:
            raise ValueError(
                f"cannot read {path}: the model takes {event}, which is no grey or RGB image; pass latents as "
                ".safetensors"
            )
    x = read(path, channels=channels, dtype=torch.float64 if channels else None)
    if tuple(x.shape) == event:
        x = x[None]
    if tuple(x.shape[1:]) != event or not len(x):
        raise ValueError(f"{path} has shape {tuple(x.shape)}, but the model takes {event}, or a batch of it")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{path} has NaN or infinite values")
    return x
