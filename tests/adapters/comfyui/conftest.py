from __future__ import annotations

import pytest
from standin import Host


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> Host:
    """The stand-in, in place of ComfyUI."""
    host = Host()
    host.install(monkeypatch)
    return host
