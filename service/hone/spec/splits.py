"""Split expressions of data sets, as `datasets` writes them: `train`, `train[:5000]`, `train[-10%:]`, `train+test`."""

import re
from typing import NamedTuple

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
