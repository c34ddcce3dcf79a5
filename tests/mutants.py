"""Whether the tests notice: one small fault at a time is put into the package, and the tests that matter are run.

    python tests/mutants.py                          # 100 faults, chosen by seed 0, in hours
    python tests/mutants.py --count 300 --workers 2  # two at a time
    python tests/mutants.py --show kinvert/plan.py   # list the possible faults of a file, run nothing
    python tests/mutants.py --again                  # keep what was killed, run the survivors once more

A mutant is the package with one fault: another comparison, operator or constant, a condition the other way round, a
value that is not returned, a statement left out, two arguments swapped. Docstrings, annotations, decorators, imports,
`__all__` and messages have none. The choice is by a hash of the seed and of the fault, so an edit elsewhere changes
nothing in it. Each mutant is a copy of the checkout in a temporary folder, where pytest runs the tests of the module,
then those that name what the module offers, then a battery (`tests_for`), up to a limit of processor time. A test
kills the mutant if it fails there and passes without the fault. A test that runs forever kills too.
If the limit ends the tests before all are run, the mutant is `unfinished`, not survived.

A fault that changes no result that is promised cannot be killed: `tests/data/equivalent_mutants.toml` lists such faults
by file, line and change, each with the reason; they are not run. A fault in what cannot run here, as on a GPU, is listed too.

Maintained tools were considered. mutmut puts all mutants of a function into one file and switches between them at run
time, which changes the code that Plans are cached by and that torch compiles. cosmic-ray mutates the checkout itself,
and it has one command for all mutants: the whole suite, minutes for each. Neither knows which tests belong to a module.
Only the standard library and pytest are needed here.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from faults import ROOT, Mutant, all_mutants, key_of

RESULT = ROOT / "benchmarks" / "results" / "mutants.json"
EQUIVALENT = ROOT / "tests" / "data" / "equivalent_mutants.toml"
BATTERY = ("test_laws.py", "test_plan.py", "test_sampling.py", "test_schedules.py", "test_exact.py", "test_methods.py")
PROGRAMS = ("test_docs.py", "test_newcomer.py", "test_notebooks.py", "test_package.py")  # minutes each
MEMORY = 12 * 2**30  # bytes of address space that a mutant gets
NEAREST = 10
ALONE = 90  # seconds of processor time for one test by itself

LIMITED = """
import resource, sys
limit, memory = map(int, sys.argv[1:3])
resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
import pytest
sys.exit(pytest.main(sys.argv[3:]))
"""


# -- tests -------------------------------------------------------------------------------------------------------------
def tests_for(file: str, root: Path = ROOT) -> list[str]:
    """The files of tests for a module, the nearest first.

    These are the file that mirrors it, files of the same folder that name what the module offers, five from elsewhere
    that do, where a name that few tests know counts more, and the rest of the folder, ten in all; then the battery.
    """
    path = Path(file).relative_to("kinvert")
    stem = path.parent.name if path.stem == "__init__" else path.stem
    texts = _texts(root)
    folder = root / "tests" / path.parent
    offers = {stem, *_offers((root / file).read_text())}
    holders = {name: [test for test, words in texts.items() if name in words] for name in offers}
    score = {test: sum(len(holders[name]) ** -0.5 for name in offers & words) for test, words in texts.items()}
    far = sorted((test for test in texts if score[test] and test.parent != folder), key=lambda test: -score[test])

    def place(test: Path) -> tuple[int, float]:
        if test.stem in (f"test_{stem}", f"test_{path.parent.name}_{stem}") and (test.parent == folder or score[test]):
            return (0, 0.0)
        if score[test] and test.parent == folder != root / "tests":
            return (1, -score[test])
        if test in far[:5]:
            return (2, -score[test])
        return (3 if test.parent == folder else 4, -score[test])

    nearest = [test for test in sorted(texts, key=place) if place(test)[0] < 4][:NEAREST]
    battery = [test for name in BATTERY for test in texts if test.name == name and test not in nearest]
    return [str(test.relative_to(root)) for test in nearest + battery]


@functools.lru_cache
def _texts(root: Path) -> dict[Path, frozenset[str]]:
    """The words of each file of tests, but for those that call whole programs."""
    everything = sorted((root / "tests").rglob("test_*.py"))
    return {test: frozenset(re.findall(r"\w+", test.read_text())) for test in everything if test.name not in PROGRAMS}


def _offers(source: str) -> list[str]:
    """The names in `__all__`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


@dataclass(frozen=True)
class Outcome:
    """What tests said of a mutant.

    Attributes:
        test: the one that failed, or that did not end; "" if none did.
        passed: how many passed before.
        ended: whether all tests were run.
    """

    test: str
    passed: int
    ended: bool


def run_tests(copy: Path, tests: list[str], limit: float) -> Outcome:
    """Run tests in a copy of the checkout until one fails, for at most `limit` seconds of processor time."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy), "COLUMNS": "1000", "TMPDIR": str(copy)}
    command = [sys.executable, "-c", LIMITED, str(int(limit)), str(MEMORY)]
    options = ["-x", "-v", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    with (copy / "output.txt").open("w+") as output:
        streams = {"stdout": output, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(
            [*command, *options, *tests], cwd=copy, env=environment, start_new_session=True, **streams
        )
        try:
            status = process.wait(timeout=40 * limit)  # for a test that waits, which takes no processor time
        except subprocess.TimeoutExpired:
            status = -1
        finally:
            _end_session(process)
        output.seek(0)
        lines = output.read().splitlines()
    passed = sum(" PASSED" in line for line in lines)
    if status in (0, 5):
        return Outcome("", passed, True)
    failed = [line.split(" ")[1] for line in lines if re.match(r"(FAILED|ERROR) \S+", line)]
    # A line of a test begins when the test does, and its verdict comes at its end.
    started = [line.split(" ")[0] for line in lines if re.match(r"tests/\S+::", line)]
    return Outcome((failed or started or tests)[-1], passed, bool(failed) or status > 0)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End the tests and what they started."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def row_of(mutant: Mutant, result: str, reason: str = "") -> dict[str, object]:
    """The row of a mutant in the results."""
    of = {"file": mutant.file, "line": mutant.line, "text": mutant.text, "change": mutant.change, "nth": mutant.nth}
    return {**of, "result": result, "test": "", "seconds": 0, **({"reason": reason} if reason else {})}


class Judge:
    """Runs mutants, each in a copy of its own, and knows which tests pass without a fault."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._sound: dict[str, bool] = {}
        self._lock = threading.Lock()

    def judge(self, mutant: Mutant) -> dict[str, object]:
        """Return the row of a mutant: what it is, the result, the test that killed it, and how many passed."""
        started = time.monotonic()
        with checkout(mutant) as folder:
            copy = Path(folder)
            tests, passed = tests_for(mutant.file), 0
            while True:
                found = run_tests(copy, tests, self.limit)
                passed += found.passed
                if not found.test:
                    break
                if found.ended and self._passes(found.test):
                    break
                if not found.ended:  # too many tests, or one that does not end?
                    alone = run_tests(copy, [found.test], ALONE)
                    forever = bool(alone.test) and self._passes(found.test)
                    found = Outcome(found.test * forever, passed, False)
                    break
                tests = [test for test in tests if test != found.test.partition("::")[0]]  # fails anyway
                if not tests:
                    break
        end = {"test": found.test, "passed": passed, "all": found.ended, "seconds": round(time.monotonic() - started)}
        result = "killed" if found.test else "survived" if found.ended else "unfinished"
        return row_of(mutant, result) | end

    def _passes(self, test: str) -> bool:
        """Tell whether a test passes in a copy without a fault."""
        with self._lock:
            if test not in self._sound:
                with checkout(None) as copy:
                    self._sound[test] = not run_tests(Path(copy), [test], 4 * self.limit).test
            return self._sound[test]


def checkout(mutant: Mutant | None) -> tempfile.TemporaryDirectory[str]:
    """Make a copy of the files that git knows, with one fault or none."""
    folder = tempfile.TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True)
    copy = Path(folder.name)
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    if mutant is not None:
        source = (copy / mutant.file).read_bytes()
        (copy / mutant.file).write_bytes(source[: mutant.start] + mutant.new.encode() + source[mutant.end :])
    return folder


# -- the list and the table --------------------------------------------------------------------------------------------
def equivalent() -> dict[str, str]:
    """The faults that no test can notice, with the reason, by key."""
    listed = tomllib.loads(EQUIVALENT.read_text())["mutant"]
    return {key_of(row): row["reason"] for row in listed}


def write(place: Path, seed: int, rows: dict[str, dict[str, object]]) -> None:
    """Write results, by file and line."""
    ordered = sorted(rows.values(), key=lambda row: (str(row["file"]), str(row["text"]), str(row["change"])))
    counts = Counter(str(row["result"]) for row in ordered)
    text = json.dumps({"seed": seed, "counts": counts, "rows": ordered}, indent=1, ensure_ascii=False)
    place.write_text(text + "\n")


def main() -> None:
    """Choose, run, print, keep the results; the exit status is 1 if a mutant survived that the list does not have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--limit", type=float, default=240.0, help="seconds of processor time for the tests of a mutant"
    )
    parser.add_argument("--again", action="store_true", help="take over what was killed from --out")
    parser.add_argument("--show", metavar="FILE", help="list the faults of a file, or of all with 'all'")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("only", nargs="*", metavar="FILE", help="mutate these files of the package alone")
    given = parser.parse_args()
    everything = all_mutants()
    if given.show:
        print(*(json.dumps(asdict(m)) for m in everything if given.show in ("all", m.file)), sep="\n")
        return
    possible = [m for m in everything if not given.only or m.file in given.only]
    chosen = sorted(possible, key=lambda mutant: mutant.rank(given.seed))[: given.count]
    old = json.loads(given.out.read_text())["rows"] if given.again and given.out.exists() else []
    killed = {key_of(row): row for row in old if row["result"] == "killed"}
    listed, judge = equivalent(), Judge(given.limit)
    print(f"{len(chosen)} of {len(possible)} mutants, seed {given.seed}", flush=True)
    rows = {}

    def one(mutant: Mutant) -> None:
        reason = listed.get(mutant.key)
        row = killed.get(mutant.key) or (
            judge.judge(mutant) if reason is None else row_of(mutant, "equivalent", reason)
        )
        rows[mutant.key] = row
        write(given.out, given.seed, dict(rows))
        print(f"{row['result']:<10} {row['seconds']:>4} s  {mutant.key}  {row['test']}", flush=True)

    with ThreadPoolExecutor(given.workers) as pool:
        list(pool.map(one, chosen))
    counts = Counter(str(row["result"]) for row in rows.values())
    share = counts["killed"] / max(1, len(rows) - counts["equivalent"])
    print(", ".join(f"{n} {what}" for what, n in counts.items()), f"- {share:.1%} of those not equivalent are killed")
    sys.exit(counts["survived"] + counts["unfinished"] > 0)


if __name__ == "__main__":
    main()
