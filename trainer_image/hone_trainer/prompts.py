"""Rows as prompts to be answered: for methods that learn from rewards.

Called by ppo and grpo. A row holds a prompt (text or messages), or messages whose last answer is left out; what else it
holds goes to the rewards. Prompts that are too long are left out, and counted.
"""

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from hone.run import TrainerExit
from hone.spec import Columns, JobSpec
from hone_trainer.data import BATCH, Prepared, refuse_rows, refusing_templates
from hone_trainer.encoding import (
    asked_ids,
    conversation_problem,
    kind_of,
    prompt_ids,
    refuse_system_prompt,
    training_template,
    with_one_bos,
    with_system,
)
from hone_trainer.failure import NothingLeft, RunFailed
from hone_trainer.files import Row
from hone_trainer.questions import Question
from hone_trainer.rows import Rows
from hone_trainer.tokens import Counts, Pool, Prints, TextPool, histogram


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """Turns rows into the tokens that an answer follows."""

    tokenizer: Any
    columns: Columns
    column: str
    """The one that holds the prompt."""
    is_conversation: bool
    """Whether that column is a whole conversation, whose last answer is left out."""
    is_chat: bool
    system_prompt: str | None = None

    def prompt(self, row: Row) -> str | list[dict[str, Any]]:
        """The prompt of a row, as text or as messages."""
        value = row[self.column]
        if isinstance(value, str):
            return value
        messages = [dict(message) for message in value]
        while self.is_conversation and len(messages) > 1 and messages[-1]["role"] == "assistant":
            messages.pop()
        return with_system(messages, self.system_prompt)

    def encode(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """Its tokens, with one beginning-of-sequence token at most."""
        if isinstance(prompt, str):
            return with_one_bos(self.tokenizer, prompt_ids(self.tokenizer, prompt))
        return asked_ids(self.tokenizer, prompt)

    def expected(self, row: Row) -> str:
        """The answer that the row has itself, for people; empty where it has none."""
        value = row.get(self.columns.completion)
        if self.is_conversation:
            value = row[self.column][-1:]
        if isinstance(value, list):
            value = value[-1].get("content") if value and value[-1].get("role") == "assistant" else ""
        return value if isinstance(value, str) else ""

    def problem(self, row: Row) -> str | None:
        """What is wrong with a row; None when it can be answered."""
        if self.column not in row:
            return f"has no column {self.column}, only {', '.join(row)}"
        value = row[self.column]
        if self.is_chat:
            return conversation_problem(value, self.column, needs_answer=False)
        if not isinstance(value, str):
            return f"{self.column} is {kind_of(value)} where a text is expected, as in the first row"
        return None if value.strip() else f"{self.column} is empty"


def prompt_encoder(spec: JobSpec, tokenizer: Any, rows: Rows) -> PromptEncoder:
    """The encoder that fits the rows. Raises RunFailed: no fitting column, no chat template."""
    assert spec.dataset is not None
    first, columns, asked = rows.first(), spec.dataset.columns, spec.dataset.format
    is_conversation = asked == "messages" or (asked == "auto" and columns.prompt not in first)
    column = columns.messages if is_conversation else columns.prompt
    if column not in first:
        wanted = f"{columns.prompt} or {columns.messages}" if asked == "auto" else column
        raise RunFailed(
            TrainerExit.DATA,
            f"The data set {rows.source} has the columns {', '.join(first)}; {wanted} is needed.",
            fix="Name its columns under dataset.columns.",
        )
    is_chat = isinstance(first[column], list)
    if is_chat:
        training_template(tokenizer, marked=False)
    else:
        refuse_system_prompt(spec.model, "texts")
    return PromptEncoder(
        tokenizer=tokenizer,
        columns=columns,
        column=column,
        is_conversation=is_conversation,
        is_chat=is_chat,
        system_prompt=spec.model.system_prompt,
    )


def prepare_prompts(spec: JobSpec, tokenizer: Any, train: Rows, evaluation: Rows | None) -> Prepared:
    """Tables of prompts: prompt_ids, prompt (JSON), row (all its columns, as JSON) and rows (its number).

    Raises RunFailed (DATA) where rows are wrong or every prompt is longer than the request's max_prompt_length.
    """
    assert spec.method.rewarded
    encoder = prompt_encoder(spec, tokenizer, train)
    limit = _Limit(f"method.{spec.method.name}.max_prompt_length", spec.method.rewarded.max_prompt_length)
    table, counts, prints, fingerprint = _collect(encoder, train, limit)
    eval_table, eval_counts = None, None
    if evaluation is not None:
        eval_table, eval_counts, held, _ = _collect(encoder, evaluation, limit)
        eval_counts.rows_in_training = held.num_in(prints)
    questions = spec.reporting.samples.prompts
    asked = [row for _, batch in evaluation.head(questions).batches(BATCH) for row in batch] if evaluation else []
    return Prepared(
        train=table,
        evaluation=eval_table,
        train_counts=counts,
        eval_counts=eval_counts,
        fingerprint=fingerprint,
        questions=tuple(_question(encoder, row) for row in asked),
        is_chat=encoder.is_chat,
    )


def tell_prompts(counts: Counts) -> tuple[str, list[str]]:
    """What became of the rows: a sentence, and what was lost."""
    lost = []
    if counts.rows_dropped:
        lost.append(
            f"{counts.rows_dropped:,} of {counts.rows:,} prompts left out: they are longer than max_prompt_length (the "
            f"longest has {counts.longest_row:,} tokens)."
        )
    return f"{counts.rows_used:,} of {counts.rows:,} prompts", lost


def _question(encoder: PromptEncoder, row: Row) -> Question:
    prompt = encoder.prompt(row)
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "")
    return Question(prompt_ids=encoder.encode(prompt), prompt=text, expected=encoder.expected(row))


class _Limit(NamedTuple):
    field: str
    tokens: int


def _collect(encoder: PromptEncoder, rows: Rows, limit: _Limit) -> tuple[pa.Table, Counts, Prints, str]:
    """The table, what became of the rows, and a SHA-256 of what is trained on: equal where training sees the same."""
    counts, prints, ids, lengths, digest = Counts(), Prints(), Pool(), array("q"), sha256()
    numbers, prompts, whole = array("q"), TextPool(), TextPool()
    for start, batch in rows.batches(BATCH):
        refuse_rows(rows, start, [encoder.problem(row) for row in batch])
        for offset, row in enumerate(batch):
            prompt = encoder.prompt(row)
            with refusing_templates(rows, start + offset):
                found = np.asarray(encoder.encode(prompt), dtype=np.int32)
            text = json.dumps(row, ensure_ascii=False, default=str)
            number = int(rows.indices[start + offset]) + 1
            data = np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8)
            prints.add(number, found, data)
            lengths.append(len(found))
            if len(found) > limit.tokens:
                continue
            digest.update(len(found).to_bytes(8, "big") + found.tobytes() + data.tobytes())
            ids.add(found)
            numbers.append(number)
            prompts.add_text(json.dumps(prompt, ensure_ascii=False, default=str))
            whole.add(data)
    counts.rows, counts.tokens, counts.longest_row = len(lengths), sum(lengths), max(lengths, default=0)
    counts.rows_used = counts.sequences = len(numbers)
    counts.rows_dropped, counts.tokens_dropped = counts.rows - counts.rows_used, counts.tokens - int(ids.offsets[-1])
    counts.rows_repeated, counts.lengths = prints.num_repeated, histogram(lengths)
    if not numbers:
        raise NothingLeft(
            TrainerExit.DATA,
            f"None of the {counts.rows:,} prompts of {rows.source} fits within {limit.field} ({limit.tokens:,} "
            "tokens).",
            fix=f"Raise {limit.field} to {min(lengths):,} tokens at least, or shorten the prompts.",
        )
    singles = pa.array(np.arange(len(numbers) + 1), type=pa.int32())
    table = pa.table(
        {
            "prompt_ids": pa.LargeListArray.from_arrays(pa.array(ids.offsets), pa.array(ids.numbers())),
            "prompt": prompts.column(),
            "row": whole.column(),
            "rows": pa.ListArray.from_arrays(singles, pa.array(np.frombuffer(numbers, dtype=np.int64))),
        }
    )
    return table, counts, prints, digest.hexdigest()
