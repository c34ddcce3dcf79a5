r"""Classifier-free guidance.

With `C` and `U` the predictions under the positive and the negative conditioning,

    D = U + cfg (C - U)

or another function of the two (`kinvert.guidance`). `cfg = 1` is the positive prediction alone, and the negative one is
not computed. Both are computed as one call on a batch `[uncond, cond]` of twice the size if their conditionings stack,
and in two calls if they do not.

What belongs to one item: a tensor (or NumPy array) whose first dimension is x's batch has a row for each item; a tensor
of size 1 is expanded. A list as long as the batch has an entry for each item, such as a prompt or a tuple of crops,
unless it holds such tensors itself. Everything else belongs to all: give a sequence that all items share as a tuple.
This is settled once, for the batch that is sampled or inverted. If a part of the batch is evaluated, the denoiser gets
the entries of that part.

Which conditionings stack: two values stack if they are

* tensors of equal shape, dtype and device with a row for each item: concatenated;
* dicts with the same keys, or lists or tuples of the same length, whose members stack: member by member (not a list
  with an entry for each item);
* equal strings, numbers, booleans or None, or the same object (no array or tensor with dimensions): passed through.

Anything else, such as different keys or token lengths, or tensors that all items share, takes two calls, so that the
denoiser never sees a batch that its conditioning does not match. So does a denoiser that can be cut into rows (it has a
`take`). No tensor's values are read. A denoiser may return the same memory in both of two calls: the result of the
first is copied if that is needed.

Source: Ho and Salimans, Classifier-Free Diffusion Guidance (2022), arXiv 2207.12598.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from kinvert.checks import check_number, is_number, plain
from kinvert.coordinates import Coordinates, coordinates_of
from kinvert.denoisers.branches import Branches, Combination, Combine, Model
from kinvert.denoisers.buffers import keep
from kinvert.denoisers.cfg import Linear, PerStep, StepCfg, settled_cfg
from kinvert.denoisers.dtypes import call
from kinvert.denoisers.protocol import Denoiser, Guided, check_output, take_rows, working_dtype
from kinvert.showing.brief import brief_repr

__all__ = ["Guidance", "guide"]

_NEGATIVE_MISSING = (
    "{why} needs the unconditional prediction, but negative= is missing; "
    "pass the unconditional conditioning, e.g. the embedding of the empty prompt, or negative={{}} "
    "to call the denoiser with no keywords"
)
_APART = object()
"""Two conditionings that do not stack make this. It is no exception, since torch.compile follows no raise."""


@dataclass(frozen=True, eq=False)
class _Rows:
    """A value with a row or an entry for each item of the batch."""

    value: Tensor | np.ndarray | list[Any]

    def take(self, index: Tensor) -> _Rows:
        if isinstance(self.value, Tensor):
            return _Rows(self.value[index.to(self.value.device)])
        if isinstance(self.value, np.ndarray):
            return _Rows(self.value[index.cpu().numpy()])
        return _Rows([self.value[i] for i in index.tolist()])


@dataclass(frozen=True, eq=False)
class Guidance:
    """What `guide` returns: `(x, sigma) -> Tensor`, or `Guided` if `pair` is set."""

    denoiser: Denoiser
    cfg: float | Callable[[Tensor], Tensor] | Combination
    positive: dict[str, Any] = field(repr=False)
    negative: dict[str, Any] | None = field(repr=False)
    pair: bool
    batch: int | None = None  # rows that the conditioning is settled for; None: each call settles it
    model: Model = field(default_factory=Model, repr=False)

    __repr__ = brief_repr

    @property
    def coordinates(self) -> Coordinates | None:
        """Return those of the denoiser, None if it does not say."""
        return coordinates_of(self.denoiser)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor | Guided:
        """Return the guided prediction, from x (batch, *event) and sigma (batch,)."""
        bound = self._settled(len(x))
        if bound.negative is None or (_is_one(self.cfg) and not self.pair):
            result = self._called(x, sigma, _open(bound.positive))
            if isinstance(result, Guided):
                return result
            if self.pair:
                raise ValueError(_NEGATIVE_MISSING.format(why="a CFG++ sampler"))
            return check_output(result, x, "denoiser", "x, sigma, **c")
        uncond, cond = self._branches(x, sigma, bound.positive, bound.negative)
        denoised = self.combine(cond, uncond, x, sigma)
        return Guided(denoised, uncond) if self.pair else denoised

    def combine(self, cond: Tensor, uncond: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the guided prediction of the two branches, of x's shape; half precision is combined in float32."""
        if isinstance(self.cfg, float):
            return torch.lerp(uncond, cond, self.cfg)
        how = self.cfg if isinstance(self.cfg, Combination) else Linear(self.cfg)
        wide = working_dtype(cond)
        branches = Branches(cond.to(wide), uncond.to(wide), x.to(wide), sigma, self.model)
        return how.combine(branches).to(cond.dtype)

    def take(self, index: Tensor) -> Guidance:
        """Return the guidance of the rows `index`, shape (n,), of the batch it was made for.

        Raises:
            ValueError: `guide` was not given the batch, so it is not known what belongs to one row.
        """
        if self.batch is None:
            raise ValueError("guidance can be cut into rows if it knows its batch: guide(..., batch=len(x))")

        def cut(value: Any) -> Any:
            return _each(lambda rows: rows.take(index), value)

        denoiser = take_rows(self.denoiser, index)
        negative = None if self.negative is None else cut(self.negative)
        return replace(self, denoiser=denoiser, positive=cut(self.positive), negative=negative, batch=len(index))

    def _settled(self, batch: int) -> Guidance:
        """Return the guidance with what belongs to one row of a batch marked as such."""
        if self.batch is not None:
            return self
        negative = None if self.negative is None else _bind(self.negative, batch)
        # Not dataclasses.replace, which torch.compile of torch 2.4 does not follow.
        return Guidance(self.denoiser, self.cfg, _bind(self.positive, batch), negative, self.pair, batch, self.model)

    def _branches(
        self, x: Tensor, sigma: Tensor, positive: dict[str, Any], negative: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return (U, C), from one call if the conditionings stack."""
        both: Any = _APART if hasattr(self.denoiser, "take") else _stack(negative, positive)
        if both is _APART:
            first = [self._predict(x, sigma, _open(negative))]
            keep(first)
            return first[0], self._predict(x, sigma, _open(positive))
        uncond, cond = self._predict(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return uncond, cond

    def _predict(self, x: Tensor, sigma: Tensor, conditioning: dict[str, Any]) -> Tensor:
        result = self._called(x, sigma, conditioning)
        if isinstance(result, Guided):
            raise TypeError("denoiser returns Guided, so it is guided already; leave cfg=1 and negative=None")
        return check_output(result, x, "denoiser", "x, sigma, **c")

    def _called(self, x: Tensor, sigma: Tensor, conditioning: dict[str, Any]) -> Any:
        """Call the denoiser, and return plain tensors; add a note of the arguments to an error of its own."""
        try:
            result: Any = call(self.denoiser, x, sigma, **conditioning)
        except Exception as error:
            if conditioning and not getattr(error, "__notes__", None):
                error.add_note(_note(x, conditioning))
            raise
        if isinstance(result, Guided) and not all(type(part) is Tensor for part in result):
            return Guided(*[plain(part) if isinstance(part, Tensor) else part for part in result])
        return plain(result) if isinstance(result, Tensor) else result


def _note(x: Tensor, conditioning: dict[str, Any]) -> str:
    def described(value: Any) -> str:
        shape = getattr(value, "shape", None)
        return type(value).__name__ + (f" of shape {tuple(shape)}" if shape is not None else "")

    given = ", ".join(f"{key}: {described(value)}" for key, value in conditioning.items())
    return (
        f"kinvert called the denoiser for x of shape {tuple(x.shape)} with these keywords of positive or negative: "
        f"{given}. A tensor needs a row for each item of the batch; other values are passed on as they are."
    )


def guide(
    denoiser: Denoiser,
    cfg: float | Callable[[Tensor], Tensor] | Combination | Combine = 1.0,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
    *,
    pair: bool = False,
    batch: int | None = None,
    coordinates: Coordinates | None = None,
) -> Guidance:
    """Bind the conditioning to a denoiser and guide it: `D = U + cfg (C - U)`.

    A denoiser that returns `Guided` itself is passed through; call it with `cfg=1` and `negative=None`.

    Args:
        denoiser: `denoiser(x, sigma, **conditioning) -> denoised`.
        cfg: guidance scale. At 1 (relative tolerance 1e-9) the negative branch is never called. Or a function, for
            which both branches are always called: of sigma, shape (batch,), that returns a scale for each sample
            (`step_cfg` makes one from a scale for each step); one of `kinvert.guidance`; or one of your own, `(cond,
            uncond, sigma) -> denoised`, of tensors of x's shape in float32 or float64. The number of its arguments
            says which it is.
        positive: keyword arguments of the conditional prediction C; None for none.
        negative: keyword arguments of the unconditional prediction U; `{}` calls the denoiser with none.
        pair: return `Guided(D, U)`, which CFG++ samplers need; both branches are then always computed.
        batch: number of rows of the states to come, e.g. `len(x)`. What belongs to one row is then settled once, and
            the result can be cut into rows by its `take`. None settles it in every call.
        coordinates: of x and sigma, "ve" or "flow", if the denoiser does not say; functions of noises or velocities
            need it.

    Returns:
        A callable `(x, sigma) -> denoised`, x of shape (batch, *event) and sigma of shape (batch,).

    Raises:
        TypeError: `denoiser` is not callable, `cfg` is neither a Python number nor such a function, `positive` or
            `negative` is not a mapping; in a call, the denoiser or the function returns something other than a
            tensor.
        ValueError: `cfg` is not finite, or a function that does not go with this model or with CFG++ samplers;
            `negative` is missing where it is needed (found in the first call for `pair=True, cfg=1`, where the denoiser
            may return `Guided`); in a call, the output has not x's shape.
    """
    if not callable(denoiser):
        got = type(denoiser).__name__
        raise TypeError(f"denoiser must be callable as denoiser(x, sigma, **conditioning), got {got}")
    how = _checked_cfg(cfg)
    if negative is None and not _is_one(how):
        per_step = isinstance(how, (StepCfg, PerStep))
        why = "a cfg for each step" if per_step else f"cfg={how:g}" if isinstance(how, float) else f"cfg={how!r}"
        raise ValueError(_NEGATIVE_MISSING.format(why=why))
    model = Model.of(denoiser, coordinates)
    if isinstance(how, Combination):
        how.check(model, pair)
    positive = _keywords("positive", {} if positive is None else positive)
    negative = None if negative is None else _keywords("negative", negative)
    guidance = Guidance(denoiser, how, positive, negative, pair, model=model)
    return guidance if batch is None else guidance._settled(batch)


def _checked_cfg(cfg: Any) -> float | Callable[[Tensor], Tensor] | Combination:
    """Return a finite number, or a function of the noise level, or a `Combination`."""
    cfg = settled_cfg(cfg)
    if callable(cfg) or isinstance(cfg, Combination):
        return cast("Callable[[Tensor], Tensor] | Combination", cfg)
    if not is_number(cfg):
        several = (isinstance(cfg, Tensor) and cfg.ndim) or isinstance(cfg, (list, tuple, np.ndarray))
        fix = "float(cfg)" if isinstance(cfg, Tensor) else "7.5"
        if several:
            fix = "7.5, or one for each step of a schedule by denoisers.step_cfg(cfg, sigmas)"
        got = type(cfg).__name__
        raise TypeError(f"cfg must be a Python number, got {got}; pass a float, e.g. {fix}")
    return check_number("cfg", cfg, fix="1 turns guidance off")


def _is_one(cfg: Any) -> bool:
    # torch.compile follows neither math.isclose nor the numbers of numbers.Real.
    return isinstance(cfg, float) and abs(cfg - 1.0) <= 1e-9 * max(abs(cfg), 1.0)


def _keywords(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        got = type(value).__name__
        raise TypeError(
            f"{name} must be a mapping of keyword arguments for the denoiser, got {got}; "
            f"e.g. {name}={{'encoder_hidden_states': embedding}}"
        )
    return dict(value)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Return the same dict, list or tuple with another value for every member."""
    if type(value) is dict:  # which torch.compile can follow
        return {key: function(member) for key, member in value.items()}
    if isinstance(value, dict):
        mapped = copy.copy(value)
        for key, member in value.items():
            mapped[key] = function(member)
        return mapped
    members = [function(member) for member in value]
    return value._make(members) if hasattr(value, "_make") else type(value)(members)


def _bind(value: Any, batch: int) -> Any:
    """Mark what belongs to one item, in dicts, lists and tuples too; a tensor of size 1 is expanded."""
    if isinstance(value, Tensor) and value.ndim and len(value) in (1, batch):
        return _Rows(value if len(value) == batch else value.expand(batch, *value.shape[1:]))
    if isinstance(value, np.ndarray) and value.ndim and len(value) == batch:
        return _Rows(value)
    if not isinstance(value, (dict, list, tuple)):
        return value
    members = _map(lambda member: _bind(member, batch), value)
    if type(value) is list and len(value) == batch and not _has_rows(members):
        return _Rows(value)
    return members


def _has_rows(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_rows(member) for member in value.values())
    return isinstance(value, _Rows) or (isinstance(value, (list, tuple)) and any(_has_rows(m) for m in value))


def _each(function: Callable[[_Rows], Any], value: Any) -> Any:
    """Replace every value that belongs to one item."""
    if isinstance(value, _Rows):
        return function(value)
    return _map(lambda member: _each(function, member), value) if isinstance(value, (dict, list, tuple)) else value


def _open(conditioning: dict[str, Any]) -> dict[str, Any]:
    """Return the conditioning as the denoiser gets it."""
    opened: dict[str, Any] = _each(lambda rows: rows.value, conditioning)
    return opened


def _stack(uncond: Any, cond: Any) -> Any:
    """Return the conditioning of the batch [uncond, cond] as the denoiser gets it; _APART if there is none."""
    if isinstance(uncond, _Rows) and isinstance(cond, _Rows):
        u, c = uncond.value, cond.value
        if not (isinstance(u, Tensor) and isinstance(c, Tensor)):
            return _APART
        same = (u.shape, u.dtype, u.device) == (c.shape, c.dtype, c.device)
        return torch.cat([u, c]) if same else _APART
    if type(uncond) is type(cond) and isinstance(cond, dict) and uncond.keys() == cond.keys():
        return _stacked([(uncond[key], cond[key]) for key in cond], cond)
    if type(uncond) is type(cond) and isinstance(cond, (list, tuple)) and len(uncond) == len(cond):
        return _stacked(list(zip(uncond, cond, strict=True)), cond)
    shared = isinstance(cond, (_Rows, np.ndarray, Mapping, list, tuple)) or (isinstance(cond, Tensor) and cond.ndim)
    plain = type(uncond) is type(cond) and isinstance(cond, (str, int, float, bool))
    return cond if (uncond is cond and not shared) or (plain and uncond == cond) else _APART


def _stacked(pairs: list[tuple[Any, Any]], like: Any) -> Any:
    """Return what the pairs make together, in a container like `like`; _APART if one of them does not stack."""
    members = []
    for uncond, cond in pairs:
        members.append(_stack(uncond, cond))
        if members[-1] is _APART:
            return _APART
    rest = iter(members)
    return _map(lambda member: next(rest), like)
