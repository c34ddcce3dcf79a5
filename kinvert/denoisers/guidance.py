r"""Classifier-free guidance.

With ``C`` and ``U`` the predictions under the positive and the negative conditioning,

    D = U + cfg (C - U)

so ``cfg = 1`` is the positive prediction alone and the negative one is not computed. Both are
computed as one call on a batch ``[uncond, cond]`` of twice the size whenever their conditionings
stack, in two calls when they do not.

Which conditionings stack. The first dimension of every tensor of at least one dimension is the
batch; of size 1 it is expanded to x's batch, in whichever way the denoiser is called. Two values
stack when they are

* tensors of equal shape, dtype and device whose first dimension is the batch: concatenated;
* dicts with the same keys, or lists or tuples of the same length, whose members stack: member by
  member (not a list of plain values as long as the batch, which may hold one for each item);
* equal strings, numbers, booleans or None, or the same object (no tensor with dimensions): passed
  through.

Anything else, such as different keys or token lengths, or tensors whose first dimension is not the
batch, takes two calls, so the denoiser never sees a batch its conditioning does not match. No
tensor's values are looked at.

Source: "Classifier-Free Diffusion Guidance", Ho & Salimans 2022, arXiv 2207.12598.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kinvert.denoisers.protocol import Denoiser, Guided, check_output

_NEGATIVE_MISSING = (
    "{why} needs the unconditional prediction, but negative= is missing; "
    "pass the unconditional conditioning, e.g. the embedding of the empty prompt, or negative={{}} "
    "to call the denoiser with no keywords"
)


class _ApartError(Exception):
    """Two conditionings that do not stack."""


@dataclass(frozen=True, eq=False)
class Guidance:
    """What `guide` returns: ``(x, sigma) -> Tensor``, or `Guided` where ``pair`` is set."""

    denoiser: Denoiser
    cfg: float
    positive: dict[str, Any] = field(repr=False)
    negative: dict[str, Any] | None = field(repr=False)
    pair: bool

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor | Guided:
        """The guided prediction, from x (batch, *event) and sigma (batch,)."""
        positive = _expand_batch(self.positive, len(x))
        if self.negative is None or (_is_one(self.cfg) and not self.pair):
            result = self.denoiser(x, sigma, **positive)
            if isinstance(result, Guided):
                return result
            if self.pair:
                raise ValueError(_NEGATIVE_MISSING.format(why="a CFG++ sampler"))
            return check_output(result, x, "denoiser", "x, sigma, **c")
        uncond, cond = self._branches(x, sigma, positive, _expand_batch(self.negative, len(x)))
        denoised = torch.lerp(uncond, cond, self.cfg)
        return Guided(denoised, uncond) if self.pair else denoised

    def select(self, index: Tensor, batch: int) -> Guidance:
        """The same guidance for the samples `index`, shape (n,), of a batch of that size."""
        negative = None if self.negative is None else _select(self.negative, index, batch)
        return replace(self, positive=_select(self.positive, index, batch), negative=negative)

    def _branches(
        self, x: Tensor, sigma: Tensor, positive: dict[str, Any], negative: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """(U, C), from one call if the conditionings stack."""
        try:
            both = _stack(negative, positive, len(x))
        except _ApartError:
            return self._predict(x, sigma, negative), self._predict(x, sigma, positive)
        uncond, cond = self._predict(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return uncond, cond

    def _predict(self, x: Tensor, sigma: Tensor, conditioning: dict[str, Any]) -> Tensor:
        result = self.denoiser(x, sigma, **conditioning)
        if isinstance(result, Guided):
            raise TypeError("denoiser returns Guided, so it is guided already; leave cfg=1 and negative=None")
        return check_output(result, x, "denoiser", "x, sigma, **c")


def guide(
    denoiser: Denoiser,
    cfg: float = 1.0,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
    *,
    pair: bool = False,
) -> Guidance:
    """Bind the conditioning to a denoiser and guide it: ``D = U + cfg (C - U)``.

    A denoiser that returns `Guided` itself is passed through; call it with ``cfg=1`` and
    ``negative=None``.

    Args:
        denoiser: ``denoiser(x, sigma, **conditioning) -> denoised``.
        cfg: guidance scale. At 1 (relative tolerance 1e-9) the negative branch is never called.
        positive: keyword arguments of the conditional prediction C; None for none.
        negative: keyword arguments of the unconditional prediction U; ``{}`` calls the denoiser
            with none.
        pair: return ``Guided(D, U)``, which CFG++ samplers need; both branches are then always
            computed.

    Returns:
        A callable ``(x, sigma) -> denoised``, x of shape (batch, *event) and sigma of shape
        (batch,).

    Raises:
        TypeError: `denoiser` is not callable, `cfg` is not a Python number, `positive` or
            `negative` is not a mapping; in a call, the denoiser returns something other than a
            tensor.
        ValueError: `cfg` is not finite; `negative` is missing where it is needed (found in the
            first call for ``pair=True, cfg=1``, where the denoiser may return `Guided`); in a call,
            the output has not x's shape.
    """
    if not callable(denoiser):
        got = type(denoiser).__name__
        raise TypeError(f"denoiser must be callable as denoiser(x, sigma, **conditioning), got {got}")
    if isinstance(cfg, bool) or not isinstance(cfg, numbers.Real):
        fix = "float(cfg)" if isinstance(cfg, Tensor) else "7.5"
        got = type(cfg).__name__
        raise TypeError(f"cfg must be a Python number, got {got}; pass a float, e.g. {fix}")
    if not math.isfinite(cfg):
        raise ValueError(f"cfg must be finite, got {cfg}; 1 turns guidance off")
    if negative is None and not _is_one(cfg):
        raise ValueError(_NEGATIVE_MISSING.format(why=f"cfg={cfg:g}"))
    positive = _keywords("positive", {} if positive is None else positive)
    negative = None if negative is None else _keywords("negative", negative)
    return Guidance(denoiser, float(cfg), positive, negative, pair)


def _is_one(cfg: float) -> bool:
    return math.isclose(cfg, 1.0, rel_tol=1e-9)


def _keywords(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        got = type(value).__name__
        raise TypeError(
            f"{name} must be a mapping of keyword arguments for the denoiser, got {got}; "
            f"e.g. {name}={{'encoder_hidden_states': embedding}}"
        )
    return dict(value)


def _expand_batch(value: Any, batch: int) -> Any:
    """Expand every tensor whose first dimension is 1, in dicts, lists and tuples too."""
    if isinstance(value, Tensor) and value.ndim and len(value) == 1:
        return value.expand(batch, *value.shape[1:])
    if type(value) is dict:
        return {key: _expand_batch(member, batch) for key, member in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_expand_batch(member, batch) for member in value)
    return value


def _select(value: Any, index: Tensor, batch: int) -> Any:
    """Rows `index` of every tensor whose first dimension is the batch; any other belongs to every sample."""
    if isinstance(value, Tensor) and value.ndim and len(value) == batch:
        return value[index.to(value.device)]
    if type(value) is dict:
        return {key: _select(member, index, batch) for key, member in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_select(member, index, batch) for member in value)
    return value


def _stack(uncond: Any, cond: Any, batch: int) -> Any:
    """The conditioning of the batch [uncond, cond]; raises _ApartError if there is none."""
    if isinstance(uncond, Tensor) and isinstance(cond, Tensor) and cond.ndim:
        same = (uncond.shape, uncond.dtype, uncond.device) == (cond.shape, cond.dtype, cond.device)
        if same and len(cond) == batch:
            return torch.cat([uncond, cond])
        raise _ApartError
    if type(uncond) is dict and type(cond) is dict and uncond.keys() == cond.keys():
        return {key: _stack(uncond[key], cond[key], batch) for key in cond}
    if type(uncond) is type(cond) and type(cond) in (list, tuple) and len(uncond) == len(cond):
        members = [_stack(u, c, batch) for u, c in zip(uncond, cond, strict=True)]
        # As long as the batch, a list of plain values may hold one for each item.
        if len(members) == batch and any(new is old for new, old in zip(members, cond, strict=True)):
            raise _ApartError
        return type(cond)(members)
    # The same list or mapping would hide tensors of the wrong batch.
    if uncond is cond and not isinstance(cond, (Mapping, list, tuple)):
        return cond
    if type(uncond) is type(cond) and isinstance(cond, (str, int, float, bool)) and uncond == cond:
        return cond
    raise _ApartError
