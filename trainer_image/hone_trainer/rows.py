"""Rows of a data set: the files of a split, a slice of them, several data sets in one.

Called by data.py. Everything that is wrong with the files themselves is said here, before a model is loaded.
"""

import glob
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hone.run import TrainerExit
from hone.spec.sources import DATA_SUFFIXES
from hone.spec.splits import HOW, Slice, read_split
from hone_trainer.failure import RunFailed
from hone_trainer.files import Part, Row, open_file

_NO_ROWS = ("MANIFEST.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")


BATCH_CHARACTERS = 16 << 20
"""Text that is held at once, whatever the number of rows."""


@dataclass(frozen=True)
class Rows:
    """Rows of one or more files, or a selection of them; read when they are asked for."""

    parts: Sequence[Part]
    indices: npt.NDArray[np.int64]
    source: str
    """As the request named it, for messages."""

    def __len__(self) -> int:
        return len(self.indices)

    def select(self, positions: npt.NDArray[np.int64]) -> "Rows":
        """The rows at these positions, in this order."""
        return Rows(self.parts, self.indices[positions], self.source)

    def head(self, count: int | None) -> "Rows":
        """The first so many rows."""
        return self if count is None else Rows(self.parts, self.indices[:count], self.source)

    def batches(self, size: int) -> Iterator[tuple[int, list[Row]]]:
        """Position of the first row, and the rows, batch by batch: fewer than `size` where they are long."""
        start, rows, held = 0, list[Row](), 0
        for position in range(len(self)):
            rows.append(self._row(position))
            held += _num_characters(rows[-1])
            if len(rows) == size or held >= BATCH_CHARACTERS:
                yield start, rows
                start, rows, held = position + 1, [], 0
        if rows:
            yield start, rows

    def first(self) -> Row:
        """The first row; there is one."""
        return self._row(0)

    def place(self, position: int) -> str:
        """Where a row stands, for people: `row 17 (train.jsonl line 18)`."""
        part, index = self._locate(position)
        return f"row {int(self.indices[position]) + 1} ({part.path.name}{part.place(index)})"

    def _row(self, position: int) -> Row:
        part, index = self._locate(position)
        return part.read(index)

    def _locate(self, position: int) -> tuple[Part, int]:
        index = int(self.indices[position])
        number = bisect_right(self._starts, index) - 1
        return self.parts[number], index - self._starts[number]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(map(len, self.parts))]


def _num_characters(value: Any) -> int:
    """Of all texts in a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_characters, value.values()))
    return sum(map(_num_characters, value)) if isinstance(value, list) else 0


def open_rows(path: Path, *, source: str, split: str, field: str = "dataset.split") -> Rows:
    """The rows of one split, of a slice of it (`train[:10%]`), or of several (`train+test[:500]`).

    Raises RunFailed (USER) for a wrong split, (DATA) for files that cannot be read or are empty.
    """
    try:
        slices = read_split(split)
    except ValueError as error:
        raise RunFailed(TrainerExit.USER, f"{field}: {str(error)!r} is not a split.", fix=HOW.capitalize()) from error
    return joined([_open_one(path, source, part, field) for part in slices])


def joined(sets: Sequence[Rows], weights: Sequence[float] = (), *, seed: int = 0) -> Rows:
    """The rows of several sets as one, in their order.

    A weight is how often each row of its set is there: 2 is twice; 0.5 is half of the rows, chosen by the seed.
    """
    chance, indices, start = np.random.default_rng(seed), [], 0
    for rows, weight in zip(sets, weights or [1.0] * len(sets), strict=True):
        whole, count = int(weight), round(len(rows) * (weight % 1))
        chosen = np.sort(chance.permutation(len(rows))[:count])
        indices += [rows.indices + start] * whole + [rows.indices[chosen] + start]
        start += sum(map(len, rows.parts))
    parts = [part for rows in sets for part in rows.parts]
    return Rows(parts, np.concatenate(indices), " and ".join(dict.fromkeys(rows.source for rows in sets)))


def _open_one(path: Path, source: str, part: Slice, field: str) -> Rows:
    parts = [open_file(file) for file in _files(path, split=part.name, field=field)]
    count = sum(len(part) for part in parts)
    if count == 0:
        raise RunFailed(TrainerExit.DATA, f"The data set {source} is empty: it holds no row.", fix="Check the file.")
    start, stop = _bound(part.start, count, 0), _bound(part.stop, count, count)
    if start >= stop:
        shown = f"{part.name}[{part.start or ''}:{part.stop or ''}]"
        raise RunFailed(TrainerExit.USER, f"{field}: {shown} selects nothing: there are {count:,} rows.")
    return Rows(parts, np.arange(start, stop, dtype=np.int64), source)


def _bound(text: str | None, count: int, default: int) -> int:
    """A border of a slice as a row; negative ones are counted from the end."""
    if text is None:
        return default
    number = round(count * int(text[:-1]) / 100) if text.endswith("%") else int(text)
    return max(0, min(count, number + count if text.startswith("-") else number))


def _files(path: Path, *, split: str, field: str) -> list[Path]:
    if glob.has_magic(path.name) and not path.exists():
        return _matching(path, split=split, field=field)
    if path.is_file():
        if split != "train":
            raise RunFailed(
                TrainerExit.USER, f"{field}: {path.name} is one file, so its only split is train, not {split!r}."
            )
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in DATA_SUFFIXES and file.name not in _NO_ROWS and file.is_file()
    )
    if not found:
        raise RunFailed(TrainerExit.DATA, f"The data set {path} is empty: no {', '.join(DATA_SUFFIXES)} file is in it.")
    if named := [file for file in found if _belongs(file.relative_to(path), split)]:
        return named
    if split == "train" and not any(_belongs(file.relative_to(path), name) for file in found for name in _SPLIT_NAMES):
        return found
    names = ", ".join(sorted({file.stem for file in found})[:10])
    raise RunFailed(TrainerExit.USER, f"{field}: {path} has no split {split!r}; its files are {names}.")


def _matching(pattern: Path, *, split: str, field: str) -> list[Path]:
    if split != "train":
        raise RunFailed(TrainerExit.USER, f"{field}: what {pattern.name} matches is all training rows, not {split!r}.")
    if found := sorted(path for path in pattern.parent.glob(pattern.name) if path.is_file()):
        return found
    raise RunFailed(TrainerExit.DATA, f"No file in {pattern.parent} matches {pattern.name}.")


def _belongs(file: Path, split: str) -> bool:
    return split in file.parts[:-1] or re.match(rf"{re.escape(split)}([-_.]\d|$)", file.stem) is not None
