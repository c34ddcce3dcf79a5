"""kinvert as nodes of ComfyUI. The folder `comfyui` of the repository goes into its `custom_nodes`.

The host reads `NODE_CLASS_MAPPINGS` and `NODE_DISPLAY_NAME_MAPPINGS`. Everything of the host stands in `host`.
"""

from __future__ import annotations

from kinvert.adapters.comfyui import inverting, latents, samplers, unsampling
from kinvert.adapters.comfyui.spec import Node, to_class

__all__ = ["NODES", "NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

NODES: tuple[Node, ...] = (*unsampling.NODES, *inverting.NODES, *samplers.NODES, *latents.NODES)
"""The nodes, each with its inputs, its outputs and its function."""

NODE_CLASS_MAPPINGS: dict[str, type] = {node.key: to_class(node) for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {node.key: node.title for node in NODES}
