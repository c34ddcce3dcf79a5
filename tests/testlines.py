"""Which tests execute which lines of the package, and how long each takes: recorded once, and kept for `mutants.py`.

As a plugin of pytest (`-p testlines`) this file records: each test is a context of coverage.py. What a fixture of a
module executes counts for all tests that use it. What subprocesses execute is not seen. Each file of tests has one file
of records in the folder KINVERT_TEST_LINES. A file of tests that has changed since is recorded again.

Lines are named by their text, not by their number, so an edit elsewhere in a file changes nothing.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["Lines", "Recorder", "statements_around"]

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# -- recording ---------------------------------------------------------------------------------------------------------
class Recorder:
    """The plugin: a context for each test and for each fixture that several tests share."""

    def __init__(self, root: Path, folder: Path) -> None:
        import coverage

        self.root, self.folder, self.context = root, folder, ""
        self.coverage = coverage.Coverage(data_file=None, config_file=False, include=[f"{root}/kinvert/*"])
        self.users: dict[str, set[str]] = defaultdict(set)
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()
        self.coverage.start()

    def switch(self, context: str) -> str:
        """Go on in another context, and return that before."""
        before, self.context = self.context, context
        self.coverage.switch_context(context)
        return before

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
        """Record a test, and write the records of its file after the last one."""
        self.users[item.nodeid].add(item.nodeid)
        for name in getattr(item, "fixturenames", ()):
            self.users[f"{item.nodeid.partition('::')[0]}::@{name}"].add(item.nodeid)
        started = sum(os.times()[:4])
        self.switch(item.nodeid)
        result = yield
        self.switch("")
        self.seconds[item.nodeid] = round(sum(os.times()[:4]) - started, 3)
        if nextitem is None or nextitem.path != item.path:
            self.write(item.nodeid.partition("::")[0])
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> Iterator[None]:
        """Record a fixture of a module for all its tests."""
        if fixturedef.scope == "function":
            return (yield)
        before = self.switch(f"{request.node.nodeid.partition('::')[0]}::@{fixturedef.argname}")
        try:
            return (yield)
        finally:
            self.switch(before)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note which tests did not pass: they cannot kill."""
        if not report.passed:
            self.failed.add(report.nodeid)

    def write(self, test_file: str) -> None:
        """Write what the tests of one file execute: for each line a number whose bit i is test i."""
        tests = [test for test in self.seconds if test.startswith(f"{test_file}::") and test not in self.failed]
        bits = {test: 1 << i for i, test in enumerate(tests)}
        lines: dict[str, dict[str, int]] = {}
        data = self.coverage.get_data()
        data.set_query_contexts([f"^{re.escape(test_file)}::"])
        for name in data.measured_files():
            source = Path(name).read_text().splitlines()
            found: dict[str, int] = defaultdict(int)
            for line, contexts in data.contexts_by_lineno(name).items():
                users = {user for context in contexts for user in self.users[context]}
                found[source[line - 1].strip()] |= sum(bits.get(user, 0) for user in users)
            lines[str(Path(name).relative_to(self.root))] = {text: mask for text, mask in found.items() if mask}
        record = {
            "digest": digest(self.root / test_file),
            "tests": [[test, self.seconds[test]] for test in tests],
            "lines": {
                file: {text: f"{mask:x}" for text, mask in found.items()} for file, found in lines.items() if found
            },
        }
        place = self.folder / (test_file.replace("/", "+") + ".json")
        place.with_suffix(".part").write_text(json.dumps(record))
        place.with_suffix(".part").replace(place)


def pytest_configure(config: pytest.Config) -> None:
    """Record, if this file is a plugin of this run."""
    if folder := os.environ.get("KINVERT_TEST_LINES"):
        config.pluginmanager.register(Recorder(config.rootpath, Path(folder)))


def digest(file: Path) -> str:
    """What tells whether a file of tests is the one that was recorded."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


# -- reading -----------------------------------------------------------------------------------------------------------
class Lines:
    """What was recorded: the tests that execute a place of the package."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root = root
        self.seconds: dict[str, float] = {}
        self.files: list[str] = []
        self._records: list[tuple[list[str], dict[str, dict[str, str]]]] = []
        for place in sorted(folder.glob("*.json")):
            name, record = place.stem.replace("+", "/"), json.loads(place.read_text())
            if (root / name).is_file() and record["digest"] == digest(root / name):
                self.files.append(name)
                self.seconds.update(dict(record["tests"]))
                self._records.append(([test for test, _ in record["tests"]], record["lines"]))

    def tests_of(self, file: str, line: int) -> list[str]:
        """The tests that execute the statement at a line.

        A statement that runs at the import has no tests of its own. Those that execute what uses it are taken: the
        body of a function for its defaults, and the lines that have the names that it defines.
        """
        source = (self.root / file).read_text()
        around = statements_around(ast.parse(source), line)
        if not around:
            return []
        inner, texts = around[0], source.splitlines()
        end = inner.end_lineno or inner.lineno
        if isinstance(inner, FUNCTIONS):
            start = inner.body[0].lineno
        else:
            start, body = inner.lineno, getattr(inner, "body", None)
            end = max(start, body[0].lineno - 1) if body else end
        found = self._executing(file, {text.strip() for text in texts[start - 1 : end]})
        if found or any(isinstance(node, FUNCTIONS) for node in around):
            return found
        names = _defined(around)
        users: dict[str, set[str]] = defaultdict(set)
        for path in sorted((self.root / "kinvert").rglob("*.py")):
            for text in path.read_text().splitlines():
                if names & set(re.findall(r"\w+", text)):
                    users[str(path.relative_to(self.root))].add(text.strip())
        return list(dict.fromkeys(test for name, of in users.items() for test in self._executing(name, of)))

    def _executing(self, file: str, texts: set[str]) -> list[str]:
        found = []
        for tests, lines in self._records:
            mask = functools.reduce(lambda a, b: a | b, (int(lines.get(file, {}).get(text, "0"), 16) for text in texts))
            found += [test for i, test in enumerate(tests) if mask >> i & 1]
        return found


def statements_around(tree: ast.Module, line: int) -> list[ast.stmt]:
    """The statements that a line belongs to, the innermost first."""
    around = [
        node for node in ast.walk(tree) if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    return sorted(around, key=lambda node: (node.end_lineno or 0) - node.lineno)


def _defined(around: list[ast.stmt]) -> set[str]:
    """The names that a statement of a module, or of a class in it, gives to what it makes."""
    targets = getattr(around[0], "targets", [getattr(around[0], "target", None)])
    names = {node.id for target in targets if target for node in ast.walk(target) if isinstance(node, ast.Name)}
    return names or {node.name for node in around if isinstance(node, ast.ClassDef)}
