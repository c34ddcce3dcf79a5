"""What a run begins with beside its latents, and its file beside the config of a saved scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from kinvert.files import write_file

__all__ = ["Start"]

FILE = "kinvert_state.safetensors"


@dataclass(frozen=True, eq=False)
class Start:
    """What belongs to the latents of an inversion.

    Attributes:
        state: the state at the first level, "x" and the auxiliary ones; None takes the latents of the pipeline.
        noises: the noises of the run in place of new ones; none draws new ones.
    """

    state: Mapping[str, Tensor] | None = None
    noises: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names that they have in the file."""
        found = {f"state.{name}": value for name, value in (self.state or {}).items()}
        return found | {f"noise.{i}": value for i, value in enumerate(self.noises)}

    def write(self, directory: Any) -> None:
        """Write the tensors to a directory, or remove those of an earlier scheduler if there are none now."""
        folder, tensors = Path(directory), self.tensors
        if not tensors:
            (folder / FILE).unlink(missing_ok=True)
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / FILE, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))

    @classmethod
    def read(cls, directory: Any, subfolder: str | None = None) -> Start:
        """Read the tensors of a directory; none if it has no such file."""
        path = Path(directory, subfolder or "", FILE)
        tensors = load_file(path) if path.is_file() else {}
        state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
        count = len(tensors) - len(state)
        return cls(state or None, tuple(tensors[f"noise.{i}"] for i in range(count)))

    def check(self, wanted: list[str]) -> None:
        """Raise ValueError if these are not the tensors that a config names."""
        if sorted(self.tensors) != sorted(wanted):
            raise ValueError(
                f"config: the scheduler was saved with the tensors {', '.join(wanted) or 'none'}, got "
                f"{', '.join(self.tensors) or 'none'}; load it by from_pretrained from the folder that save_pretrained "
                f"wrote, with {FILE}, and copy it by copy.deepcopy, not by from_config"
            )
