"""Work of several threads done by one of them, in one go: how many small transactions share one commit."""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Generic, TypeVar

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


class Grouped(Generic[_Item, _Answer]):
    """Whoever comes while the last group is at work waits, and the first of those does the work of all of them."""

    def __init__(self, work: Callable[[Sequence[_Item]], Sequence[_Answer | Exception]]) -> None:
        """`work` answers item by item, in order; what it raises is every item's answer."""
        self._work = work
        self._turn = Lock()
        self._waiting: list[_Entry[_Item, _Answer]] = []

    def do(self, item: _Item) -> _Answer:
        """The answer to one item; raises when that is an exception."""
        entry = _Entry[_Item, _Answer](item)
        self._waiting.append(entry)
        with self._turn:
            if not entry.answers:
                self._do_all()
        (answer,) = entry.answers
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _do_all(self) -> None:
        group, self._waiting = self._waiting, []
        try:
            answers = self._work([entry.item for entry in group])
        except Exception as error:
            answers = [error] * len(group)
        for entry, answer in zip(group, answers, strict=True):
            entry.answers.append(answer)


class _Entry(Generic[_Item, _Answer]):
    def __init__(self, item: _Item) -> None:
        self.item = item
        self.answers: list[_Answer | Exception] = []
