"""`hone data`: what the data set of a request becomes, before anything is trained: counts, lengths, one row as it is
learned. The reading is the trainer's own, in a process of its own, so that what is shown is what a run would see.
"""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hone import quantities as q
from hone.cli.answer import print_json
from hone.cli.console import answers, remarks
from hone.cli.environment import read_settings
from hone.cli.failure import ExitCode
from hone.cli.options import AsJson, Overrides, RequestFile
from hone.cli.plan import source_text
from hone.cli.request import load
from hone.errors import UserError

if TYPE_CHECKING:
    from hone.spec import JobSpec

METHODS = ("sft", "dpo", "reward", "ppo", "grpo")
UNITS = {"preference": "pairs", "prompts": "prompts"}
"""What a row is, by the format of the rows."""
BAR_WIDTH = 32
SHOWN_CHARACTERS = 2000
_CALLERS_FAULT = ("USER", "DATA")


class DataRefused(UserError):
    """The data set cannot be learned from as the request says."""

    reason = "BAD_DATA"


def data(file: RequestFile, overrides: Overrides = None, as_json: AsJson = False) -> int:
    """Say what the data set of a request becomes: rows, tokens, lengths, what is dropped or cut and why, one row as it
    is learned. Reads data and tokenizer, loads no model, starts nothing.
    """
    spec = load(file, overrides)
    if spec.dataset is None or spec.method.name not in METHODS:
        raise UserError(
            f"{file.name} is a request for {spec.method.name}; rows of {', '.join(METHODS)} can be looked at."
        )
    with remarks().status("reading the data …"):
        report = _ask_trainer(spec)
    if as_json:
        print_json(report)
    else:
        print_report(answers(), spec, report)
    return ExitCode.DONE


def _ask_trainer(spec: "JobSpec") -> dict[str, Any]:
    """What `python -m hone_trainer inspect` says. Raises DataRefused or CannotAsk."""
    from hone.trainer_process import CannotAsk, TrainerProcess

    report = TrainerProcess(read_settings().trainer_python).ask("inspect", json.dumps(spec.to_mapping()))
    if failure := report.get("failure"):
        kind = DataRefused if failure["failure_class"] in _CALLERS_FAULT else CannotAsk
        raise kind(failure["message"], fix=failure["next_step"])
    return report


def print_report(console: Console, spec: "JobSpec", report: Mapping[str, Any]) -> None:
    """Counts, lengths, the first row."""
    assert spec.dataset is not None
    sources = [spec.dataset.source, *(part.source for part in spec.dataset.mix)]
    unit = UNITS.get(report["format"], "rows")
    facts = Table.grid(padding=(0, 2))
    facts.add_row("", "data", f"{' and '.join(map(source_text, sources))}: {report['format'].replace('_', ', ')}")
    if columns := report.get("columns"):
        facts.add_row("", "rewards see", ", ".join(columns))
    for name, counts in report["counts"].items():
        for number, line in enumerate(_lines(counts, unit)):
            facts.add_row("", "" if number else name, line)
    console.print(facts)
    before = "" if unit == "prompts" else ", before it is cut"
    console.print(f"\n  tokens of a {unit.removesuffix('s')}{before}")
    console.print(_lengths(report["counts"]["train"]["lengths"]))
    row = report["first_row"]
    if unit == "prompts":
        console.print("\n  first prompt, as it is answered")
        console.print(_row(row, console), soft_wrap=True)
        return
    for title, pieces in row.items() if isinstance(row, dict) else [("first row", row)]:
        console.print(f"\n  {title}, what is learned ", end="")
        console.print(_learned("like this", console), soft_wrap=True)
        console.print(_row(pieces, console), soft_wrap=True)


def _lines(counts: Mapping[str, Any], unit: str) -> Iterator[str]:
    tokens = q.count(counts["tokens"])
    learned = f"{q.count(counts['tokens_learned'])} tokens to learn of {tokens}"
    used = f"{q.count(counts['rows_used'])} of {q.count(counts['rows'])} {unit} are used"
    yield f"{used}: {tokens} tokens" if unit == "prompts" else f"{used}: {learned}"
    if counts["packing_fill"] is not None:
        yield f"packed into {q.count(counts['sequences'])} sequences, {counts['packing_fill']:.1%} full"
    alike = counts["rows_alike"] or 0
    if lost := counts["rows_dropped"] - alike:
        why = (
            "they are longer than max_prompt_length"
            if unit == "prompts"
            else "nothing is left to learn within max_length"
        )
        yield f"{q.count(lost)} dropped: {why}"
    if alike:
        yield f"{q.count(alike)} dropped: both sides are the same tokens"
    if counts["rows_truncated"]:
        yield f"{q.count(counts['rows_truncated'])} cut at max_length: {q.count(counts['tokens_truncated'])} tokens"
    if counts["rows_merged_at_boundary"]:
        yield f"{q.count(counts['rows_merged_at_boundary'])} whose prompt's last token merges with the answer's first"
    if counts["rows_repeated"]:
        yield f"{q.count(counts['rows_repeated'])} are copies of others"
    if counts["rows_in_training"]:
        yield f"{q.count(counts['rows_in_training'])} are training {unit} too"


def _lengths(lengths: Mapping[str, int]) -> Table:
    table = Table.grid(padding=(0, 2))
    most = max(lengths.values())
    for top, count in lengths.items():
        table.add_row("   ", f"≤ {int(top):,}", "█" * max(1, round(BAR_WIDTH * count / most)), q.count(count))
    table.columns[1].justify = table.columns[3].justify = "right"
    return table


def _row(pieces: list[Mapping[str, Any]], console: Console) -> Text:
    text = Text()
    for piece in pieces:
        text.append_text(_learned(piece["text"], console) if piece["learned"] else Text(piece["text"], style="dim"))
    if len(text) > SHOWN_CHARACTERS:
        text = text[:SHOWN_CHARACTERS] + Text(" …")
    return text


def _learned(text: str, console: Console) -> Text:
    """In colour, and where there is none between brackets."""
    return Text(text, style="bold green") if console.color_system else Text(f"⟦{text}⟧")
