"""The data of a run: read, checked, encoded, cut, packed and counted, before a model is loaded.

Called by the methods. The first rank of a machine does the work; the others wait for its file. What is wrong with the
rows ends the run here, naming rows and columns.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hone.job import EventType
from hone.run import TrainerExit
from hone.spec import Dataset, JobSpec
from hone.spec.methods import Sft
from hone_trainer.context import RunContext
from hone_trainer.encoding import Encoder, TemplateRefused, make_encoder, problem
from hone_trainer.failure import NothingLeft, RunFailed
from hone_trainer.inputs import Inputs
from hone_trainer.questions import Question, questions_of
from hone_trainer.rows import Rows, joined, open_rows
from hone_trainer.tokens import Collector, Counts, Packed, Prints, Tokens, gather, pack

BATCH = 1000
"""Rows that are read and encoded together."""
_SHOWN_PROBLEMS = 3


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Data sets in the trainer's form: columns input_ids, labels, rows and, when packed, seq_lengths; for pairs see
    pairs.py."""

    train: pa.Table
    evaluation: pa.Table | None
    train_counts: Counts
    eval_counts: Counts | None
    fingerprint: str
    """SHA-256 of what is trained on, in tokens."""
    questions: tuple[Question, ...]
    is_chat: bool = False
    """Whether rows hold messages; known where they were read."""


def prepare(
    context: RunContext,
    encode: Callable[[Rows, Rows | None], Prepared],
    *,
    tell: Callable[[Counts], tuple[str, list[str]]],
) -> Prepared:
    """The data of this run, the same in every rank; `tell` says of it a sentence and warnings."""
    path = context.scratch / "data"
    if not context.leads_node:
        return _load_when_there(path)
    with temporary_files_in(context.scratch):
        prepared = encode(*open_sets(context.run.spec, context.inputs))
    _report(context, prepared, *tell(prepared.train_counts))
    if context.run.launch.processes_per_node > 1:
        _save(prepared, path)
    return prepared


@contextmanager
def temporary_files_in(directory: Path) -> Iterator[None]:
    """There is room for data there; /tmp may be memory."""
    before, tempfile.tempdir = tempfile.tempdir, str(directory)
    try:
        yield
    finally:
        tempfile.tempdir = before


def prepare_rows(context: RunContext, tokenizer: Any, train: Rows, evaluation: Rows | None) -> Prepared:
    """Rows of text, messages, or prompt and completion, as the request of an SFT run wants them."""
    spec = context.run.spec
    assert spec.dataset is not None and spec.method.sft is not None
    encoder = make_encoder(tokenizer, spec.model, spec.dataset, spec.method.sft, train)
    return build(encoder, train, evaluation, sft=spec.method.sft, questions=spec.reporting.samples.prompts)


def open_sets(spec: JobSpec, inputs: Inputs) -> tuple[Rows, Rows | None]:
    """Training and evaluation rows as the request splits them."""
    assert spec.dataset is not None and inputs.dataset is not None
    other = inputs.eval_dataset
    return split_rows(
        spec.dataset,
        Path(inputs.dataset.path),
        Path(other.path) if other else None,
        mixed=[Path(source.path) for source in inputs.mixed],
        seed=spec.training.seed,
        max_eval_rows=spec.training.eval.max_rows,
    )


def split_rows(
    dataset: Dataset,
    path: Path,
    eval_path: Path | None,
    *,
    mixed: Sequence[Path] = (),
    seed: int,
    max_eval_rows: int | None,
) -> tuple[Rows, Rows | None]:
    """Training and evaluation rows; `mixed` are the places of dataset.mix.

    A fraction is taken from every set before the weights repeat its rows, and chosen by the seed; the order stays.
    """
    sets = [open_rows(path, source=dataset.source, split=dataset.split)]
    for number, (part, place) in enumerate(zip(dataset.mix, mixed, strict=True)):
        sets.append(open_rows(place, source=part.source, split=part.split, field=f"dataset.mix.{number}.split"))
    weights = [dataset.weight, *(part.weight for part in dataset.mix)]
    evaluation = None
    if dataset.eval_source and eval_path:
        split = dataset.eval_split or ("train" if eval_path.is_file() else "test")
        evaluation = open_rows(eval_path, source=dataset.eval_source, split=split, field="dataset.eval_split")
    elif dataset.eval_split:
        evaluation = open_rows(path, source=dataset.source, split=dataset.eval_split, field="dataset.eval_split")
    elif dataset.eval_fraction is not None:
        pairs = [_hold_out(rows, dataset.eval_fraction, seed) for rows in sets]
        sets, evaluation = [rest for rest, _ in pairs], joined([held for _, held in pairs])
    train = joined(sets, weights, seed=seed)
    if not len(train):
        raise RunFailed(
            TrainerExit.DATA,
            f"dataset.weight: of {sum(map(len, sets)):,} rows none is left to train on.",
            fix="Give a larger weight.",
        )
    return train, evaluation.head(max_eval_rows) if evaluation else None


def _hold_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """What is left, and what is held out."""
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise RunFailed(
            TrainerExit.DATA, f"dataset.eval_fraction: {fraction:g} of {len(rows)} rows leaves none to train on."
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.select(np.sort(order[count:])), rows.select(np.sort(order[:count]))


def build(encoder: Encoder, train: Rows, evaluation: Rows | None, *, sft: Sft, questions: int) -> Prepared:
    """Encode, cut, pack and count. Raises RunFailed (DATA) where rows are wrong or nothing is left."""
    split = sft.packing and sft.packing_strategy == "bfd_split"
    tokens, counts, prints = _encode(encoder, train, max_length=sft.max_length, split=split)
    if sft.packing:
        packed = pack(tokens, max_length=sft.max_length)
        counts.packing_fill, counts.sequences = packed.fill(sft.max_length), len(packed.bins)
        table = _packed_table(packed)
    else:
        table = _table(tokens)
    eval_table, eval_counts = None, None
    if evaluation is not None:
        eval_tokens, eval_counts, held = _encode(encoder, evaluation, max_length=sft.max_length, split=False)
        eval_counts.rows_in_training = held.num_in(prints)
        eval_table = _table(eval_tokens)
    asked = [row for _, batch in evaluation.head(questions).batches(BATCH) for row in batch] if evaluation else []
    return Prepared(
        train=table,
        evaluation=eval_table,
        train_counts=counts,
        eval_counts=eval_counts,
        fingerprint=tokens.digest(),
        questions=tuple(questions_of(encoder, asked, sft.max_length)),
        is_chat=encoder.is_chat,
    )


def _encode(encoder: Encoder, rows: Rows, *, max_length: int, split: bool) -> tuple[Tokens, Counts, Prints]:
    collector = Collector(max_length=max_length, eos=encoder.eos, split=split)
    merged_before = encoder.merged_boundaries
    for start, batch in rows.batches(BATCH):
        refuse_rows(rows, start, [problem(encoder, row) for row in batch])
        with refusing_templates(rows, start):
            found = encoder.encode(batch)
        for offset, encoded in enumerate(found):
            collector.add(encoded, int(rows.indices[start + offset]) + 1)
    tokens, counts = collector.tokens(), collector.counts
    counts.rows_merged_at_boundary = encoder.merged_boundaries - merged_before
    if not len(tokens):
        raise _nothing_left(rows, counts, max_length)
    return tokens, counts, collector.prints


def refuse_rows(rows: Rows, start: int, problems: Sequence[str | None]) -> None:
    """Raise RunFailed (DATA), naming the first of them, when a batch that begins at `start` has bad rows."""
    found = [(start + offset, text) for offset, text in enumerate(problems) if text]
    if not found:
        return
    shown = "; ".join(f"{rows.place(position)}: {text}" for position, text in found[:_SHOWN_PROBLEMS])
    more = f"; and {len(found) - _SHOWN_PROBLEMS} more" if len(found) > _SHOWN_PROBLEMS else ""
    count = "1 row" if len(found) == 1 else f"{len(found)} rows"
    raise RunFailed(
        TrainerExit.DATA,
        f"The data set {rows.source} has {count} that cannot be learned: {shown}{more}.",
        fix="Correct these rows or take them out.",
    )


@contextmanager
def refusing_templates(rows: Rows, start: int) -> Iterator[None]:
    """Raise RunFailed (DATA), naming the row, when the chat template does not take one of a batch that begins here."""
    try:
        yield
    except TemplateRefused as error:
        place = rows.place(start + error.index)
        raise RunFailed(
            error.code, f"The chat template does not take {place} of {rows.source}: {error.why}", fix=error.fix
        ) from error


def _nothing_left(rows: Rows, counts: Counts, max_length: int) -> NothingLeft:
    fix = "Check the answers in the data set."
    if counts.shortest_useful_length:
        fix = (
            f"Raise method.sft.max_length to {counts.shortest_useful_length:,} tokens at least, or shorten the prompts."
        )
    return NothingLeft(
        TrainerExit.DATA,
        f"None of the {counts.rows:,} rows of {rows.source} has anything left to learn within max_length "
        f"({max_length:,} tokens).",
        fix=fix,
    )


def _table(tokens: Tokens) -> pa.Table:
    numbers = pa.array(tokens.rows, type=pa.int64())
    singles = pa.ListArray.from_arrays(pa.array(np.arange(len(tokens) + 1), type=pa.int32()), numbers)
    return pa.table({**_token_columns(tokens, tokens.offsets), "rows": singles})


def _packed_table(packed: Packed) -> pa.Table:
    tokens = gather(packed.tokens, (row for group in packed.bins for row in group))
    borders = np.cumsum([0, *(len(group) for group in packed.bins)])
    offsets = pa.array(borders, type=pa.int32())
    return pa.table(
        {
            **_token_columns(tokens, tokens.offsets[borders]),
            "seq_lengths": pa.ListArray.from_arrays(offsets, pa.array(tokens.lengths, type=pa.int64())),
            "rows": pa.ListArray.from_arrays(offsets, pa.array(tokens.rows, type=pa.int64())),
        }
    )


def _token_columns(tokens: Tokens, offsets: Any) -> dict[str, pa.Array]:
    borders = pa.array(offsets, type=pa.int64())
    return {
        "input_ids": pa.LargeListArray.from_arrays(borders, pa.array(tokens.ids)),
        "labels": pa.LargeListArray.from_arrays(borders, pa.array(tokens.labels)),
    }


def tell_rows(counts: Counts) -> tuple[str, list[str]]:
    """What became of the training rows: a sentence, and what was lost."""
    text = f"{counts.rows_used:,} of {counts.rows:,} rows, {counts.tokens_learned:,} tokens to learn"
    if counts.packing_fill is not None:
        text += f", packed into {counts.sequences:,} sequences, {counts.packing_fill:.1%} full"
    warnings = []
    if counts.rows_dropped or counts.rows_truncated:
        warnings.append(
            f"{counts.rows_dropped:,} rows dropped (nothing left to learn), {counts.rows_truncated:,} cut at "
            f"max_length: "
            f"{counts.tokens_dropped + counts.tokens_truncated:,} of {counts.tokens:,} tokens are not trained on."
        )
    return text, [*warnings, *merged_warning(counts)]


def merged_warning(counts: Counts) -> list[str]:
    """That some prompts end within a token."""
    if not counts.rows_merged_at_boundary:
        return []
    return [
        f"In {counts.rows_merged_at_boundary:,} rows the last token of the prompt merges with the "
        f"completion, so the model "
        "sees another prompt than at inference: end prompts with a line break or begin completions with a space."
    ]


def _report(context: RunContext, prepared: Prepared, text: str, warnings: Sequence[str]) -> None:
    metrics = prepared.train_counts.metrics()
    metrics |= {f"lengths/{upto}": float(rows) for upto, rows in prepared.train_counts.lengths.items()}
    if prepared.eval_counts:
        metrics |= {f"eval_{name}": value for name, value in prepared.eval_counts.metrics().items()}
    fields = {"fingerprint": prepared.fingerprint, "prompts": "chat" if prepared.is_chat else "text"}
    context.event(EventType.DATA, text, metrics=metrics, fields=fields)
    for warning in [*warnings, *_doubled(prepared)]:
        context.event(EventType.WARNING, warning)


def _doubled(prepared: Prepared) -> Iterator[str]:
    """Rows that are there more than once."""
    train, evaluation = prepared.train_counts, prepared.eval_counts
    if train.rows_repeated:
        yield f"{train.rows_repeated:,} training rows are copies of others, so they count more than once."
    if evaluation and evaluation.rows_in_training:
        yield (
            f"{evaluation.rows_in_training:,} of {evaluation.rows:,} evaluation rows are training rows too: the "
            "evaluation flatters the model."
        )


def as_dataset(table: pa.Table, fingerprint: str) -> Any:
    """An Arrow table as `datasets` wants it; the fingerprint is given, because making one hashes every byte again."""
    import datasets
    from datasets.table import InMemoryTable

    return datasets.Dataset(InMemoryTable(table), fingerprint=fingerprint)


def _save(prepared: Prepared, path: Path) -> None:
    path.mkdir(exist_ok=True)
    for name, table in (("train", prepared.train), ("eval", prepared.evaluation)):
        if table is not None:
            with pa.OSFile(str(path / f"{name}.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
    record = {
        "train_counts": asdict(prepared.train_counts),
        "eval_counts": asdict(prepared.eval_counts) if prepared.eval_counts else None,
        "fingerprint": prepared.fingerprint,
    }
    temporary = path / "ready.part"
    temporary.write_text(json.dumps(record), encoding="utf-8")
    temporary.replace(path / "ready.json")


def _load_when_there(path: Path) -> Prepared:
    """Wait for the first rank without a time limit: when it fails, the supervisor ends this process too."""
    while not (path / "ready.json").exists():
        time.sleep(0.05)
    record = json.loads((path / "ready.json").read_text(encoding="utf-8"))
    eval_counts = record["eval_counts"]
    return Prepared(
        train=_mapped(path / "train.arrow"),
        evaluation=_mapped(path / "eval.arrow") if eval_counts else None,
        train_counts=Counts(**record["train_counts"]),
        eval_counts=Counts(**eval_counts) if eval_counts else None,
        fingerprint=record["fingerprint"],
        questions=(),  # the first rank answers them
    )


def _mapped(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()
