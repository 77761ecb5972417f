"""Answers of models as people see them. Called by trial.py and conversation.py."""

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from hone.cli.console import answers

if TYPE_CHECKING:
    from hone.cli.answering import Answer, Model


def print_answers(prompt: str, given: "Sequence[Answer]") -> None:
    """One prompt and its answers, one below the other."""
    table = replies_table()
    table.add_row("prompt", printable(prompt.strip()))
    for answer in given:
        table.add_row(f"  {answer.model}", reply(answer))
    answers().print(table)


def replies_table(width: int = 0) -> Table:
    """Who, in so many columns at least, and what."""
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=width)
    table.add_column(overflow="fold")
    return table


def reply(answer: "Answer") -> str:
    """A whole answer."""
    return printable(answer.text.strip()) + ending(answer)


def ending(answer: "Answer") -> str:
    """What to know of an answer that did not end by itself."""
    return {"length": " …", "interrupt": " … (stopped)"}.get(answer.ended_by, "")


def printable(text: str) -> str:
    """Text of a model as a terminal may have it: without characters that steer it."""
    return "".join("\ufffd" if _steers(char) else char for char in text)


def system_for(model: "Model", system: str | None) -> str | None:
    """The system prompt, where the model has a place for it."""
    return system if model.chat else None


def _steers(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t"
