"""Make the same calls in many conditions, and compare the results: do they end, and are they equal?

Every sampler goes through every verb, and `invert` through all its methods, on an exact denoiser, in float32 and
float64, some 430 calls in each. A condition is a mode of torch, a number of threads, a layout of x or of the
denoiser's output, or a flag of the interpreter. It runs in its own process with a time limit, because a hang is a
result too. It is compared with the baseline (one thread, nothing changed) call by call: values, to a relative 1e-4;
refusals, and their words; `converged`; evaluations; results that keep a graph; inputs that were written to.

    python benchmarks/environments.py                  # all, some twenty minutes
    python benchmarks/environments.py threads autocast # these, the others stay as they are in the file
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kinvert as ki
from kinvert.denoisers import guide
from kinvert.inversion import METHODS

RESULT = Path(__file__).parent / "results" / "environments.json"
CLOSE = 1e-4  # relative difference up to which values are the same
DTYPES = {"float32": torch.float32, "float64": torch.float64}
EXAMPLES = ("euler", "heun", "dpmpp_2m", "euler_ancestral")  # what the options are tried with
SHAPE = (3, 2, 4, 4)


def same(x: Any) -> Any:
    """Return x unchanged."""
    return x


@dataclass(frozen=True)
class Condition:
    """A difference from the baseline, which is the condition without arguments.

    Attributes:
        what: in words, for the table.
        threads: torch's; None leaves its default.
        flags: of the interpreter.
        mode: a context in which all calls are made.
        given: what is done to x before a call gets it; its values stay.
        returned: what is done to the denoiser's output.
        like: the condition that it is compared with.
    """

    what: str
    threads: int | None = 1
    flags: tuple[str, ...] = ()
    mode: Callable[[], Any] = contextlib.nullcontext
    given: Callable[[Tensor], Tensor] = same
    returned: Callable[[Tensor], Tensor] = same
    like: str = "baseline"
    environment: dict[str, str] = field(default_factory=dict)


# -- modes and layouts -------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def setting(set_to: Callable[[Any], Any], value: Any) -> Iterator[None]:
    """Change one of torch's global settings; the process ends afterwards, so nothing is put back."""
    set_to(value)
    yield


class Image(Tensor):
    """A subclass that survives operations, as libraries for images have them."""


def larger(x: Tensor, pad: int = 3) -> Tensor:
    """Return a view with the values of x in the middle of a larger tensor whose rest is NaN."""
    whole = x.new_full([n + 2 * pad for n in x.shape], torch.nan)
    whole[tuple(slice(pad, pad + n) for n in x.shape)] = x
    return whole[tuple(slice(pad, pad + n) for n in x.shape)]


def stepped(x: Tensor) -> Tensor:
    """Return a view of every second value of a tensor twice as wide."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]


def permuted(x: Tensor) -> Tensor:
    """Return x with its dimensions in the opposite order in memory."""
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def expanded(x: Tensor) -> Tensor:
    """Return the first image for all samples, with stride 0."""
    return x[:1].expand(x.shape)


def inference(x: Tensor) -> Tensor:
    """Return a copy made in inference mode."""
    with torch.inference_mode():
        return x.clone()


def with_graph(x: Tensor) -> Tensor:
    """Return x as the output of a network whose parameters require gradients."""
    return x * torch.ones((), dtype=x.dtype, requires_grad=True)


MEMORY = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": permuted,
    "stepped": stepped,
    "larger": larger,
}
CONDITIONS: dict[str, Condition] = {
    "baseline": Condition("one thread, nothing changed"),
    "again": Condition("the same once more"),
    "threads": Condition("torch's default threads, one a core", threads=None),
    "no_grad": Condition("`torch.no_grad()`", mode=torch.no_grad),
    "inference_mode": Condition("`torch.inference_mode()`", mode=torch.inference_mode),
    "anomaly": Condition("`torch.autograd.detect_anomaly()`", mode=torch.autograd.detect_anomaly),
    "autocast": Condition(
        "`torch.autocast`, bfloat16", mode=partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=True)
    ),
    "default_float64": Condition(
        "default dtype float64", mode=partial(setting, torch.set_default_dtype, torch.float64)
    ),
    "default_bfloat16": Condition(
        "default dtype bfloat16", mode=partial(setting, torch.set_default_dtype, torch.bfloat16)
    ),
    "deterministic": Condition(
        "deterministic algorithms", mode=partial(setting, torch.use_deterministic_algorithms, True)
    ),
    "flush_denormal": Condition("denormal numbers are flushed", mode=partial(setting, torch.set_flush_denormal, True)),
    "matmul_high": Condition(
        "float32 products `high`", mode=partial(setting, torch.set_float32_matmul_precision, "high")
    ),
    "matmul_medium": Condition(
        "float32 products `medium`", mode=partial(setting, torch.set_float32_matmul_precision, "medium")
    ),
    "optimized": Condition("`python -O`", flags=("-O",)),
    "no_docstrings": Condition("`python -OO`", flags=("-OO",)),
    "dev": Condition("`python -X dev`", flags=("-X", "dev")),
    "hash_seed": Condition("another order of sets", environment={"PYTHONHASHSEED": "7"}),
    "python_thread": Condition("in a second thread of Python"),
    "x_requires_grad": Condition("x requires gradients", given=lambda x: x.clone().requires_grad_()),
    "x_parameter": Condition("x is a Parameter", given=lambda x: torch.nn.Parameter(x.clone())),
    "x_inference": Condition("x was made in inference mode", given=inference),
    "x_subclass": Condition("x is of a subclass of Tensor", given=lambda x: x.clone().as_subclass(Image)),
    **{f"x_{name}": Condition(f"x is {name}", given=change) for name, change in MEMORY.items()},
    "equal_rows": Condition("all images are equal", given=lambda x: expanded(x).clone()),
    "x_expanded": Condition("x is one image, expanded", given=expanded, like="equal_rows"),
    **{f"out_{name}": Condition(f"the denoiser returns {name}", returned=change) for name, change in MEMORY.items()},
    "out_graph": Condition("the denoiser returns a graph", returned=with_graph),
    "out_parameter": Condition("the denoiser returns a Parameter", returned=torch.nn.Parameter),
    "out_inference": Condition("the denoiser returns an inference tensor", returned=inference),
    "out_subclass": Condition("the denoiser returns a subclass", returned=lambda x: x.as_subclass(Image)),
}


# -- the calls ---------------------------------------------------------------------------------------------------------
def calls(denoiser: Any) -> dict[str, Callable[[Tensor], Any]]:
    """Return the calls by name; each is a function of x."""
    sigmas = ki.schedule("karras", 8, ki.levels.edm(0.03, 15.0))
    short, high = sigmas[:-1], float(sigmas[0])
    seeded, pair = {"noise": ki.noise.white(0)}, {"negative": {}}
    guided = {"cfg": 2.0, "negative": {"shift": 0.1}}
    hard = (torch.arange(SHAPE[-1]) < 2).double().expand(SHAPE)

    def run(x: Tensor, name: str) -> Tensor:
        plan = ki.compile_plan(name, sigmas)
        return ki.run(plan, guide(denoiser, 1.0, None, {}, pair=plan.is_guided), high * x, ki.noise.white(0))

    def noises(x: Tensor, **options: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return ki.extract_noise(denoiser, x, short, generator=generator, **options)

    def up(x: Tensor, **options: Any) -> Any:
        return ki.unsample(denoiser, x, sigmas, **pair | options)

    def down(x: Tensor, **options: Any) -> Any:
        return ki.sample(denoiser, high * x, sigmas, **pair | options)

    def exact(x: Tensor, to: Any = short, **options: Any) -> Any:
        return ki.invert(denoiser, x, to, **pair | options)

    found: dict[str, Callable[[Tensor], Any]] = {}
    for name in ki.SAMPLERS:
        found |= {
            f"sample {name}": partial(down, sampler=name, **seeded),
            f"unsample {name}": partial(up, sampler=name),
            f"round_trip {name}": lambda x, name=name: ki.round_trip(denoiser, x, sigmas, sampler=name, **pair),
            f"run {name}": partial(run, name=name),
            f"invert {name}": partial(exact, sampler=name),
            f"extract_noise {name}": partial(noises, sampler=name, **pair),
        }
    for name in EXAMPLES:
        for option, given in {"mask": {"mask": hard}, "cfg": guided, "max_batch": {"max_batch": 2}}.items():
            found |= {
                f"sample {name}, {option}": partial(down, sampler=name, **seeded | given),
                f"unsample {name}, {option}": partial(up, sampler=name, **given),
                f"invert {name}, {option}": partial(exact, sampler=name, **given),
            }
        found[f"unsample {name}, normalize"] = partial(up, sampler=name, normalize=True)
        found[f"invert {name}, least_change"] = partial(exact, to=sigmas, sampler=name, last_step="least_change")
        if name != "dpmpp_2m":  # a multistep sampler is solved as a whole, whatever the method
            found |= {f"invert {name}, {m}": partial(exact, sampler=name, method=m) for m in METHODS if m != "auto"}
    found["extract_noise euler_ancestral, cfg"] = partial(noises, sampler="euler_ancestral", **guided)
    return found


def outcome(call: Callable[[Tensor], Any], x: Tensor) -> dict[str, Any]:
    """Describe what a call returned or refused: numbers, words, and what should not have happened."""
    before = x.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call(x)
            text = str(result) if not isinstance(result, Tensor) else ""  # reports print
        except Exception as error:
            message = re.sub(r"0x[0-9a-f]+", "0x", f"{type(error).__name__}: {error}")
            return {"refused": message, "values": [], "notes": []}
    fields = {"result": result} if isinstance(result, Tensor) else vars(result)
    tensors = {key: value for key, value in fields.items() if isinstance(value, Tensor) and value.is_floating_point()}
    told = sum(issubclass(w.category, RuntimeWarning) for w in caught)
    return {
        "values": [v.detach().double().flatten() for k, v in tensors.items() if k in ("result", *KEPT)],
        "form": [(k, tuple(v.shape), str(v.dtype)) for k, v in tensors.items()],
        "graph": any(v.requires_grad for v in tensors.values()),
        "written": not torch.equal(before, x.detach()),
        "converged": result.converged.tolist() if hasattr(result, "converged") else None,
        "evaluations": int(torch.as_tensor(getattr(result, "evaluations", 0)).sum()),
        "warned": told,
        "lines": text.count("\n"),
    }


KEPT = ("latent", "reconstruction", "restored")  # of reports


def denoiser_of(condition: Condition) -> Any:
    """Return the exact denoiser of independent Gaussians, whose output has the layout of the condition."""
    values = SHAPE[1:]
    stds = torch.linspace(0.3, 1.0, int(np.prod(values)), dtype=torch.float64).reshape(values)
    gaussian = ki.denoisers.Gaussian(0.1, stds)

    def denoise(x: Tensor, sigma: Tensor, shift: float = 0.0) -> Tensor:
        return condition.returned(gaussian(x, sigma) + shift)

    return denoise


def child(name: str, out: Path) -> None:
    """Make all calls in one condition, and write the name of each to a file before it is made."""
    condition = CONDITIONS[name]
    if condition.threads is not None:
        torch.set_num_threads(condition.threads)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    todo, found = calls(denoiser_of(condition)), {}

    def work() -> None:
        with warnings.catch_warnings(), condition.mode(), out.with_suffix(".log").open("w") as log:
            for dtype, kind in DTYPES.items():
                for what, call in todo.items():
                    print(f"{what}, {dtype}", file=log, flush=True)
                    found[what, dtype] = outcome(call, condition.given(x.to(kind)))

    begun = time.perf_counter()
    if name == "python_thread":
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    else:
        work()
    seconds, threads = time.perf_counter() - begun, torch.get_num_threads()
    torch.save({"calls": found, "seconds": seconds, "threads": threads}, out)


# -- the comparison ----------------------------------------------------------------------------------------------------
def start(name: str, folder: Path, limit: float) -> dict[str, Any]:
    """Make a condition's calls in their own process."""
    condition, out = CONDITIONS[name], folder / f"{name}.pt"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, *condition.flags, __file__, "--child", name, "--out", str(out)]
    try:
        done = subprocess.run(
            command, env=environment | condition.environment, timeout=limit, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        log = out.with_suffix(".log")
        last = log.read_text().splitlines()[-1] if log.exists() and log.stat().st_size else "the import"
        return {"end": f"no end after {limit:g} s, in {last}"}
    if done.returncode or not out.exists():
        return {"end": f"exit status {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"}
    return {"end": "ends", **torch.load(out, weights_only=False)}


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Compute the largest difference of values, relative to the largest value."""
    if [len(v) for v in a] != [len(v) for v in b]:
        return float("inf")
    pairs = [(p, q) for p, q in zip(a, b, strict=True) if len(p)]
    return max((float((p - q).abs().max() / p.abs().max().clamp_min(1e-30)) for p, q in pairs), default=0.0)


def judge(want: dict[str, Any], got: dict[str, Any], verb: str) -> tuple[list[str], float]:
    """Return what differs, in words, and how far the values are apart."""
    refused = want.get("refused"), got.get("refused")
    if any(refused):
        return ([] if refused[0] == refused[1] else [f"refused: {refused[1] or 'no more'}"]), 0.0
    found = []
    apart = distance(want["values"], got["values"])
    if not apart <= CLOSE:
        found.append("values")
    found += [key for key in ("form", "converged", "warned", "lines") if want[key] != got[key]]
    found += [key for key in ("graph", "written") if got[key] and not (key == "graph" and verb == "run")]
    if abs(got["evaluations"] - want["evaluations"]) > 0.1 * want["evaluations"]:
        found.append(f"evaluations: {want['evaluations']} to {got['evaluations']}")
    return found, apart


def compare(name: str, want: dict[str, Any], got: dict[str, Any]) -> dict[str, Any]:
    """Return a line of the table."""
    condition = CONDITIONS[name]
    row: dict[str, Any] = {"condition": name, "what": condition.what, "like": condition.like, "end": got["end"]}
    if "calls" not in got or "calls" not in want:
        return row
    row |= {"threads": got["threads"], "seconds": round(got["seconds"], 1)}
    for dtype in DTYPES:
        kinds: Counter[str] = Counter()
        worst, differ, examples = 0.0, 0, []
        pairs = {what: each for (what, kind), each in want["calls"].items() if kind == dtype}
        for what, each in pairs.items():
            found, apart = judge(each, got["calls"][what, dtype], what.partition(" ")[0])
            worst, differ = max(worst, apart), differ + bool(found)
            kinds.update(words.partition(":")[0] for words in found)
            examples += [f"{what}: {words}" for words in found]
        row[dtype] = {
            "calls": len(pairs),
            "refused": sum("refused" in each for each in pairs.values()),
            "differ": differ,
            "kinds": dict(kinds),
            "worst": worst if np.isfinite(worst) else str(worst),
            "examples": [example[:200] for example in examples[:5]],
        }
    return row


def main() -> None:
    """Run the conditions that are named, or all, and write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="condition", help=f"any of {', '.join(CONDITIONS)}; all by default")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that a condition may take")
    parser.add_argument("--workers", type=int, default=1, help="conditions at a time; each may use all cores")
    parser.add_argument("--child", choices=list(CONDITIONS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULT, help="where the comparison goes")
    given = parser.parse_args()
    if given.child:
        child(given.child, given.out)
        return
    if unknown := set(given.names) - CONDITIONS.keys():
        parser.error(f"there is no condition {', '.join(sorted(unknown))}")
    names = given.names or list(CONDITIONS)
    kept = json.loads(given.out.read_text())["rows"] if given.names and given.out.exists() else []
    rows = {row["condition"]: row for row in kept}
    versions = {"kinvert": ki.__version__, "torch": torch.__version__, "numpy": np.__version__}
    versions |= {"python": platform.python_version(), "machine": platform.machine()}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.workers) as pool:
        needed = dict.fromkeys(each for name in names for each in (CONDITIONS[name].like, name))
        made = {name: pool.submit(start, name, Path(folder), given.limit) for name in needed}
        for name in names:
            rows[name] = compare(name, made[CONDITIONS[name].like].result(), made[name].result())
            print(json.dumps(rows[name]), flush=True)
            report = {"versions": versions, "rows": [rows[each] for each in CONDITIONS if each in rows]}
            given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
