"""`kinvert doctor`: what is installed, where it computes, and whether a digit can be inverted here."""

from __future__ import annotations

import os
import platform
import sys
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import torch

import kinvert as ki
from kinvert.cli.options import as_json, device
from kinvert.console import print_lines
from kinvert.devices import available, check_device, has_float64
from kinvert.jobs import computing_with
from kinvert.jsontext import to_json

__all__ = ["doctor"]

NEEDED = ("torch", "numpy", "scipy", "safetensors", "tqdm")
EXTRAS = {
    "cli": ("click", "rich", "matplotlib", "pillow"),
    "diffusers": ("diffusers", "transformers", "accelerate"),
    "slurm": ("submitit",),
}
TOL = 1e-5  # what an inversion in float32 reaches; see docs/exact-inversion.md


@click.command()
@device
@as_json
def doctor(device: str, as_json: bool) -> None:
    """Say what is installed, and test that it works.

    The test inverts a handwritten digit on --device, in a few seconds, and samples it back. The exit status is 1 if it
    fails. Put its output into a bug report.
    """
    found = _surroundings()
    found["self-test"] = test = _self_test(device)
    if as_json:
        click.echo(to_json(found), nl=False)
    else:
        _print(found)
    if not test["passed"]:
        raise click.exceptions.Exit(1)


def _surroundings() -> dict[str, Any]:
    return {
        "kinvert": {"version": ki.__version__, "where": str(Path(ki.__file__).parent)},
        "python": {"version": platform.python_version(), "where": sys.executable},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in NEEDED},
        "extras": {extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()},
        "devices": _devices(),
        "threads": {
            "torch": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    """Return what devices there are, and what they are."""
    found = {}
    for name in available():
        device = torch.device(name)
        if name == "cpu":
            found[name] = torch.backends.cpu.get_cpu_capability()
        elif device.type == "cuda" and device.index is not None:
            properties = torch.cuda.get_device_properties(device)
            found[name] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        elif device.index is not None:
            found[name] = "" if has_float64(device) else "without float64"
    return found


def _self_test(device: str) -> dict[str, Any]:
    """Invert a digit, sample it back, and return the numbers.

    Raises:
        ValueError: the device cannot be used.
    """
    where, begin = check_device(device), time.perf_counter()
    try:
        with computing_with(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what it would say is in the verdict
            denoiser = ki.models.load("digits", device=where)
            images, labels = ki.models.held_out("digits")
            x, label = images[:1].to(where), labels[:1].to(where)
            sigmas = ki.schedule("karras", 21, ki.levels.edm(denoiser.sigma_min, denoiser.sigma_max))[:-1]
            given: dict[str, Any] = {"sampler": "euler", "positive": {"label": label}}
            inverted = ki.invert(denoiser, x, sigmas, tol=TOL, **given)
            error = float((inverted.sample(denoiser) - x).abs().max())
    except Exception as failure:  # whatever is wrong here is the answer
        return {"passed": False, "device": str(where), "error": f"{type(failure).__name__}: {failure}"}
    return {
        "passed": bool(inverted.converged.all()) and error <= 10 * TOL,
        "device": str(where),
        "converged": bool(inverted.converged.all()),
        "largest_error": error,
        "evaluations": int(inverted.evaluations.max()),
        "seconds": round(time.perf_counter() - begin, 2),
    }


def _print(found: dict[str, Any]) -> None:
    for name in ("kinvert", "python"):
        print_lines(f"{name:<10} {found[name]['version']}, {found[name]['where']}")
    print_lines(f"{'system':<10} {found['system']}")
    print_lines(f"{'packages':<10} " + ", ".join(f"{name} {value}" for name, value in found["packages"].items()))
    for extra, packages in found["extras"].items():
        there = ", ".join(f"{name} {value}" for name, value in packages.items() if value)
        missing = ", ".join(name for name, value in packages.items() if not value)
        hint = f"without {missing}: pip install 'kinvert[{extra}]'" if missing else ""
        print_lines(f"{extra:<10} " + "; ".join(filter(None, [there, hint])))
    for name, what in found["devices"].items():
        print_lines(f"{name:<10} {what}")
    threads = found["threads"]
    own = f", OMP_NUM_THREADS={threads['OMP_NUM_THREADS']}" if threads["OMP_NUM_THREADS"] else ""
    print_lines(f"{'threads':<10} {threads['torch']} of torch, {threads['cores']} cores{own}")
    print_lines(f"{'self-test':<10} {_verdict(found['self-test'])}")


def _verdict(test: dict[str, Any]) -> str:
    verdict = f"{'passed' if test['passed'] else 'FAILED'} on {test['device']}: "
    if "error" in test:
        return verdict + str(test["error"])
    found = "inverted" if test["converged"] else "not inverted"
    return (
        f"{verdict}a digit was {found}, and came back with an error of at most {test['largest_error']:.1e} "
        f"({test['evaluations']} evaluations, {test['seconds']:.1f} s)"
    )
