"""Files of rows, read where they lie: JSON Lines, JSON, CSV, Parquet, Arrow, plain text.

Called by rows.py. A file costs the address of each row (8 bytes) and what is being read, not its rows: text files and
Arrow files are mapped into memory, Parquet is read a row group at a time. Rows keep their line, so that a message can
say where to look.
"""

import csv
import io
import json
import mmap
import re
import sys
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from hone.run import TrainerExit
from hone.spec.sources import DATA_SUFFIXES
from hone_trainer.failure import RunFailed

Row = Mapping[str, Any]
MAX_ROW_BYTES = 8 << 20
"""A longer row of a text file is a mistake: two million tokens."""
_AT_ONCE = 1000
"""Rows that are taken out of a table together."""
_PIECE = 1 << 20
"""Characters of a JSON list that are read together."""
_BETWEEN = re.compile(r"[\s,]*")
csv.field_size_limit(sys.maxsize)  # MAX_ROW_BYTES says it in our words


class Part(Protocol):
    """One file."""

    path: Path

    def __len__(self) -> int: ...
    def read(self, index: int) -> Row:
        """The row of this number, from 0."""
        ...

    def place(self, index: int) -> str:
        """` line 7`, or nothing where rows have no place that an editor shows."""
        ...


def open_file(path: Path) -> Part:
    """Raises RunFailed (DATA) for a file that is none of the kinds, or not what its name says."""
    opener = _OPENERS.get(path.suffix)
    if opener is None:
        raise RunFailed(
            TrainerExit.DATA,
            f"{path} is not a data set: its name ends in {path.suffix or 'nothing'}.",
            fix=f"Use one of {', '.join(DATA_SUFFIXES)}.",
        )
    try:
        return opener(path)
    except OSError as error:
        raise RunFailed(TrainerExit.DATA, f"{path} cannot be read: {error.strerror or error}.") from error


class _Text:
    """Records of a mapped file: from starts[i] on to the next start, or to `ends[i]`; lines[i] is where it begins."""

    unit = " line "

    def __init__(self, path: Path, text: "mmap.mmap | bytes") -> None:
        self.path = path
        self._text = text
        self._starts, self._ends, self._lines = array("q"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, index: int) -> str:
        return f"{self.unit}{self._lines[index]}"

    def _add(self, start: int, end: int, line: int) -> None:
        if end - start > MAX_ROW_BYTES:
            raise RunFailed(
                TrainerExit.DATA,
                f"{self.path}{self.unit}{line} holds {(end - start) / (1 << 20):.1f} MiB in one row; at most "
                f"{MAX_ROW_BYTES >> 20} MiB are read.",
                fix="Split that row, or take it out.",
            )
        self._starts.append(start)
        self._ends.append(end)
        self._lines.append(line)

    def _record(self, index: int) -> str:
        raw = self._text[self._starts[index] : self._ends[index]]
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RunFailed(
                TrainerExit.DATA,
                f"{self.path}{self.place(index)} is not UTF-8 text: {error.reason} (byte {raw[error.start]:#04x}).",
                fix="Convert the file to UTF-8.",
            ) from error


class _Lines(_Text):
    """One record a line; blank ones are none."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _mapped(path))
        start = 0
        for number, line in enumerate(_lines(self._text), start=1):
            if line.strip():
                self._add(start, start + len(line), number)
            start += len(line)

    def read(self, index: int) -> Row:
        return {"text": self._record(index).rstrip("\r\n")}


class _JsonLines(_Lines):
    """One JSON object a line."""

    def read(self, index: int) -> Row:
        try:
            return _mapping(json.loads(self._record(index)), self.path, self.place(index))
        except json.JSONDecodeError as error:
            raise RunFailed(TrainerExit.DATA, f"{self.path}{self.place(index)} is not JSON: {error}.") from error


class _JsonList(_Text):
    """The items of one JSON list, copied one after the other into a temporary file that is mapped."""

    unit = " item "

    def __init__(self, path: Path) -> None:
        with tempfile.TemporaryFile() as copy:
            super().__init__(path, b"")
            end = 0
            for number, item in enumerate(_items(path), start=1):
                written = copy.write(item.encode("utf-8", "surrogatepass"))
                self._add(end, end + written, number)
                end += written
            copy.flush()
            self._text = mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ) if end else b""

    def read(self, index: int) -> Row:
        return _mapping(json.loads(self._record(index)), self.path, self.place(index))


class _Csv(_Text):
    """Records of a CSV file, which may go over several lines; the first is the names of the columns."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _mapped(path))
        self._header: list[str] = []
        position, lines = 0, 0

        def decoded() -> Iterator[str]:
            nonlocal position, lines
            for line in _lines(self._text):
                position += len(line)
                lines += 1
                yield line.decode("utf-8", "replace")

        start, first = 0, 1
        reader = csv.reader(decoded(), strict=True)
        try:
            for fields in reader:
                if fields and self._header:
                    self._add(start, position, first)
                elif fields:
                    self._header = [name.removeprefix("\ufeff") for name in fields]
                start, first = position, lines + 1
        except csv.Error as error:
            raise RunFailed(TrainerExit.DATA, f"{path} line {lines} is not CSV: {error}.") from error

    def read(self, index: int) -> Row:
        [fields] = csv.reader(io.StringIO(self._record(index), newline=""))
        if len(fields) != len(self._header):
            raise RunFailed(
                TrainerExit.DATA,
                f"{self.path}{self.place(index)} has {len(fields)} fields, and the header has {len(self._header)}.",
                fix="Put fields that hold a comma, a quote or a line break in double quotes.",
            )
        return dict(zip(self._header, fields, strict=True))


class _Table:
    """Rows of tables that are read one after the other; `starts` are the numbers of their first rows."""

    def __init__(self, path: Path, counts: Sequence[int], read_table: Callable[[int], Any]) -> None:
        self.path = path
        self._starts = [0, *accumulate(counts)]
        self._read_table = read_table
        self._table: tuple[int, Any] = (-1, None)
        self._rows: tuple[int, list[Row]] = (0, [])

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> Row:
        start, rows = self._rows
        if not start <= index < start + len(rows):
            start, rows = self._rows = self._load(index)
        return rows[index - start]

    def place(self, index: int) -> str:
        return ""

    def _load(self, index: int) -> tuple[int, list[Row]]:
        number = bisect_right(self._starts, index) - 1
        if self._table[0] != number:
            self._table = (number, self._read_table(number))
        inside = (index - self._starts[number]) // _AT_ONCE * _AT_ONCE
        return self._starts[number] + inside, self._table[1].slice(inside, _AT_ONCE).to_pylist()


def _open_json(path: Path) -> Part:
    with path.open("rb") as file:
        start = file.read(_PIECE).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return _JsonList(path) if start == b"[" else _JsonLines(path)


def _open_parquet(path: Path) -> Part:
    import pyarrow as pa  # late: reading text needs none
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, memory_map=True)
    except pa.ArrowInvalid as error:
        raise RunFailed(TrainerExit.DATA, f"{path} is not a Parquet file: {error}.") from error
    counts = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    return _Table(path, counts, file.read_row_group)


def _open_arrow(path: Path) -> Part:
    """A file or a stream of Arrow's own format, as `datasets` saves them."""
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        table = pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:
        try:
            source.seek(0)
            table = pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid as error:
            raise RunFailed(TrainerExit.DATA, f"{path} is not an Arrow file: {error}.") from error
    return _Table(path, [table.num_rows], lambda _: table)


_OPENERS: dict[str, Callable[[Path], Part]] = {
    ".jsonl": _open_json,
    ".json": _open_json,
    ".csv": _Csv,
    ".parquet": _open_parquet,
    ".arrow": _open_arrow,
    ".txt": _Lines,
}


def _mapped(path: Path) -> "mmap.mmap | bytes":
    with path.open("rb") as file:
        file.seek(0, io.SEEK_END)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.tell() else b""


def _lines(text: "mmap.mmap | bytes") -> Iterator[bytes]:
    if isinstance(text, bytes):
        return iter(text.splitlines(keepends=True))
    text.seek(0)
    return iter(text.readline, b"")


def _items(path: Path) -> Iterator[str]:
    """The text of each item of a JSON list, without ever holding more than a piece and the longest item."""
    decoder, lines = json.JSONDecoder(), 0
    with path.open(encoding="utf-8-sig") as file:

        def read() -> str:
            try:
                return file.read(_PIECE)
            except UnicodeDecodeError as error:
                raise RunFailed(
                    TrainerExit.DATA, f"{path} is not UTF-8 text (after line {lines}).", fix="Convert it to UTF-8."
                ) from error

        rest = read().lstrip().removeprefix("[")
        position = 0
        while True:
            match = _BETWEEN.match(rest, position)
            assert match is not None
            lines, position = lines + match[0].count("\n"), match.end()
            if rest.startswith("]", position):
                return
            try:
                _, end = decoder.raw_decode(rest, position)
                if end == len(rest):  # a number may go on
                    raise json.JSONDecodeError("the list does not end", rest, end)
            except json.JSONDecodeError as error:
                if len(rest) - position <= 2 * MAX_ROW_BYTES and (more := read()):
                    rest, position = rest[position:] + more, 0
                    continue
                line = lines + 1 + rest.count("\n", position, error.pos)
                raise RunFailed(TrainerExit.DATA, f"{path} line {line} is not JSON: {error.msg}.") from error
            yield rest[position:end]
            lines, position = lines + rest.count("\n", position, end), end


def _mapping(row: Any, path: Path, place: str) -> Row:
    if not isinstance(row, dict):
        raise RunFailed(
            TrainerExit.DATA,
            f"{path}{place} is not an object with columns but {type(row).__name__}: {str(row)[:60]!r}.",
        )
    return row
