"""The filter of List: an AIP-160-style subset, from text to a SQL condition.

    state = RUNNING AND method = sft AND labels.team = "a" AND NOT name : "test" AND create_time > "2026-11-01"

`=` and `!=` compare, `:` looks for a part, times also take `<`, `<=`, `>`, `>=`. AND binds weaker than OR, as AIP-160
has it; parentheses group. What is not understood is refused with its position.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Column, ColumnElement, and_, exists, not_, or_, true

from hone.errors import InvalidRequest, Violation
from hone.job import State
from hone.spec.methods import METHODS
from hone.store.rows import to_us
from hone.store.tables import job_labels, jobs

MAX_FILTER_LENGTH = 2048
_TEXTS: dict[str, Column[Any]] = {
    "id": jobs.c.id,
    "name": jobs.c.name,
    "state": jobs.c.state,
    "method": jobs.c.method,
    "creator": jobs.c.creator,
}
_TIMES: dict[str, Column[Any]] = {
    "create_time": jobs.c.create_time,
    "update_time": jobs.c.update_time,
    "end_time": jobs.c.end_time,
}
_CHOICES = {"state": tuple(str(state) for state in State), "method": METHODS}
_KNOWN = f"{', '.join([*_TEXTS, *_TIMES])} and labels.<key>"
_TOKEN = re.compile(
    r"""\s*(?:(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<operator><=|>=|!=|[=:<>])|(?P<bracket>[()])"""
    r"""|(?P<word>[^\s()"'=:<>!]+))"""
)
_ORDER: dict[str, Callable[[Any, Any], ColumnElement[bool]]] = {
    "=": lambda column, value: column == value,
    "!=": lambda column, value: column != value,
    "<": lambda column, value: column < value,
    "<=": lambda column, value: column <= value,
    ">": lambda column, value: column > value,
    ">=": lambda column, value: column >= value,
}


def condition(text: str) -> ColumnElement[bool]:
    """The SQL condition of a filter; an empty one lets everything pass. Raises InvalidRequest."""
    if len(text) > MAX_FILTER_LENGTH:
        raise _refused(text[:40], 0, f"is {len(text)} characters long; at most {MAX_FILTER_LENGTH} are read.")
    if not text.strip():
        return true()
    return _Parser(text).parse()


@dataclass(frozen=True)
class _Token:
    kind: str
    value: str
    position: int


class _Parser:
    """Recursive descent: conjunction → disjunction → term → comparison."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = _tokens(text)
        self._next = 0

    def parse(self) -> ColumnElement[bool]:
        answer = self._conjunction()
        if (token := self._peek()).kind != "end":
            raise self._unexpected(token, "AND, OR or the end")
        return answer

    def _conjunction(self) -> ColumnElement[bool]:
        parts = [self._disjunction()]
        while self._take_word("AND"):
            parts.append(self._disjunction())
        return and_(*parts)

    def _disjunction(self) -> ColumnElement[bool]:
        parts = [self._term()]
        while self._take_word("OR"):
            parts.append(self._term())
        return or_(*parts)

    def _term(self) -> ColumnElement[bool]:
        if self._take_word("NOT"):
            return not_(self._term())
        if self._peek().value == "(" and self._peek().kind == "bracket":
            self._take()
            inner = self._conjunction()
            if (closing := self._take()).value != ")":
                raise self._unexpected(closing, "a closing parenthesis")
            return inner
        return self._comparison()

    def _comparison(self) -> ColumnElement[bool]:
        field = self._take()
        if field.kind != "word":
            raise self._unexpected(field, "the name of a field")
        operator = self._take()
        if operator.kind != "operator":
            raise self._unexpected(operator, f"one of = != : < <= > >= after {field.value}")
        value = self._take()
        if value.kind not in ("word", "text"):
            raise self._unexpected(value, f"a value after {field.value} {operator.value}")
        return self._compare(field, operator, value)

    def _compare(self, field: _Token, operator: _Token, value: _Token) -> ColumnElement[bool]:
        if field.value in _TIMES:
            return self._compare_time(field, operator, value)
        if operator.value not in ("=", "!=", ":"):
            raise self._wrong(operator, f"{field.value} is compared by =, != or :, not by {operator.value}.")
        if field.value.startswith("labels."):
            return _compare_label(field.value.removeprefix("labels."), operator.value, value.value)
        if field.value not in _TEXTS:
            raise self._wrong(field, f"{field.value!r} is not a field of a job; known are {_KNOWN}.")
        choices = _CHOICES.get(field.value)
        if choices and operator.value != ":" and value.value not in choices:
            raise self._wrong(value, f"{value.value!r} is not a {field.value}; use one of {', '.join(choices)}.")
        return _compare_text(_TEXTS[field.value], operator.value, value.value)

    def _compare_time(self, field: _Token, operator: _Token, value: _Token) -> ColumnElement[bool]:
        if operator.value == ":":
            raise self._wrong(operator, f"{field.value} is a time: compare it by =, !=, <, <=, > or >=.")
        try:
            time = datetime.fromisoformat(value.value)
        except ValueError as error:
            raise self._wrong(value, f'{value.value!r} is not a time; write "2026-11-24T12:00:00Z".') from error
        return _ORDER[operator.value](_TIMES[field.value], to_us(time if time.tzinfo else time.replace(tzinfo=UTC)))

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._tokens[self._next]
        self._next = min(self._next + 1, len(self._tokens) - 1)
        return token

    def _take_word(self, word: str) -> bool:
        token = self._peek()
        if token.kind == "word" and token.value == word:
            self._take()
            return True
        return False

    def _unexpected(self, token: _Token, wanted: str) -> InvalidRequest:
        found = "the filter ends" if token.kind == "end" else f"{token.value!r} stands"
        return self._wrong(token, f"{found} where {wanted} is expected.")

    def _wrong(self, token: _Token, message: str) -> InvalidRequest:
        return _refused(self._text, token.position, message)


def _tokens(text: str) -> list[_Token]:
    tokens, position = [], 0
    while text[position:].strip():
        match = _TOKEN.match(text, position)
        if not match or not match.lastgroup:
            start = position + len(text[position:]) - len(text[position:].lstrip())
            raise _refused(text, start, f"{text[start]!r} is not understood; is a quotation mark missing?")
        kind, value = match.lastgroup, match[match.lastgroup]
        if kind == "text":
            value = re.sub(r"\\(.)", r"\1", value[1:-1])
        tokens.append(_Token(kind, value, match.start(match.lastgroup)))
        position = match.end()
    return [*tokens, _Token("end", "", len(text))]


def _compare_text(column: Column[Any], operator: str, value: str) -> ColumnElement[bool]:
    if operator == ":":
        return column.contains(value, autoescape=True)
    return column == value if operator == "=" else column != value


def _compare_label(key: str, operator: str, value: str) -> ColumnElement[bool]:
    mine = (job_labels.c.job_uid == jobs.c.uid) & (job_labels.c.key == key)
    if operator == "!=":
        return not_(exists().where(mine, job_labels.c.value == value))
    if operator == ":" and value == "*":
        return exists().where(mine)
    return exists().where(mine, _compare_text(job_labels.c.value, operator, value))


def _refused(text: str, position: int, message: str) -> InvalidRequest:
    sentence = f"at position {position + 1}: {message}"
    return InvalidRequest([Violation(path="filter", value=text, message=sentence)])
