"""Preference rows: what becomes of each form, what is cut, left out and counted, what is refused in what words."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hone.run import TrainerExit
from hone.spec import Columns, Dataset, Model
from hone_trainer.data import Prepared, _load_when_there, _save, split_rows
from hone_trainer.failure import RunFailed
from hone_trainer.pairs import Limit, make_pair_encoder, prepare_pairs, tell_cut_pairs, tell_whole_pairs

from .conftest import preferences, write_rows

BOS, EOS = "<s>", "</s>"
ASK, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "yo"), ("assistant", "no"))
)
TEXT = {"prompt": "ask: ", "chosen": "yes", "rejected": "no"}


def prepared(
    tokenizer: Any,
    tmp_path: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    scores: bool = False,
    max_length: int = 64,
    columns: Mapping[str, Any] | None = None,
    **model: Any,
) -> Prepared:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    dataset = Dataset(source="file:///rows.jsonl", columns=Columns(**(columns or {})))
    train, _ = split_rows(dataset, file, None, seed=1, max_eval_rows=None)
    encoder = make_pair_encoder(tokenizer, Model(source="file:///base", **model), dataset, train, scores=scores)
    name = "reward" if scores else "dpo"
    limit = Limit(max_length=max_length, cuts=not scores, field=f"method.{name}.max_length")
    return prepare_pairs(encoder, limit, train, None)


def sides(tokenizer: Any, found: Prepared, row: int = 0) -> list[tuple[str, str]]:
    """Prompt and answer of each side, as text."""
    pair = found.train.to_pylist()[row]
    return [
        (
            tokenizer.decode(pair[f"{side}_ids"][: pair[f"{side}_start"]]),
            tokenizer.decode(pair[f"{side}_ids"][pair[f"{side}_start"] :]),
        )
        for side in ("chosen", "rejected")
    ]


FORMS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "texts": (TEXT, [(f"{BOS}ask: ", f"yes{EOS}"), (f"{BOS}ask: ", f"no{EOS}")]),
    "texts that begin with their prompt": (
        {"chosen": "ask: yes", "rejected": "ask: no"},
        [(f"{BOS}ask:", f" yes{EOS}"), (f"{BOS}ask:", f" no{EOS}")],
    ),
    "messages": (
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
        [(f"{BOS}U:hi;A:", f"yo{EOS}"), (f"{BOS}U:hi;A:", f"no{EOS}")],
    ),
    "conversations": (
        {"chosen": [ASK, YES], "rejected": [ASK, NO]},
        [(f"{BOS}U:hi;A:", f"yo{EOS}"), (f"{BOS}U:hi;A:", f"no{EOS}")],
    ),
    "conversations with the question beside them as a text": (
        {"prompt": "hi", "chosen": [ASK, YES], "rejected": [ASK, NO]},
        [(f"{BOS}U:hi;A:", f"yo{EOS}"), (f"{BOS}U:hi;A:", f"no{EOS}")],
    ),
    "conversations of several turns": (
        {"chosen": [ASK, YES, ASK, YES], "rejected": [ASK, YES, ASK, NO]},
        [(f"{BOS}U:hi;A:yo{EOS}U:hi;A:", f"yo{EOS}"), (f"{BOS}U:hi;A:yo{EOS}U:hi;A:", f"no{EOS}")],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_has_one_bos_and_both_answers_end_with_the_stop_token(
    tokenizer: Any, tmp_path: Path, name: str
) -> None:
    row, expected = FORMS[name]
    assert sides(tokenizer, prepared(tokenizer, tmp_path, [row])) == expected


def test_a_reward_model_reads_the_whole_of_both_sides(tokenizer: Any, tmp_path: Path) -> None:
    found = prepared(tokenizer, tmp_path, [TEXT], scores=True)
    assert ["".join(side) for side in sides(tokenizer, found)] == [f"{BOS}ask: yes{EOS}", f"{BOS}ask: no{EOS}"]


def test_a_system_prompt_is_put_before_both_sides(tokenizer: Any, tmp_path: Path) -> None:
    row = {"chosen": [ASK, YES], "rejected": [ASK, NO]}
    found = prepared(tokenizer, tmp_path, [row], system_prompt="be kind")
    assert [prompt for prompt, _ in sides(tokenizer, found)] == [f"{BOS}S:be kind;U:hi;A:"] * 2


def test_columns_may_have_other_names(tokenizer: Any, tmp_path: Path) -> None:
    row = {"question": "ask: ", "good": "yes", "bad": "no"}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert sides(tokenizer, prepared(tokenizer, tmp_path, [row], columns=columns))[1][1] == f"no{EOS}"


def test_a_long_answer_is_cut_and_still_ends_with_the_stop_token(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{**TEXT, "chosen": "y" * 40}, TEXT]
    found = prepared(tokenizer, tmp_path, rows, max_length=16)
    assert sides(tokenizer, found)[0] == (f"{BOS}ask: ", "y" * 9 + EOS)
    counts = found.train_counts
    assert (counts.rows_truncated, counts.rows_dropped, counts.tokens_truncated) == (1, 0, 31)
    assert counts.tokens_learned == 10 + 3 + 4 + 3
    assert "1 cut at max_length: 31 of" in tell_cut_pairs(counts)[1][0]


def test_answers_that_differ_only_behind_the_cut_teach_nothing_and_are_dropped(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{**TEXT, "chosen": "y" * 40, "rejected": "y" * 40 + "x"}, TEXT]
    counts = prepared(tokenizer, tmp_path, rows, max_length=16).train_counts
    assert (counts.rows_used, counts.rows_dropped, counts.rows_alike) == (1, 1, 1)
    assert "in 1 of them both answers are equal there" in tell_cut_pairs(counts)[1][0]


def test_a_prompt_that_leaves_no_room_is_dropped_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    counts = prepared(tokenizer, tmp_path, [{**TEXT, "prompt": "x" * 40}, TEXT], max_length=16).train_counts
    assert (counts.rows, counts.rows_used, counts.rows_dropped) == (2, 1, 1)
    assert counts.tokens == counts.tokens_truncated + counts.tokens_dropped + 19


def test_for_a_reward_model_a_long_pair_is_left_out_whole(tokenizer: Any, tmp_path: Path) -> None:
    found = prepared(tokenizer, tmp_path, [{**TEXT, "rejected": "n" * 40}, TEXT], scores=True, max_length=16)
    assert (found.train_counts.rows_used, found.train_counts.rows_dropped) == (1, 1)
    assert found.train["rows"].to_pylist() == [[2]]
    assert (
        "1 of 2 pairs left out: they are longer than max_length (the longest has 47"
        in tell_whole_pairs(found.train_counts)[1][0]
    )


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (False, r"None of the 4 pairs .* anything left to learn .* Raise method\.dpo\.max_length to 43 tokens"),
        (True, r"None of the 4 pairs .* fits .* Raise method\.reward\.max_length to 45 tokens"),
    ],
)
def test_when_every_pair_is_too_long_the_run_fails_and_says_how_long_it_must_be(
    tokenizer: Any, tmp_path: Path, scores: bool, words: str
) -> None:
    rows = [{**TEXT, "prompt": "x" * 40}] * 4
    with pytest.raises(RunFailed, match=words) as caught:
        prepared(tokenizer, tmp_path, rows, scores=scores, max_length=16)
    assert caught.value.code == TrainerExit.DATA


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "equal sides": ({**TEXT, "rejected": "yes"}, "chosen and rejected are equal, so neither is preferred"),
    "an empty answer": ({**TEXT, "chosen": " "}, "chosen is empty"),
    "no answer": ({**TEXT, "rejected": None}, "rejected is absent where a text is expected"),
    "a missing column": ({"prompt": "x", "chosen": "y"}, "has no column rejected, only prompt, chosen"),
    "messages among texts": ({**TEXT, "chosen": [YES]}, "chosen is of type list where a text is expected"),
    "a row without the prompt of the others": ({"chosen": "y", "rejected": "n"}, "has no column prompt"),
    "a number": ({**TEXT, "chosen": 7}, "chosen is of type int where a text is expected"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_pair_is_named_before_anything_is_loaded(tokenizer: Any, tmp_path: Path, name: str) -> None:
    bad, words = BAD[name]
    with pytest.raises(
        RunFailed, match=rf"has 1 row that cannot be learned: row 3 \(rows\.jsonl line 3\): {words}"
    ) as caught:
        prepared(tokenizer, tmp_path, [*preferences(2), bad, *preferences(2)])
    assert caught.value.code == TrainerExit.DATA


BAD_CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "equal conversations": ({"chosen": [ASK, YES], "rejected": [ASK, YES]}, "are equal"),
    "no common question": ({"chosen": [ASK, YES], "rejected": [NO, YES]}, "so they share no prompt"),
    "a side without an answer": ({"chosen": [ASK, YES], "rejected": [ASK]}, "rejected has no assistant turn"),
    "a text among conversations": ({"chosen": "yes", "rejected": [ASK, NO]}, "where a list of messages is expected"),
    "a message without text": ({"chosen": [ASK, {**YES, "content": ""}], "rejected": [ASK, NO]}, "has no text"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_a_bad_pair_of_conversations_is_named_before_anything_is_loaded(
    tokenizer: Any, tmp_path: Path, name: str
) -> None:
    bad, words = BAD_CHATS[name]
    with pytest.raises(RunFailed, match=words):
        prepared(tokenizer, tmp_path, [{"chosen": [ASK, YES], "rejected": [ASK, NO]}, bad])


def test_a_set_without_preferences_is_refused_with_the_columns_that_are_needed(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="has the columns prompt, completion; chosen and rejected are needed"):
        prepared(tokenizer, tmp_path, [{"prompt": "x", "completion": "y"}])


def test_a_template_is_asked_for_where_there_are_conversations(tokenizer: Any, tmp_path: Path) -> None:
    from copy import deepcopy

    bare = deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(RunFailed, match="has no chat template"):
        prepared(bare, tmp_path, [{"chosen": [ASK, YES], "rejected": [ASK, NO]}])


@pytest.mark.parametrize(
    ("rows", "columns"), [([{**TEXT, "margin": 2}], {}), ([{**TEXT, "gap": 2}], {"margin": "gap"})]
)
def test_a_margin_is_read_where_rows_have_one(
    tokenizer: Any, tmp_path: Path, rows: list[dict[str, Any]], columns: dict[str, str]
) -> None:
    assert prepared(tokenizer, tmp_path, rows, scores=True, columns=columns).train["margin"].to_pylist() == [2.0]
    assert "margin" not in prepared(tokenizer, tmp_path, [{**TEXT, "margin": 2}]).train.column_names


@pytest.mark.parametrize("value", [None, "wide", True])
def test_a_margin_that_is_no_number_is_refused(tokenizer: Any, tmp_path: Path, value: Any) -> None:
    with pytest.raises(RunFailed, match="where a number is expected"):
        prepared(tokenizer, tmp_path, [{**TEXT, "margin": 1.5}, {**TEXT, "margin": value}], scores=True)


def test_a_margin_column_that_is_not_there_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="has no column gap") as caught:
        prepared(tokenizer, tmp_path, [TEXT], scores=True, columns={"margin": "gap"})
    assert caught.value.code == TrainerExit.DATA


def test_other_ranks_read_the_pairs_that_the_first_prepared(tokenizer: Any, tmp_path: Path) -> None:
    first = prepared(tokenizer, tmp_path, [{**row, "margin": 1} for row in preferences(9)], scores=True)
    _save(first, tmp_path / "data")
    other = _load_when_there(tmp_path / "data")
    assert other.train.equals(first.train)
    assert (other.fingerprint, other.train_counts) == (first.fingerprint, first.train_counts)


def test_the_fingerprint_tells_sides_and_margins_apart(tokenizer: Any, tmp_path: Path) -> None:
    flipped = {**TEXT, "chosen": TEXT["rejected"], "rejected": TEXT["chosen"]}
    rows: list[dict[str, Any]] = [TEXT, flipped, {**TEXT, "margin": 1}, {**TEXT, "margin": 2}]
    found = {prepared(tokenizer, tmp_path, [row], scores=True).fingerprint for row in rows}
    assert len(found) == len(rows)
    assert prepared(tokenizer, tmp_path, [TEXT], scores=True).fingerprint in found
