import json
from pathlib import Path

import numpy as np
import pytest

from hone.run import TrainerExit
from hone_trainer.failure import RunFailed
from hone_trainer.rows import open_rows

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


WRITERS = {"jsonl": write_jsonl, "json": write_json, "csv": write_csv, "parquet": write_parquet}


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
    [("train[:3]", [0, 1, 2]), ("train[8:]", [8, 9]), ("train[20%:40%]", [2, 3]), ("train[:90%]", list(range(9)))],
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
