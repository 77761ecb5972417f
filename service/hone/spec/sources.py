"""Where a request names inputs: every source in it, with its path."""

import glob
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hone.remembered import Remembered
from hone.spec import JobSpec

FIELDS = ("source", "eval_source", "tokenizer", "file")
"""Names of the fields that hold one."""
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt")
"""Of the files that rows are read from."""


def bucket_and_prefix(source: str) -> tuple[str, str]:
    """Of an s3:// source: its bucket, and what all of its objects begin with; of a pattern that is its folder."""
    bucket, _, key = source.removeprefix("s3://").partition("/")
    directory, _, name = key.rpartition("/")
    return bucket, directory if glob.has_magic(name) else key.rstrip("/")


def sources(spec: JobSpec, *, scheme: str = "") -> Iterator[tuple[str, str]]:
    """(path, source) of every source, or of those of one scheme: hf, s3, file or job."""
    for path, source in _found(spec):
        if not scheme or source.startswith(f"{scheme}://"):
            yield path, source


def with_sources(spec: JobSpec, changed: Mapping[str, str]) -> JobSpec:
    """The request with other sources in the place of those that `changed` has."""
    if not changed:
        return spec
    return JobSpec.model_validate(_changed(spec.to_mapping(), lambda source: changed.get(source, source)))


_found = Remembered[JobSpec, tuple[tuple[str, str], ...]](lambda spec: tuple(_sources(spec.to_mapping(), "")))


def _sources(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _sources(inner, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _sources(inner, f"{path}.{index}")
    elif isinstance(value, str) and path.rpartition(".")[2] in FIELDS:
        yield path, value


def _changed(value: Any, change: Callable[[str], str], name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _changed(inner, change, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [_changed(inner, change) for inner in value]
    return change(value) if name in FIELDS and isinstance(value, str) else value
