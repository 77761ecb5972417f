"""Signals that are rules on an answer's text: the right answer, a pattern, a JSON schema, a length."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import regex

from hone.run import TrainerExit
from hone.spec.methods import AnswerPart, JsonSchemaPart, LengthPart, RegexPart
from hone_trainer.failure import RunFailed
from hone_trainer.rewards.answers import Answer, SignalFailed

Rule = Callable[[Sequence[Answer]], list[float]]
SEARCH_S = 1.0
"""For one pattern on one answer: some patterns take for ever on some texts."""
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def answer_rule(part: AnswerPart, field: str) -> Rule:
    """1 where an answer equals the row's, or its last number does."""

    def score(answers: Sequence[Answer]) -> list[float]:
        for answer in answers:
            if part.column not in answer.row:
                raise SignalFailed(
                    f"needs the column {part.column}, and a row has {', '.join(answer.row)}",
                    kind="column",
                    code=TrainerExit.DATA,
                    fix=f"Name the column with the right answer in {field}.column.",
                )
        right = _equal_numbers(part.tolerance) if part.numeric else _equal_texts
        return [float(right(answer.text, answer.row[part.column])) for answer in answers]

    return score


def _equal_texts(text: str, wanted: Any) -> bool:
    return text.strip() == str(wanted).strip()


def _equal_numbers(tolerance: float) -> Callable[[str, Any], bool]:
    def equal(text: str, wanted: Any) -> bool:
        found, right = last_number(text), last_number(str(wanted))
        return found is not None and right is not None and abs(found - right) <= tolerance

    return equal


def last_number(text: str) -> float | None:
    """The last number of a text, `1,234.5` among them; None where it has none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def regex_rule(part: RegexPart, field: str) -> Rule:
    """1 where the pattern is found in an answer."""
    try:
        pattern = regex.compile(part.pattern)
    except regex.error as error:
        raise RunFailed(TrainerExit.USER, f"{field}.pattern is not a regular expression: {error}.") from error

    def score(answers: Sequence[Answer]) -> list[float]:
        try:
            return [float(pattern.search(answer.text, timeout=SEARCH_S) is not None) for answer in answers]
        except TimeoutError as error:
            raise _too_slow("Write the pattern") from error

    return score


def json_schema_rule(part: JsonSchemaPart, field: str) -> Rule:
    """1 where an answer is JSON that the schema accepts. A `$ref` to another document is fetched from nowhere."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError, ValidationError
    from jsonschema.validators import extend
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    def pattern(validator: Any, pattern: str, instance: Any, _schema: Any) -> Iterator[ValidationError]:
        if validator.is_type(instance, "string") and not regex.search(pattern, instance, timeout=SEARCH_S):
            yield ValidationError("does not match")

    schema = json.loads(part.schema_text)
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise RunFailed(TrainerExit.USER, f"{field}.schema_text is not a JSON Schema: {error.message}.") from error
    kind = extend(Draft202012Validator, {"pattern": pattern})  # type: ignore[no-untyped-call]
    validator = kind(schema, registry=Registry())

    def accepted(text: str) -> bool:
        try:
            return bool(validator.is_valid(json.loads(text)))
        except Unresolvable as error:
            raise SignalFailed(f"refers to {error.ref}, which is not in it", kind="reference") from error
        except TimeoutError as error:
            raise _too_slow("Write the schema's pattern") from error
        except (ValueError, RecursionError):
            return False

    return lambda answers: [float(accepted(answer.text)) for answer in answers]


def _too_slow(what: str) -> SignalFailed:
    fix = f"{what} without nested repetitions, such as (a+)+."
    return SignalFailed(f"took more than {SEARCH_S:g} s on one answer", kind="time", fix=fix)


def length_rule(part: LengthPart, _field: str) -> Rule:
    """0 up to a length, falling to −1 at twice that length."""
    limit = part.max_tokens
    return lambda answers: [0.0 - min(1.0, max(0.0, (answer.num_tokens - limit) / limit)) for answer in answers]


RULES: Mapping[str, Callable[[Any, str], Rule]] = {
    "answer": answer_rule,
    "regex": regex_rule,
    "json_schema": json_schema_rule,
    "length": length_rule,
}
"""By the names that the request has for them."""
