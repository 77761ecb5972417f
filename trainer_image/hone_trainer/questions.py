"""Rows that a model answers before, while and after it trains: the prompt as generation sees it, and the right answer.

Called where rows are prepared (data.py, pairs.py, prompts.py) and answered (samples.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hone_trainer.encoding import Encoder, asked_ids, with_system
from hone_trainer.files import Row


@dataclass(frozen=True, kw_only=True)
class Question:
    """One row to answer before and after training."""

    prompt_ids: list[int]
    prompt: str
    expected: str


def questions_of(encoder: Encoder, rows: Sequence[Row], max_length: int) -> list[Question]:
    """The prompts of rows and their right answers, as generation sees them."""
    return [_question(encoder, row, max_length) for row in rows]


def _question(encoder: Encoder, row: Row, max_length: int) -> Question:
    [encoded] = encoder.encode([row])
    if encoder.format == "text":
        half = max(1, min(len(encoded.ids) // 2, max_length // 2))
        prompt_ids, answer_ids = encoded.ids[:half], encoded.ids[half:]
    elif encoder.format == "messages":
        return _chat_question(encoder, row)
    else:
        return _plain_question(encoder, row)
    decode = encoder.tokenizer.decode
    return Question(
        prompt_ids=prompt_ids,
        prompt=decode(prompt_ids, skip_special_tokens=True),
        expected=decode(answer_ids, skip_special_tokens=True),
    )


def _chat_question(encoder: Encoder, row: Row) -> Question:
    messages = encoder.conversation(row)
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
    expected = str(messages[last].get("content") or "") if last < len(messages) else ""
    return _rendered(encoder, messages[:last], expected)


def _plain_question(encoder: Encoder, row: Row) -> Question:
    prompt, completion = encoder.value(row, "prompt"), encoder.value(row, "completion")
    if not isinstance(prompt, str):
        asked = with_system(prompt, encoder.system_prompt)
        return _rendered(encoder, asked, str(completion[0].get("content") or ""))
    return Question(prompt_ids=encoder.prompt_ids(prompt), prompt=prompt, expected=completion)


def _rendered(encoder: Encoder, messages: Sequence[Any], expected: str) -> Question:
    return Question(
        prompt_ids=asked_ids(encoder.tokenizer, messages),
        prompt=str(messages[-1]["content"]) if messages else "",
        expected=expected,
    )
