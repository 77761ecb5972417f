"""What was made of an object that never changes, kept by the object itself: making it again costs more than the rest.

Called by whoever turns requests and plans into something else (plans, rows, messages): the same request comes many
times, and its object with it (convert.spec_from_message).
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

MOST = 256
"""So many are kept."""

_Object = TypeVar("_Object")
_Made = TypeVar("_Made")


class Remembered(Generic[_Object, _Made]):
    """A function of one object, and its last answers. By identity: comparing requests takes longer than looking.

    Safe to use from several threads; two that ask for the same at once may both make it.
    """

    def __init__(self, make: Callable[..., _Made]) -> None:
        self._make = make
        self._kept: OrderedDict[int, tuple[_Object, tuple[Any, ...], _Made]] = OrderedDict()

    def __call__(self, thing: _Object, *others: Any) -> _Made:
        """make(thing, *others), or what it gave before for this very object and equal others."""
        kept = self._kept.get(id(thing))
        if kept is not None and kept[0] is thing and kept[1] == others:
            return kept[2]
        made = self._make(thing, *others)
        self._kept[id(thing)] = (thing, others, made)  # holds the object, so that no other one gets its id
        while len(self._kept) > MOST:
            self._kept.popitem(last=False)
        return made
