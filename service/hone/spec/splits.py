"""Split expressions of data sets, as `datasets` writes them: `train`, `train[:5000]`, `train[-10%:]`, `train+test`."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from hone.errors import Violation
from hone.spec import Dataset

_SPLIT = re.compile(r"(?P<name>[\w.-]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
HOW = "write train, train[:5000], train[:10%] or train+test."


class Slice(NamedTuple):
    """Some rows of one split."""

    name: str
    start: str | None
    """A number of rows, or a share such as `10%`; counted from the end where it is negative."""
    stop: str | None


def read_split(text: str) -> list[Slice]:
    """The slices that an expression adds up. Raises ValueError with the one that is none."""
    slices = []
    for word in text.split("+"):
        match = _SPLIT.fullmatch(word.strip())
        if match is None:
            raise ValueError(word)
        slices.append(Slice(match["name"], match["start"], match["stop"]))
    return slices


def split_violations(dataset: Dataset) -> Iterator[Violation]:
    """Expressions of a request that are none."""
    splits = {"dataset.split": dataset.split, "dataset.eval_split": dataset.eval_split}
    splits |= {f"dataset.mix.{number}.split": part.split for number, part in enumerate(dataset.mix)}
    for path, split in splits.items():
        try:
            read_split(split or "train")
        except ValueError as error:
            yield Violation(path=path, value=split, message=f"{str(error)!r} is not a split: {HOW}")
