"""Token rows in flat arrays: cutting, dropping, splitting and packing them, with everything that is lost counted.

Pure and numpy only. Called by data.py; the arrays become the data set that the trainer reads.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from hone_trainer.encoding import Encoded

IntArray = npt.NDArray[np.int64]
IGNORED = -100
"""Label of a token that is not learned."""


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

    @property
    def num_learned(self) -> int:
        """Tokens that the loss is taken over."""
        return int((self.labels != IGNORED).sum())

    def digest(self) -> str:
        """SHA-256 over ids, labels and borders: equal where training sees the same."""
        found = sha256()
        for array in (self.ids, self.labels, self.offsets.astype(np.int64)):
            found.update(np.ascontiguousarray(array).tobytes())
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

    def metrics(self) -> dict[str, float]:
        """For the report; without what does not apply."""
        values = {name: value for name, value in vars(self).items() if name != "shortest_useful_length"}
        return {name: float(value) for name, value in values.items() if value is not None}


class Collector:
    """Takes encoded rows, cuts and drops them as max_length asks, and counts."""

    def __init__(self, *, max_length: int, eos: int, split: bool) -> None:
        self.counts = Counts()
        self._max_length = max_length
        self._eos = eos
        self._split = split
        self._ids: list[npt.NDArray[np.int32]] = []
        self._labels: list[npt.NDArray[np.int32]] = []
        self._rows: list[int] = []

    def add(self, row: Encoded, number: int) -> None:
        """One row of the data set, with its number from 1."""
        self.counts.rows += 1
        self.counts.tokens += len(row.ids)
        self.counts.longest_row = max(self.counts.longest_row, len(row.ids))
        ids = np.asarray(row.ids, dtype=np.int32)
        learned = np.asarray(row.learned, dtype=bool)
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
        offsets = np.cumsum([0, *(len(ids) for ids in self._ids)], dtype=np.int64)
        empty = [np.zeros(0, dtype=np.int32)]
        tokens = Tokens(
            ids=np.concatenate(self._ids or empty),
            labels=np.concatenate(self._labels or empty),
            offsets=offsets,
            rows=np.asarray(self._rows, dtype=np.int64),
        )
        self.counts.tokens_learned = tokens.num_learned
        self.counts.sequences = len(tokens)
        return tokens

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
        self._ids.append(ids)
        self._labels.append(np.where(learned, ids, IGNORED).astype(np.int32))
        self._rows.append(number)
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
    listed = list(order)
    spans = [slice(int(tokens.offsets[i]), int(tokens.offsets[i + 1])) for i in listed]
    return Tokens(
        ids=np.concatenate([tokens.ids[span] for span in spans]),
        labels=np.concatenate([tokens.labels[span] for span in spans]),
        offsets=np.cumsum([0, *(span.stop - span.start for span in spans)], dtype=np.int64),
        rows=tokens.rows[listed],
    )
