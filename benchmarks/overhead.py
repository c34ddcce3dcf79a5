"""Measure what a sampler costs above its denoiser, next to k-diffusion, diffusers and loops by hand.

    python benchmarks/overhead.py [--k-diffusion path/to/k_diffusion/sampling.py] [--device cuda] [--samplers euler,lms]

The denoiser of this benchmark hands out existing tensors, each of them once, so that only the sampler is counted and
timed. Measured per step, from the difference of a run of 50 steps and one of 25 (so that set-up drops out):

* operations on tensors as large as x; the bytes they move, in units of x ("passes") and of the least possible, which is
  one kernel for each input of the denoiser and for each update (the noise source and the denoiser do not count); new
  tensors of that size; reads of the device by the host, on the simulated device of the tests.
* the time of a run of 50 steps, divided by 50: the median over runs in random order, thread time on a CPU, events on a
  GPU.

Measured once: milliseconds to compile 1,000 steps of every sampler, the Plan and its kernels.

k-diffusion's file is loaded alone, without the packages that it imports and does not need here; diffusers is used if it
is installed.
Results go to `benchmarks/results/overhead-<device>.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import math
import platform
import random
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from best_case import best_case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kinvert as ki
from kinvert.engine.kernels import program

RESULTS = Path(__file__).parent / "results"
TESTS = Path(__file__).parent.parent / "tests"
SHAPES = {"large": (4, 4, 128, 128), "small": (1, 4, 64, 64)}
STEPS = 50
SIGMAS = (0.03, 14.6)
# kinvert's sampler: its options, k-diffusion's function, diffusers' scheduler and the options of that
CASES: dict[str, tuple[dict[str, Any], str | None, str | None, dict[str, Any]]] = {
    "euler": ({}, "sample_euler", "EulerDiscreteScheduler", {}),
    "heun": ({}, "sample_heun", "HeunDiscreteScheduler", {}),
    "dpm_2": ({}, "sample_dpm_2", "KDPM2DiscreteScheduler", {}),
    "lms": ({}, "sample_lms", "LMSDiscreteScheduler", {}),
    "dpmpp_2m": ({}, "sample_dpmpp_2m", "DPMSolverMultistepScheduler", {}),
    "dpmpp_2s_ancestral": ({"eta": 0.0}, "sample_dpmpp_2s_ancestral", "DPMSolverSinglestepScheduler", {}),
    "dpmpp_2m_sde": (
        {},
        "sample_dpmpp_2m_sde",
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    "deis": ({}, None, "DEISMultistepScheduler", {"solver_order": 3}),
    "uni_pc": ({}, None, "UniPCMultistepScheduler", {"solver_order": 3}),
    "er_sde": ({}, None, None, {}),
}


class Outputs:
    """A denoiser that costs nothing."""

    def __init__(self, x: Tensor, evaluations: int) -> None:
        self.x, self.evaluations, self.tensors = x, evaluations, list[Tensor]()

    def fill(self) -> None:
        """Make the tensors of a run, before it."""
        self.tensors = [torch.randn_like(self.x) for _ in range(self.evaluations)]

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.tensors.pop()


class Given:
    """A noise source that costs nothing: the noise is drawn already."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def bind(self, x: Tensor) -> Given:
        return self

    def __call__(self, sigma_from: float, sigma_to: float) -> Tensor:
        return self.noise

    def into(self, out: Tensor, sigma_from: float, sigma_to: float) -> None:
        """Do nothing: the sources of kinvert write into the given row, so the noise is there already."""


class Count(TorchDispatchMode):
    """A mode that counts operations on tensors as large as x, the bytes they read and write, and new tensors."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.numel, self.bytes = x.numel(), x.nbytes
        self.operations = self.moved = self.created = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls += 1
        if torch.Tag.inplace_view in func.tags or any(
            r.alias_info and not r.alias_info.is_write for r in returns(func)
        ):
            return out
        written, read = set(), set()
        for argument, value in itertools.chain(
            zip(func._schema.arguments, args, strict=False),
            ((a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs),
        ):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for t in filter(self.large, tree_leaves(value)):
                if writes:
                    written.add(t)
                if not writes or not (
                    argument.kwarg_only or func.overloadpacket.__name__ in ("copy_", "zero_", "fill_")
                ):
                    read.add(t)
        new = {t for t in tree_leaves(out) if self.large(t)} - written
        if written or read or new:
            self.operations += 1
            self.moved += sum(t.nbytes for t in [*read, *written, *new])
            self.created += len(new)
        return out

    def large(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.numel() >= self.numel


def returns(func: Any) -> Any:
    return func._schema.returns


# -- the samplers ------------------------------------------------------------------------------------------------------
def runs(
    x: Tensor, steps: int, k_diffusion: Any
) -> Iterator[tuple[str, str, Callable[[], object], Callable[[], object]]]:
    """Yield (sampler, who, set-up that does not count, the run) for every implementation."""
    sigmas = ki.schedules.karras(steps, *SIGMAS)
    noise = torch.randn_like(x)
    for name, (options, function, scheduler, settings) in CASES.items():
        plan = ki.compile_plan(ki.sampler(name, **options), sigmas)
        denoiser = Outputs(x, 2 * plan.evaluations)  # a scheduler of diffusers may make a step more
        fill = denoiser.fill
        yield name, "kinvert", fill, lambda p=plan, d=denoiser: ki.run(p, d, x, Given(noise))
        yield name, "by hand", fill, best_case(plan, denoiser, x, noise)
        if k_diffusion is not None and function is not None:
            extra: dict[str, Any] = {"disable": True}
            if "sde" in name:
                extra["noise_sampler"] = lambda a, b: noise
            if "2s" in name:
                extra |= {"eta": 0.0, "noise_sampler": lambda a, b: noise}
            on_device = sigmas.to(x.dtype).to(x.device)
            f = getattr(k_diffusion, function)
            yield name, "k-diffusion", fill, lambda f=f, d=denoiser, e=extra, s=on_device: f(d, x, s, **e)
        if scheduler is not None and importlib.util.find_spec("diffusers"):
            yield (name, "diffusers", *diffusers_run(scheduler, settings, x, steps, denoiser, noise))


def diffusers_run(
    name: str, settings: dict[str, Any], x: Tensor, steps: int, denoiser: Outputs, noise: Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return set-up and run of a scheduler's `step`; a singlestep solver of order 2 takes two timesteps a step."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()  # type: ignore[attr-defined]
    scheduler = getattr(diffusers, name)(**settings)
    extra = {"variance_noise": noise} if "algorithm_type" in settings else {}
    timesteps = 2 * steps if "Singlestep" in name else steps
    state: dict[str, Any] = {}

    def prepare() -> None:
        denoiser.fill()
        scheduler.set_timesteps(timesteps)
        state["timesteps"] = list(scheduler.timesteps)

    def run() -> Tensor:
        y = x
        for t in state["timesteps"]:
            y = scheduler.step(denoiser(y, t), t, y, return_dict=False, **extra)[0]
        return y

    return prepare, run


def load_k_diffusion(path: Path) -> types.ModuleType:
    """Load k-diffusion's sampling file without the packages that it imports and this benchmark does not use."""
    stubs = {name: types.ModuleType(name) for name in ("alone", "alone.utils", "torchdiffeq", "torchsde")}
    stubs["alone"].__path__ = []
    stubs["alone"].utils = stubs["alone.utils"]  # type: ignore[attr-defined]
    stubs["alone.utils"].append_dims = lambda x, n: x[(..., *(None,) * (n - x.ndim))]  # type: ignore[attr-defined]
    stubs["torchdiffeq"].odeint = None  # type: ignore[attr-defined]
    sys.modules |= stubs
    spec = importlib.util.spec_from_file_location("alone.sampling", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for stub in stubs:
        del sys.modules[stub]
    return module


# -- counts ------------------------------------------------------------------------------------------------------------
def counts(k_diffusion: Any) -> dict[tuple[str, str], dict[str, float]]:
    """Count operations, passes and new tensors a step: deterministic, the same on every device."""
    x = SIGMAS[1] * torch.randn(2, 4, 32, 32)
    found: dict[tuple[str, str], list[Count]] = {}
    for steps in (STEPS, STEPS // 2):
        for name, who, prepare, run in runs(x, steps, k_diffusion):
            prepare()
            with Count(x) as count:
                run()
            found.setdefault((name, who), []).append(count)
    return {key: per_step(*pair) for key, pair in found.items()}


def per_step(long: Count, short: Count) -> dict[str, float]:
    steps = STEPS - STEPS // 2
    passes = (long.moved - short.moved) / steps / long.bytes
    return {
        "calls": (long.calls - short.calls) / steps,
        "operations": (long.operations - short.operations) / steps,
        "passes": round(passes, 3),
        "created": (long.created - short.created) / steps,
    }


def least(plan: ki.Plan) -> tuple[int, int]:
    """Count the passes of one kernel for each denoiser input and each update, and the operations allowed in a step."""
    step = plan.steps[len(plan.steps) // 2]
    inputs = [stage.input for stage in step.stages if stage.input.alias() is None]
    rows = [form for form in (step.x, *(form for _, form in step.memory)) if form.alias() is None]
    read = {symbol for form in rows for symbol, _ in form}
    passes = sum(len(form) + 1 for form in inputs) + len(read) + len(rows)
    return passes, len(step.stages) + 1 + len(step.memory) + 1


def synchronisations(args: argparse.Namespace) -> dict[tuple[str, str], int]:
    """Count reads of the device by the host in a run of 50 steps, in a new process with the simulated device."""
    command = [sys.executable, "-W", "ignore", __file__, "--count-synchronisations", "--samplers", args.samplers]
    if args.k_diffusion:
        command += ["--k-diffusion", str(args.k_diffusion)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {tuple(row[:2]): row[2] for row in json.loads(done.stdout.splitlines()[-1])}


def count_synchronisations(k_diffusion: Any) -> None:
    """Print the reads as JSON."""
    sys.path.insert(0, str(TESTS))
    import simdevice

    rows = []
    x = simdevice.to_sim(torch.ones(1, 4, 8, 8))
    with simdevice.sim():
        for name, who, prepare, run in runs(x, STEPS, k_diffusion):
            try:
                prepare()
                simdevice.SYNC.clear()
                run()
                rows.append((name, who, sum(simdevice.SYNC.values())))
            except Exception as error:
                print(name, who, type(error).__name__, error, file=sys.stderr)
    print(json.dumps(rows))


# -- time --------------------------------------------------------------------------------------------------------------
def timer(device: str) -> Callable[[Callable[[], object]], float]:
    """Return a function that times a call, in seconds."""

    def on_cpu(run: Callable[[], object]) -> float:
        start = time.thread_time()
        run()
        return time.thread_time() - start

    def on_gpu(run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return on_gpu if device.startswith("cuda") else on_cpu


def times(shape: tuple[int, ...], device: str, k_diffusion: Any, repetitions: int) -> dict[tuple[str, str], float]:
    """Return microseconds a step: the median over repetitions, each of which runs everything once in random order."""
    x = SIGMAS[1] * torch.randn(shape, device=device)
    cells = list(runs(x, STEPS, k_diffusion))
    clock, order = timer(device), random.Random(0)
    seconds: dict[tuple[str, str], list[float]] = {(name, who): [] for name, who, _, _ in cells}
    for repetition in range(repetitions + 2):
        for name, who, prepare, run in order.sample(cells, len(cells)):
            prepare()
            elapsed = clock(run)
            if repetition >= 2:
                seconds[name, who].append(elapsed)
    return {key: round(statistics.median(values) / STEPS * 1e6, 2) for key, values in seconds.items()}


def brownian(shape: tuple[int, ...], device: str, repetitions: int) -> dict[str, float]:
    """Return microseconds a step of dpmpp_2m_sde with either kind of noise."""
    x = SIGMAS[1] * torch.randn(shape, device=device)
    plan = ki.compile_plan("dpmpp_2m_sde", ki.schedules.karras(STEPS, *SIGMAS))
    denoiser, clock = Outputs(x, plan.evaluations), timer(device)
    sources = {"white": ki.noise.white(0), "brownian": ki.noise.brownian(0)}
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(repetitions):
        for name, source in sources.items():
            denoiser.fill()
            seconds[name].append(clock(lambda s=source: ki.run(plan, denoiser, x, s)))
    return {name: round(statistics.median(values[1:]) / STEPS * 1e6, 2) for name, values in seconds.items()}


def compilation(steps: int = 1000) -> dict[str, list[float]]:
    """Return milliseconds from a sampler's name to its Plan, and from there to its kernels: the best of three."""
    sigmas, found, count = ki.schedules.karras(steps, *SIGMAS), {}, itertools.count()
    for name in ki.SAMPLERS:
        if name == "dpm_adaptive":  # its steps follow from the state
            continue
        best = [math.inf, math.inf]
        for _ in range(3):
            other = (sigmas * (1 + 1e-9 * next(count))).tolist()  # Plans are kept
            start = time.thread_time()
            plan = ki.compile_plan(name, other)
            middle = time.thread_time()
            program(plan)
            best = [min(pair) for pair in zip(best, (middle - start, time.thread_time() - middle), strict=True)]
        found[name] = [round(1e3 * seconds, 1) for seconds in best]
    return found


# -- the report --------------------------------------------------------------------------------------------------------
@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--k-diffusion", type=Path, help="its file k_diffusion/sampling.py")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--samplers", default=",".join(CASES), help="some of %(default)s, for a look: nothing is written"
    )
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count-synchronisations", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = args.samplers.split(",")
    if not CASES.keys() >= set(chosen):
        parser.error(f"--samplers must be some of {', '.join(CASES)}, got {args.samplers}")
    left_out = CASES.keys() - set(chosen)
    for name in left_out:
        del CASES[name]
    k_diffusion = load_k_diffusion(args.k_diffusion) if args.k_diffusion else None
    if args.count_synchronisations:
        count_synchronisations(k_diffusion)
        return
    counted, stops = counts(k_diffusion), synchronisations(args)
    measured = {size: times(shape, args.device, k_diffusion, args.repetitions) for size, shape in SHAPES.items()}
    rows = []
    for (name, who), found in counted.items():
        plan = ki.compile_plan(ki.sampler(name, **CASES[name][0]), ki.schedules.karras(STEPS, *SIGMAS))
        passes, operations = least(plan)
        rows.append(
            {"sampler": name, "who": who, **found, "least_passes": passes, "allowed_operations": operations}
            | {"synchronisations": stops.get((name, who))}
            | {f"us_{size}": measured[size][name, who] for size in SHAPES}
        )
        print(json.dumps(rows[-1]))
    compiled = compilation()
    print(json.dumps(compiled))
    noise = {size: brownian(shape, args.device, args.repetitions) for size, shape in SHAPES.items()}
    print(json.dumps(noise))
    report = {"machine": machine(args.device), "versions": versions(args.k_diffusion), "steps": STEPS, "shapes": SHAPES}
    report |= {"repetitions": args.repetitions, "rows": rows, "noise": noise, "compile_ms": compiled}
    path = args.out or (None if left_out else RESULTS / f"overhead-{args.device.partition(':')[0]}.json")
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


def machine(device: str) -> str:
    """Describe what the times were measured on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{model[0].partition(': ')[2] if model else platform.processor()}, one thread"


def versions(k_diffusion: Path | None) -> dict[str, str]:
    """Return the versions of everything that was measured; a hash for k-diffusion's file."""
    found = {"kinvert": ki.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if importlib.util.find_spec("diffusers"):
        import diffusers

        found["diffusers"] = diffusers.__version__
    if k_diffusion is not None:
        found["k-diffusion, sampling.py"] = hashlib.sha1(k_diffusion.read_bytes()).hexdigest()[:10]
    return found


if __name__ == "__main__":
    main()
