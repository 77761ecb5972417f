from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hone.run import TrainerExit
from hone.spec import Dataset, MixedDataset, Model
from hone.spec.methods import Sft
from hone_trainer.data import Prepared, _load_when_there, _save, build, split_rows
from hone_trainer.encoding import make_encoder
from hone_trainer.failure import RunFailed
from hone_trainer.tokens import histogram

GOOD = [{"prompt": f"count to {number}: ", "completion": "1 " * number} for number in range(1, 41)]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    import json

    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepared(
    tokenizer: Any, tmp_path: Path, rows: Sequence[Mapping[str, Any]], *, questions: int = 0, **sft: Any
) -> Prepared:
    dataset = Dataset(source="file:///rows.jsonl", eval_fraction=0.1)
    train, evaluation = split_rows(dataset, write(tmp_path / "rows.jsonl", rows), None, seed=1, max_eval_rows=None)
    method = Sft(**sft)
    encoder = make_encoder(tokenizer, Model(source="file:///base"), dataset, method, train)
    return build(encoder, train, evaluation, sft=method, questions=questions)


def test_a_fraction_is_held_out_by_the_seed_and_shares_no_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD)
    dataset = Dataset(source="file:///rows.jsonl", eval_fraction=0.25)
    train, held = split_rows(dataset, path, None, seed=1, max_eval_rows=None)
    again, _ = split_rows(dataset, path, None, seed=1, max_eval_rows=None)
    other, _ = split_rows(dataset, path, None, seed=2, max_eval_rows=None)
    assert held is not None
    assert (len(train), len(held)) == (30, 10)
    assert not set(train.indices.tolist()) & set(held.indices.tolist())
    assert train.indices.tolist() == again.indices.tolist() != other.indices.tolist()


def test_slices_of_one_file_serve_as_training_and_evaluation(tmp_path: Path) -> None:
    dataset = Dataset(source="file:///rows.jsonl", split="train[:90%]", eval_split="train[90%:]")
    train, held = split_rows(dataset, write(tmp_path / "rows.jsonl", GOOD), None, seed=1, max_eval_rows=2)
    assert held is not None
    assert (len(train), held.indices.tolist()) == (36, [36, 37])


def test_a_fraction_that_leaves_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    dataset = Dataset(source="file:///rows.jsonl", eval_fraction=0.9)
    with pytest.raises(RunFailed, match="leaves none to train on"):
        split_rows(dataset, write(tmp_path / "rows.jsonl", GOOD[:1]), None, seed=1, max_eval_rows=None)


def test_what_is_held_out_of_mixed_sets_is_never_trained_on_however_often_its_row_is_repeated(tmp_path: Path) -> None:
    places = [write(tmp_path / f"{name}.jsonl", GOOD[:20]) for name in "ab"]
    more = MixedDataset(source="file:///b.jsonl", weight=2.5)
    dataset = Dataset(source="file:///a.jsonl", eval_fraction=0.1, weight=0.5, mix=(more,))
    train, held = split_rows(dataset, places[0], None, mixed=places[1:], seed=1, max_eval_rows=None)
    assert held is not None
    assert not set(train.indices.tolist()) & set(held.indices.tolist())
    counts = np.bincount(train.indices, minlength=40)
    assert sorted(counts[:20].tolist()) == [0] * 11 + [1] * 9
    assert sorted(counts[20:].tolist()) == [0] * 2 + [2] * 9 + [3] * 9
    assert len(held) == 4


def test_copies_and_rows_that_are_trained_and_evaluated_on_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [*GOOD, *GOOD[:3], {**GOOD[0], "note": "columns that are not read"}])
    held = write(tmp_path / "held.jsonl", [*GOOD[5:7], {"prompt": "count to 3", "completion": ": 1 1 1 "}])
    more = MixedDataset(source="file:///more.jsonl", split="train[:1]", weight=3)
    dataset = Dataset(source="file:///train.jsonl", eval_source="file:///held.jsonl", weight=2, mix=(more,))
    rows = split_rows(dataset, train, held, mixed=[write(tmp_path / "more.jsonl", GOOD)], seed=1, max_eval_rows=None)
    encoder = make_encoder(tokenizer, Model(source="file:///base"), dataset, Sft(), rows[0])
    found = build(encoder, *rows, sft=Sft(), questions=0)
    assert found.train_counts.rows == 2 * 44 + 3
    assert found.train_counts.rows_repeated == 5
    assert found.eval_counts is not None
    assert found.eval_counts.rows_in_training == 2


def test_lengths_are_told_in_powers_of_two() -> None:
    assert histogram([1, 16, 17, 32, 33, 1000]) == {"16": 2, "32": 2, "64": 1, "1024": 1}


def test_rows_of_another_set_that_lack_the_columns_are_named(tokenizer: Any, tmp_path: Path) -> None:
    more = MixedDataset(source="file:///chats.jsonl")
    dataset = Dataset(source="file:///rows.jsonl", mix=(more,))
    chats = write(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    train, _ = split_rows(
        dataset, write(tmp_path / "rows.jsonl", GOOD), None, mixed=[chats], seed=1, max_eval_rows=None
    )
    encoder = make_encoder(tokenizer, Model(source="file:///base"), dataset, Sft(), train)
    with pytest.raises(RunFailed, match=r"chats.jsonl line 1\): has no column prompt, only messages"):
        build(encoder, train, None, sft=Sft(), questions=0)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a row without text": ({"prompt": "x", "completion": ""}, r"row 3 .*line 3\): completion is empty"),
    "a row without its column": ({"prompt": "x"}, r"row 3 .*has no column completion, only prompt"),
    "messages among texts": (
        {"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "y"}]},
        r"row 3 .*prompt holds messages, unlike the first row",
    ),
    "a row of another type": ({"prompt": 7, "completion": "y"}, r"row 3 .*prompt is of type int"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_before_anything_is_loaded(tokenizer: Any, tmp_path: Path, name: str) -> None:
    bad, expected = BAD[name]
    rows: list[Mapping[str, Any]] = [*GOOD[:2], bad, *GOOD[2:]]
    path = write(tmp_path / "rows.jsonl", rows)
    dataset, method = Dataset(source="file:///rows.jsonl"), Sft()
    train, _ = split_rows(dataset, path, None, seed=1, max_eval_rows=None)
    encoder = make_encoder(tokenizer, Model(source="file:///base"), dataset, method, train)
    with pytest.raises(RunFailed, match=expected) as caught:
        build(encoder, train, None, sft=method, questions=0)
    assert caught.value.code == TrainerExit.DATA


def test_of_many_bad_rows_the_first_are_shown_and_all_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = [*GOOD, *({"prompt": "x", "completion": " "} for _ in range(30))]
    with pytest.raises(RunFailed, match=r"has \d+ rows that cannot be learned: .*; and \d+ more"):
        prepared(tokenizer, tmp_path, rows)


def test_rows_that_are_cut_or_dropped_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = [*GOOD, *({"prompt": "x" * 100, "completion": "y"} for _ in range(8))]
    counts = prepared(tokenizer, tmp_path, rows, max_length=48).train_counts
    assert counts.rows_dropped >= 6
    assert counts.rows_truncated > counts.rows_dropped
    assert counts.rows_used + counts.rows_dropped == counts.rows


def test_when_nothing_is_left_to_learn_the_run_fails_and_says_how_long_it_must_be(
    tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": "x" * 100, "completion": "yes"}] * 20
    with pytest.raises(RunFailed, match=r"None of the 18 rows .* Raise method\.sft\.max_length to 103 tokens"):
        prepared(tokenizer, tmp_path, rows, max_length=32)


def test_packed_rows_are_the_same_tokens_as_unpacked_ones(tokenizer: Any, tmp_path: Path) -> None:
    plain = prepared(tokenizer, tmp_path, GOOD, max_length=128)
    packed = prepared(tokenizer, tmp_path, GOOD, max_length=128, packing=True)
    assert packed.fingerprint == plain.fingerprint
    apart = {tuple(row["input_ids"]) for row in plain.train.to_pylist()}
    for sequence in packed.train.to_pylist():
        borders = np.cumsum([0, *sequence["seq_lengths"]])
        for start, stop in pairwise(borders):
            assert tuple(sequence["input_ids"][start:stop]) in apart
            assert sequence["labels"][start] == -100
    assert packed.train_counts.packing_fill == pytest.approx(
        packed.train_counts.tokens / (packed.train_counts.sequences * 128)
    )


def test_a_split_strategy_loses_no_token(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "word " * number} for number in range(1, 60)]
    split = prepared(tokenizer, tmp_path, rows, max_length=64, packing=True, packing_strategy="bfd_split")
    cut = prepared(tokenizer, tmp_path, rows, max_length=64, packing=True)
    assert split.train_counts.tokens_truncated == 0 < cut.train_counts.tokens_truncated
    assert sum(len(row["input_ids"]) for row in split.train.to_pylist()) == split.train_counts.tokens


def test_other_ranks_read_what_the_first_prepared(tokenizer: Any, tmp_path: Path) -> None:
    first = prepared(tokenizer, tmp_path, GOOD, packing=True, max_length=64)
    _save(first, tmp_path / "data")
    other = _load_when_there(tmp_path / "data")
    assert other.train.equals(first.train)
    assert other.evaluation is not None
    assert other.evaluation.equals(first.evaluation)
    assert (other.fingerprint, other.train_counts) == (first.fingerprint, first.train_counts)


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize(
    ("row", "asked", "expected"),
    [
        ({"prompt": "2+2=", "completion": "4"}, "<s>2+2=", "4"),
        ({"messages": [*CHAT, {"role": "user", "content": "bye"}, CHAT[1]]}, "<s>U:hi;A:yo</s>U:bye;A:", "yo"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "<s>U:hi;A:", "yo"),
        ({"text": "abcdef"}, "<s>abc", "def"),
    ],
)
def test_sample_prompts_are_what_generation_sees(
    tokenizer: Any, tmp_path: Path, row: dict[str, Any], asked: str, expected: str
) -> None:
    [question] = prepared(tokenizer, tmp_path, [row] * 10, questions=1).questions
    assert tokenizer.decode(question.prompt_ids) == asked
    assert question.expected == expected
