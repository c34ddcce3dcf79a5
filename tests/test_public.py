"""The public surface: its names, that each module says what it offers, and that old names still answer."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import kinvert as ki

ROOT = Path(__file__).parent.parent

# Every public name. A name that goes from here needs a face at its old place, and a line in CHANGELOG.md.
PUBLIC = {}


def modules() -> Iterator[str]:
    yield "kinvert"
    for module in pkgutil.walk_packages(ki.__path__, "kinvert."):
        if not module.name.endswith(".__main__"):
            yield module.name


MODULES = list(modules())


def source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text()


FACES = {name: new for name in MODULES for new in re.findall(r"moved\(__name__, \"([\w.]+)\"\)", source(name))}
"""Old path of a module -> the new one."""


def renamed_names(module: str) -> dict[str, str]:
    """Old name -> full new name, of the names of a module that were renamed or moved."""
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "moved_names":
            return ast.literal_eval(node.args[1])
    return {}


RENAMED = [(module, *pair) for module in MODULES if module not in FACES for pair in renamed_names(module).items()]


def kind(name: str) -> tuple[int, list[str | int]]:
    """The place of a name in `__all__`: constants, classes, the rest, and numbers by their size."""
    rank = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return rank, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names_are_these(package: str) -> None:
    assert sorted(importlib.import_module(package).__all__) == sorted(PUBLIC[package].split())


@pytest.mark.parametrize("name", [name for name in MODULES if name not in FACES])
def test_every_module_says_what_it_offers(name: str) -> None:
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(set(module.__all__), key=kind)
    for offered in module.__all__:
        assert hasattr(module, offered), offered
        assert not offered.startswith("_") or offered == "__version__", offered


@pytest.mark.parametrize("name", [name for name in MODULES if name not in FACES])
def test_every_public_function_and_class_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for offered in module.__all__:
        value = getattr(module, offered)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), offered


@pytest.mark.parametrize("name", [name for name in MODULES if hasattr(importlib.import_module(name), "__path__")])
def test_no_module_has_the_name_of_a_function_of_its_package(name: str) -> None:
    package = importlib.import_module(name)
    for module in pkgutil.iter_modules(package.__path__):
        value = getattr(package, module.name, None)
        assert value is None or isinstance(value, types.ModuleType), f"{name}.{module.name}"


@pytest.mark.parametrize("old", FACES)
def test_old_modules_answer_with_a_warning(old: str) -> None:
    new = importlib.import_module(FACES[old])
    for name in new.__all__:
        with pytest.warns(DeprecationWarning, match=rf"{old} is now {FACES[old]}"):
            assert getattr(importlib.import_module(old), name) is getattr(new, name)


@pytest.mark.parametrize(("module", "old", "new"), RENAMED, ids=[f"{module}.{old}" for module, old, _ in RENAMED])
def test_old_names_of_a_module_answer_with_a_warning(module: str, old: str, new: str) -> None:
    where, _, name = new.rpartition(".")
    with pytest.warns(DeprecationWarning, match=rf"{module}.{old} is now {new}"):
        assert getattr(importlib.import_module(module), old) is getattr(importlib.import_module(where), name)


def test_an_import_of_the_package_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(importlib.import_module("kinvert"))


VERBS = {
    name: getattr(ki, name)
    for name in ("sample", "unsample", "invert", "extract_noise", "round_trip", "run", "stepwise")
}


def table_of_arguments() -> dict[str, dict[str, str]]:
    """The table of docs/arguments.md: for each verb the default of every argument that it has."""
    lines = [line for line in (ROOT / "docs" / "arguments.md").read_text().splitlines() if line.startswith("| ")]
    head, *rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[: len(lines)]]
    rows = [row for row in rows if not set(row[0]) <= {"-"} and len(row) == len(head)]
    return {verb: {row[0]: row[i] for row in rows if row[i]} for i, verb in enumerate(head) if i}


def test_the_table_of_arguments_is_what_the_verbs_take() -> None:
    """In the order of the signatures, so that what the verbs share is in the same order in each."""
    table = table_of_arguments()
    assert list(table) == list(VERBS)
    for name, verb in VERBS.items():
        parameters = inspect.signature(verb).parameters
        expected = {
            key: "required" if value.default is value.empty else repr(value.default)
            for key, value in parameters.items()
        }
        assert list(table[name].items()) == list(expected.items()), name


@pytest.mark.parametrize("name", list(VERBS)[:5])
def test_what_is_not_data_is_given_by_keyword(name: str) -> None:
    parameters = inspect.signature(VERBS[name]).parameters.values()
    positional = [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    assert positional == ["denoiser", "x", "sigmas"]
