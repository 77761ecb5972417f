"""Reading a request: from YAML, JSON or a mapping to a JobSpec, or to every violation at once.

Called by the CLI, the client and the service. Each violation names the path, the value and the fix.
"""

import copy
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from hone.errors import InvalidRequest, NotServed, Violation
from hone.spec import JobSpec
from hone.spec.combinations import violations
from hone.spec.part import Part

OTHER_NAMES: Mapping[str, str] = {
    "adapter_dropout": "adapter.lora.dropout",
    "batch_size": "training.micro_batch_size (one device) or training.global_batch_size",
    "bf16": "training.precision: bf16",
    "dataset_name": "dataset.source",
    "evaluation_strategy": "training.eval.steps",
    "eval_strategy": "training.eval.steps",
    "gradient_checkpointing": "training.activation_checkpointing",
    "init_kl_coeff": "method.ppo.init_kl_coef",
    "load_in_4bit": "quantization: nf4",
    "lora": "adapter.lora",
    "lora_alpha": "adapter.lora.alpha",
    "lora_dropout": "adapter.lora.dropout",
    "lora_r": "adapter.lora.rank",
    "lr": "training.learning_rate",
    "lr_scheduler_type": "training.scheduler",
    "max_seq_length": "method.sft.max_length",
    "model_name_or_path": "model.source",
    "num_train_epochs": "training.epochs",
    "optim": "training.optimizer",
    "per_device_train_batch_size": "training.micro_batch_size",
    "push_to_hub": "output.hub",
    "r": "adapter.lora.rank",
    "torch_dtype": "training.precision",
    "use_lora": "adapter.lora",
}
"""What other tools call a field, and where it stands here."""

_REFUSED_NAMES: Mapping[str, str] = {
    "trust_remote_code": "is refused: Hone never runs code that comes with a model. Use an architecture that "
    "transformers knows, or convert the model first.",
}


def load(path: Path, overrides: Sequence[str] = ()) -> JobSpec:
    """The request of a YAML or JSON file, with `--set a.b=c` overrides.

    `file://` sources that are not absolute stand relative to the file. Raises InvalidRequest.
    """
    data = read(path)
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name:
            raise _single("", override, f"--set {override} is not of the form path=value, as in training.epochs=2.")
        data = _set_by_path(data, name.strip(), yaml.safe_load(value))
    return parse(_with_absolute_sources(data, path.absolute().parent))


def read(path: Path) -> dict[str, Any]:
    """The mapping that a file holds. Raises InvalidRequest: missing, not YAML, twice the same key, not a mapping."""
    try:
        documents = list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=_StrictLoader))
    except FileNotFoundError as error:
        raise _single("", str(path), f"{path}: no such file.") from error
    except IsADirectoryError as error:
        raise _single("", str(path), f"{path} is a directory; name the request's file in it.") from error
    except (UnicodeDecodeError, PermissionError) as error:
        raise _single("", str(path), f"{path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise _single("", str(path), f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if len(documents) > 1:
        raise NotServed(
            f"{path} holds {len(documents)} requests (a chain), and chains are not served by this version.",
            fix="Submit the requests one by one.",
        )
    if not documents or not isinstance(documents[0], dict):
        raise _single("", None, f"{path} holds no request: a mapping with name, model, dataset and method is expected.")
    return dict(documents[0])


def parse(data: Mapping[str, Any]) -> JobSpec:
    """Check a request. Raises InvalidRequest with every violation, of single fields and of their combinations."""
    try:
        spec = JobSpec.model_validate(data)
    except ValidationError as error:
        found = [_violation(detail) for detail in error.errors(include_url=False)]
        raise InvalidRequest([*found, *_further(data, error)]) from error
    if found := violations(spec):
        raise InvalidRequest(found)
    return spec


def _further(data: Mapping[str, Any], error: ValidationError) -> list[Violation]:
    """What else is wrong once the faulty fields are left out: one round tells everything."""
    rest = copy.deepcopy(dict(data))
    faulty = {".".join(map(str, detail["loc"])) for detail in error.errors(include_url=False)}
    for detail in error.errors(include_url=False):
        _remove(rest, detail["loc"])
    try:
        found = violations(JobSpec.model_validate(rest))
    except ValidationError:
        return []
    return [violation for violation in found if not any(violation.path.startswith(path) for path in faulty)]


_STAND_INS: Mapping[str | int, Any] = {"name": "x", "source": "hf://x/x", "model": {"source": "hf://x/x"}}
"""Put where a required field is faulty, so that the rest can still be checked."""


def _remove(data: Any, location: Sequence[int | str]) -> None:
    *parents, last = location
    for part in parents:
        if not isinstance(data, dict) or part not in data:
            return
        data = data[part]
    if isinstance(data, dict):
        data.pop(last, None)
        if last in _STAND_INS:
            data[last] = _STAND_INS[last]


def _violation(detail: ErrorDetails) -> Violation:
    path = ".".join(str(part) for part in detail["loc"])
    value = None if detail["type"] == "missing" else detail.get("input")
    return Violation(path=path, value=value, message=_message(detail))


def _message(detail: ErrorDetails) -> str:
    kind, value, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    field = str(detail["loc"][-1]) if detail["loc"] else "the request"
    if kind == "extra_forbidden":
        return _unknown_field(detail["loc"])
    if kind == "missing":
        return f"is required: {_field_text(detail['loc'])}"
    if kind == "literal_error":
        choices = str(context["expected"]).replace("'", "").replace(" or ", ", ")
        return f"{value!r} is not one of {choices}.{_did_you_mean(str(value), choices.split(', '))}"
    if kind == "string_pattern_mismatch":
        return _pattern_message(str(value), field)
    if kind == "value_error":
        return (
            f"{context['error']}."
            if not str(context["error"]).startswith("is true")
            else f"{value!r} {context['error']}."
        )
    for prefix, expected in _EXPECTED.items():
        if kind.startswith(prefix):
            return f"{value!r} is not {expected}."
    if kind in _BOUNDS:
        word, bound = _BOUNDS[kind]
        limit = next(iter(context.values()))
        return f"{value!r} is too {word}: {field} is {bound} {limit}.{_usual(detail['loc'])}"
    return f"{value!r}: {detail['msg']}."


_EXPECTED = {
    "int_": "a whole number",
    "float_": "a number",
    "finite_": "a finite number",
    "bool_": "true or false",
    "string_type": "a text",
    "tuple_": "a list",
    "model_": "a mapping of fields",
    "dict_": "a mapping",
}
_BOUNDS = {
    "greater_than_equal": ("small", "at least"),
    "greater_than": ("small", "more than"),
    "less_than_equal": ("large", "at most"),
    "less_than": ("large", "less than"),
    "too_short": ("short", "at least as long as"),
    "string_too_long": ("long", "at most as long as"),
}


def _pattern_message(value: str, field: str) -> str:
    if field in ("source", "tokenizer", "eval_source", "file"):
        return f"{value!r} is not a source: write hf://organisation/name, file:///path, s3://bucket/key or job://job."
    if field == "name":
        return f"{value!r} is not a name: lower-case letters, digits and hyphens, at most 44, no hyphen at the ends."
    if field == "repo":
        return f"{value!r} is not a repository: write organisation/name."
    if field == "url":
        return f"{value!r} is not an http:// or https:// address without user-info."
    return f"{value!r} is not a label: at most 63 letters, digits, '.', '_' and '-', ending in a letter or digit."


def _unknown_field(location: Sequence[int | str]) -> str:
    name = str(location[-1])
    if name in _REFUSED_NAMES:
        return _REFUSED_NAMES[name]
    part = _part_at(location[:-1])
    if near := difflib.get_close_matches(name, part.model_fields, n=1):
        return f"unknown field. Did you mean {near[0]}?"
    if name in OTHER_NAMES:
        return f"unknown field. Here this is {OTHER_NAMES[name]}."
    if homes := [path for path in _all_paths(JobSpec) if path.rpartition(".")[2] == name]:
        return f"unknown field here. Did you mean {' or '.join(homes[:3])}?"
    return f"unknown field. Known here: {', '.join(part.model_fields)}."


def _part_at(location: Sequence[int | str]) -> type[Part]:
    part: type[Part] = JobSpec
    for name in location:
        if isinstance(name, str) and name in part.model_fields:
            part = part_of(part.model_fields[name].annotation) or part
    return part


def part_of(annotation: Any) -> type[Part] | None:
    """The Part inside `X`, `X | None` or `tuple[X, …]`; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return annotation
    return next((part for argument in get_args(annotation) if (part := part_of(argument))), None)


def _all_paths(part: type[Part], prefix: str = "") -> list[str]:
    paths = []
    for name, field in part.model_fields.items():
        paths.append(prefix + name)
        if inner := part_of(field.annotation):
            paths += _all_paths(inner, f"{prefix}{name}.")
    return paths


def _field_text(location: Sequence[int | str]) -> str:
    part = _part_at(location[:-1])
    field = part.model_fields.get(str(location[-1]))
    return " ".join((field.description or "").split()) if field else ""


def _usual(location: Sequence[int | str]) -> str:
    field = _part_at(location[:-1]).model_fields.get(str(location[-1]))
    extra = field.json_schema_extra if field else None
    origin = str(extra.get("origin", "")) if isinstance(extra, dict) else ""
    return f" Usual: {origin.partition('usual: ')[2].rstrip(')')}." if "usual: " in origin else ""


def _did_you_mean(value: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, choices, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _with_absolute_sources(data: Any, base: Path) -> Any:
    if isinstance(data, dict):
        return {key: _with_absolute_sources(value, base) for key, value in data.items()}
    if isinstance(data, list):
        return [_with_absolute_sources(value, base) for value in data]
    if isinstance(data, str) and data.startswith("file://") and not data.startswith("file:///"):
        return "file://" + str((base / data.removeprefix("file://")).resolve())
    return data


def _set_by_path(data: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    head, _, rest = path.partition(".")
    inner = data.get(head)
    changed = _set_by_path(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value
    return {**data, head: changed}


def _single(path: str, value: Any, message: str) -> InvalidRequest:
    return InvalidRequest([Violation(path=path, value=value, message=message)])


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice: the first would be lost without a word."""


def _strict_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    keys = [json.dumps(loader.construct_object(key, deep=True), default=str) for key, _ in node.value]
    if doubled := [key for key in keys if keys.count(key) > 1]:
        raise yaml.constructor.ConstructorError(None, None, f"the key {doubled[0]} is given twice", node.start_mark)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _strict_mapping)
