"""JSON without infinite numbers: the form that keeps them, and the form that drops them."""

from __future__ import annotations

import hashlib
import json
import math
from types import SimpleNamespace

import pytest

from kinvert.jsontext import canonical_json, content_key, from_canonical_json, to_json


def test_canonical_json_round_trip() -> None:
    data = {"b": [math.inf, -math.inf, 1.0, (2, None)], "a": {"word": "infinite"}}
    text = canonical_json(data)
    assert text == '{"a":{"word":"infinite"},"b":["inf","-inf",1.0,[2,null]]}'
    assert canonical_json(dict(reversed(data.items()))) == text
    assert from_canonical_json(text) == from_canonical_json(text.encode()) == data | {"b": [*data["b"][:3], [2, None]]}
    assert math.isnan(from_canonical_json(canonical_json([math.nan]))[0])


def test_to_json_writes_null_and_names() -> None:
    text = to_json({"psnr": [math.inf, math.nan, 3.5], "tableau": SimpleNamespace(name="midpoint")})
    assert json.loads(text) == {"psnr": [None, None, 3.5], "tableau": "midpoint"}
    assert text.endswith("}\n") and text.startswith('{\n  "psnr"')


def test_content_key_is_a_hash_of_the_text() -> None:
    assert content_key({"b": 1, "a": [2]}) == hashlib.sha256(b'{"a":[2],"b":1}').hexdigest()[:16]
    with pytest.raises(ValueError, match="not JSON compliant"):
        content_key({"a": math.inf})
