"""Fetching what a run reads: models and data sets, from wherever they are to this machine's disk.

Called by the supervisor before any worker starts, so that workers need no network at all. `hf://` is online for exactly
the sources that the request names; a `file://` source is used where it lies. Where model.source is an adapter, the base
that the adapter names is fetched too.
"""

import glob
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from hone.errors import HoneError, NotFound
from hone.modelinfo import read_adapter_directory
from hone.run import ENV_PYTHON_REWARDS, Run, TrainerExit
from hone.spec import Dataset
from hone.spec.rewards import NO_PYTHON_REWARDS_FIX, reward_functions, reward_models
from hone.spec.splits import read_split
from hone.storage import MANIFEST, ArtifactStore, download_directory, open_store
from hone_trainer.failure import RunFailed
from hone_trainer.hub import hub_failure


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input as it was asked for, and where it lies now."""

    asked: str
    path: str
    """A file or directory of this machine."""
    revision: str = ""
    """Commit of a Hub repository; empty elsewhere."""
    address: str = ""
    """What it was fetched from, where that is not what was asked for: the place of another job's output."""


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A model that scores answers."""

    model: Source
    """The whole model, or the adapter's base."""
    tokenizer: Source
    adapter: Source | None = None


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that the workers read."""

    model: Source
    """The model, or the base of the adapter that model.source names."""
    tokenizer: Source
    dataset: Source | None = None
    eval_dataset: Source | None = None
    mixed: tuple[Source, ...] = ()
    """Of dataset.mix."""
    adapters: tuple[Source, ...] = ()
    """The one that training goes on from, or those that are merged."""
    reward_models: Mapping[str, RewardModel] = field(default_factory=dict)
    """By the number of their reward in the request; text, as keys of JSON are."""
    reward_functions: Mapping[str, Source] = field(default_factory=dict)
    """Files of Python, by the number of their reward."""

    def write(self, path: Path) -> None:
        """For the workers, as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> "Inputs":
        """The other way round."""
        data = json.loads(path.read_text(encoding="utf-8"))
        mixed, adapters = (tuple(Source(**source) for source in data.pop(name)) for name in ("mixed", "adapters"))
        models = {
            number: RewardModel(**{name: Source(**source) for name, source in parts.items() if source})
            for number, parts in data.pop("reward_models").items()
        }
        functions = {number: Source(**source) for number, source in data.pop("reward_functions").items()}
        found = {name: Source(**source) for name, source in data.items() if source}
        return Inputs(**found, mixed=mixed, adapters=adapters, reward_models=models, reward_functions=functions)


def fetch(run: Run, directory: Path, *, weights: bool = True) -> Inputs:
    """Bring every source of the request to this machine; a model without its `weights` still has its tokenizer.

    Raises RunFailed or a HoneError that names the source.
    """
    spec = run.spec
    named = _fetch(run, "model.source", spec.model.source, directory / "model", weights=weights)
    model, adapters = fetch_base(run, named, directory, weights=weights)
    tokenizer = named if has_tokenizer(named) else model
    if spec.model.tokenizer:
        tokenizer = _fetch(run, "model.tokenizer", spec.model.tokenizer, directory / "tokenizer")
    rows = fetch_data(run, spec.dataset, directory) if spec.dataset else {}
    models = _fetch_reward_models(run, directory) if weights else {}
    functions = _fetch_reward_functions(run, directory) if weights else {}
    return Inputs(
        model=model,
        tokenizer=tokenizer,
        adapters=tuple(adapters),
        reward_models=models,
        reward_functions=functions,
        **rows,
    )


def _fetch_reward_models(run: Run, directory: Path) -> dict[str, RewardModel]:
    """The models among the rewards of ppo and grpo, each with the base of an adapter."""
    found = dict[str, RewardModel]()
    for number, place, part in reward_models(run.spec):
        path = directory / f"reward-{number}"
        named = _fetch(run, place, part.source, path)
        saved = read_adapter_directory(Path(named.path), named.asked)
        model = _fetch(run, f"{place}: {named.asked}, its base", saved.base, path / "base") if saved else named
        tokenizer = named if has_tokenizer(named) else model
        found[str(number)] = RewardModel(model=model, tokenizer=tokenizer, adapter=named if saved else None)
    return found


def _fetch_reward_functions(run: Run, directory: Path) -> dict[str, Source]:
    """The files of the user's own functions, where the platform lets them in."""
    found = dict[str, Source]()
    for number, place, part in reward_functions(run.spec):
        if os.environ.get(ENV_PYTHON_REWARDS) != "1":
            raise RunFailed(
                TrainerExit.USER, f"{place}: functions of Python are not allowed here.", fix=NO_PYTHON_REWARDS_FIX
            )
        path = _fetch_files(place, part.file, directory / f"function-{number}")
        found[str(number)] = Source(asked=part.file, path=str(path))
    return found


def fetch_data(run: Run, dataset: Dataset, directory: Path, *, first: int | None = None) -> dict[str, Any]:
    """The data sets of a request, by the names that Inputs has for them; where `first` is given, of the Hub's only so
    many rows of each split."""
    own = [dataset.split] + ([dataset.eval_split] if dataset.eval_split and not dataset.eval_source else [])
    wanted = _Rows("dataset.source", dataset.source, own, dataset.config)
    found: dict[str, Any] = {"dataset": _fetch_rows(run, wanted, directory / "dataset", first)}
    if dataset.eval_source:
        wanted = _Rows("dataset.eval_source", dataset.eval_source, [dataset.eval_split or "test"], dataset.config)
        found["eval_dataset"] = _fetch_rows(run, wanted, directory / "eval", first)
    mixed = [
        _Rows(f"dataset.mix.{number}.source", part.source, [part.split], part.config)
        for number, part in enumerate(dataset.mix)
    ]
    places = (directory / f"mix-{number}" for number in range(len(mixed)))
    return found | {"mixed": tuple(_fetch_rows(run, *pair, first) for pair in zip(mixed, places, strict=True))}


class _Rows(NamedTuple):
    """A data set as the request names it."""

    field: str
    source: str
    splits: list[str]
    config: str | None


def fetch_base(run: Run, named: Source, directory: Path, *, weights: bool) -> tuple[Source, list[Source]]:
    """The model to load, and the adapters that belong to the run."""
    adapter = read_adapter_directory(Path(named.path), named.asked)
    if merge := run.spec.method.merge:
        if adapter:
            raise RunFailed(
                TrainerExit.USER,
                f"model.source: {named.asked} is an adapter, and merge wants its base there.",
                fix=f"Name the base ({adapter.base}), and the adapter under method.merge.adapters.",
            )
        parts = enumerate(merge.adapters)
        field = "method.merge.adapters"
        return named, [
            _fetch(run, f"{field}[{i}].source", part.source, directory / f"adapter-{i}", weights=weights)
            for i, part in parts
        ]
    if adapter is None:
        return named, []
    field = f"model.source: {named.asked}, its base"
    return _fetch(run, field, adapter.base, directory / "base", weights=weights), [named]


def has_tokenizer(source: Source) -> bool:
    """Whether a directory holds a tokenizer."""
    return any((Path(source.path) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))


def _fetch(run: Run, field: str, source: str, target: Path, *, weights: bool = True) -> Source:
    """A model or tokenizer of the request."""
    return fetch_model(field, source, target, address=run.inputs.get(source, source), weights=weights)


def fetch_model(field: str, source: str, target: Path, *, address: str = "", weights: bool = True) -> Source:
    """A model, adapter or tokenizer; `address` is where it lies, where that is not what was asked for."""
    address = address or source
    scheme, _, rest = address.partition("://")
    if scheme == "hf":
        return _fetch_repository(field, source, rest, weights=weights)
    path = _fetch_files(field, address, target, weights=weights)
    if not path.is_dir():
        raise RunFailed(TrainerExit.USER, f"{field}: {source} is a file; a model is a directory with its config.json.")
    return Source(asked=source, path=str(path), address=address if address != source else "")


def _fetch_rows(run: Run, wanted: _Rows, target: Path, first: int | None) -> Source:
    """A data set: a file, a directory of files, or a pattern that some of them match."""
    address = run.inputs.get(wanted.source, wanted.source)
    scheme, _, rest = address.partition("://")
    if scheme == "hf":
        return _fetch_hub_rows(wanted, target, first)
    if scheme == "file" and glob.has_magic(Path(unquote(rest)).name):
        return Source(asked=wanted.source, path=unquote(rest))  # rows.py says when nothing matches
    fetch = _fetch_matching if scheme == "s3" and glob.has_magic(_name(rest)) else _fetch_files
    return Source(asked=wanted.source, path=str(fetch(wanted.field, address, target)))


def _fetch_files(field: str, address: str, target: Path, *, weights: bool = True) -> Path:
    scheme, _, rest = address.partition("://")
    if scheme == "file":
        path = Path(unquote(rest))
        if not path.exists():
            raise RunFailed(
                TrainerExit.USER, f"{field}: {path} does not exist on this machine.", fix="Name a file that is there."
            )
        return path
    if scheme == "s3":
        return _fetch_objects(field, rest, target, weights=weights)
    raise RunFailed(
        TrainerExit.USER, f"{field}: {address} cannot be fetched.", fix="Use a file://, s3:// or hf:// source."
    )


def _fetch_objects(field: str, rest: str, target: Path, *, weights: bool) -> Path:
    """Everything below a prefix, or the one object of that key; by its manifest where there is one."""
    bucket, _, key = rest.partition("/")
    key = key.rstrip("/")
    store = open_store(f"s3://{bucket}")
    found = list(store.list_objects(key))
    if not found:
        return _fetch_object(field, store, key, target / key.rpartition("/")[2])
    if not weights:
        found = [item for item in found if not item.key.endswith(_WEIGHTS)]
    elif any(item.key == f"{key}/{MANIFEST}" for item in found):
        download_directory(store, key, target)
        return target
    for item in found:
        name = item.key.removeprefix(key).lstrip("/")
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        store.get_file(item.key, target / name)
    return target


def _fetch_matching(field: str, address: str, target: Path) -> Path:
    """Objects beside each other whose names match a pattern."""
    bucket, _, key = address.removeprefix("s3://").rstrip("/").partition("/")
    directory, _, pattern = key.rpartition("/")
    store = open_store(f"s3://{bucket}")
    target.mkdir(parents=True, exist_ok=True)
    beside = [item.key for item in store.list_objects(directory) if item.key.rpartition("/")[0] == directory]
    found = [key for key in beside if fnmatchcase(_name(key), pattern)]
    if not found:
        raise RunFailed(TrainerExit.USER, f"{field}: no object matches {address}.")
    for key in found:
        store.get_file(key, target / _name(key))
    return target / "*"


def _name(key: str) -> str:
    return key.rstrip("/").rpartition("/")[2]


def _fetch_object(field: str, store: ArtifactStore, key: str, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        store.get_file(key, path)
    except NotFound as error:
        raise RunFailed(TrainerExit.USER, f"{field}: there is nothing at {store.url(key)}.") from error
    return path


_WEIGHTS = ".safetensors"
_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")


def _fetch_repository(field: str, source: str, name: str, *, weights: bool) -> Source:
    from huggingface_hub import snapshot_download  # late: only hf:// needs it

    repository, _, revision = name.partition("@")
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        patterns = [pattern for pattern in _MODEL_FILES if weights or not pattern.endswith(_WEIGHTS)]
        path = snapshot_download(repository, revision=revision or None, allow_patterns=patterns)
    except HoneError:  # the run was asked to stop
        raise
    except Exception as error:
        raise hub_failure(error, field=field, source=source, otherwise=TrainerExit.INTERNAL) from error
    return Source(asked=source, path=path, revision=Path(path).name)


def _fetch_hub_rows(wanted: _Rows, target: Path, first: int | None) -> Source:
    """Rows of a Hub data set, as parquet: in a process of its own, because `datasets` decides on being offline at
    import."""
    target.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1"}
    field, source = wanted.field, wanted.source
    splits = sorted({part.name for split in wanted.splits for part in read_split(split)})
    words = [field, source, wanted.config or "", str(target), str(first or ""), *splits]
    command = [sys.executable, "-m", "hone_trainer.hub_rows", *words]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if not ended.returncode:
        return Source(asked=source, path=str(target), revision=ended.stdout.strip())
    if ended.returncode in set(TrainerExit):
        raise RunFailed(TrainerExit(ended.returncode), **json.loads(ended.stdout))
    last = next((line for line in reversed(ended.stderr.splitlines()) if line.strip()), "no message")
    raise RunFailed(TrainerExit.INTERNAL, f"{field}: {source} could not be fetched: {last}")
