"""Token rows in flat arrays: cutting, dropping, splitting and packing them, with everything that is lost counted.

Numpy and Arrow only. Called by data.py, pairs.py and prompts.py; the arrays become the data set that the trainer reads.
Tokens and texts lie in temporary files that are mapped: of a large data set only its borders, 24 bytes a row, are in
memory.
"""

import mmap
import tempfile
import weakref
from array import array
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hone_trainer.encoding import Encoded

IntArray = npt.NDArray[np.int64]
IGNORED = -100
"""Label of a token that is not learned."""


class Pool:
    """Rows of tokens that grow in a temporary file."""

    _type: type[np.generic] = np.int32

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the pool)
        weakref.finalize(self, self._file.close)
        self._lengths = array("q", [0])

    def add(self, numbers: npt.NDArray[Any]) -> None:
        """One row more."""
        self._file.write(np.ascontiguousarray(numbers, dtype=self._type).data)
        self._lengths.append(len(numbers))

    @property
    def offsets(self) -> IntArray:
        """Borders of the rows: row i is numbers[offsets[i]:offsets[i + 1]]."""
        return np.cumsum(np.frombuffer(self._lengths, dtype=np.int64))

    def numbers(self) -> npt.NDArray[Any]:
        """All of them, mapped."""
        self._file.flush()
        if not self._file.tell():
            return np.zeros(0, dtype=self._type)
        return np.frombuffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ), dtype=self._type)


class TextPool(Pool):
    """The same of texts, as UTF-8."""

    _type = np.uint8

    def add_text(self, text: str) -> None:
        """One text more; what is no character becomes a question mark."""
        self.add(np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8))

    def column(self) -> pa.LargeStringArray:
        """All of them, mapped."""
        offsets, data = self.offsets, self.numbers()
        return pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(data))


class Prints:
    """A fingerprint of each row, so that equal ones are found: 64 bits, so among a million rows none is taken for
    another's copy by chance (1 in 37 million)."""

    def __init__(self) -> None:
        self._rows, self._prints = array("q"), array("Q")

    def add(self, number: int, *parts: npt.NDArray[np.generic]) -> None:
        """One row: its number and what is in it."""
        found = blake2b(digest_size=8)
        for part in parts:
            found.update(len(part).to_bytes(8, "little"))
            found.update(np.ascontiguousarray(part).data)
        self._rows.append(number)
        self._prints.append(int.from_bytes(found.digest(), "little"))

    @property
    def num_repeated(self) -> int:
        """Rows that are equal to an earlier one. A row that its data set's weight repeats is one row."""
        first = np.unique(np.frombuffer(self._rows, dtype=np.int64), return_index=True)[1]
        prints = self._array[first]
        return len(prints) - len(np.unique(prints))

    def num_in(self, other: "Prints") -> int:
        """Rows that are equal to one of the other's."""
        return int(np.isin(self._array, other._array).sum())

    @property
    def _array(self) -> npt.NDArray[np.uint64]:
        return np.frombuffer(self._prints, dtype=np.uint64)


def histogram(lengths: Iterable[int]) -> dict[str, int]:
    """How many rows have at most so many tokens, and more than the figure before: powers of two from 16 on."""
    found = np.asarray(list(lengths) or [0])
    tops = 2 ** np.maximum(4, np.ceil(np.log2(np.maximum(found, 1)))).astype(np.int64)
    return {str(top): int(count) for top, count in zip(*np.unique(tops, return_counts=True), strict=True)}


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Rows of tokens, one after the other: row i is ids[offsets[i]:offsets[i + 1]]."""

    ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    offsets: IntArray
    rows: IntArray
    """Which row of the data set each came from, from 1."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> IntArray:
        """Tokens of each row."""
        return np.diff(self.offsets)

    def digest(self) -> str:
        """SHA-256 over ids, labels and borders: equal where training sees the same."""
        found = sha256()
        for numbers in (self.ids, self.labels, self.offsets.astype(np.int64)):
            found.update(np.ascontiguousarray(numbers).data)
        return found.hexdigest()


@dataclass(kw_only=True)
class Counts:
    """What became of the rows and tokens of one data set."""

    rows: int = 0
    rows_used: int = 0
    rows_truncated: int = 0
    rows_dropped: int = 0
    """Rows with nothing left to learn within max_length."""
    rows_alike: int | None = None
    """Pairs whose two sides are equal within max_length; None where rows are no pairs."""
    rows_merged_at_boundary: int = 0
    rows_repeated: int = 0
    """Rows that are equal to an earlier one."""
    rows_in_training: int | None = None
    """Evaluation rows that are training rows too."""
    longest_row: int = 0
    """Tokens, before it is cut."""
    tokens: int = 0
    tokens_truncated: int = 0
    tokens_dropped: int = 0
    tokens_learned: int = 0
    sequences: int = 0
    packing_fill: float | None = None
    shortest_useful_length: int | None = field(default=None, repr=False)
    """Least max_length with which some dropped row would have had something to learn."""
    lengths: dict[str, int] = field(default_factory=dict, repr=False)
    """See histogram; tokens of a row, or of the longer side of a pair, before it is cut."""

    def metrics(self) -> dict[str, float]:
        """For the report; without what does not apply."""
        values = {name: value for name, value in vars(self).items() if name != "shortest_useful_length"}
        return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


class Collector:
    """Takes encoded rows, cuts and drops them as max_length asks, and counts."""

    def __init__(self, *, max_length: int, eos: int, split: bool) -> None:
        self.counts = Counts()
        self._max_length = max_length
        self._eos = eos
        self._split = split
        self._ids, self._labels = Pool(), Pool()
        self._rows, self._lengths = array("q"), array("q")
        self.prints = Prints()

    def add(self, row: Encoded, number: int) -> None:
        """One row of the data set, with its number from 1."""
        self.counts.rows += 1
        self.counts.tokens += len(row.ids)
        self.counts.longest_row = max(self.counts.longest_row, len(row.ids))
        ids = np.asarray(row.ids, dtype=np.int32)
        learned = np.asarray(row.learned, dtype=bool)
        self._lengths.append(len(ids))
        self.prints.add(number, ids, learned)
        learned[:1] = False  # nothing comes before it, so it cannot be predicted
        if self._split:
            kept = sum([self._keep(ids[piece], learned[piece], number) for piece in self._pieces(len(ids))])
        else:
            kept = self._keep(*self._cut(ids, learned), number)
        self.counts.rows_used += bool(kept)
        if not kept:
            self.counts.rows_dropped += 1
            self._note_useful(learned)

    def tokens(self) -> Tokens:
        """Everything that was kept."""
        self.counts.sequences = len(self._rows)
        self.counts.rows_repeated = self.prints.num_repeated
        self.counts.lengths = histogram(self._lengths)
        return Tokens(
            ids=self._ids.numbers(),
            labels=self._labels.numbers(),
            offsets=self._ids.offsets,
            rows=np.frombuffer(self._rows, dtype=np.int64) if self._rows else np.zeros(0, dtype=np.int64),
        )

    def _pieces(self, length: int) -> list[slice]:
        borders = [*range(0, length, self._max_length), length]
        if len(borders) > 2 and length - borders[-2] == 1:  # a token alone has nothing before it and is never learned
            borders[-2] -= 1
        return [slice(start, stop) for start, stop in pairwise(borders)]

    def _cut(
        self, ids: npt.NDArray[np.int32], learned: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Cut at max_length. A cut answer still ends with the stop token, or the model learns to go on for ever."""
        limit = self._max_length
        if len(ids) <= limit:
            return ids, learned
        self.counts.rows_truncated += 1
        self.counts.tokens_truncated += len(ids) - limit
        ids, learned = ids[:limit].copy(), learned[:limit].copy()
        if learned[-1]:
            ids[-1] = self._eos
            learned[-1] = learned[:-1].any()  # a lone stop token would teach to say nothing
        return ids, learned

    def _keep(self, ids: npt.NDArray[np.int32], learned: npt.NDArray[np.bool_], number: int) -> bool:
        learned = learned.copy()
        learned[:1] = False
        if not learned.any():
            self.counts.tokens_dropped += len(ids)
            return False
        self._ids.add(ids)
        self._labels.add(np.where(learned, ids, IGNORED))
        self._rows.append(number)
        self.counts.tokens_learned += int(learned.sum())
        return True

    def _note_useful(self, learned: npt.NDArray[np.bool_]) -> None:
        if learned.any():
            needed = int(learned.argmax()) + 2  # the first token of the answer and a stop token
            self.counts.shortest_useful_length = min(needed, self.counts.shortest_useful_length or needed)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Rows put together: sequence i is made of the token rows in bins[i]."""

    tokens: Tokens
    bins: list[list[int]]

    def fill(self, max_length: int) -> float:
        """Share of the places in all sequences that hold a token."""
        return float(self.tokens.offsets[-1] / (len(self.bins) * max_length))


def pack(tokens: Tokens, *, max_length: int) -> Packed:
    """Best-fit decreasing: longest first, each into the fullest sequence that still has room (as TRL's `bfd`)."""
    order = np.argsort(-tokens.lengths, kind="stable")
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []
    lengths = tokens.lengths.tolist()
    for row in order.tolist():
        length = lengths[row]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            bins.append([])
            chosen, room = len(bins) - 1, max_length
        else:
            room = rooms[place]
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(place)
        bins[chosen].append(row)
        if left := room - length:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(chosen)
    return Packed(tokens=tokens, bins=bins)


def gather(tokens: Tokens, order: Iterable[int]) -> Tokens:
    """The same rows in another order."""
    listed, ids, labels = list(order), Pool(), Pool()
    for row in listed:
        span = slice(int(tokens.offsets[row]), int(tokens.offsets[row + 1]))
        ids.add(tokens.ids[span])
        labels.add(tokens.labels[span])
    return Tokens(ids=ids.numbers(), labels=labels.numbers(), offsets=ids.offsets, rows=tokens.rows[listed])
