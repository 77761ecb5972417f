"""What is wrong with a mapping that people wrote, as violations: path, value, fix, and what was probably meant.

For the request (parse.py) and for every other Part that comes from a file: `root` is the Part that was expected.
"""

import copy
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from hone.errors import Violation
from hone.spec.part import Part, PartType
from hone.spec.secret import secret_in, secret_message


def faults(error: ValidationError, root: type[Part], *, hints: Mapping[str, str] | None = None) -> list[Violation]:
    """Every fault that pydantic found. `hints`: a field that is not known → the sentence to say instead."""
    return [_violation(detail, root, hints or {}) for detail in error.errors(include_url=False)]


def rest_of(
    data: Mapping[str, Any], error: ValidationError, root: type[PartType], *, stand_ins: Mapping[str | int, Any]
) -> PartType | None:
    """What is left without the faulty fields, so that rules over several fields can be checked in the same round.

    `stand_ins`: a required field → what is put in its place. None where too little is left.
    """
    rest = copy.deepcopy(dict(data))
    for _ in range(3):  # a part that lost a required field is faulty itself in the next round
        for detail in error.errors(include_url=False):
            location = [part for part in detail["loc"] if part != "[key]"]
            if detail["type"] == "missing" and location[-1] not in stand_ins:
                location.pop()
            if location:
                _remove(rest, location, stand_ins)
        try:
            return root.model_validate(rest)
        except ValidationError as another:
            error = another
    return None


def _remove(data: Any, location: Sequence[int | str], stand_ins: Mapping[str | int, Any]) -> None:
    *parents, last = location
    for part in parents:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return
    if isinstance(data, dict):
        data.pop(last, None)
        if last in stand_ins:
            data[last] = stand_ins[last]


def _violation(detail: ErrorDetails, root: type[Part], hints: Mapping[str, str]) -> Violation:
    path = ".".join(str(part) for part in detail["loc"] if part != "[key]")
    value = None if detail["type"] == "missing" else detail.get("input")
    if kind := secret_in(repr(value)):
        return Violation(path=path, message=secret_message(kind))
    return Violation(path=path, value=value, message=_message(detail, root, hints))


def _message(detail: ErrorDetails, root: type[Part], hints: Mapping[str, str]) -> str:
    kind, value, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    field = str(detail["loc"][-1]) if detail["loc"] else "this"
    if kind == "extra_forbidden":
        return _unknown_field(detail["loc"], root, hints)
    if kind == "missing":
        return f"is required: {_field_text(detail['loc'], root)}"
    if kind == "literal_error":
        choices = str(context["expected"]).replace("'", "").replace(" or ", ", ")
        return f"{value!r} is not one of {choices}.{_did_you_mean(str(value), choices.split(', '))}"
    if kind == "string_pattern_mismatch":
        return _pattern_message(str(value), field)
    if kind == "value_error":
        return (
            f"{context['error']}."
            if not str(context["error"]).startswith("is true")
            else f"{value!r} {context['error']}."
        )
    for prefix, expected in _EXPECTED.items():
        if kind.startswith(prefix):
            return f"{value!r} is not {expected}."
    if kind in _BOUNDS:
        word, bound = _BOUNDS[kind]
        limit = next(iter(context.values()))
        return f"{value!r} is too {word}: {field} is {bound} {limit}.{_usual(detail['loc'], root)}"
    return f"{value!r}: {detail['msg']}."


_EXPECTED = {
    "int_": "a whole number",
    "float_": "a number",
    "finite_": "a finite number",
    "bool_": "true or false",
    "string_type": "a text",
    "tuple_": "a list",
    "model_": "a mapping of fields",
    "dict_": "a mapping",
}
_BOUNDS = {
    "greater_than_equal": ("small", "at least"),
    "greater_than": ("small", "more than"),
    "less_than_equal": ("large", "at most"),
    "less_than": ("large", "less than"),
    "too_short": ("short", "at least as long as"),
    "string_too_long": ("long", "at most as long as"),
}


def _pattern_message(value: str, field: str) -> str:
    if field in ("source", "tokenizer", "eval_source", "file"):
        return f"{value!r} is not a source: write hf://organisation/name, file:///path, s3://bucket/key or job://job."
    if field == "name":
        return f"{value!r} is not a name: lower-case letters, digits and hyphens, at most 44, no hyphen at the ends."
    if field == "repo":
        return f"{value!r} is not a repository: write organisation/name."
    if field == "url":
        return f"{value!r} is not an http:// or https:// address without user-info."
    return f"{value!r} is not a label: at most 63 letters, digits, '.', '_' and '-', ending in a letter or digit."


def _unknown_field(location: Sequence[int | str], root: type[Part], hints: Mapping[str, str]) -> str:
    name = str(location[-1])
    part = _part_at(location[:-1], root)
    if near := difflib.get_close_matches(name, part.model_fields, n=1):
        return f"unknown field. Did you mean {near[0]}?"
    if name in hints:
        return hints[name]
    if homes := [path for path in _all_paths(root) if path.rpartition(".")[2] == name]:
        return f"unknown field here. Did you mean {' or '.join(homes[:3])}?"
    return f"unknown field. Known here: {', '.join(part.model_fields)}."


def _part_at(location: Sequence[int | str], root: type[Part]) -> type[Part]:
    part = root
    for name in location:
        if isinstance(name, str) and name in part.model_fields:
            part = part_of(part.model_fields[name].annotation) or part
    return part


def part_of(annotation: Any) -> type[Part] | None:
    """The Part inside `X`, `X | None`, `tuple[X, …]` or `dict[str, X]`; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return annotation
    return next((part for argument in get_args(annotation) if (part := part_of(argument))), None)


def _all_paths(part: type[Part], prefix: str = "") -> list[str]:
    paths = []
    for name, field in part.model_fields.items():
        paths.append(prefix + name)
        if inner := part_of(field.annotation):
            paths += _all_paths(inner, f"{prefix}{name}.")
    return paths


def _field_text(location: Sequence[int | str], root: type[Part]) -> str:
    part = _part_at(location[:-1], root)
    field = part.model_fields.get(str(location[-1]))
    return " ".join((field.description or "").split()) if field else ""


def _usual(location: Sequence[int | str], root: type[Part]) -> str:
    field = _part_at(location[:-1], root).model_fields.get(str(location[-1]))
    extra = field.json_schema_extra if field else None
    origin = str(extra.get("origin", "")) if isinstance(extra, dict) else ""
    return f" Usual: {origin.partition('usual: ')[2].rstrip(')')}." if "usual: " in origin else ""


def _did_you_mean(value: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, choices, n=1)
    return f" Did you mean {near[0]}?" if near else ""
