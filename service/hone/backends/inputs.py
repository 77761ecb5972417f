"""Inputs that lie on this machine, looked at before a job is recorded: whether they are there, and are what is read.

Called by local.py. What only reading the rows can tell (an empty data set, a row without text) is the trainer's to say.
"""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from hone.errors import InvalidRequest, Violation
from hone.spec import JobSpec
from hone.spec.rewards import reward_functions, reward_models
from hone.spec.sources import DATA_SUFFIXES

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ELSEWHERE = "on the machine that the service runs on: put it there, or name an s3:// or hf:// source."


class Sources(NamedTuple):
    """What a request reads."""

    model: str
    tokenizer: str | None
    dataset: str | None
    eval_dataset: str | None
    adapters: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    """Of dataset.mix."""
    reward_models: tuple[tuple[str, str], ...] = ()
    """Where the request names them, and what."""
    reward_functions: tuple[tuple[str, str], ...] = ()
    """The same of the files of Python."""


def sources(spec: JobSpec) -> Sources:
    """The sources of a request."""
    dataset, eval_dataset = (spec.dataset.source, spec.dataset.eval_source) if spec.dataset else (None, None)
    adapters = tuple(part.source for part in spec.method.merge.adapters) if spec.method.merge else ()
    mixed = tuple(part.source for part in spec.dataset.mix) if spec.dataset else ()
    found = Sources(spec.model.source, spec.model.tokenizer, dataset, eval_dataset, adapters, mixed)
    return found._replace(
        reward_models=tuple((field, part.source) for _, field, part in reward_models(spec)),
        reward_functions=tuple((field, part.file) for _, field, part in reward_functions(spec)),
    )


def check_inputs(found: Sources) -> None:
    """Raise InvalidRequest with everything that is wrong with the request's file:// sources."""
    violations = [*_model("model.source", found.model)]
    for number, adapter in enumerate(found.adapters):
        violations += _adapter(f"method.merge.adapters.{number}.source", adapter)
    for field, source in found.reward_models:
        violations += _model(field, source)
    for field, source in found.reward_functions:
        violations += _there(field, source)
    if found.tokenizer:
        violations += _there("model.tokenizer", found.tokenizer)
    if found.dataset:
        violations += _data("dataset.source", found.dataset)
    for number, source in enumerate(found.mixed):
        violations += _data(f"dataset.mix.{number}.source", source)
    if found.eval_dataset:
        violations += _data("dataset.eval_source", found.eval_dataset)
    if violations:
        raise InvalidRequest(violations)


def _adapter(field: str, source: str) -> Iterator[Violation]:
    path = _local_path(source)
    if path and path.is_dir() and not (path / "adapter_config.json").is_file():
        yield Violation(path=field, value=source, message=f"{path} holds no adapter: adapter_config.json is missing.")
        return
    yield from _model(field, source)


def _model(field: str, source: str) -> Iterator[Violation]:
    path = _local_path(source)
    if path is None:
        return
    wrong = list(_there(field, source, directory=True))
    if wrong:
        yield from wrong
    elif not any(path.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
        if pickled:
            message = f"{path} holds pickle weights ({pickled[0]}), which can run code: convert them to safetensors."
        else:
            message = f"{path} holds no weights: a *.safetensors file is expected beside config.json."
        yield Violation(path=field, value=source, message=message)


def _data(field: str, source: str) -> Iterator[Violation]:
    path = _local_path(source)
    if path is None:
        return
    if glob.has_magic(path.name) and not path.exists():
        if not any(file.is_file() for file in path.parent.glob(path.name)):
            yield Violation(path=field, value=source, message=f"no file in {path.parent} matches {path.name}.")
        return
    wrong = list(_there(field, source))
    if wrong:
        yield from wrong
        return
    kinds = ", ".join(DATA_SUFFIXES)
    if path.is_dir():
        if not any(file.suffix in DATA_SUFFIXES for file in path.rglob("*")):
            yield Violation(path=field, value=source, message=f"{path} holds no data file: {kinds} are read.")
    elif path.suffix not in DATA_SUFFIXES:
        yield Violation(path=field, value=source, message=f"{path.name} is not a data file: {kinds} are read.")
    elif path.stat().st_size == 0:
        yield Violation(path=field, value=source, message=f"{path} is empty: it has no row to learn from.")


def _there(field: str, source: str, *, directory: bool = False) -> Iterator[Violation]:
    path = _local_path(source)
    if path is None:
        return
    try:
        found = path.is_dir() if directory else path.exists()
    except PermissionError:
        found = False
    if not found:
        what = "directory" if directory else "file or directory"
        yield Violation(path=field, value=source, message=f"{path} is no {what} {_ELSEWHERE}")
        return
    try:
        if path.is_dir():
            next(path.iterdir(), None)
        else:
            path.open("rb").close()
    except PermissionError:
        yield Violation(
            path=field, value=source, message=f"{path} may not be read by the user that the service runs as."
        )


def _local_path(source: str) -> Path | None:
    scheme, _, rest = source.partition("://")
    return Path(unquote(rest)) if scheme == "file" else None
