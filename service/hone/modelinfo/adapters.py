"""What a saved adapter says of itself: the base that it belongs to, and how it was made. From its two JSON files alone.

Called by machine.py before a request that goes on from an adapter is planned, by sources.py for the shape of its base,
and by the trainer, which holds the identity against the base at every load. Hone writes the identity beside PEFT's
configuration; an adapter of another tool has the second only, which names a base and proves nothing.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hone.modelinfo.shape import BadConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_IDENTITY = "hone_base.json"
"""{source, revision, config_sha256, weights_sha256, dtype, quantization} of the base as it was trained on."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """The two files of one adapter."""

    source: str
    """Where it lies, as it was asked for."""
    config: Mapping[str, Any]
    """PEFT's."""
    identity: Mapping[str, Any]
    """Hone's; empty where another tool wrote the adapter."""

    @property
    def base(self) -> str:
        """The source of its base, at the revision that it was trained on. Raises BadConfig where it names none."""
        named = str(self.identity.get("source") or self.config.get("base_model_name_or_path") or "")
        revision = self.identity.get("revision") or self.config.get("revision")
        if re.fullmatch(r"[\w.-]+/[\w.-]+", named):
            named = f"hf://{named}"
        elif named.startswith("/"):
            named = f"file://{named}"
        if not re.fullmatch(r"(hf|s3|file)://\S+", named):
            raise BadConfig(
                f"{self.source}/{ADAPTER_CONFIG} does not say where the adapter's base is "
                f"(base_model_name_or_path: {named!r}).",
                fix="Write the base's repository or address there.",
            )
        return f"{named.partition('@')[0]}@{revision}" if named.startswith("hf://") and revision else named


def read_adapter(source: str, config: bytes, identity: bytes | None) -> SavedAdapter:
    """An adapter of the bytes of its files. Raises BadConfig: not JSON, no LoRA, a start that changed the base."""
    adapter = SavedAdapter(
        source=source,
        config=_mapping(source, ADAPTER_CONFIG, config),
        identity=_mapping(source, ADAPTER_IDENTITY, identity) if identity else {},
    )
    kind, start = adapter.config.get("peft_type"), str(adapter.config.get("init_lora_weights", True)).lower()
    if kind != "LORA":
        raise BadConfig(f"{source} is an adapter of the kind {kind!r}.", fix="Hone reads LoRA adapters.")
    if start.startswith(_CHANGES_BASE):
        raise BadConfig(
            f"{source} was started by {start}, which changes the base that it is trained on, so it fits no other.",
            fix="Convert it to a plain LoRA adapter first (PEFT's path_initial_model_for_weight_conversion).",
        )
    return adapter


def read_adapter_directory(directory: Path, source: str) -> SavedAdapter | None:
    """The adapter of a directory; None where it holds a model, or neither. Raises BadConfig."""
    file, identity = directory / ADAPTER_CONFIG, directory / ADAPTER_IDENTITY
    if not file.is_file() or (directory / "config.json").is_file():
        return None
    try:
        return read_adapter(source, file.read_bytes(), identity.read_bytes() if identity.is_file() else None)
    except OSError as error:
        raise BadConfig(f"{file} cannot be read: {error.strerror}.", fix="Check its permissions.") from error


def _mapping(source: str, name: str, text: bytes) -> Mapping[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise BadConfig(f"{source}/{name} is not JSON: {error}.", fix="Copy the file again.") from error
    if not isinstance(values, dict):
        raise BadConfig(f"{source}/{name} holds no object.", fix="Copy the file again.")
    return values
