"""Preference rows as pairs of token rows: a prompt with the answer that was chosen and the one that was rejected.

Called by dpo and reward. Rows hold prompt, chosen and rejected; or chosen and rejected alone, whose common beginning is
the prompt. Tokens are those of encoding.py, the stop token included. For dpo an answer that is too long is cut and ends
with the stop token; for reward such a pair is left out. Pairs that teach nothing are dropped. Everything is counted.
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hone.run import TrainerExit
from hone.spec import Columns, Dataset, JobSpec, Model
from hone_trainer.data import BATCH, Prepared, merged_warning, refuse_rows, refusing_templates
from hone_trainer.encoding import Encoded, Encoder, conversation_problem, kind_of, training_template
from hone_trainer.failure import NothingLeft, RunFailed
from hone_trainer.files import Row
from hone_trainer.questions import questions_of
from hone_trainer.rows import Rows
from hone_trainer.tokens import Counts, Pool, Prints, histogram

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What becomes of long pairs."""

    max_length: int
    cuts: bool
    """Whether a long answer is cut; else the pair is left out."""
    field: str
    """Where the request says max_length."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The tokens of both sides, each with its prompt, and where the answers begin in them."""

    ids: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
    starts: tuple[int, int]
    margin: float | None

    @property
    def longest(self) -> int:
        """Tokens of the longer side."""
        return max(map(len, self.ids))

    @property
    def alike(self) -> bool:
        """Whether nothing tells the sides apart."""
        return np.array_equal(*self.ids)


@dataclass(frozen=True, kw_only=True)
class PairEncoder:
    """Turns preference rows of one form into pairs of tokens."""

    columns: Columns
    has_prompt: bool
    """Whether the prompt has a column of its own."""
    is_chat: bool
    margin: str | None
    """The column with the margin."""
    whole: bool
    """Keep what stands after the stop token, as a score of the last token needs it."""
    sides: tuple[Encoder, Encoder]

    @property
    def merged_boundaries(self) -> int:
        """Rows whose last prompt token merged with an answer's first."""
        return max(side.merged_boundaries for side in self.sides)

    def encode(self, rows: Sequence[Row]) -> list[Pair]:
        """Pairs of rows that `problem` found nothing wrong with."""
        split = [self.split(row) for row in rows]
        chosen, rejected = (side.encode(split) for side in self.sides)
        return [self._pair(*sides) for sides in zip(chosen, rejected, rows, strict=True)]

    def split(self, row: Row) -> dict[str, Any]:
        """Prompt, chosen and rejected by these names; a prompt that has no column is what both sides begin with."""
        chosen, rejected = (row.get(getattr(self.columns, side)) for side in SIDES)
        if self.has_prompt:
            return {"prompt": row.get(self.columns.prompt), "chosen": chosen, "rejected": rejected}
        assert chosen is not None and rejected is not None
        length = _common(chosen, rejected)
        return {"prompt": chosen[:length], "chosen": chosen[length:], "rejected": rejected[length:]}

    def problem(self, row: Row) -> str | None:
        """What is wrong with a row; None when it can be encoded."""
        wanted = [*([self.columns.prompt] if self.has_prompt else []), *(getattr(self.columns, side) for side in SIDES)]
        for column in wanted:
            if column not in row:
                return f"has no column {column}, only {', '.join(row)}"
            if found := self._value_problem(row[column], column, is_answer=column != self.columns.prompt):
                return found
        chosen, rejected = (getattr(self.columns, side) for side in SIDES)
        if row[chosen] == row[rejected]:
            return f"{chosen} and {rejected} are equal, so neither is preferred"
        if self.is_chat and not self.has_prompt and not _common(row[chosen], row[rejected]):
            return f"{chosen} and {rejected} begin with different messages, so they share no prompt"
        return self._margin_problem(row)

    def _value_problem(self, value: Any, column: str, *, is_answer: bool) -> str | None:
        if self.is_chat:
            return conversation_problem(value, column, needs_answer=is_answer)
        if not isinstance(value, str):
            return f"{column} is {kind_of(value)} where a text is expected, as in the first row"
        return None if value.strip() else f"{column} is empty"

    def _margin_problem(self, row: Row) -> str | None:
        if self.margin is None:
            return None
        value = row.get(self.margin)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return None if is_number else f"{self.margin} is {value!r} where a number is expected"

    def _pair(self, chosen: Encoded, rejected: Encoded, row: Row) -> Pair:
        trimmed = [side if self.whole else _until_stop(side) for side in (chosen, rejected)]
        first, second = (np.asarray(side.ids, dtype=np.int32) for side in trimmed)
        return Pair(
            ids=(first, second),
            starts=(_start(chosen), _start(rejected)),
            margin=float(row[self.margin]) if self.margin else None,
        )


def pairs_for(spec: JobSpec, tokenizer: Any, rows: Rows) -> tuple[PairEncoder, Limit]:
    """How a dpo or reward request reads these rows. Raises RunFailed: columns or template missing."""
    part, scores = spec.method.dpo or spec.method.reward, spec.method.reward is not None
    assert part is not None and spec.dataset is not None
    limit = Limit(max_length=part.max_length, cuts=not scores, field=f"method.{spec.method.name}.max_length")
    return make_pair_encoder(tokenizer, spec.model, spec.dataset, rows, scores=scores), limit


def make_pair_encoder(tokenizer: Any, model: Model, dataset: Dataset, rows: Rows, *, scores: bool) -> PairEncoder:
    """The encoder that fits the rows; `scores` is for a reward model. Raises RunFailed: columns or template missing."""
    first, columns = rows.first(), dataset.columns
    missing = [name for name in (columns.chosen, columns.rejected) if name not in first]
    if missing:
        raise RunFailed(
            TrainerExit.DATA,
            f"The data set {rows.source} has the columns {', '.join(first)}; {columns.chosen} and {columns.rejected} "
            f"are needed, and {columns.prompt} unless both begin with it.",
            fix="Name its columns under dataset.columns.",
        )
    if scores and columns.margin is not None and columns.margin not in first:
        raise RunFailed(
            TrainerExit.DATA,
            f"The data set {rows.source} has no column {columns.margin}, only {', '.join(first)}.",
            fix="Correct dataset.columns.margin, or remove it.",
        )
    is_chat = isinstance(first[columns.chosen], list)
    if is_chat:
        training_template(tokenizer, marked=False)
    elif model.system_prompt is not None:
        raise RunFailed(
            TrainerExit.USER,
            "model.system_prompt needs conversations, and the rows hold texts.",
            fix="Remove it, or use rows with messages.",
        )
    margin = columns.margin or ("margin" if "margin" in first else None)
    return PairEncoder(
        columns=columns,
        has_prompt=_has_prompt(first, columns, is_chat=is_chat),
        is_chat=is_chat,
        margin=margin if scores else None,
        whole=scores,
        sides=(_side(tokenizer, model, "chosen"), _side(tokenizer, model, "rejected")),
    )


def prepare_pairs(
    encoder: PairEncoder, limit: Limit, train: Rows, evaluation: Rows | None, *, questions: int = 0
) -> Prepared:
    """Tables of pairs: chosen_ids, rejected_ids, where the answers start in them, rows, and margin where there is one.

    Raises RunFailed (DATA) where rows are wrong or nothing is left.
    """
    table, counts, prints = _collect(encoder, train, limit)
    eval_table, eval_counts = None, None
    if evaluation is not None:
        eval_table, eval_counts, held = _collect(encoder, evaluation, limit)
        eval_counts.rows_in_training = held.num_in(prints)
    asked = list(evaluation.head(questions).batches(BATCH)) if evaluation is not None else []
    split = [encoder.split(row) for _, batch in asked for row in batch]
    return Prepared(
        train=table,
        evaluation=eval_table,
        train_counts=counts,
        eval_counts=eval_counts,
        fingerprint=_digest(table),
        questions=tuple(questions_of(encoder.sides[0], split, limit.max_length)),
        is_chat=encoder.is_chat,
    )


def tell_cut_pairs(counts: Counts) -> tuple[str, list[str]]:
    """What became of the training pairs, where long answers are cut."""
    lost = []
    if counts.rows_dropped or counts.rows_truncated:
        alike = f", in {counts.rows_alike:,} of them both answers are equal there" if counts.rows_alike else ""
        lost = [
            f"{counts.rows_dropped:,} pairs dropped (nothing left to learn within max_length{alike}), "
            f"{counts.rows_truncated:,} cut at max_length: {counts.tokens_dropped + counts.tokens_truncated:,} of "
            f"{counts.tokens:,} tokens are not trained on."
        ]
    text = f"{counts.rows_used:,} of {counts.rows:,} pairs, {counts.tokens_learned:,} tokens in their answers"
    return text, [*lost, *merged_warning(counts)]


def tell_whole_pairs(counts: Counts) -> tuple[str, list[str]]:
    """What became of the training pairs, where long ones are left out."""
    lost = []
    if long := counts.rows_dropped - (counts.rows_alike or 0):
        lost.append(
            f"{long:,} of {counts.rows:,} pairs left out: they are longer than max_length (the longest has "
            f"{counts.longest_row:,} tokens)."
        )
    if counts.rows_alike:
        lost.append(f"{counts.rows_alike:,} pairs left out: both sides are the same tokens.")
    return f"{counts.rows_used:,} of {counts.rows:,} pairs, {counts.tokens_learned:,} tokens", lost


def _side(tokenizer: Any, model: Model, side: str) -> Encoder:
    return Encoder(
        tokenizer=tokenizer,
        format="prompt_completion",
        columns=Columns(prompt="prompt", completion=side),
        respond_only=True,
        system_prompt=model.system_prompt,
    )


def _has_prompt(first: Row, columns: Columns, *, is_chat: bool) -> bool:
    """Some sets of conversations repeat the question as a text beside them; their prompt is in both sides already."""
    prompt = first.get(columns.prompt)
    return prompt is not None and not (is_chat and isinstance(prompt, str))


def _common(chosen: Any, rejected: Any) -> int:
    """Length of what both sides begin with: messages, of which each side keeps one, or characters."""
    pairs = zip(chosen, rejected, strict=False)
    length = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if isinstance(chosen, str):
        return length - 1 if length and chosen[length - 1] == " " else length  # a space belongs to the word behind it
    return min(length, len(chosen) - 1, len(rejected) - 1)


def _until_stop(side: Encoded) -> Encoded:
    """Without what a template writes after the stop token: nothing is learned there, and nothing depends on it."""
    end = len(side.learned) - side.learned[::-1].index(True)
    return Encoded(side.ids[:end], side.learned[:end])


def _start(side: Encoded) -> int:
    return max(1, side.learned.index(True))  # nothing comes before the first token, so it cannot be predicted


def _collect(encoder: PairEncoder, rows: Rows, limit: Limit) -> tuple[pa.Table, Counts, Prints]:
    counts, prints, kept, lengths = Counts(rows_alike=0), Prints(), _Kept(), array("q")
    before = encoder.merged_boundaries
    for start, batch in rows.batches(BATCH):
        refuse_rows(rows, start, [encoder.problem(row) for row in batch])
        with refusing_templates(rows, start):
            pairs = encoder.encode(batch)
        for offset, pair in enumerate(pairs):
            number = int(rows.indices[start + offset]) + 1
            prints.add(number, *pair.ids, np.asarray(pair.starts))
            lengths.append(pair.longest)
            if (fitting := _fit(pair, encoder.sides[0].eos, limit, counts)) is not None:
                kept.add(fitting, number)
    counts.rows_used = counts.sequences = len(kept)
    counts.rows_merged_at_boundary = encoder.merged_boundaries - before
    counts.rows_repeated, counts.lengths = prints.num_repeated, histogram(lengths)
    if not len(kept):
        raise _nothing_left(rows, counts, limit)
    return kept.table(), counts, prints


def _fit(pair: Pair, eos: int, limit: Limit, counts: Counts) -> Pair | None:
    """The pair within max_length, or None where nothing is left of it; counted either way."""
    tokens = sum(map(len, pair.ids))
    counts.rows += 1
    counts.tokens += tokens
    counts.longest_row = max(counts.longest_row, pair.longest)
    if pair.longest > limit.max_length and limit.cuts:
        counts.rows_truncated += 1
        useful = max(pair.starts) + 2  # the first token of the answer and a stop token
        pair = _cut(pair, limit.max_length, eos)
        counts.tokens_truncated += tokens - sum(map(len, pair.ids))
    else:
        useful = pair.longest
    left = pair.longest <= limit.max_length and (not limit.cuts or useful <= limit.max_length)
    if left and not pair.alike:
        counts.tokens_learned += sum(map(len, pair.ids)) - (sum(pair.starts) if limit.cuts else 0)
        return pair
    counts.rows_dropped += 1
    counts.tokens_dropped += sum(map(len, pair.ids))
    if left:
        counts.rows_alike = (counts.rows_alike or 0) + 1
    else:
        counts.shortest_useful_length = min(useful, counts.shortest_useful_length or useful)
    return None


def _cut(pair: Pair, max_length: int, eos: int) -> Pair:
    """Answers cut at max_length still end with the stop token, or the model learns to prefer what never ends."""
    sides = []
    for ids in pair.ids:
        short = ids[:max_length].copy()
        if len(ids) > max_length:
            short[-1] = eos
        sides.append(short)
    return Pair(ids=(sides[0], sides[1]), starts=pair.starts, margin=pair.margin)


def _nothing_left(rows: Rows, counts: Counts, limit: Limit) -> NothingLeft:
    fix = "Check the answers in the data set."
    if counts.shortest_useful_length:
        fix = f"Raise {limit.field} to {counts.shortest_useful_length:,} tokens at least, or shorten the rows."
    left = "has anything left to learn" if limit.cuts else "fits"
    return NothingLeft(
        TrainerExit.DATA,
        f"None of the {counts.rows:,} pairs of {rows.source} {left} within max_length ({limit.max_length:,} tokens).",
        fix=fix,
    )


class _Kept:
    """The pairs that are trained on."""

    def __init__(self) -> None:
        self._ids = {side: Pool() for side in SIDES}
        self._starts = {side: array("i") for side in SIDES}
        self._rows, self._margins = array("q"), array("d")

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, pair: Pair, number: int) -> None:
        """One more, with the number of its row."""
        for index, side in enumerate(SIDES):
            self._ids[side].add(pair.ids[index])
            self._starts[side].append(pair.starts[index])
        self._rows.append(number)
        if pair.margin is not None:
            self._margins.append(pair.margin)

    def table(self) -> pa.Table:
        """As prepare_pairs says."""
        columns: dict[str, pa.Array] = {}
        for side in SIDES:
            ids = self._ids[side]
            columns[f"{side}_ids"] = pa.LargeListArray.from_arrays(pa.array(ids.offsets), pa.array(ids.numbers()))
            columns[f"{side}_start"] = pa.array(np.frombuffer(self._starts[side], dtype=np.int32))
        singles = pa.array(np.arange(len(self) + 1), type=pa.int32())
        columns["rows"] = pa.ListArray.from_arrays(singles, pa.array(np.frombuffer(self._rows, dtype=np.int64)))
        if self._margins:
            columns["margin"] = pa.array(np.frombuffer(self._margins, dtype=np.float64))
        return pa.table(columns)


def _digest(table: pa.Table) -> str:
    """SHA-256 of what is trained on: equal where training sees the same."""
    found = sha256()
    columns: Mapping[str, Any] = {name: table[name] for name in table.column_names if name != "rows"}
    for name, column in columns.items():
        found.update(name.encode())
        for chunk in column.chunks:
            for buffer in chunk.buffers():
                found.update(buffer or b"")
    return found.hexdigest()
