"""A process that has imported torch and the rest once, and is forked for each run of tests: seconds less for each mutant.

`Warm` is for `mutants.py`. Run as a script, this file is the process itself. A job is a line of JSON; the answers are
the id of the fork, and its exit status once it has ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path

__all__ = ["Warm"]

# Nothing that imports kinvert, which comes from the copy with the fault.
IMPORTED = (
    *("torch", "torch._dynamo", "torch.func", "numpy", "scipy.optimize", "scipy.special", "hypothesis.stateful"),
    *("pytest", "matplotlib.pyplot", "PIL.Image", "click", "rich.console", "safetensors.torch", "tqdm"),
    *("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "diffusers.schedulers.scheduling_ddim"),
)
MEMORY = 12 * 2**30  # bytes of address space for a run of tests


class Warm:
    """The process, from outside: it starts at the first run. A run is a session of its own, and ends as one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, copy: Path, arguments: list[str], limit: float, environment: dict[str, str]) -> int:
        """Run pytest in `copy` for at most `limit` seconds of processor time, and return its exit status.

        What it prints is in `output.txt`. A run that was ended has a negative status.
        """
        if self._process is None:
            clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                text=True,
                bufsize=1,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=clean | {"OMP_NUM_THREADS": "1"},
            )
        job = {"copy": str(copy), "arguments": arguments, "limit": int(limit), "environment": environment}
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the process has no pipes")
        stdin.write(json.dumps(job) + "\n")
        pid = int(stdout.readline())
        in_time = select.select([stdout], [], [], 40 * limit)[0]  # a test that waits takes no processor time
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, 9)  # the run, if it has not ended, and what it started
        status = int(stdout.readline())
        return status if in_time else -1

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
            self._process = None


def end_with_parent() -> None:
    """Ask Linux to end this process if its parent ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def serve() -> None:
    """Fork for each job of standard input."""
    end_with_parent()
    sys.path.pop(0)  # the tests are those of the copy
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _run(json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(job: dict[str, object]) -> None:
    """Be the process of one run of tests."""
    os.setsid()
    end_with_parent()
    status = 3
    try:
        copy, limit = str(job["copy"]), int(str(job["limit"]))
        os.chdir(copy)
        os.environ.update(job["environment"])  # type: ignore[call-overload]
        sys.pycache_prefix = os.environ.get("PYTHONPYCACHEPREFIX")
        with open("output.txt", "w") as output, open(os.devnull) as nothing:  # noqa: PTH123
            for stream, place in ((nothing, 0), (output, 1), (output, 2)):
                os.dup2(stream.fileno(), place)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        sys.path[:0] = [copy]
        import pytest

        known = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is imported
        status = int(pytest.main([*known, *map(str, job["arguments"])]))  # type: ignore[call-overload]
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    serve()
