"""Random tests for as long as you like.

    python tests/fuzz.py --minutes 10              # rounds with seeds 0, 1, 2, ... until the time is over
    python tests/fuzz.py --minutes 60 --first 500  # other seeds
    python tests/fuzz.py --seed 507                # one round, the same again
    python tests/fuzz.py --seed 507 -k damaged     # one test of it

A round runs each test of `FILES` with many examples. These tests are part of the suite, with few examples and new seeds
each time. Hypothesis shrinks what it finds, prints it, and keeps it in `.hypothesis`: `python -m pytest FILE` tries it
first from then on. The exit status is 1 if anything was found. Add what was found as a test of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = (
    "test_random_runs.py",
    "test_random_inputs.py",
    "engine/test_stepwise_machine.py",
    "adapters/comfyui/test_comfyui_machine.py",
    "adapters/diffusers/test_scheduler_machine.py",
    "adapters/k_diffusion/test_k_machine.py",
    "test_random_results.py",
)


def main() -> None:
    """Run rounds, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="no round starts later")
    parser.add_argument("--first", type=int, default=0, help="seed of the first round")
    parser.add_argument("--seed", type=int, help="one round, with this seed")
    parser.add_argument("--examples", type=int, default=300, help="of each test, in a round")
    parser.add_argument("-k", default="", metavar="WORDS", help="tests, as pytest takes them")
    given = parser.parse_args()
    files = [str(ROOT / "tests" / name) for name in FILES]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KINVERT_FUZZ": str(given.examples)}
    end = time.monotonic() + 60 * given.minutes
    seed, rounds, found = given.first if given.seed is None else given.seed, 0, list[int]()
    while not rounds or (given.seed is None and time.monotonic() < end):
        options = ["-q", "--tb=short", f"--hypothesis-seed={seed}", *(["-k", given.k] if given.k else [])]
        command = [sys.executable, "-m", "pytest", *options, *files]
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
            found.append(seed)
            print(f"again: python tests/fuzz.py --seed {seed} --examples {given.examples}", flush=True)
        rounds, seed = rounds + 1, seed + 1
    print(f"{rounds} rounds of {given.examples} examples a test, found something with {found or 'no'} seeds")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
