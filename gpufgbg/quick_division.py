"""Division by constants in 32 bits, for a blend on a card.

Numba computes in 64 bits, where a card needs some thirty instructions to divide by a constant; many blends end in one
or two such divisions a byte. Most dividends fit 31 bits, and then a handful of instructions do. So ``a // 255`` of
the function's source becomes a call of `quotient`, which asks for that first, and gives the same result in any case.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import numba

__all__ = ["quotient", "with_quick_division"]

_NAME = "_gpufgbg_quotient"  # of `quotient` in the function's source
_int64, _uint32 = numba.int64, numba.uint32


def quotient(dividend, divisor):  # type: ignore[no-untyped-def]
    """``dividend // divisor`` for integers, the divisor positive and below 2**31; for Numba to compile."""
    if dividend >> 31 == 0:
        return _int64(_uint32(dividend) // _uint32(divisor))
    return dividend // divisor


def with_quick_division(function: Callable[..., Any], compiled: Any) -> Callable[..., Any] | None:
    """A function like ``function`` that divides by constants through ``compiled``, Numba's form of `quotient`.

    Returns None where it divides by none, or where its source is not at hand, not that of a plain ``def``, or no
    longer what was compiled.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        values = [cell.cell_contents for cell in function.__closure__ or ()]
    except (OSError, SyntaxError, TypeError, ValueError):  # no source, part of a statement, or an empty cell
        return None
    if len(tree.body) != 1 or not isinstance(node := tree.body[0], ast.FunctionDef):
        return None
    node.decorator_list = []
    divisions = _Divisions()
    changed = divisions.visit(copy.deepcopy(node))
    if not divisions.found or not _alike(_built(node, function, values, compiled), function):
        return None
    return _built(changed, function, values, compiled)


class _Divisions(ast.NodeTransformer):
    """Turns ``a // c`` and ``a //= c`` into calls, where c is an integer constant."""

    found = 0

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        return self._call(node, node.left, node.right) if self._is_division(node.op, node.right) else node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt:
        self.generic_visit(node)
        if not isinstance(node.target, ast.Name) or not self._is_division(node.op, node.value):
            return node
        left = ast.copy_location(ast.Name(node.target.id, ast.Load()), node)
        return ast.copy_location(ast.Assign([node.target], self._call(node, left, node.value)), node)

    @staticmethod
    def _is_division(operator: ast.operator, right: ast.expr) -> bool:
        value = right.value if isinstance(right, ast.Constant) else None
        return isinstance(operator, ast.FloorDiv) and type(value) is int and 0 < value < 1 << 31

    def _call(self, at: ast.AST, left: ast.expr, right: ast.expr) -> ast.expr:
        self.found += 1
        call = ast.Call(ast.Name(_NAME, ast.Load()), [left, right], [])
        return ast.fix_missing_locations(ast.copy_location(call, at))


def _built(node: ast.FunctionDef, function: Any, values: list[Any], compiled: Any) -> Any:
    """The function of a definition, among the names that ``function`` sees."""
    maker = ast.parse(f"def make({', '.join(function.__code__.co_freevars)}):\n    return {node.name}")
    body = maker.body[0]
    assert isinstance(body, ast.FunctionDef)
    body.body.insert(0, node)
    names = {**function.__globals__, _NAME: compiled}
    exec(compile(ast.fix_missing_locations(maker), inspect.getfile(function), "exec"), names)
    return names["make"](*values)


def _alike(a: Any, b: Any) -> bool:
    """Whether two functions do the same, by their code."""
    codes = a.__code__, b.__code__
    one, other = ((c.co_code, c.co_names, c.co_freevars, c.co_varnames, repr(c.co_consts)) for c in codes)
    return one == other
