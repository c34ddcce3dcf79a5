r"""What a cell asks: `QUESTIONS` holds the questions by name.

With `S` the sampler, `M` the method and c the conditioning of an image:

* `reconstruction`: an image x, the latent `z = M(x)`, and `S(z)` against x.
* `recovery`: a latent z, the image `x = S(z)`, and `M(x)` against z. The signs of z are a message, whose bits are read
  from `M(x)`.
* `recovery_blind`: the same, but who runs M knows neither the conditioning, nor cfg, nor the steps, nor the sampler.
* `recovery_8bit`, `recovery_noise`, `recovery_blur`, `recovery_jpeg`, `recovery_crop`: the same as `recovery`, but
  something happens to x on its way.
* `edit`: an image x, its latent `z = M(x)` without guidance, and `S(z)` with the conditioning of an edit, against the
  true edited image (`Problem.target` and `Problem.truth`).
* `density`: how likely S makes the image, computed from the latent `M(x)`, with its own conditioning c and with a wrong
  one (`Problem.target`).
* `uniqueness`: a latent z, the image `x = S(z)`, and how many other latents there are of x (`ki.inversion.preimages`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from torch import Tensor

from kinvert import attacks

__all__ = ["QUESTIONS", "Attack", "Question"]

Attack = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        start: "image" or "latent": what is given.
        measures: the metrics that answer it, which the overview of a report shows.
        attack: what happens to the image before it is inverted.
        is_blind: whether the method is told nothing of how the image was made.
    """

    start: str
    measures: tuple[str, ...]
    attack: Attack | None = None
    is_blind: bool = False


BITS = ("bits",)
QUESTIONS: Mapping[str, Question] = MappingProxyType(
    {
        "reconstruction": Question("image", ("nmse_db",)),
        "recovery": Question("latent", ("nmse_db", *BITS)),
        "recovery_blind": Question("latent", BITS, is_blind=True),
        "recovery_8bit": Question("latent", BITS, attacks.quantize),
        "recovery_noise": Question("latent", BITS, partial(attacks.gaussian_noise, std=0.1)),
        "recovery_blur": Question("latent", BITS, partial(attacks.blur, std=0.5)),
        "recovery_jpeg": Question("latent", BITS, partial(attacks.jpeg, quality=75)),
        "recovery_crop": Question("latent", BITS, partial(attacks.crop_and_resize, share=0.9)),
        "edit": Question("image", ("edit_error", "edit_closer")),
        "density": Question("image", ("bits_per_value", "prefers_own")),
        "uniqueness": Question("latent", ("latents", "unique", "likeliest")),
    }
)
"""Name -> question."""
