import tracemalloc

import numpy as np
import pytest

from hone_trainer.encoding import Encoded
from hone_trainer.tokens import IGNORED, Collector, Packed, TextPool, Tokens, pack

EOS = 1


def row(prompt: int, answer: int) -> Encoded:
    """A prompt of tens and an answer of hundreds that ends with the stop token."""
    ids = [10 + i for i in range(prompt)] + [100 + i for i in range(answer - 1)] + [EOS]
    return Encoded(ids, [False] * prompt + [True] * answer)


def collect(*rows: Encoded, max_length: int, split: bool = False) -> tuple[Tokens, Collector]:
    collector = Collector(max_length=max_length, eos=EOS, split=split)
    for number, encoded in enumerate(rows, start=1):
        collector.add(encoded, number)
    return collector.tokens(), collector


def test_a_row_that_fits_is_kept_whole_and_learns_its_answer() -> None:
    tokens, collector = collect(row(3, 4), max_length=8)
    assert tokens.labels.tolist() == [IGNORED] * 3 + [100, 101, 102, EOS]
    assert (collector.counts.rows_used, collector.counts.rows_truncated, collector.counts.tokens_learned) == (1, 0, 4)


def test_the_last_learned_token_of_a_cut_answer_is_the_stop_token() -> None:
    tokens, collector = collect(row(3, 40), max_length=8)
    assert tokens.ids.tolist() == [10, 11, 12, 100, 101, 102, 103, EOS]
    assert tokens.labels[-1] == EOS
    assert (collector.counts.rows_truncated, collector.counts.tokens_truncated) == (1, 35)


@pytest.mark.parametrize("prompt", [8, 9, 50, 7])
def test_a_row_with_nothing_left_to_learn_is_dropped_and_counted(prompt: int) -> None:
    # With a prompt of 7 only the stop token would be left of the answer: that teaches to say nothing.
    tokens, collector = collect(row(prompt, 5), row(2, 3), max_length=8)
    assert tokens.rows.tolist() == [2]
    assert (collector.counts.rows_dropped, collector.counts.tokens_dropped) == (1, 8)
    assert collector.counts.shortest_useful_length == prompt + 2


def test_the_first_token_of_a_row_is_never_learned() -> None:
    tokens, _ = collect(Encoded([5, 6, EOS], [True] * 3), max_length=8)
    assert tokens.labels.tolist() == [IGNORED, 6, EOS]


def test_splitting_keeps_every_token_of_a_long_row() -> None:
    tokens, collector = collect(Encoded([*range(2, 21), EOS], [True] * 20), max_length=8, split=True)
    assert tokens.ids.tolist() == [*range(2, 21), EOS]
    assert tokens.lengths.tolist() == [8, 8, 4]
    assert tokens.rows.tolist() == [1, 1, 1]
    assert collector.counts.tokens_truncated == 0


def test_tokens_are_all_accounted_for() -> None:
    rng = np.random.default_rng(0)
    rows = [row(int(p), int(a)) for p, a in rng.integers(1, 30, (200, 2))]
    tokens, collector = collect(*rows, max_length=32)
    counts = collector.counts
    assert len(tokens.ids) + counts.tokens_dropped + counts.tokens_truncated == counts.tokens
    assert counts.rows_used + counts.rows_dropped == counts.rows == 200


def make_tokens(lengths: list[int]) -> Tokens:
    total = sum(lengths)
    return Tokens(
        ids=np.arange(total, dtype=np.int32),
        labels=np.arange(total, dtype=np.int32),
        offsets=np.cumsum([0, *lengths]),
        rows=np.arange(1, len(lengths) + 1),
    )


def test_packing_holds_every_row_once_and_never_overflows() -> None:
    rng = np.random.default_rng(1)
    tokens = make_tokens(rng.integers(1, 129, 3000).tolist())
    packed = pack(tokens, max_length=128)
    assert sorted(row for group in packed.bins for row in group) == list(range(3000))
    assert max(sum(int(tokens.lengths[row]) for row in group) for group in packed.bins) <= 128


def test_packing_is_98_percent_full_on_lengths_as_they_are_in_life() -> None:
    lengths = np.clip(np.random.default_rng(2).lognormal(4.0, 0.6, 4000), 8, 512).astype(int)
    packed = pack(make_tokens(lengths.tolist()), max_length=512)
    assert packed.fill(512) >= 0.98


def test_packing_fills_as_trl_does() -> None:
    from datasets import Dataset
    from trl import pack_dataset

    lengths = np.random.default_rng(3).integers(1, 60, 500).tolist()
    theirs = pack_dataset(Dataset.from_dict({"input_ids": [[1] * length for length in lengths]}), 64, "bfd")
    ours = pack(make_tokens(lengths), max_length=64)
    assert len(ours.bins) == len(theirs)


def test_fill_is_tokens_over_places() -> None:
    assert Packed(tokens=make_tokens([3, 5]), bins=[[0], [1]]).fill(8) == pytest.approx(0.5)


def test_the_digest_changes_with_a_token_a_label_or_a_border() -> None:
    base = make_tokens([3, 5])
    other_border = make_tokens([4, 4])
    relabelled = Tokens(
        ids=base.ids, labels=np.where(base.labels == 2, IGNORED, base.labels), offsets=base.offsets, rows=base.rows
    )
    assert len({base.digest(), other_border.digest(), relabelled.digest()}) == 3
    assert base.digest() == make_tokens([3, 5]).digest()


def test_texts_lie_in_a_file_and_come_back_as_a_column() -> None:
    texts = ["", "ä", "\ud800", *(f"{number} " + "x" * 1000 for number in range(50_000))]
    tracemalloc.start()
    pool = TextPool()
    for text in texts:
        pool.add_text(text)
    column = pool.column()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6
    assert column[:3].to_pylist() == ["", "ä", "?"] and column[3:].to_pylist() == texts[3:]
    assert TextPool().column().to_pylist() == []
