r"""The problems that are inverted: a denoiser, images, their conditioning and the noise levels.

These come with kinvert:

* `gaussian`: independent Gaussian coordinates in 16 dimensions, standard deviations from 0.2 to 1;
* `mixture`: two classes of three Gaussians each in 16 dimensions; the exact denoiser of a class is guided by that of
  both;
* `digits_exact`: the exact denoiser of a data set, 40 digits of 8x8 pixels, guided as the mixture;
* `digits`, `mnist`, `emoji`: the embedded networks, with images that they never saw.

The first three have exact denoisers, so that the ODE gives the true latent. Their images are draws of `x_sigma` at
the smallest noise level, where every run starts or ends. The networks get clean images there, as a user would do.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Protocol
from urllib.parse import parse_qsl

import torch
from torch import Tensor

from kinvert import levels, models
from kinvert.checks import check_choice, nearest
from kinvert.denoisers import Dataset, Denoiser, Gaussian, GaussianMixture
from kinvert.models.emoji import TONES
from kinvert.showing.registry import Registry
from kinvert.torch_settings import loading

__all__ = [
    "PROBLEMS",
    "ByLabel",
    "Problem",
    "ProblemFunction",
    "find_problem",
    "image_numbers",
    "is_built_in",
    "make_problem",
    "most_images",
    "on_device",
]


@dataclass(frozen=True, eq=False)
class Problem:
    """A denoiser and the images to try it on. An entry point `function(count, seed, dtype)` returns a problem.

    Attributes:
        denoiser: `denoiser(x, sigma, **conditioning) -> denoised`, in the dtype that was asked for.
        images: shape (count, *event): the states at the smallest noise level.
        levels: the model's noise levels, e.g. `ki.levels.edm(0.02, 80.0)` or `ki.levels.stable_diffusion()`.
        positive: conditioning of the images, as in `sample`; tensors have a row for each image.
        negative: conditioning of the unconditional branch; None if the model has none, and then cfg must be 1.
        data_range: distance between the darkest and the brightest value, for PSNR and SSIM.
        exact: whether the denoiser is exact (and smooth, in float64), so that the ODE gives the true latent.
        target: another conditioning than that of the images, as `positive`: what an edit asks for, and a wrong label
            for densities.
        truth: what the images look like under `target`, if that is known, the shape of the images.
    """

    denoiser: Denoiser
    images: Tensor
    levels: levels.Levels
    positive: Mapping[str, Any] = field(default_factory=dict)
    negative: Mapping[str, Any] | None = None
    data_range: float = 2.0
    exact: bool = False
    target: Mapping[str, Any] | None = None
    truth: Tensor | None = None


class ProblemFunction(Protocol):
    """A function that makes a problem: `PROBLEMS` holds such functions, and entry points name them."""

    def __call__(self, count: int, seed: int, dtype: torch.dtype) -> Problem:
        """Return the problem with `count` images, chosen by `seed`, in `dtype`."""


def find_problem(name: str) -> ProblemFunction:
    """Return the function behind a name of `PROBLEMS` or an entry point "module:function".

    "module:function?size=64&kind=noisy" hands `size="64", kind="noisy"` to the function, quoted as in an address.

    Raises:
        ValueError: the name is unknown; the entry point cannot be imported, with the reason.
    """
    if not isinstance(name, str) or ":" not in name:
        check_choice("model", name, PROBLEMS, ", or an entry point 'module:function'")
        return PROBLEMS[name]
    entry, question, options = name.partition("?")
    module, _, attribute = entry.partition(":")
    found = _attribute(name, _imported(name, module), attribute)
    if not callable(found):
        raise ValueError(f"model {name!r} is not a function but {found!r}; see kinvert.bench.Problem")
    given: dict[str, Any] = dict(parse_qsl(options, keep_blank_values=True))
    return functools.partial(found, **given) if question else found


def is_built_in(name: str) -> bool:
    """Tell whether a model comes with kinvert and so is computed with one thread: its records are equal to the byte."""
    return getattr(find_problem(name), "__module__", None) == __name__


def _imported(name: str, module: str) -> ModuleType:
    """Import the module of an entry point; the message tells a missing module from one that fails to import."""
    try:
        with loading(module):
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if module == missing or module.startswith(f"{missing}."):
            package, _, last = missing.rpartition(".")
            reason = f"there is no module {missing!r}; is its folder on PYTHONPATH?"
            reason = f"the package {package!r} has no module {last!r}" if package else reason
            raise ValueError(f"model {name!r}: {reason}") from error
        raise ValueError(f"model {name!r}: its module needs {missing!r}, which is not installed here") from error
    except Exception as error:
        raise ValueError(f"model {name!r}: importing its module failed, {type(error).__name__}: {error}") from error


def _attribute(name: str, module: ModuleType, attribute: str) -> ProblemFunction:
    if not hasattr(module, attribute):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = nearest(attribute, functions)
        hint = f"did you mean {near!r}?" if near else f"it has {', '.join(functions) or 'none'}"
        raise ValueError(f"model {name!r}: {module.__file__ or module.__name__} has no function {attribute!r}; {hint}")
    found: ProblemFunction = getattr(module, attribute)
    return found


def make_problem(name: str, count: int, seed: int, dtype: torch.dtype) -> Problem:
    """Call the function behind a name, and check its result.

    Raises:
        TypeError: the entry point does not return a `Problem`.
        ValueError: as `find_problem`; the problem has another number of images than asked for, or another dtype.
    """
    problem = find_problem(name)(count, seed, dtype)
    if not isinstance(problem, Problem):
        raise TypeError(f"model {name!r} must return a kinvert.bench.Problem, got {type(problem).__name__}")
    images = problem.images
    if len(images) != count or images.dtype != dtype:
        raise ValueError(
            f"model {name!r} must return {count} images of {dtype}, got shape {tuple(images.shape)} of {images.dtype}"
        )
    return problem


def most_images(model: str) -> int | None:
    """Return how many images a model that comes with kinvert has; None if there is no limit, or nobody knows."""
    return len(models.held_out(_IMAGES_OF[model])[0]) if model in _IMAGES_OF and is_built_in(model) else None


def image_numbers(model: str, count: int, seed: int) -> list[int] | None:
    """Return which images of its data set a model that comes with kinvert gets; None if they are drawn, or unknown.

    Pictures that show the same in several classes, as those of `emoji` do, have one number.
    """
    if model not in _IMAGES_OF or count > (available := len(models.held_out(_IMAGES_OF[model])[0])):
        return None
    return [int(number) // _CLASSES_OF.get(model, 1) for number in _chosen(available, count, seed)]


def on_device(problem: Problem, device: torch.device | str) -> Problem:
    """Return the problem on a device: its images, its conditioning, and the denoiser if that is a module.

    A denoiser that is no module is taken as it is: it sees states on the device.
    """
    denoiser = problem.denoiser
    return replace(
        problem,
        denoiser=denoiser.to(device) if isinstance(denoiser, torch.nn.Module) else denoiser,
        images=problem.images.to(device),
        positive=_moved(problem.positive, device),
        negative=None if problem.negative is None else _moved(problem.negative, device),
        target=None if problem.target is None else _moved(problem.target, device),
        truth=None if problem.truth is None else problem.truth.to(device),
    )


def _moved(values: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in values.items()}


class ByLabel:
    """A denoiser made of one denoiser for each label and a last one for no label."""

    def __init__(self, parts: Sequence[Callable[[Tensor, Tensor], Tensor]]) -> None:
        self.parts = parts

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        """Return E[x0 | x, label], for x (batch, *event), sigma (batch,) and label (batch,), int64."""
        if label is None:
            return self.parts[-1](x, sigma)
        every = torch.stack([part(x, sigma) for part in self.parts])
        return every[label, torch.arange(len(x), device=x.device)]


def _gaussian(count: int, seed: int, dtype: torch.dtype) -> Problem:
    gaussian, bounds = (
        Gaussian(0.0, torch.linspace(0.2, 1.0, 16, dtype=torch.float64, device="cpu")),
        levels.edm(0.03, 15.0),
    )
    images = _noised(gaussian.sample(count, _generator(seed)), 0.03, seed)
    return Problem(gaussian, images.to(dtype), bounds, exact=True)


def _mixture(count: int, seed: int, dtype: torch.dtype) -> Problem:
    means = torch.randn(6, 16, generator=_generator(0), dtype=torch.float64, device="cpu")
    stds = torch.tensor([0.3, 0.5, 0.8, 0.4, 0.6, 0.7], dtype=torch.float64, device="cpu")
    classes = [GaussianMixture(means[part], stds[part]) for part in (slice(3), slice(3, 6))]
    generator = _generator(seed)
    draws = torch.stack([one.sample(count, generator) for one in classes], dim=1)
    label = torch.arange(count, device="cpu") % 2
    images = _noised(draws[range(count), label], 0.03, seed)
    denoiser = ByLabel([*classes, GaussianMixture(means, stds)])
    given = _labels(label, 2)
    return Problem(denoiser, images.to(dtype), levels.edm(0.03, 15.0), **given, exact=True)


def _digits_exact(count: int, seed: int, dtype: torch.dtype) -> Problem:
    points, labels = models.held_out("digits")
    index = _chosen(len(points), count, seed)
    denoiser = ByLabel([*(Dataset(points[labels == k].double()) for k in range(10)), Dataset(points.double())])
    images = _noised(points[index].double(), 0.02, seed)
    given = _labels(labels[index], 10)
    return Problem(denoiser, images.to(dtype), levels.edm(0.02, 80.0), **given, exact=True)


def _embedded(name: str) -> ProblemFunction:
    def problem(count: int, seed: int, dtype: torch.dtype) -> Problem:
        images, labels = models.held_out(name)
        index = _chosen(len(images), count, seed)
        denoiser = models.load(name, dtype=dtype)
        given = _labels(labels[index], denoiser.null_label)
        return Problem(denoiser, images[index].to(dtype), levels.edm(0.02, 80.0), **given)

    return problem


def _emoji(count: int, seed: int, dtype: torch.dtype) -> Problem:
    """Return pictures of held-out people and hands; the edit of picture k is to the tone 1, 2, ... or 5 places on."""
    problem, pictures = _embedded("emoji")(count, seed, dtype), models.variants("emoji")
    index, tones = _chosen(pictures.shape[0] * pictures.shape[1], count, seed), pictures.shape[1]
    shift = 1 + torch.arange(count, device="cpu") % (tones - 1)
    new = (index + shift) % tones
    return replace(problem, target={"label": new}, truth=pictures[index // tones, new].to(dtype))


PROBLEMS: Registry[ProblemFunction] = Registry(
    {
        "gaussian": _gaussian,
        "mixture": _mixture,
        "digits_exact": _digits_exact,
        "digits": _embedded("digits"),
        "mnist": _embedded("mnist"),
        "emoji": _emoji,
    },
    what="problems",
    place="bench.PROBLEMS",
)
"""Name -> function. Add your own by `PROBLEMS["mine"] = function`."""
_IMAGES_OF = {"digits_exact": "digits", "digits": "digits", "mnist": "mnist", "emoji": "emoji"}
_CLASSES_OF = {"emoji": len(TONES)}  # a picture comes in each


def _labels(label: Tensor, null: int) -> dict[str, Any]:
    """Return the conditioning of a problem with `null` classes: positive, negative, and the next class as target."""
    given = {"positive": label, "negative": torch.full_like(label, null), "target": (label + 1) % null}
    return {name: {"label": value} for name, value in given.items()}


def _chosen(available: int, count: int, seed: int) -> Tensor:
    if count > available:
        raise ValueError(f"count must be at most {available}, the images there are, got {count}")
    return torch.randperm(available, generator=_generator(seed), device="cpu")[:count]


def _noised(x: Tensor, sigma: float, seed: int) -> Tensor:
    return x + sigma * torch.randn(x.shape, generator=_generator(seed + 1_000_000), dtype=x.dtype, device="cpu")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
