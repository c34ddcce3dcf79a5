r"""The two branches of guidance, and the kinds of prediction in which they can be combined.

A guided prediction is a function of the conditional and the unconditional one. Plain guidance, `U + w (C - U)`, is the
same whether C and U are noises, velocities or denoised images. Everything else is not: a rescaling of the predicted
noise and one of the denoised image are different methods. With `x = x0 + sigma eps` (VE) or `x = (1 - t) x0 + t eps`
(flow time), and D the denoised image, the kinds are

    x0        D
    velocity  eps - D = (x - D) / sigma - D                            in flow time (x - D) / t
    eps       (x - D) / sigma                                          in VE only
    v         (x s² / (sigma² + s²) - D) sqrt(sigma² + s²) / (sigma s)     in VE only

where s is the standard deviation of the data that the network is scaled for. All of them are `a x + b D`, with numbers
a and b that depend on the level. At levels below 1e-8, where x itself is the image, they are taken at 1e-8. In flow
time there is no eps: at t = 1 it is x, whatever the networks predict.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from kinvert.checks import check_choice
from kinvert.coordinates import Coordinates, coordinates_of, innermost
from kinvert.denoisers.protocol import check_output, expand

__all__ = ["SPACES", "Branches", "Combination", "Combine", "Function", "Model", "Space", "check_kind", "check_space"]

Space = Literal["x0", "eps", "v", "velocity"]
SPACES: tuple[str, ...] = get_args(Space)
Combine = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(cond, uncond, sigma) -> guided`: predictions of shape (batch, *event), sigma of shape (batch,)."""

LOWEST = 1e-8


def check_space(space: object) -> None:
    """Raise ValueError if `space` is not a kind of prediction."""
    check_choice("space", space, SPACES)


@dataclass(frozen=True)
class Model:
    """What guidance has to know of the network.

    Attributes:
        coordinates: of x and sigma.
        prediction: what the network predicts; None if the denoiser does not say.
        sigma_data: the standard deviation of the data, for v.
    """

    coordinates: Coordinates = "ve"
    prediction: Space | None = None
    sigma_data: float = 1.0

    @classmethod
    def of(cls, denoiser: Any, coordinates: Coordinates | None = None) -> Model:
        """Read it off a denoiser; `coordinates` are those of the run, None takes the denoiser's."""
        inner = innermost(denoiser)
        found = getattr(inner, "prediction", None)
        kind = "v" if found == "edm" else found  # of the other sign, which no rescaling or projection sees
        data = getattr(getattr(inner, "levels", None), "sigma_data", 1.0)
        prediction = cast(Space, kind) if kind in SPACES else None
        return cls(coordinates or coordinates_of(denoiser) or "ve", prediction, float(data))

    def affine(self, space: Space, sigma: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Return (a, b) of the prediction `a x + b D`, for sigma of shape (batch, 1, ...)."""
        sigma = sigma.clamp_min(LOWEST)
        if space == "x0":
            return 0.0, 1.0
        if space == "eps":
            return 1 / sigma, -1 / sigma
        if space == "velocity":
            return 1 / sigma, (-1 / sigma if self.coordinates == "flow" else -1 / sigma - 1)
        spread, data = torch.hypot(sigma, torch.full_like(sigma, self.sigma_data)), self.sigma_data
        return data / (sigma * spread), -spread / (sigma * data)


@dataclass(frozen=True, eq=False)
class Branches:
    """The predictions of one evaluation, denoised, in the dtype to compute in.

    Attributes:
        cond, uncond, x: shape (batch, *event).
        sigma: shape (batch,).
        model: what the network is.
    """

    cond: Tensor
    uncond: Tensor
    x: Tensor
    sigma: Tensor
    model: Model

    def combined(self, function: Combine, space: Space) -> Tensor:
        """Return D of `function(cond, uncond, sigma)`, which is given predictions of the kind `space`."""
        if space == "x0":
            return self._checked(function(self.cond, self.uncond, self.sigma))
        of_x, of_d = self.model.affine(space, expand(self.sigma, self.x))
        shift = of_x * self.x
        guided = function(shift + of_d * self.cond, shift + of_d * self.uncond, self.sigma)
        return (self._checked(guided) - shift) / of_d

    def _checked(self, guided: Any) -> Tensor:
        return check_output(guided, self.cond, "cfg", "cond, uncond, sigma").to(self.cond.dtype)


class Combination(ABC):
    """A way of making the guided prediction of the two branches: what `cfg` may be besides a number.

    It must depend neither on the other samples of the batch nor, unless it says so by `stateful`, on earlier
    evaluations.
    """

    @property
    def stateful(self) -> bool:
        """Tell whether it depends on earlier evaluations; then `sample` alone takes it."""
        return False

    @abstractmethod
    def combine(self, branches: Branches) -> Tensor:
        """Return the guided D, shape (batch, *event)."""

    def check(self, model: Model, pair: bool) -> None:  # noqa: B027 - most have nothing to check
        """Raise ValueError if it does not go with this model, or with CFG++ samplers, which need the `pair`."""


@dataclass(frozen=True)
class Function(Combination):
    """A function of your own, `(cond, uncond, sigma) -> guided`, in the kind of prediction that it is meant for.

    `cfg=function` is `cfg=Function(function)`. The function gets predictions of shape (batch, *event) in float32 or
    float64 and sigma of shape (batch,), and returns a prediction of the same kind and shape.

    Args:
        function: what combines the predictions. Means, norms and the like are to be taken per sample.
        space: the kind of the predictions: denoised images "x0", noises "eps", "v" or "velocity".
        stateful: whether it depends on earlier evaluations, by momentum or a count of steps. Then it works with
            `sample` alone, and with the whole batch at once.

    Raises:
        ValueError: an unknown space; where it is used, "eps" or "v" for a model in flow time.
        TypeError: `function` is not callable.
    """

    function: Combine
    space: Space = "x0"
    stateful: bool = False

    def __post_init__(self) -> None:
        check_space(self.space)
        if not callable(self.function):
            got = type(self.function).__name__
            raise TypeError(f"function must be callable as function(cond, uncond, sigma), got {got}")

    def combine(self, branches: Branches) -> Tensor:
        """See `Combination`."""
        return branches.combined(self.function, self.space)

    def check(self, model: Model, pair: bool) -> None:
        """See `Combination`."""
        check_kind(self.space, model)


def check_kind(space: Space, model: Model) -> None:
    """Raise ValueError for a kind of prediction that there is not in the coordinates of the model."""
    if space in ("eps", "v") and model.coordinates == "flow":
        raise ValueError(
            f"cfg combines predictions of {space}, and the model is in flow time, where it predicts velocities; use "
            "space='velocity', or 'x0'"
        )
