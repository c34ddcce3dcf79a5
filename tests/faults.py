"""The faults that `mutants.py` puts into the package: what may be changed in a source, and to what.

Docstrings, annotations, decorators, base classes, imports, `__all__` and messages are left as they are.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
}


@dataclass(frozen=True)
class Mutant:
    """One fault: the text between two places of a file is replaced.

    Attributes:
        file: of the package, from the root of the checkout.
        line: number of the line, from 1.
        text: the line without indentation.
        change: what becomes what, shortened.
        nth: 0, or 1, 2, ... for the same change in the same text elsewhere in the file.
        start, end: places in the file, in bytes.
        new: what stands there in the mutant.
    """

    file: str
    line: int
    text: str
    change: str
    nth: int
    start: int
    end: int
    new: str

    @property
    def key(self) -> str:
        """What names the fault, wherever the line moves to."""
        return key_of(asdict(self))

    def rank(self, seed: int) -> str:
        """Return a number, as text, that puts faults into the random order of a seed."""
        return hashlib.sha256(f"{seed} {self.key}".encode()).hexdigest()


def key_of(row: Mapping[str, object]) -> str:
    """The key of a mutant that is given by a row of results, or of the list."""
    return f"{row['file']}: {row['text']} [{row['change']}]" + f" #{row.get('nth')}" * bool(row.get("nth"))


# -- faults ------------------------------------------------------------------------------------------------------------
def mutants_of(file: str, source: str) -> list[Mutant]:
    """All faults of one file, in the order of the text."""
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    found: list[Mutant] = []
    seen: Counter[tuple[str, str]] = Counter()
    for node, new in _faults(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        old = " ".join(source.encode()[start:end].decode().split())
        text, change = lines[node.lineno - 1].decode().strip(), f"{_short(old)} -> {_short(new)}"
        found.append(Mutant(file, node.lineno, text, change, seen[text, change], start, end, new))
        seen[text, change] += 1
    return sorted(found, key=lambda mutant: (mutant.start, mutant.end, mutant.new))


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:50]} ... {text[-25:]}"


def _faults(tree: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """Yield a node and the text to put in its place, for all that may be mutated below `tree`."""
    for child in _parts(tree):
        if isinstance(child, ast.stmt):
            yield from ((child, new) for new in _statement(child))
        elif isinstance(child, ast.expr):
            yield from ((child, f"({new})") for new in _expression(child))
        yield from _faults(child)


def _parts(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the children of a node that may be mutated."""
    skipped: tuple[str, ...] = ("annotation", "returns", "decorator_list", "bases", "keywords")
    if isinstance(node, ast.Call):
        skipped = ()
    elif isinstance(node, ast.Raise):
        skipped = ("exc", "cause")
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        skipped = ("test", "body")
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if name not in skipped and isinstance(child, ast.AST) and not _has_no_faults(child):
                yield child


def _has_no_faults(node: ast.AST) -> bool:
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)  # a docstring
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.JoinedStr, ast.alias, ast.Global, ast.Nonlocal))


def _statement(node: ast.stmt) -> Iterator[str]:
    """Yield what may stand in place of a statement."""
    match node:
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield "return None"
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break() | ast.Delete():
            yield "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "pass"
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call() as value):  # x = f(x)
            if any(isinstance(inner, ast.Name) and inner.id == name for inner in ast.walk(value)):
                yield "pass"


def _expression(node: ast.expr) -> Iterator[str]:
    """Yield what may stand in place of an expression."""
    match node:
        case ast.Compare(left=left, ops=[op, *more], comparators=right) if type(op) in COMPARISONS:
            yield ast.unparse(ast.Compare(left, [COMPARISONS[type(op)](), *more], right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            if not any(
                isinstance(inner, (ast.JoinedStr, ast.List, ast.Tuple)) or _is_text(inner) for inner in (left, right)
            ):
                yield ast.unparse(ast.BinOp(left, OPERATORS[type(op)](), right))
        case ast.BoolOp(op=op, values=values):
            yield ast.unparse(ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values))
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield ast.unparse(operand)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield ast.unparse(ast.IfExp(test, orelse, body))
        case ast.Constant(value=bool() as value):
            yield str(not value)
        case ast.Constant(value=int() as value):
            yield str(value + 1)
        case ast.Constant(value=float() as value):
            yield repr(2 * value or 1.0)
        case ast.Call(func=func, args=[first, second, *more], keywords=keywords):
            starred = isinstance(first, ast.Starred) or isinstance(second, ast.Starred)
            if not starred and ast.dump(first) != ast.dump(second):
                yield ast.unparse(ast.Call(func, [second, first, *more], keywords))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@functools.lru_cache
def all_mutants(root: Path = ROOT) -> list[Mutant]:
    """All faults of the package."""
    files = sorted((root / "kinvert").rglob("*.py"))
    return [mutant for path in files for mutant in mutants_of(str(path.relative_to(root)), path.read_text())]
