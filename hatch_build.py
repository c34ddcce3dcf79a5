"""The description that a package index shows: README.md without links that only work in a checkout.

A package index has no files beside the page. Links to files of this repository are completed with `base-url` of
pyproject.toml if it is set; otherwise their text stays and their target goes. Pictures become their caption then.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

try:
    from hatchling.metadata.plugin.interface import MetadataHookInterface
except ModuleNotFoundError:  # the text can be made without the builder
    MetadataHookInterface = object

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def description(readme: str, base_url: str = "") -> str:
    """Return README.md as an index can show it; code between fences stays as it is."""

    def completed(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        if base_url:
            return f"{picture}[{text}]({urljoin(base_url, target)})"
        return f"*{text}*" if picture else text

    parts = re.split(r"(^```.*?^```$)", readme, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(completed, part) for part in parts)


class DescriptionHook(MetadataHookInterface):
    """Gives the description to the builder."""

    def update(self, metadata: dict[str, Any]) -> None:
        """See `MetadataHookInterface`."""
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = description(readme, self.config.get("base-url", ""))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
