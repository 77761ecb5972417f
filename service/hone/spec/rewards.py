"""What the rewards of ppo and grpo need of one another and of themselves. Called by combinations.py."""

import json
import re
from collections.abc import Iterator

from hone.errors import Violation
from hone.spec import JobSpec
from hone.spec.methods import RewardPart


def reward_violations(spec: JobSpec) -> Iterator[Violation]:
    """Every rule that the signals of a request break."""
    learns = spec.method.ppo or spec.method.grpo
    if learns is None:
        return
    path = f"method.{spec.method.name}.rewards"
    if not any(part.weight for part in learns.rewards):
        yield Violation(path=path, message="every weight is 0, so nothing is learned: give one signal a weight.")
    for number, part in enumerate(learns.rewards):
        yield from _part_violations(part, f"{path}.{number}")


def scorers(spec: JobSpec) -> list[str]:
    """Addresses of the HTTP scorers that a request names."""
    learns = spec.method.ppo or spec.method.grpo
    return [part.http.url for part in learns.rewards if part.http] if learns else []


def _part_violations(part: RewardPart, path: str) -> Iterator[Violation]:
    if part.answer:
        if not part.answer.column:
            yield Violation(path=f"{path}.answer.column", value="", message="is empty: name a column.")
        if part.answer.tolerance and not part.answer.numeric:
            yield Violation(path=f"{path}.answer.tolerance", value=part.answer.tolerance,
                            message="is between numbers: set numeric to true, or remove it.")  # fmt: skip
    if part.regex:
        try:
            re.compile(part.regex.pattern)
        except re.error as error:
            yield Violation(path=f"{path}.regex.pattern", value=part.regex.pattern,
                            message=f"{part.regex.pattern!r} is not a regular expression: {error}.")  # fmt: skip
    if part.json_schema:
        try:
            is_schema = isinstance(json.loads(part.json_schema.schema_text), dict | bool)
        except ValueError as error:
            yield Violation(path=f"{path}.json_schema.schema_text", message=f"is not JSON: {error}.")
        else:
            if not is_schema:
                yield Violation(path=f"{path}.json_schema.schema_text", message="is no JSON Schema: write an object.")
