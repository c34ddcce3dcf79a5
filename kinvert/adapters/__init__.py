"""Adapters: other programs' models, samplers and pipelines. The core imports none of them."""

__all__ = list[str]()
