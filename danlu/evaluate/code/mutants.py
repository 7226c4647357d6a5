"""Mutants: a program with one small fault each, made on its syntax tree. They test tests.

DeMillo et al. 1978, "Hints on Test Data Selection"; the operators are the usual ones (Jia and Harman 2011).
"""

import ast
import copy
from collections.abc import Callable, Iterator
from typing import Any

_COMPARE: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Add,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
}


def mutants(source: str, function: str) -> Iterator[tuple[str, str]]:
    """(what was changed, the program) of each mutant of this function and of what it calls; texts stay."""
    tree = ast.parse(source)
    written = {ast.unparse(tree)}
    nodes = [node for node in ast.walk(tree) if not _is_docstring(tree, node)]
    for number, node in enumerate(nodes):
        for change, apply in _changes(node):
            other = copy.deepcopy(tree)
            twin = [one for one in ast.walk(other) if not _is_docstring(other, one)][number]
            apply(twin)
            text = ast.unparse(ast.fix_missing_locations(other))
            if text not in written:
                written.add(text)
                yield f"line {getattr(node, 'lineno', 0)}: {change}", text


def _is_docstring(tree: ast.AST, node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


Change = tuple[str, Callable[[Any], None]]


def _changes(node: ast.AST) -> Iterator[Change]:
    match node:
        case ast.Compare(ops=[op]):
            for other in _COMPARE.get(type(op), ()):
                yield _named(op, other), _setter("ops", [other()])
        case ast.BinOp(op=op) | ast.AugAssign(op=op):
            for kind in _ARITHMETIC.get(type(op), ()):
                yield _named(op, kind), _setter("op", kind())
        case ast.BoolOp(op=op):
            swapped = ast.Or if isinstance(op, ast.And) else ast.And
            yield _named(op, swapped), _setter("op", swapped())
        case ast.UnaryOp(op=ast.Not()):
            yield "not → nothing", lambda twin: _become(twin, twin.operand)
        case ast.Constant(value=bool() as value):
            yield f"{value} → {not value}", _setter("value", not value)
        case ast.Constant(value=int() | float() as value):
            for changed in (value + 1, value - 1):
                yield f"{value} → {changed}", _setter("value", changed)
        case ast.Constant(value=str() as value) if value:
            yield f"{value!r} → ''", _setter("value", "")
        case ast.If() | ast.While() | ast.IfExp():
            yield "condition turned", lambda twin: setattr(twin, "test", ast.UnaryOp(ast.Not(), twin.test))
        case ast.Break():
            yield "break → continue", lambda twin: _become(twin, ast.Continue())
        case ast.Continue():
            yield "continue → break", lambda twin: _become(twin, ast.Break())
        case ast.Return(value=value) if value is not None and not _is_none(value):
            yield "return → None", _setter("value", ast.Constant(None))


def _named(before: ast.AST, after: type[ast.AST]) -> str:
    return f"{type(before).__name__} → {after.__name__}"


def _setter(name: str, value: Any) -> Callable[[Any], None]:
    return lambda twin: setattr(twin, name, value)


def _become(twin: ast.AST, other: ast.AST) -> None:
    """The node turns into another one, where it stands."""
    twin.__class__ = type(other)
    twin.__dict__ = {
        **other.__dict__,
        **{k: v for k, v in twin.__dict__.items() if k.endswith(("lineno", "offset"))},
    }


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
