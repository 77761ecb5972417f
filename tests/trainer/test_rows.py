import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from hone.run import TrainerExit
from hone.spec.sources import DATA_SUFFIXES
from hone_trainer import files
from hone_trainer import rows as rows_module
from hone_trainer.failure import RunFailed
from hone_trainer.rows import joined, open_rows

ROWS = [{"text": f"row {number}"} for number in range(10)]


def write_jsonl(path: Path) -> None:
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")


def write_csv(path: Path) -> None:
    path.write_text("text\r\n" + "\r\n".join(row["text"] for row in ROWS), encoding="utf-8-sig")


def write_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_arrow(path: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_text(path: Path) -> None:
    path.write_text("\n".join(row["text"] for row in ROWS) + "\n\n", encoding="utf-8")


WRITERS = {
    "jsonl": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
    "arrow": write_arrow,
    "txt": write_text,
}


def test_every_suffix_that_is_accepted_has_a_reader_here() -> None:
    assert tuple(f".{kind}" for kind in WRITERS) == DATA_SUFFIXES == tuple(files._OPENERS)


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data.{kind}"
    WRITERS[kind](path)
    rows = open_rows(path, source="x", split="train")
    assert [dict(row) for _, batch in rows.batches(3) for row in batch] == ROWS


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data.json")
    assert len(open_rows(tmp_path / "data.json", source="x", split="train")) == 10


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:3]", [0, 1, 2]),
        ("train[8:]", [8, 9]),
        ("train[20%:40%]", [2, 3]),
        ("train[:90%]", list(range(9))),
        ("train[-2:]", [8, 9]),
        ("train[:-80%]", [0, 1]),
        ("train[:1]+train[9:]", [0, 19]),
    ],
)
def test_slices_select_rows_by_number_and_by_share(tmp_path: Path, split: str, expected: list[int]) -> None:
    write_jsonl(tmp_path / "data.jsonl")
    assert open_rows(tmp_path / "data.jsonl", source="x", split=split).indices.tolist() == expected


def test_a_directory_is_read_by_split_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl")
    write_json(tmp_path / "train-00001-of-00002.json")
    write_csv(tmp_path / "test.csv")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert len(open_rows(tmp_path, source="x", split="train")) == 20
    assert len(open_rows(tmp_path, source="x", split="test")) == 10


def test_a_directory_without_split_names_is_all_training_rows(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    write_jsonl(tmp_path / "b.jsonl")
    assert len(open_rows(tmp_path, source="x", split="train")) == 20


def test_a_row_says_where_it_stands(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n', encoding="utf-8")
    rows = open_rows(tmp_path / "data.jsonl", source="x", split="train").select(np.array([1]))
    assert rows.place(0) == "row 2 (data.jsonl line 3)"


BAD_FILES = {
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n\n", "is empty"),
    "none.json": (b"[]", "is empty"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "broken.json": (b'[{"text": "a"},\n {]', "line 2 is not JSON"),
    "list.jsonl": (b'["a"]\n', "item 1 is not an object"),
    "number.jsonl": (b"7\n", "line 1 is not an object"),
    "latin.csv": ("text\nÄ".encode("latin-1"), "is not UTF-8"),
    "fake.parquet": (b"nothing", "is not a Parquet file"),
    "fake.arrow": (b"nothing", "is not an Arrow file"),
    "short.csv": (b"a,b\n1,2\n3\n", r"short.csv line 3 has 1 fields, and the header has 2"),
    "quote.csv": (b'a,b\n1,"2\n3,4\n', "is not CSV: unexpected end of data"),
    "open.json": (b'[{"text": "a"},\n {"text": "b"}', "line 2 is not JSON: the list does not end"),
    "latin.jsonl": ('{"text": "a"}\n{"text": "Ä"}'.encode("latin-1"), "line 2 is not UTF-8 text"),
    "latin.json": ('[{"text": "Ä"}]'.encode("latin-1"), "is not UTF-8"),
    "long.jsonl": (b'{"text": "a"}\n{"text": "' + b"a" * (10 << 20) + b'"}\n', "line 2 holds 10.0 MiB in one row"),
    "long.json": (b'[{"text": "a"}, {"text": "' + b"a" * (10 << 20) + b'"}]', "item 2 holds 10.0 MiB in one row"),
    "rows.xlsx": (b"x", "is not a data set: its name ends in .xlsx"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_a_fault_of_the_data(tmp_path: Path, name: str) -> None:
    content, expected = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunFailed, match=expected) as caught:
        rows = open_rows(tmp_path / name, source=name, split="train")
        list(rows.batches(10))
    assert caught.value.code == TrainerExit.DATA


def test_an_empty_directory_is_a_fault_of_the_data(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"is empty: no \.jsonl") as caught:
        open_rows(tmp_path, source="x", split="train")
    assert caught.value.code == TrainerExit.DATA


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("test", "its only split is train"),
        ("train[5:5]", "selects nothing: there are 10 rows"),
        ("train[50:]", "selects nothing"),
        ("train[a:]", "is not a split"),
    ],
)
def test_a_split_that_is_not_there_is_a_fault_of_the_request(tmp_path: Path, split: str, expected: str) -> None:
    write_jsonl(tmp_path / "data.jsonl")
    with pytest.raises(RunFailed, match=expected) as caught:
        open_rows(tmp_path / "data.jsonl", source="x", split=split)
    assert caught.value.code == TrainerExit.USER


def test_a_missing_split_of_a_directory_is_answered_with_those_that_are_there(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl")
    with pytest.raises(RunFailed, match="has no split 'test'; its files are train"):
        open_rows(tmp_path, source="x", split="test")


def test_a_pattern_is_all_files_that_match_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a-1.jsonl")
    write_csv(tmp_path / "a-2.csv")
    write_jsonl(tmp_path / "b.jsonl")
    assert len(open_rows(tmp_path / "a-*", source="x", split="train")) == 20
    with pytest.raises(RunFailed, match=r"No file in .* matches c-\*"):
        open_rows(tmp_path / "c-*", source="x", split="train")
    with pytest.raises(RunFailed, match="all training rows, not 'test'"):
        open_rows(tmp_path / "a-*", source="x", split="test")


def test_fields_of_a_csv_file_may_go_over_several_lines(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text('prompt,completion\n"a\n""b""",c\n\nd,"e,f"\n', encoding="utf-8")
    rows = open_rows(tmp_path / "data.csv", source="x", split="train")
    assert [dict(rows.first())] == [{"prompt": 'a\n"b"', "completion": "c"}]
    assert rows.place(1) == "row 2 (data.csv line 5)"
    assert dict(rows.select(np.array([1])).first()) == {"prompt": "d", "completion": "e,f"}


def test_items_of_a_list_are_found_over_the_borders_of_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [{"text": "ä\n" * (number % 7), "n": -12.5e3 * number} for number in range(40)]
    (tmp_path / "data.json").write_text(json.dumps(wanted, indent=2, ensure_ascii=False), encoding="utf-8")
    for piece in (1, 5, 64):
        monkeypatch.setattr(files, "_PIECE", piece)
        rows = open_rows(tmp_path / "data.json", source="x", split="train")
        assert [row for _, batch in rows.batches(7) for row in batch] == wanted


def test_tables_are_read_in_any_order(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([{"n": number} for number in range(5000)])
    pq.write_table(table, tmp_path / "data.parquet", row_group_size=1700)
    rows = open_rows(tmp_path / "data.parquet", source="x", split="train")
    order = np.random.default_rng(0).permutation(5000)
    assert [row["n"] for _, batch in rows.select(order).batches(100) for row in batch] == order.tolist()


def test_sets_are_mixed_by_weight_and_the_seed_alone_decides(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    write_csv(tmp_path / "b.csv")
    first, second = (open_rows(tmp_path / name, source=name, split="train") for name in ("a.jsonl", "b.csv"))
    mixed = joined([first, second], [2.0, 0.3], seed=1)
    counts = np.bincount(mixed.indices, minlength=20)
    assert counts[:10].tolist() == [2] * 10 and sorted(counts[10:].tolist()) == [0] * 7 + [1] * 3
    assert mixed.source == "a.jsonl and b.csv"
    assert mixed.place(20).endswith(f"(b.csv line {int(mixed.indices[20]) - 10 + 2})")
    assert joined([first, second], [2.0, 0.3], seed=1).indices.tolist() == mixed.indices.tolist()
    assert joined([first, second], [2.0, 0.3], seed=2).indices.tolist() != mixed.indices.tolist()


def test_long_rows_are_held_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "BATCH_CHARACTERS", 100)
    long = {"messages": [{"role": "user", "content": "x" * 60}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, long, long, long]))
    found = list(open_rows(path, source="x", split="train").batches(1000))
    assert [(start, len(batch)) for start, batch in found] == [(0, 11), (11, 2)]
    assert [row for _, batch in found for row in batch] == [*ROWS, long, long, long]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_costs_the_addresses_of_its_rows_and_not_the_rows(tmp_path: Path, kind: str) -> None:
    """100,000 rows of 1 kB are 100 MB; what Python allocates for them stays below a tenth of that."""
    text, path = "x" * 1000, tmp_path / f"data.{kind}"
    if kind in ("parquet", "arrow"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({"text": [f"{number} {text}" for number in range(100_000)]})
        if kind == "parquet":
            pq.write_table(table, path, row_group_size=10_000)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        del table
    else:
        form = {"jsonl": '{{"text": "{} {}"}}\n', "json": '{{"text": "{} {}"}},\n', "csv": "{} {}\n", "txt": "{} {}\n"}
        with path.open("w") as file:
            file.write({"json": "[", "csv": "text\n"}.get(kind, ""))
            file.writelines(form[kind].format(number, text) for number in range(99_999))
            file.write(form[kind].format(99_999, text).rstrip(",\n") + ("]" if kind == "json" else ""))
    tracemalloc.start()
    rows = open_rows(path, source="x", split="train")
    assert sum(len(row["text"]) > 1000 for _, batch in rows.batches(1000) for row in batch) == 100_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6
