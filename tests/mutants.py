"""Whether the tests notice: one small fault at a time is put into the package, and the tests that matter are run.

    python tests/mutants.py                          # 100 faults, chosen by seed 0, in hours
    python tests/mutants.py --count 300 --workers 2  # two at a time
    python tests/mutants.py --show kinvert/plan.py   # list the possible faults of a file, run nothing
    python tests/mutants.py --again                  # keep what was killed, run the survivors once more

A mutant is the package with one fault: another comparison, operator or constant, a condition the other way round, a
value that is not returned, a statement left out, two arguments swapped. Docstrings, annotations, decorators, imports,
`__all__` and messages have none. The choice is by a hash of the seed and of the fault, so an edit elsewhere changes
nothing in it. Each mutant is a copy of the checkout in a temporary folder, where pytest runs the tests that execute the
line (`testlines.py` records them, in half an hour, and keeps them in .mutants): of each file and function of tests the
quickest first, then the others up to a limit of processor time. If none kills, the tests of the module are run, then
those that name what the module offers, then a battery (`tests_for`), whatever they execute: a subprocess is not seen
by the record. A test kills the mutant if it fails there and passes without the fault. A test that runs forever kills
too. If the limit ends the tests before all are run, the mutant is `unfinished`, not survived.

A fault that changes no result that is promised cannot be killed: `tests/data/equivalent_mutants.toml` lists such faults
by file, line and change, each with the reason; they are not run. A fault in what cannot run here, as on a GPU, is listed too.

Maintained tools were considered. mutmut puts all mutants of a function into one file and switches between them at run
time, which changes the code that Plans are cached by and that torch compiles. cosmic-ray mutates the checkout itself,
and it has one command for all mutants: the whole suite, minutes for each. Neither knows which tests belong to a module.
Only the standard library, pytest and coverage.py are needed here.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
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
from testlines import Lines, statements_around
from warm import Warm

RESULT = ROOT / "benchmarks" / "results" / "mutants.json"
EQUIVALENT = ROOT / "tests" / "data" / "equivalent_mutants.toml"
BATTERY = ("test_laws.py", "test_plan.py", "test_sampling.py", "test_schedules.py", "test_exact.py", "test_methods.py")
PROGRAMS = ("test_docs.py", "test_newcomer.py", "test_notebooks.py", "test_package.py")  # minutes each
KEPT = ROOT / ".mutants"  # the record of the tests, and what Python compiles
NEAREST = 10
QUICK, MORE = 12.0, 120.0  # seconds that the first tests of a mutant may take, and the others that execute its line
ALONE = 90  # seconds of processor time for one test by itself


# -- tests -------------------------------------------------------------------------------------------------------------
def tests_for(file: str, line: int = 0, root: Path = ROOT) -> list[str]:
    """The files of tests for a line of a module, or for all of it, the nearest first.

    These are the file that mirrors it, those that name the function of the line if they are one or two, files of the
    same folder that name what the module offers, five from elsewhere that do, where a name that few tests know counts
    more, and the rest of the folder, ten in all; then the battery.
    """
    path = Path(file).relative_to("kinvert")
    stem = path.parent.name if path.stem == "__init__" else path.stem
    texts = _texts(root)
    folder = root / "tests" / path.parent
    source = (root / file).read_text()
    offers = {stem, *_offers(source)}
    around = {getattr(node, "name", "") for node in statements_around(ast.parse(source), line)}
    naming = [[test for test, words in texts.items() if name in words] for name in around]
    few = {test for tests in naming if len(tests) <= 2 for test in tests}
    holders = {name: [test for test, words in texts.items() if name in words] for name in offers}
    score = {test: sum(len(holders[name]) ** -0.5 for name in offers & words) for test, words in texts.items()}
    far = sorted((test for test in texts if score[test] and test.parent != folder), key=lambda test: -score[test])

    def place(test: Path) -> tuple[int, float]:
        if test.stem in (f"test_{stem}", f"test_{path.parent.name}_{stem}") and (test.parent == folder or score[test]):
            return (0, 0.0)
        if test in few:
            return (0, 1.0)
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


class Place:
    """Where mutants run, one after the other: a copy of the checkout, and a process to fork.

    The copy is always in the same folder, so what Python has compiled is used again.
    """

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.copy, self.compiled = base, folder / "copy", folder / "compiled"
        self._warm, self._time = Warm(), 10**9

    def fresh(self, mutant: Mutant | None = None) -> None:
        """Copy the checkout again, with one fault or none."""
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.base, self.copy)
        if mutant is not None:
            file = self.copy / mutant.file
            source = file.read_bytes()
            file.write_bytes(source[: mutant.start] + mutant.new.encode() + source[mutant.end :])
            self._time += 1  # compiled code is known by time and size
            os.utime(file, (self._time, self._time))

    def close(self) -> None:
        """End the process."""
        self._warm.close()

    def run(self, tests: list[str], limit: float, *options: str, **more: str) -> Outcome:
        """Run tests until one fails, for at most `limit` seconds of processor time."""
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.copy), "COLUMNS": "1000"}
        environment |= {"TMPDIR": str(self.copy), "PYTHONPYCACHEPREFIX": str(self.compiled)} | more
        options = (*(options or ("-x",)), "-v", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-seed=0")
        status = self._warm.run(self.copy, [*options, *tests], limit, environment)
        lines = (self.copy / "output.txt").read_text(errors="replace").splitlines()
        gone = {line.partition(f"{self.copy}/")[2] for line in lines if line.startswith("ERROR: not found: ")}
        if gone and (left := [test for test in tests if test not in gone]) != tests:  # pytest ran none
            return self.run(left, limit, *options, **more) if left else Outcome("", 0, True)
        passed = sum(" PASSED" in line for line in lines)
        if status in (0, 5):
            return Outcome("", passed, True)
        failed = [
            line.split(" ", 1)[1].split(" - ")[0].strip() for line in lines if re.match(r"(FAILED|ERROR) \S", line)
        ]
        # A line of a test begins when the test does, and its verdict comes at its end. A name may have spaces.
        verdict = r"\s(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*"
        started = [re.sub(verdict, "", line).strip() for line in lines if re.match(r"tests/\S+::", line)]
        return Outcome((failed or started or tests)[-1], passed, bool(failed) or status > 0)


def row_of(mutant: Mutant, result: str, reason: str = "") -> dict[str, object]:
    """The row of a mutant in the results."""
    of = {"file": mutant.file, "line": mutant.line, "text": mutant.text, "change": mutant.change, "nth": mutant.nth}
    return {**of, "result": result, "test": "", "seconds": 0, **({"reason": reason} if reason else {})}


class Judge:
    """Runs mutants, each in a fresh copy of the checkout as it is now, and knows which tests pass without a fault."""

    def __init__(self, limit: float, folder: Path) -> None:
        self.limit, self.folder, self.base = limit, folder, folder / "base"
        self._sound: dict[str, bool] = {}
        self._lock = threading.Lock()
        self._own = threading.local()
        self._clean = Place(self.base, folder / "clean")
        self._places = [self._clean]
        listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
        for name in listed.splitlines():
            if (ROOT / name).is_file():
                (self.base / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.base / name)
        self.lines = Lines(self.base, KEPT)

    @property
    def place(self) -> Place:
        """The place of this thread."""
        if not hasattr(self._own, "place"):
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            self._own.place = Place(self.base, folder)
            self._places.append(self._own.place)
        return self._own.place

    def close(self) -> None:
        """End the processes of all threads."""
        for place in self._places:
            place.close()

    def record(self, chosen: list[Mutant]) -> None:
        """Record which lines the tests execute, for the files of tests that have no record.

        Those that are nearest to many of the mutants come first. What is interrupted goes on the next time.
        """
        near = Counter(test for mutant in chosen for test in tests_for(mutant.file, root=self.base)[:2])
        texts = [str(test.relative_to(self.base)) for test in _texts(self.base)]
        if missing := sorted(set(texts) - set(self.lines.files), key=lambda test: (-near[test], test)):
            print(f"recording which lines the tests of {len(missing)} files execute", flush=True)
            KEPT.mkdir(exist_ok=True)
            self.place.fresh()
            options = ("-p", "tests.testlines")
            self.place.run(missing, 4 * 3600, *options, KINVERT_TEST_LINES=str(KEPT))
            self.lines = Lines(self.base, KEPT)

    def rounds(self, mutant: Mutant) -> list[tuple[list[str], float]]:
        """Which tests to run for a mutant, one list after the other, and the limit of each.

        A list that is complete has the limit that a mutant has; one that is cut short has less.
        """
        near = tests_for(mutant.file, mutant.line, self.base)
        seconds, found = self.lines.seconds, self.lines.tests_of(mutant.file, mutant.line)
        nth: Counter[str] = Counter()
        turn = {}
        for test in sorted(found, key=seconds.__getitem__):  # of each function the quickest case, then the next
            function = test.partition("[")[0]
            turn[test] = (nth[function], seconds[test])
            nth[function] += 1
        places = {file: i for i, file in enumerate(near)}

        def some(tests: list[str], budget: float, each: float) -> list[str]:
            """Take tests by turn until the time is spent, of each file for `each` seconds; the nearest file first."""
            chosen, spent = [], Counter[str]()
            for test in sorted(tests, key=turn.__getitem__):
                file = test.partition("::")[0]
                if spent[file] + seconds[test] <= each and spent.total() + seconds[test] <= budget:
                    chosen.append(test)
                    spent[file] += seconds[test]
            return sorted(chosen, key=lambda test: (places.get(test.partition("::")[0], 99), test.partition("::")[0]))

        quick = some(found, QUICK, QUICK / 4)
        rest = some(sorted(set(found) - set(quick)), MORE, MORE)
        complete = len(quick) + len(rest) == len(found) > 0
        return [(quick, self.limit), (rest, self.limit), (near, self.limit / 4 if complete else self.limit)]

    def judge(self, mutant: Mutant, quick: bool = False) -> dict[str, object]:
        """Return the row of a mutant: what it is, the result, the test that killed it, and how many passed.

        Args:
            mutant: the fault.
            quick: whether to run the first tests alone. What survives those is unfinished.
        """
        started, passed = time.monotonic(), 0
        rounds = self.rounds(mutant)
        complete = rounds[-1][1] < self.limit and not quick
        if rounds[0][0] or not quick:
            self.place.fresh(mutant)
        for tests, limit in rounds[:1] if quick else rounds:
            found = self._run(tests, limit) if tests else Outcome("", 0, True)
            passed += found.passed
            if found.test:
                break
        ended = bool(found.test) or (found.ended and not quick) or complete
        end = {"test": found.test, "passed": passed, "all": ended, "seconds": round(time.monotonic() - started)}
        result = "killed" if found.test else "survived" if ended else "unfinished"
        return row_of(mutant, result) | end

    def _run(self, tests: list[str], limit: float) -> Outcome:
        """Run tests until one fails that passes without the fault."""
        passed = 0
        while tests:
            found = self.place.run(tests, limit)
            passed += found.passed
            if not found.test:
                return Outcome("", passed, True)
            if not found.ended:  # too many tests, or one that does not end?
                alone = self.place.run([found.test], ALONE)
                forever = bool(alone.test) and self._passes(found.test)
                return Outcome(found.test * forever, passed, False)
            if self._passes(found.test):
                return Outcome(found.test, passed, True)
            tests = [test for test in tests if test.partition("::")[0] != found.test.partition("::")[0]]  # fails anyway
        return Outcome("", passed, True)

    def _passes(self, test: str) -> bool:
        """Tell whether a test passes in a copy without a fault."""
        if test in self.lines.seconds or test in self.lines.files:
            return True
        with self._lock:
            if test not in self._sound:
                self._clean.fresh()
                self._sound[test] = not self._clean.run([test], 4 * self.limit).test
            return self._sound[test]


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
    parser.add_argument("--quick", action="store_true", help="only the first tests; what they do not kill is left out")
    parser.add_argument("--unrecorded", action="store_true", help="go without the records that are missing")
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
    listed = equivalent()
    print(f"{len(chosen)} of {len(possible)} mutants, seed {given.seed}", flush=True)
    rows = {mutant.key: killed[mutant.key] for mutant in chosen if mutant.key in killed}

    def one(mutant: Mutant) -> None:
        reason = listed.get(mutant.key)
        row = killed.get(mutant.key) or (
            judge.judge(mutant, given.quick) if reason is None else row_of(mutant, "equivalent", reason)
        )
        if row["result"] == "unfinished" and given.quick:
            return  # for a run that is not quick
        rows[mutant.key] = row
        write(given.out, given.seed, dict(rows))
        print(f"{row['result']:<10} {row['seconds']:>4} s  {mutant.key}  {row['test']}", flush=True)

    with (
        tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder,
        contextlib.closing(Judge(given.limit, Path(folder))) as judge,
    ):
        if not given.unrecorded:
            judge.record(chosen)
        with ThreadPoolExecutor(given.workers) as pool:
            list(pool.map(one, chosen))
    counts = Counter(str(row["result"]) for row in rows.values())
    share = counts["killed"] / max(1, len(rows) - counts["equivalent"])
    print(", ".join(f"{n} {what}" for what, n in counts.items()), f"- {share:.1%} of those not equivalent are killed")
    sys.exit(counts["survived"] + counts["unfinished"] > 0)


if __name__ == "__main__":
    main()
