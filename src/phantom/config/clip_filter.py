"""`data.filter`: which training clips a run uses, as a condition on the columns of the manifest.

The text is parsed and translated into functions, never evaluated as Python: comparisons of columns and numbers, joined
by `and`, `or`, `not` and parentheses.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Of every clip; `phantom prepare` computes them (data/curation.py).
COLUMNS = {
    "cuts": "hard cuts between shots",
    "motion": "mean absolute difference of consecutive frames, in levels of 255, cuts left out",
    "static": "nothing changes from the first frame on",
    "black_bars": "share of the picture that black bars take, 0 to 1",
    "duplicate": "nearly the same pictures as an earlier clip, or as a held-out one",
    "caption_length": "characters of the caption",
    "language": "language of the caption, ISO 639-1 such as 'en'; 'und' where it cannot be told",
    "frames": "frames of the clip",
}
FLAGS = ("static", "duplicate")  # true or false: conditions by themselves
TEXTS = ("language",)  # compared with a text in quotes, by == and !=
MAX_LENGTH = 1000  # characters of an expression

Row = Mapping[str, Any]
COMPARISONS: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


@dataclass(frozen=True)
class ClipFilter:
    """A parsed condition; `keeps(row)` is whether it holds for a clip with these columns."""

    text: str
    keeps: Callable[[Row], bool]
    node: ast.expr

    @property
    def columns(self) -> list[str]:
        """The columns it reads, in the order of `COLUMNS`."""
        found = {node.id for node in ast.walk(self.node) if isinstance(node, ast.Name)}
        return [name for name in COLUMNS if name in found]

    def terms(self) -> list[ClipFilter]:
        """The conditions that it joins by `and`; itself, if it does not."""
        nodes = [self.node]
        if isinstance(self.node, ast.BoolOp) and isinstance(self.node.op, ast.And):
            nodes = self.node.values
        return [ClipFilter(ast.unparse(node), _condition(node), node) for node in nodes]

    @classmethod
    def parse(cls, text: str) -> ClipFilter:
        """Raises ValueError, naming what is wrong and the columns there are."""
        try:
            if len(text) > MAX_LENGTH:
                raise ValueError(f"{len(text)} characters")
            tree = ast.parse(text.strip(), mode="eval")
            return cls(text, _condition(tree.body), tree.body)
        except (SyntaxError, RecursionError, MemoryError, OverflowError):
            problem = "not an expression"
        except ValueError as error:
            problem = str(error)
        raise ValueError(
            f"{problem}; accepted: comparisons such as 'motion > 0.3 and cuts == 0' of numbers and columns, or of "
            f"{' and '.join(TEXTS)} and a text in quotes; columns: {', '.join(COLUMNS)}, joined by and, or, not"
        )


def _condition(node: ast.expr) -> Callable[[Row], bool]:
    match node:
        case ast.BoolOp(op=op, values=values):
            parts, joined = [_condition(value) for value in values], all if isinstance(op, ast.And) else any
            return lambda row: joined(part(row) for part in parts)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _condition(operand)
            return lambda row: not inner(row)
        case ast.Compare(
            left=ast.Name(id=name), ops=[ast.Eq() | ast.NotEq() as op], comparators=[ast.Constant(value=str(text))]
        ) if name in TEXTS:
            is_equal = isinstance(op, ast.Eq)
            return lambda row: (row[name] == text) == is_equal
        case ast.Compare(left=left, ops=ops, comparators=right) if all(type(op) in COMPARISONS for op in ops):
            numbers, compare = [_number(side) for side in (left, *right)], [COMPARISONS[type(op)] for op in ops]
            return lambda row: all(
                holds(a(row), b(row)) for holds, a, b in zip(compare, numbers, numbers[1:], strict=False)
            )
        case ast.Name(id=name) if name in FLAGS:
            return lambda row: bool(row[name])
    raise ValueError(f"{ast.unparse(node)!r} is not a condition" + _unknown(node))


def _number(node: ast.expr) -> Callable[[Row], float]:
    match node:
        case ast.Constant(value=value) if isinstance(value, int | float):
            number = float(value)
            return lambda _: number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if isinstance(value, int | float):
            negative = -float(value)
            return lambda _: negative
        case ast.Name(id=name) if name in COLUMNS and name not in TEXTS:
            return lambda row: row[name]
    raise ValueError(f"{ast.unparse(node)!r} is not a number" + _unknown(node))


def _unknown(node: ast.expr) -> str:
    return " and no column" if isinstance(node, ast.Name) and node.id not in COLUMNS else ""
