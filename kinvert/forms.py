"""Linear forms: the only arithmetic that a sampler's rule may use on states.

A form is a finite sum `sum_j c_j * s_j` of symbols `s_j` with float coefficients `c_j`. The symbols are

* `State(name)`: the current `x`, or a value that an earlier step remembered,
* `Denoised(k)` and `Uncond(k)`: the outputs of the denoiser at stage `k` of this step,
* `Noise(r)`: the `r`-th unit-variance noise that this step draws.

If a rule runs on forms in place of tensors, its results are its own coefficients. The compiler does nothing else. Each
operation that is not linear in the states (a product, a comparison, `abs`, a conversion to float) raises a `TypeError`,
so a rule that compiles is linear by construction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, SupportsFloat

__all__ = ["Denoised", "Form", "Noise", "State", "Symbol", "Uncond"]


class Symbol(NamedTuple):
    """One unknown of a form: its kind (`state`, `denoised`, `uncond`, `noise`) and its name or number."""

    kind: str
    key: str | int

    def __str__(self) -> str:
        prefix = {"state": "", "denoised": "D", "uncond": "U", "noise": "n"}[self.kind]
        return f"{prefix}{self.key}"


def State(name: str) -> Symbol:  # noqa: N802 - reads as the constructor it is
    """Return the symbol of the state `name`: "x" or a remembered value."""
    return Symbol("state", name)


def Denoised(stage: int) -> Symbol:  # noqa: N802
    """Return the symbol of the denoised output of stage `stage`."""
    return Symbol("denoised", stage)


def Uncond(stage: int) -> Symbol:  # noqa: N802
    """Return the symbol of the unconditional output of stage `stage` (classifier-free guidance)."""
    return Symbol("uncond", stage)


def Noise(index: int) -> Symbol:  # noqa: N802
    """Return the symbol of the `index`-th noise of a step."""
    return Symbol("noise", index)


class Form:
    """An immutable linear combination `{symbol: coefficient}`; terms with coefficient 0 are dropped.

    It takes ownership of the dict `terms`: do not change it afterwards.
    """

    terms: dict[Symbol, float]  # no __slots__: torch 2.4 cannot compile code that reads them

    def __init__(self, terms: dict[Symbol, float]) -> None:
        values = terms.values()
        if not math.isfinite(sum(values)):  # a finite sum has no infinite or nan term
            for symbol, c in terms.items():
                if not math.isfinite(c):
                    raise ValueError(f"the coefficient of {symbol} is {c}")
        self.terms = {symbol: c for symbol, c in terms.items() if c != 0.0} if 0.0 in values else terms
        self._hash: int | None = None

    @classmethod
    def of(cls, symbol: Symbol) -> Form:
        """Return the form `1 * symbol`."""
        return cls({symbol: 1.0})

    def __getitem__(self, symbol: Symbol) -> float:
        """Return the coefficient of `symbol`, 0 if it does not occur."""
        return self.terms.get(symbol, 0.0)

    def __iter__(self) -> Iterator[tuple[Symbol, float]]:
        return iter(self.terms.items())

    def __len__(self) -> int:
        return len(self.terms)

    def alias(self) -> Symbol | None:
        """Return the symbol `s` if the form is exactly `1 * s`, else None."""
        if len(self.terms) == 1:
            ((symbol, c),) = self.terms.items()
            if c == 1.0:
                return symbol
        return None

    def at(self, values: Mapping[Symbol, Any]) -> Any:
        """Return `sum_j c_j values[s_j]`, for values of any kind that can be scaled and added."""
        return sum(c * values[symbol] for symbol, c in self)

    # -- the arithmetic of a vector space -------------------------------------------------------------------------
    def add(self, other: Form, alpha: float = 1.0) -> Form:
        """Return `self + alpha * other`, like `torch.add`."""
        if not isinstance(other, Form):
            _refuse(f"adding {other!r} to a state")
        terms = self.terms.copy()
        for symbol, c in other.terms.items():
            terms[symbol] = terms[symbol] + alpha * c if symbol in terms else alpha * c
        return Form(terms)

    def __add__(self, other: Form) -> Form:
        return self.add(other)

    def __sub__(self, other: Form) -> Form:
        if not isinstance(other, Form):
            _refuse(f"subtracting {other!r} from a state")
        return self.add(other, -1.0)

    def __neg__(self) -> Form:
        return Form({symbol: -c for symbol, c in self.terms.items()})

    def __mul__(self, scale: SupportsFloat) -> Form:
        if isinstance(scale, Form):
            _refuse("a product of two states")
        scale = float(scale)
        return Form({symbol: scale * c for symbol, c in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, scale: SupportsFloat) -> Form:
        if isinstance(scale, Form):
            _refuse("a quotient of two states")
        scale = float(scale)
        return Form({symbol: c / scale for symbol, c in self.terms.items()})

    # -- structural equality, so that plans can be compared and hashed ----------------------------------------------
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Form):
            _refuse(f"comparing a state with {other!r}")
        return self.terms == other.terms

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self.terms.items()))
        return self._hash

    def __repr__(self) -> str:
        return f"Form({self})"

    def __str__(self) -> str:
        text = ""
        for symbol, c in self.terms.items():
            sign = " - " if c < 0 else " + " if text else ""
            scale = "" if abs(c) == 1.0 else f"{abs(c):.6g} "
            text += f"{sign if text else sign.strip()}{scale}{symbol}"
        return text or "0"

    # -- everything else is not linear ----------------------------------------------------------------------------
    def _nonlinear(self, *_: object) -> NoReturn:
        _refuse("comparing a state, or using it as a number or a condition,")

    __bool__ = __float__ = __int__ = __abs__ = _nonlinear
    __lt__ = __le__ = __gt__ = __ge__ = _nonlinear
    __array__ = _nonlinear

    def __pow__(self, other: object) -> NoReturn:
        _refuse("a power of a state")

    def __rtruediv__(self, other: object) -> NoReturn:
        _refuse("dividing by a state")

    def __radd__(self, other: object) -> NoReturn:
        _refuse(f"adding a state to {other!r}")

    def __rsub__(self, other: object) -> NoReturn:
        _refuse(f"subtracting a state from {other!r}")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise TypeError(
            f"a rule used .{name} on a state, which is a linear form while the rule is compiled; "
            "only +, - and multiplication by a float are linear. "
            "Put a function of one evaluation (thresholding, guidance) into the denoiser"
        )


def _refuse(what: str) -> NoReturn:
    """Raise TypeError for an operation that is not linear."""
    raise TypeError(
        f"{what} is not linear: a rule may only add, subtract and scale states (forms) by floats. "
        "Put a function of one evaluation (thresholding, guidance) into the denoiser"
    )
