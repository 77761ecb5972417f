"""Rows of a data set, as they lie in files: JSON Lines, JSON, CSV, Parquet; a file or a directory of them.

Called by data.py. Rows keep the file and line they come from, so that a message can say where to look. Everything
that is
wrong with the files themselves is said here, before a model is loaded.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hone.run import TrainerExit
from hone_trainer.failure import RunFailed

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")
_NO_ROWS = ("MANIFEST.json", "dataset_info.json", "dataset_infos.json", "state.json")
_SPLIT = re.compile(r"(?P<name>[\w.-]+)(?:\[(?P<start>\d+%?)?:(?P<stop>\d+%?)?\])?")
_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")

Row = Mapping[str, Any]


class _Part(Protocol):
    """One file."""

    path: Path

    def __len__(self) -> int: ...
    def read(self, index: int) -> Row: ...
    def place(self, index: int) -> str: ...


@dataclass(frozen=True)
class Rows:
    """Rows of one or more files, or a selection of them; read when they are asked for."""

    parts: Sequence[_Part]
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
        """Position of the first row, and the rows, batch by batch."""
        for start in range(0, len(self), size):
            yield start, [self._row(position) for position in range(start, min(start + size, len(self)))]

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

    def _locate(self, position: int) -> tuple[_Part, int]:
        index = int(self.indices[position])
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(position)


def open_rows(path: Path, *, source: str, split: str, field: str = "dataset.split") -> Rows:
    """The rows of one split. Raises RunFailed (USER) for a wrong split, (DATA) for files that cannot be read or are
    empty."""
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise RunFailed(
            TrainerExit.USER, f"{field}: {split!r} is not a split.", fix="Write train, train[:5000] or train[:10%]."
        )
    parts = [_open(file) for file in _files(path, split=match["name"], field=field)]
    count = sum(len(part) for part in parts)
    if count == 0:
        raise RunFailed(TrainerExit.DATA, f"The data set {source} is empty: it holds no row.", fix="Check the file.")
    start, stop = _bound(match["start"], count, 0), _bound(match["stop"], count, count)
    if start >= min(stop, count):
        raise RunFailed(TrainerExit.USER, f"{field}: {split!r} selects nothing: there are {count:,} rows.")
    return Rows(parts, np.arange(start, min(stop, count), dtype=np.int64), source)


def _bound(text: str | None, count: int, default: int) -> int:
    if text is None:
        return default
    return round(count * int(text[:-1]) / 100) if text.endswith("%") else int(text)


def _files(path: Path, *, split: str, field: str) -> list[Path]:
    if path.is_file():
        if split != "train":
            raise RunFailed(
                TrainerExit.USER, f"{field}: {path.name} is one file, so its only split is train, not {split!r}."
            )
        return [path]
    found = sorted(
        file for file in path.rglob("*") if file.suffix in EXTENSIONS and file.name not in _NO_ROWS and file.is_file()
    )
    if not found:
        raise RunFailed(TrainerExit.DATA, f"The data set {path} is empty: no {', '.join(EXTENSIONS)} file is in it.")
    if named := [file for file in found if _belongs(file.relative_to(path), split)]:
        return named
    if split == "train" and not any(_belongs(file.relative_to(path), name) for file in found for name in _SPLIT_NAMES):
        return found
    names = ", ".join(sorted({file.stem for file in found})[:10])
    raise RunFailed(TrainerExit.USER, f"{field}: {path} has no split {split!r}; its files are {names}.")


def _belongs(file: Path, split: str) -> bool:
    return split in file.parts[:-1] or re.match(rf"{re.escape(split)}([-_.]\d|$)", file.stem) is not None


def _open(path: Path) -> _Part:
    if path.suffix not in EXTENSIONS:
        raise RunFailed(
            TrainerExit.DATA,
            f"{path} is not a data set: its name ends in {path.suffix or 'nothing'}.",
            fix=f"Use one of {', '.join(EXTENSIONS)}.",
        )
    try:
        if path.suffix == ".parquet":
            return _Parquet(path)
        if path.suffix == ".csv":
            return _Listed(path, _read_csv(path), " line ", 2)
        return _open_json(path)
    except UnicodeDecodeError as error:
        raise RunFailed(TrainerExit.DATA, f"{path} is not UTF-8 text (byte {error.start:,}).") from error
    except OSError as error:
        raise RunFailed(TrainerExit.DATA, f"{path} cannot be read: {error.strerror or error}.") from error


def _open_json(path: Path) -> _Part:
    text = path.read_bytes()
    if not text.lstrip().startswith(b"["):
        return _JsonLines(path, text)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise RunFailed(TrainerExit.DATA, f"{path} line {error.lineno} is not JSON: {error.msg}.") from error
    return _Listed(path, rows, " item ", 1)


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, strict=True))


class _JsonLines:
    """Kept as bytes and parsed when read: a large file costs its size, not its objects."""

    def __init__(self, path: Path, text: bytes) -> None:
        self.path = path
        lines = text.split(b"\n")
        self._lines = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]

    def __len__(self) -> int:
        return len(self._lines)

    def read(self, index: int) -> Row:
        number, line = self._lines[index]
        try:
            return _mapping(json.loads(line), self.path, f" line {number}")
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RunFailed(TrainerExit.DATA, f"{self.path} line {number} is not JSON: {error}.") from error

    def place(self, index: int) -> str:
        return f" line {self._lines[index][0]}"


class _Listed:
    """Rows that are in memory already."""

    def __init__(self, path: Path, rows: list[Any], unit: str, first: int) -> None:
        self.path, self._rows, self._unit, self._first = path, rows, unit, first

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Row:
        return _mapping(self._rows[index], self.path, self.place(index))

    def place(self, index: int) -> str:
        return f"{self._unit}{index + self._first}"


class _Parquet:
    """An Arrow table; columns stay as they are stored."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa  # late: only Parquet needs it here
        import pyarrow.parquet as pq

        self.path = path
        try:
            self._table = pq.read_table(path)
        except pa.ArrowInvalid as error:
            raise RunFailed(TrainerExit.DATA, f"{path} is not a Parquet file: {error}.") from error

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def read(self, index: int) -> Row:
        row: Row = self._table.slice(index, 1).to_pylist()[0]
        return row

    def place(self, index: int) -> str:
        return ""


def _mapping(row: Any, path: Path, place: str) -> Row:
    if not isinstance(row, dict):
        raise RunFailed(
            TrainerExit.DATA,
            f"{path}{place} is not an object with columns but {type(row).__name__}: {str(row)[:60]!r}.",
        )
    return row
