"""The files in which a task leaves its result: `<key>.json`, and `<key>.safetensors` if there are tensors.

The JSON is one line, its record. Two of its entries tell damage: "data" has the length and the SHA-256 of the tensors'
file (None if there is none), and "sha256" is that of the canonical JSON of all other entries. It is written last, so
that a record stands for a result that is complete. Results of kinvert 0.1.0 have neither entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kinvert.files import write_file
from kinvert.jsontext import canonical_json, from_canonical_json

__all__ = [
    "DATA",
    "SEAL",
    "check_data",
    "check_seal",
    "measured",
    "parse_result",
    "read_result",
    "sealed",
    "set_aside",
    "write_result",
]

DATA, SEAL = "data", "sha256"
ASIDE = ".damaged"


def write_result(folder: Path, key: str, record: Mapping[str, Any], data: bytes | None = None) -> None:
    """Write the result of a task, the record last.

    Args:
        folder: where.
        key: of the task.
        record: what canonical JSON can hold.
        data: the content of the safetensors file.
    """
    noted = None
    if data is not None:
        write_file(folder / f"{key}.safetensors", data)
        noted = {"bytes": len(data), SEAL: hashlib.sha256(data).hexdigest()}
    line = canonical_json(sealed({**record, DATA: noted}))
    write_file(folder / f"{key}.json", f"{line}\n".encode())


def read_result(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ValueError: it cannot be read, or is damaged; the message does not name the file.
    """
    try:
        return parse_result(path.read_bytes())
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error


def parse_result(line: bytes) -> dict[str, Any]:
    """Return the record that a line of JSON holds.

    Raises:
        ValueError: it is damaged, or was edited.
    """
    record = from_canonical_json(line)
    if not isinstance(record, dict):
        raise ValueError(f"it is no record but {type(record).__name__}")
    check_seal(record)
    return record


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with the checksum of its other entries."""
    bare = {key: value for key, value in record.items() if key != SEAL}
    return bare | {SEAL: hashlib.sha256(canonical_json(bare).encode()).hexdigest()}


def measured(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without what tells damage."""
    return {key: value for key, value in record.items() if key not in (DATA, SEAL)}


def check_seal(record: Mapping[str, Any]) -> None:
    """Raise ValueError if a record is not what its checksum says; one of kinvert 0.1.0 has none."""
    if {SEAL, DATA} & record.keys() and record.get(SEAL) != sealed(record)[SEAL]:
        raise ValueError("it was edited or damaged after it was written: its checksum is that of other content")


def check_data(path: Path, record: Mapping[str, Any]) -> None:
    """Raise ValueError if the safetensors file of a result is gone, or is not what was written.

    Args:
        path: of the file.
        record: of the result.
    """
    noted = record.get(DATA)
    try:
        if noted is not None:
            _check_noted(path, noted)
        elif DATA not in record:
            with safe_open(path, "np"):  # which compares the length with the header
                pass
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is gone") from error
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged or cut off: {error}") from error


def _check_noted(path: Path, noted: Mapping[str, Any]) -> None:
    length = path.stat().st_size
    if length != noted["bytes"]:
        raise ValueError(f"{path.name} has {length} bytes, and {noted['bytes']} were written")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != noted[SEAL]:
            raise ValueError(f"{path.name} has other bytes than were written")


def set_aside(path: Path) -> Path:
    """Rename a damaged file, so that its place is free, and return its new path.

    Raises:
        ValueError: it cannot be renamed.
    """
    place = path.with_name(path.name + ASIDE)
    try:
        path.replace(place)
    except FileNotFoundError:
        pass  # another process was quicker
    except OSError as error:
        raise ValueError(f"{path} is damaged, and cannot be set aside: {error.strerror}; remove it") from error
    return place
