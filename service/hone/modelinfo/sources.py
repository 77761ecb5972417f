"""Where a shape comes from: a local directory, a snapshot in the Hub's local cache, or the shipped table.

Nothing here opens a connection. A source that none of the three knows is an error that says what to do.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from hone.modelinfo.adapters import read_adapter_directory
from hone.modelinfo.families import read_config
from hone.modelinfo.shape import BadConfig, ModelShape, UnknownModel

MAX_CONFIG_BYTES = 4 * 2**20
"""A config.json is a few KiB; one with a large label map may have hundreds."""


def load_shape(source: str, *, num_labels: int | None = None, hub_cache: Path | None = None) -> ModelShape:
    """The shape of the model at `file://<directory>` or `hf://<org>/<name>[@<revision>]`.

    The shape of an adapter's directory is that of its base. A cached snapshot of the asked revision wins over the
    shipped table, whose entries stand for every revision. `hub_cache` is the Hub's cache directory, by default this
    user's; `num_labels` asks for a classifier's shape.
    Raises UnknownModel, UnknownFamily or BadConfig.
    """
    scheme, _, place = source.partition("://")
    if scheme == "file":
        if adapter := read_adapter_directory(Path(place), source):
            return _of_base(adapter.base, num_labels, hub_cache)
        return _from_directory(Path(place), source, num_labels)
    if scheme == "hf":
        return _from_hub(place, source, num_labels, hub_cache or default_hub_cache())
    raise UnknownModel(
        f"the shape of {source!r} cannot be read from here.", fix="Shapes are read from hf:// and file:// sources."
    )


def default_hub_cache() -> Path:
    """Where huggingface_hub keeps snapshots: HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub."""
    if explicit := os.environ.get("HF_HUB_CACHE"):
        return Path(explicit).expanduser()
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(user_cache, "huggingface")
    return Path(home).expanduser() / "hub"


@cache
def shipped_configs() -> Mapping[str, Mapping[str, Any]]:
    """The shipped table: the Hub's name → configuration values, `base` resolved."""
    text = files(__package__).joinpath("shapes.yaml").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    resolved: dict[str, dict[str, Any]] = {}
    for name, entry in table.items():  # a base stands above the entries that use it
        values = dict(entry)
        resolved[name] = {**resolved[values.pop("base")], **values} if "base" in values else values
    return resolved


def _from_directory(directory: Path, source: str, num_labels: int | None) -> ModelShape:
    path = directory / "config.json"
    if not path.is_file():
        raise UnknownModel(f"{source} has no config.json.", fix=_what_is_there_instead(directory))
    with os.scandir(directory) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith(".safetensors")}
    weights = {name: size for name, size in sizes.items() if name.startswith("model")} or sizes
    return _sized(_read(path, source, num_labels), sum(weights.values()) or None)


@lru_cache(maxsize=256)
def _sized(shape: ModelShape, weight_bytes: int | None) -> ModelShape:
    return replace(shape, weight_bytes_on_disk=weight_bytes)


def read_shape(config: bytes, source: str) -> ModelShape:
    """The shape that the bytes of a config.json tell. Raises UnknownFamily or BadConfig."""
    if len(config) > MAX_CONFIG_BYTES:
        raise BadConfig(f"{source}/config.json has {len(config)} bytes.", fix="Name a model directory.")
    try:
        values = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise BadConfig(f"{source}/config.json is not JSON: {error}.", fix="Copy the file again.") from error
    if not isinstance(values, dict):
        raise BadConfig(f"{source}/config.json holds no object.", fix="Copy the file again.")
    return read_config(values, source=source, num_labels=None)


def _of_base(base: str, num_labels: int | None, hub_cache: Path | None) -> ModelShape:
    if base.startswith("file://") and (Path(base.removeprefix("file://")) / "adapter_config.json").is_file():
        raise UnknownModel(f"the adapter's base {base} is an adapter itself.", fix="Merge that one first.")
    return load_shape(base, num_labels=num_labels, hub_cache=hub_cache)


def _what_is_there_instead(directory: Path) -> str:
    if directory.is_dir():
        return "Name the directory that save_pretrained() wrote."
    return "There is no such directory on the machine that plans."


def _from_hub(place: str, source: str, num_labels: int | None, hub_cache: Path) -> ModelShape:
    name, _, revision = place.partition("@")
    if snapshot := _snapshot(hub_cache, name, revision or "main"):
        return _read(snapshot / "config.json", source, num_labels)
    shape = _from_table(name.lower(), num_labels)
    if shape is None:
        raise UnknownModel(f"the shape of {source} is not known here.", fix=_unknown_model_fix(name))
    return replace(shape, source=source)


def _snapshot(hub_cache: Path, name: str, revision: str) -> Path | None:
    """The directory of a cached snapshot with a config.json; names and revisions come from callers, so no `..`."""
    parts = name.split("/")
    if len(parts) > 2 or not all(re.fullmatch(r"\w[\w.-]*", part) for part in parts):
        return None
    if not all(re.fullmatch(r"\w[\w.-]*", part) for part in revision.split("/")):
        return None
    repository = hub_cache / f"models--{'--'.join(parts)}"
    try:
        commit = (repository / "refs" / revision).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        commit = revision
    snapshot = repository / "snapshots" / commit
    return snapshot if (snapshot / "config.json").is_file() else None


@lru_cache(maxsize=1024)
def _from_table(lower_name: str, num_labels: int | None) -> ModelShape | None:
    for name, values in shipped_configs().items():
        if name.lower() == lower_name:
            return read_config(values, source=f"hf://{name}", num_labels=num_labels)
    return None


def _unknown_model_fix(name: str) -> str:
    known = {known.lower(): known for known in shipped_configs()}
    short = {lower.rpartition("/")[2]: full for lower, full in known.items()}
    close = get_close_matches(name.lower(), known, n=1, cutoff=0.8)
    found = known[close[0]] if close else short.get(name.lower().rpartition("/")[2])
    hint = f"Did you mean hf://{found}? Otherwise download" if found else "Download"
    return f"{hint} it (hf download {name}) so that its config.json is in the cache, or give a file:// directory."


def _read(path: Path, source: str, num_labels: int | None) -> ModelShape:
    try:
        status = path.stat()
    except OSError as error:
        raise BadConfig(f"{path} cannot be read: {error.strerror}.", fix="Check its permissions.") from error
    return _read_cached(path, status.st_mtime_ns, status.st_size, source, num_labels)


@lru_cache(maxsize=256)
def _read_cached(path: Path, mtime_ns: int, size: int, source: str, num_labels: int | None) -> ModelShape:
    """A file that changed has another time or size, hence another key."""
    if size > MAX_CONFIG_BYTES:
        raise BadConfig(f"{path} has {size} bytes; a config.json has a few thousand.", fix="Name a model directory.")
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise BadConfig(f"{path} cannot be read: {error.strerror}.", fix="Check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise BadConfig(f"{path} is not JSON: {error}.", fix="Copy the file again.") from error
    if not isinstance(values, dict):
        raise BadConfig(f"{path} holds a {type(values).__name__}, not an object.", fix="Copy the file again.")
    return read_config(values, source=source, num_labels=num_labels)
