"""Rules of the methods that learn from rewards, and what their rewards name. Called by
combinations.py, the backends and the trainer."""

import json
import re
from collections.abc import Iterator

from hone.errors import Violation
from hone.spec import JobSpec
from hone.spec.methods import JsonSchemaPart, PythonPart, RewardModelPart, RewardPart

NO_PYTHON_REWARDS_FIX = (
    "Put it behind an http scorer; or a platform allows it: HONE_PYTHON_REWARDS=1 on a machine of one's own, "
    "cluster.python_rewards on a cluster."
)


def reward_violations(spec: JobSpec) -> Iterator[Violation]:
    """Every rule that ppo, grpo or the signals of a request break."""
    yield from _ppo_rules(spec)
    yield from _grpo_rules(spec)
    learns = spec.method.rewarded
    if learns is None:
        return
    path = f"method.{spec.method.name}.rewards"
    if not any(part.weight for part in learns.rewards):
        yield Violation(path=path, message="every weight is 0, so nothing is learned: give one signal a weight.")
    for number, part in enumerate(learns.rewards):
        yield from _part_violations(part, f"{path}.{number}")


def scorers(spec: JobSpec) -> list[str]:
    """Addresses of the HTTP scorers that a request names."""
    learns = spec.method.rewarded
    return [part.http.url for part in learns.rewards if part.http] if learns else []


def reward_models(spec: JobSpec) -> Iterator[tuple[int, str, RewardModelPart]]:
    """The reward models that a request names: their number among the rewards, and the field of their source."""
    for number, part in enumerate(spec.method.rewarded.rewards if spec.method.rewarded else ()):
        if part.model:
            yield number, f"method.{spec.method.name}.rewards.{number}.model.source", part.model


def reward_functions(spec: JobSpec) -> Iterator[tuple[int, str, PythonPart]]:
    """The same of the Python functions, and the field of their file."""
    for number, part in enumerate(spec.method.rewarded.rewards if spec.method.rewarded else ()):
        if part.python:
            yield number, f"method.{spec.method.name}.rewards.{number}.python.file", part.python


def forbidden_functions(spec: JobSpec) -> Iterator[Violation]:
    """All of them, for a platform that lets none in."""
    for _, path, part in reward_functions(spec):
        yield Violation(path=path.removesuffix(".file"), value=part.file,
                        message=f"runs code of the request's in the trainer, which is not allowed here. "
                        f"{NO_PYTHON_REWARDS_FIX}")  # fmt: skip


def _grpo_rules(spec: JobSpec) -> Iterator[Violation]:
    """Answers come in groups, and a distance that is not measured bounds nothing."""
    if (grpo := spec.method.grpo) is None:
        return
    whole = spec.training.global_batch_size
    if whole and whole % grpo.num_generations:
        yield Violation(path="training.global_batch_size", value=whole,
                        message=f"is no multiple of method.grpo.num_generations ({grpo.num_generations}): it counts "
                        "answers, and every prompt is answered so often.")  # fmt: skip
    if grpo.max_kl and not grpo.beta:
        yield Violation(path="method.grpo.max_kl", value=grpo.max_kl,
                        message="needs method.grpo.beta above 0: without it no reference is asked.")  # fmt: skip


def _ppo_rules(spec: JobSpec) -> Iterator[Violation]:
    """The three sizes of batches: answers drawn together, answers of one optimizer step, answers of one pass."""
    if (ppo := spec.method.ppo) is None:
        return
    if ppo.batch_size % ppo.mini_batch_size:
        yield Violation(path="method.ppo.mini_batch_size", value=ppo.mini_batch_size,
                        message=f"does not divide batch_size ({ppo.batch_size}): every answer is used once in every "
                        "epoch.")  # fmt: skip
    whole = spec.training.global_batch_size
    if whole and whole != ppo.mini_batch_size:
        yield Violation(path="training.global_batch_size", value=whole,
                        message=f"contradicts method.ppo.mini_batch_size ({ppo.mini_batch_size}), which is the number "
                        "of answers in one optimizer step: remove it.")  # fmt: skip


def _part_violations(part: RewardPart, path: str) -> Iterator[Violation]:
    if part.python:
        yield from _function_violations(part.python, f"{path}.python")
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
        yield from _schema_violations(part.json_schema, f"{path}.json_schema.schema_text")


def _schema_violations(part: JsonSchemaPart, path: str) -> Iterator[Violation]:
    try:
        is_schema = isinstance(json.loads(part.schema_text), dict | bool)
    except ValueError as error:
        yield Violation(path=path, message=f"is not JSON: {error}.")
    else:
        if not is_schema:
            yield Violation(path=path, message="is no JSON Schema: write an object.")


def _function_violations(part: PythonPart, path: str) -> Iterator[Violation]:
    if not part.file.endswith(".py") or part.file.partition("://")[0] not in ("file", "s3"):
        yield Violation(path=f"{path}.file", value=part.file,
                        message="is no file of Python: name file:///….py or s3://bucket/….py.")  # fmt: skip
    if not part.function.isidentifier():
        yield Violation(path=f"{path}.function", value=part.function,
                        message=f"{part.function!r} is no name of a function.")  # fmt: skip
