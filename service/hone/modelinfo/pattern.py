"""Regular expressions of callers, which run inside the service: none may backtrack for hours (CWE-1333).

Before an expression is used, the ways in which it can split one module path are bounded from its syntax tree. That tree
is the standard library's own and private (`re._parser`); whatever it holds that is not known here is refused.
"""

import re
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from hone.errors import UserError

MAX_WAYS = 1_500_000
"""Four `.*` over the paths of Llama pass; the worst that passes takes seconds, not hours."""
MAX_CHARACTERS = 1000


class BadPattern(UserError):
    """A regular expression for target modules that is none, or that could run for hours."""

    reason = "BAD_TARGET_PATTERN"


def compile_pattern(text: str, *, longest_path: int) -> re.Pattern[str]:
    """The expression, ready for fullmatch over paths of at most `longest_path` characters. Raises BadPattern."""
    if len(text) > MAX_CHARACTERS:
        raise _endless(text)
    try:
        pattern = re.compile(text)
        ways = _ways(parser.parse(text), longest_path)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadPattern(
            f"target module 're:{text[:80]}' is no regular expression: {error}.",
            fix=r"Example: re:.*\.layers\.(0|1)\..*(q|v)_proj",
        ) from error
    if ways > MAX_WAYS:
        raise _endless(text)
    return pattern


def _endless(text: str) -> BadPattern:
    return BadPattern(
        f"target module 're:{text[:80]}' could take hours to match.",
        fix=f"Use fewer of * + ? {{}}, none of them on a group that has choices inside, and at most {MAX_CHARACTERS} "
        "characters; or list the names.",
    )


def _ways(items: Any, length: int) -> int:
    """In how many ways a sequence can match the beginning of one text of this length, at most."""
    ways = 1
    for code, argument in items:
        ways = min(ways * _ways_of_one(code, argument, length), MAX_WAYS + 1)
    return ways


def _ways_of_one(code: Any, argument: Any, length: int) -> int:
    if code in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN, op.AT, op.GROUPREF):
        return 1
    if code == op.SUBPATTERN:
        return _ways(argument[3], length)
    if code == op.ATOMIC_GROUP:
        return _ways(argument, length)
    if code in (op.ASSERT, op.ASSERT_NOT):
        return _ways(argument[1], length)
    if code == op.BRANCH:
        return _ways_of_branches(argument[1], length)
    if code in (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT):
        least, most, repeated = argument
        inner, most = _ways(repeated, length), min(int(most), length)
        # With one way inside, only the number of rounds is free; with more, every round multiplies.
        return max(1, most - int(least) + 1) if inner == 1 else min(inner ** min(most, 64), MAX_WAYS + 1) * (most + 1)
    return MAX_WAYS + 1


def _ways_of_branches(branches: Any, length: int) -> int:
    """Branches that begin with different characters exclude each other; the others add up."""
    by_first: dict[str, int] = {}
    for branch in branches:
        code, argument = branch[0] if len(branch) else (None, None)
        first = chr(int(argument)).lower() if argument is not None and code == op.LITERAL else ""
        by_first[first] = by_first.get(first, 0) + _ways(branch, length)
    unknown = by_first.pop("", 0)
    return unknown + max(by_first.values(), default=0)
