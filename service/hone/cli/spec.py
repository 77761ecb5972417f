"""`hone spec`: every field of a request, with type, default, unit and where the default comes from."""

from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated

import typer
from rich.padding import Padding
from rich.text import Text

from hone.cli.answer import print_json
from hone.cli.console import answers
from hone.cli.failure import ExitCode
from hone.errors import NotFound

if TYPE_CHECKING:
    from hone.spec.document import FieldText


def spec(
    field: Annotated[
        str,
        typer.Argument(
            metavar="[FIELD]", help="Only this field and what is below it: training.eval.", show_default=False
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole as JSON Schema, for editors.")] = False,
) -> int:
    """Show every field of a request: type, default, unit, limits, and where the default comes from."""
    from hone.spec.document import fields, json_schema

    if as_json:
        print_json(json_schema())
        return ExitCode.DONE
    known = list(fields())
    chosen = [
        text for text in known if not field or text.path == field or text.path.startswith((f"{field}.", f"{field}["))
    ]
    if not chosen:
        raise _unknown(field, [text.path for text in known])
    for text in chosen:
        _print(text)
    return ExitCode.DONE


def _unknown(field: str, known: list[str]) -> NotFound:
    near = get_close_matches(field, known, n=1)
    fix = f"Did you mean {near[0]}?" if near else "`hone spec` lists them all."
    return NotFound(f"A request has no field {field}.", fix=fix)


def _print(field: "FieldText") -> None:
    facts = [field.kind, field.unit, field.limits]
    head = Text(field.path, style="bold").append(f"  {', '.join(fact for fact in facts if fact)}", style="not bold dim")
    answers().print(head)
    answers().print(Padding(f"{field.text} {_default(field)}".strip(), (0, 0, 0, 4), expand=False))


def _default(field: "FieldText") -> str:
    if field.default == "required":
        return "Required."
    if field.is_part and field.default == "as below":
        return ""
    origin = f" ({field.origin})" if field.origin and field.default != "absent" else ""
    value = field.origin if field.default == "absent" and field.origin else field.default
    return f"Default: {value}{origin}."
