"""Arithmetic of adapters, as in "A + 0.5*B - C": language and task arithmetic, negation, analogies."""

from __future__ import annotations

import ast
from collections.abc import Mapping

from exapt.algebra.adapters import Shifts, combined
from exapt.core.errors import InputError


def linear_form(expression: str) -> dict[str, float]:
    """Reads a sum of multiples of names.

    Returns:
        The factor of each name, in the order of their first appearance.

    Raises:
        InputError: for anything else than sums, differences, multiples by numbers, and parentheses.

    >>> linear_form("A + 0.5*(B - C) - A/4")
    {'A': 0.75, 'B': 0.5, 'C': -0.5}
    """
    try:
        found = _read(ast.parse(expression.strip(), mode="eval").body, expression)
    except SyntaxError as e:
        raise InputError(f'"{expression}" is no expression such as "A + 0.5*B - C" ({e.msg})') from e
    if "" in found:
        raise InputError(f'"{expression}" adds the number {found[""]:g} to adapters; multiply by numbers only')
    return found


def _read(node: ast.expr, whole: str) -> dict[str, float]:
    """The linear form of a node; a number is the factor of the name ""."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return {"": float(node.value)}
    if isinstance(node, ast.Name):
        return {node.id: 1.0}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return _scaled(_read(node.operand, whole), -1.0 if isinstance(node.op, ast.USub) else 1.0)
    if isinstance(node, ast.BinOp):
        a, b = _read(node.left, whole), _read(node.right, whole)
        if isinstance(node.op, (ast.Add, ast.Sub)):
            b = b if isinstance(node.op, ast.Add) else _scaled(b, -1.0)
            return {k: a.get(k, 0.0) + b.get(k, 0.0) for k in dict.fromkeys((*a, *b))}
        if isinstance(node.op, ast.Mult) and (set(a) == {""} or set(b) == {""}):
            return _scaled(b, a[""]) if set(a) == {""} else _scaled(a, b[""])
        if isinstance(node.op, ast.Div) and set(b) == {""} and b[""]:
            return _scaled(a, 1 / b[""])
    raise InputError(f'"{whole}": {ast.unparse(node)} is not a sum of multiples of adapters, such as A + 0.5*B - C')


def _scaled(form: dict[str, float], factor: float) -> dict[str, float]:
    return {k: factor * v for k, v in form.items()}


def arithmetic(expression: str, adapters: Mapping[str, Shifts], *, missing: str = "zero", force: bool = False) -> Shifts:
    r"""The adapter whose shift is a sum of multiples of others', :math:`\sum_i c_i \Delta W_i`; low-rank ones stay so, without an error.

    Args:
        expression: See :func:`linear_form`.
        adapters: Shifts by the names in it.
        missing, force: See :func:`exapt.algebra.adapters.combined`.

    Raises:
        InputError: for a name that is no adapter's, or an expression that is none.

    References:
        Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023.
    """
    form = linear_form(expression)
    unknown = [k for k in form if k not in adapters]
    if unknown:
        raise InputError(f'"{expression}" names {unknown[0]}, which is no adapter given ({", ".join(adapters)})')
    return combined("task_arithmetic", [adapters[k] for k in form], list(form.values()), missing=missing, force=force)
