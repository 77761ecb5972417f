"""Reading a request: from YAML, JSON or a mapping to a JobSpec, or to every violation at once.

Called by the CLI, the client and the service. Each violation names the path, the value and the fix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hone.errors import InvalidRequest, Violation
from hone.spec import JobSpec
from hone.spec.combinations import violations
from hone.spec.faults import faults, rest_of
from hone.spec.sources import sources
from hone.spec.yaml_file import read_documents, single_fault

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

_HINTS: Mapping[str, str] = {name: f"unknown field. Here this is {home}." for name, home in OTHER_NAMES.items()} | {
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
            raise single_fault(
                "", override, f"--set {override} is not of the form path=value, as in training.epochs=2."
            )
        data = _set_by_path(data, name.strip(), yaml.safe_load(value))
    return parse(_with_absolute_sources(data, path.absolute().parent))


def load_chain(path: Path) -> list[JobSpec]:
    """The requests of a file, one or several YAML documents, in their order; `job://<name>` in one means an earlier one
    of that name. Raises InvalidRequest with every violation of all of them."""
    documents = read_documents(path)
    if len(documents) < 2:
        return [load(path)]
    found, specs, names = list[Violation](), list[JobSpec](), list[str]()
    for number, data in enumerate(documents, start=1):
        name = str(data.get("name", number)) if isinstance(data, dict) else str(number)
        if not isinstance(data, dict):
            found.append(Violation(path=f"document {number}", message="is no mapping of a request's fields."))
            continue
        if name in names:
            found.append(Violation(path=f"{name}: name", value=name, message="is given twice in this file."))
        names.append(name)
        try:
            specs.append(parse(_with_absolute_sources(data, path.absolute().parent)))
        except InvalidRequest as error:
            found += [replace(violation, path=f"{name}: {violation.path}") for violation in error.violations]
    for place, spec in enumerate(specs):
        later = {other.name for other in specs[place:]}
        for field, text in sources(spec, scheme="job"):
            if (wanted := text.removeprefix("job://").partition("/")[0]) in later:
                message = f"{wanted} stands later in this file: put what is needed first."
                found.append(Violation(path=f"{spec.name}: {field}", value=text, message=message))
    if found:
        raise InvalidRequest(found)
    return specs


def read(path: Path) -> dict[str, Any]:
    """The mapping that a file holds. Raises InvalidRequest: missing, not YAML, twice the same key, not a mapping."""
    documents = read_documents(path)
    if len(documents) > 1:
        message = f"{path.name} holds {len(documents)} requests (a chain); one is expected here."
        raise single_fault("", None, f"{message} hone run and hone submit take all of them, without --set.")
    if not documents or not isinstance(documents[0], dict):
        message = f"{path} holds no request: a mapping with name, model, dataset and method is expected."
        raise single_fault("", None, message)
    return dict(documents[0])


def parse(data: Mapping[str, Any]) -> JobSpec:
    """Check a request. Raises InvalidRequest with every violation, of single fields and of their combinations."""
    try:
        spec = JobSpec.model_validate(data)
    except ValidationError as error:
        found = faults(error, JobSpec, hints=_HINTS)
        raise InvalidRequest([*found, *_further(data, error)]) from error
    if found := violations(spec):
        raise InvalidRequest(found)
    return spec


def _further(data: Mapping[str, Any], error: ValidationError) -> list[Violation]:
    """What else is wrong once the faulty fields are left out: one round tells everything."""
    faulty = {".".join(map(str, detail["loc"])) for detail in error.errors(include_url=False)}
    rest = rest_of(data, error, JobSpec, stand_ins=_STAND_INS)
    found = violations(rest) if rest else []
    return [violation for violation in found if not any(violation.path.startswith(path) for path in faulty)]


_STAND_INS: Mapping[str | int, Any] = {"name": "x", "source": "hf://x/x", "model": {"source": "hf://x/x"}}


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
