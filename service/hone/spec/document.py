"""The request's documentation, made from the fields themselves: `hone spec`, the JSON Schema, docs/spec.md."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from hone.spec import JobSpec
from hone.spec.combinations import AXES, RULES, UNSERVED, Rule
from hone.spec.faults import part_of
from hone.spec.part import Part

SCHEMA_ID = "https://hone.dev/schema/job.v1.json"


@dataclass(frozen=True)
class FieldText:
    """One field as people read it."""

    path: str
    kind: str
    default: str
    origin: str
    unit: str
    limits: str
    text: str
    is_part: bool


def fields(part: type[Part] = JobSpec, prefix: str = "") -> Iterator[FieldText]:
    """Every field of the request, parents before their children."""
    for name, field in part.model_fields.items():
        inner = part_of(field.annotation)
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        path = prefix + name
        yield FieldText(
            path=path,
            kind=_kind(part, name),
            default=_default(field, inner),
            origin=str(extra.get("origin", "")),
            unit=str(extra.get("unit", "")),
            limits=_limits(field),
            text=" ".join((field.description or "").split()),
            is_part=inner is not None,
        )
        if inner:
            yield from fields(inner, f"{path}{_of_many(field)}.")


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the request, for editors."""
    schema = JobSpec.model_json_schema()
    _accept_shorthands(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID, **schema}


def json_schema_text() -> str:
    """The JSON Schema as it is shipped."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def markdown() -> str:
    """docs/spec.md."""
    lines = [
        "# The request",
        "",
        "Made by `make docs` from the fields in `service/hone/spec`; do not edit. A field is optional unless it says "
        "required. YAML, JSON and the gRPC message `hone.v1.JobSpec` have this one shape.",
        "",
    ]
    for field in fields():
        if field.is_part and field.path.count(".") == 0:
            lines += ["", f"## {field.path}", "", field.text, "", *_TABLE_HEAD]
        elif field.path.count(".") == 0:
            lines += ["", f"## {field.path}", "", f"{field.text} ({_facts(field)})", ""]
        else:
            lines.append(_row(field))
    lines += ["", "## What may stand together", "", "Axes and their values:", ""]
    lines += [f"- {axis}: {', '.join(values)}" for axis, values in AXES.items()]
    lines += ["", "Every other pair of values is allowed. Refused:", "", *_rules(RULES)]
    lines += ["", "Known, and not served by this version (UNIMPLEMENTED):", "", *_rules(UNSERVED)]
    return "\n".join(lines) + "\n"


_TABLE_HEAD = ("| field | type | default | meaning |", "| --- | --- | --- | --- |")


def _rules(rules: tuple[Rule, ...]) -> list[str]:
    head = ["| when | field | why, and the fix |", "| --- | --- | --- |"]
    rows = [
        f"| {' and '.join(f'{axis} {value}' for axis, value in rule.when.items())} | `{rule.path}` | {rule.message} |"
        for rule in rules
    ]
    return head + rows


def _facts(field: FieldText) -> str:
    facts = [field.default]
    facts += [field.unit] if field.unit else []
    facts += [field.limits] if field.limits else []
    facts += [f"from: {field.origin}"] if field.origin and field.default != "required" else []
    return "; ".join(fact for fact in facts if fact)


def _default(field: FieldInfo, inner: type[Part] | None) -> str:
    if field.is_required():
        return "required"
    if field.default is None:
        return "absent"
    if inner:
        return "as below"
    if isinstance(field.default, (tuple, dict)):
        return json.dumps(list(field.default)) if isinstance(field.default, tuple) else "{}"
    return json.dumps(field.default)


def _limits(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    ]
    return ", ".join(found)


def with_table(page: str, part: type[Part]) -> str:
    """A Markdown page with every field of a part between its two marks."""
    head, _, rest = page.partition("<!-- made by tools/generated.sh")
    mark, _, rest = rest.partition("-->\n")
    _, end, rest = rest.partition("<!-- end -->")
    rows = "\n".join([*_TABLE_HEAD, *(_row(field) for field in fields(part))])
    return f"{head}<!-- made by tools/generated.sh{mark}-->\n\n{rows}\n\n{end}{rest}"


def _of_many(field: FieldInfo) -> str:
    annotation = str(field.annotation)
    return "[]" if "tuple" in annotation else ".<name>" if "dict" in annotation else ""


def _row(field: FieldText) -> str:
    return f"| `{field.path}` | {field.kind} | {_facts(field)} | {field.text.replace('|', chr(92) + '|')} |"


def _kind(part: type[Part], name: str) -> str:
    """The word for a field's type, read from its JSON Schema."""
    schema = part.model_json_schema()
    return _word(schema["properties"][name])


def _word(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_word(option) for option in schema["anyOf"] if option.get("type") != "null"))
    if "enum" in schema:
        return " / ".join(str(value) for value in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if "$ref" in schema or "allOf" in schema:
        return "mapping"
    if schema.get("type") == "array":
        return f"list of {_word(schema['items'])}"
    return {"string": "text", "integer": "whole number", "number": "number", "boolean": "true / false"}.get(
        str(schema.get("type")), "mapping"
    )


def _accept_shorthands(schema: Any) -> None:
    """Editors must accept what parse accepts: one word for a list of words, `4h` for seconds, a text for a number."""
    if isinstance(schema, list):
        for item in schema:
            _accept_shorthands(item)
    if not isinstance(schema, dict):
        return
    for name, inner in list(schema.items()):
        if name == "properties":
            for field, definition in inner.items():
                _accept_shorthands(definition)
                if definition.get("type") == "array" and definition.get("items") == {"type": "string"}:
                    inner[field] = {"anyOf": [{"type": "string"}, definition], **_keep(definition)}
                if field in ("deadline", "timeout"):
                    inner[field] = {
                        "anyOf": [{"type": "string", "pattern": r"^\d+\s*[smhd]$"}, definition],
                        **_keep(definition),
                    }
        else:
            _accept_shorthands(inner)


def _keep(definition: dict[str, Any]) -> dict[str, Any]:
    """Text and default belong on the outside of `anyOf`, where editors look for them."""
    return {
        name: definition.pop(name)
        for name in ("description", "default", "title", "origin", "unit")
        if name in definition
    }
