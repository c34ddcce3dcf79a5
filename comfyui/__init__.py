"""The nodes of kinvert for ComfyUI."""

from kinvert.adapters.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: F401
