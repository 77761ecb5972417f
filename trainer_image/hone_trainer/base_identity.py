"""Which model a base is: its source, its revision, a hash of its configuration and one of its weights.

Written beside every adapter (hone_base.json) and held against the base at every load, because PEFT loads an adapter on
any model of the same shapes without a word. The weights' hash takes a sample of every tensor, so it costs hundreds of
small reads and no more, tells two fine-tunings of one architecture apart, and does not mind how files are cut.
"""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from hone.modelinfo import SavedAdapter
from hone.run import TrainerExit
from hone_trainer.failure import RunFailed
from hone_trainer.inputs import Source

_SAMPLE_BYTES = 256


def base_identity(source: Source) -> dict[str, str]:
    """Which model this is."""
    path = Path(source.path)
    return {
        "source": source.address or source.asked,
        "revision": source.revision,
        "config_sha256": sha256((path / "config.json").read_bytes()).hexdigest(),
        "weights_sha256": _weights_sha256(path),
    }


def public_name(base: Source) -> str:
    """How others find the base: its repository, its address in a bucket, or the bare name of a local directory."""
    scheme, _, rest = base.asked.partition("://")
    if scheme == "hf":
        return rest.partition("@")[0]
    return Path(rest).name if scheme == "file" else base.asked


def check_base(adapter: SavedAdapter, base: Source) -> None:
    """Raise RunFailed (USER) unless this is the base that the adapter was trained on."""
    known, found = adapter.identity, base_identity(base)
    if not known:
        _check_named_base(adapter, base)
        return
    for name, what in (("config_sha256", "config.json"), ("weights_sha256", "weights")):
        if known.get(name) and known[name] != found[name]:
            raise RunFailed(
                TrainerExit.USER,
                f"{adapter.source} was trained on {_named(known)}, and {base.asked} is another model: its {what} "
                f"{'differs' if name == 'config_sha256' else 'differ'}, although the adapter may fit its shapes.",
                fix=f"Use the adapter with {adapter.base}.",
            )


def _check_named_base(adapter: SavedAdapter, base: Source) -> None:
    """Another tool's adapter has only a name to go by."""
    named = str(adapter.config.get("base_model_name_or_path") or "")
    if base.asked.startswith("hf://") and "/" in named.strip("/") and public_name(base).lower() != named.lower():
        raise RunFailed(
            TrainerExit.USER,
            f"{adapter.source} names {named} as its base, and {base.asked} is another model.",
            fix=f"Use the adapter with {named}.",
        )


def _named(identity: Any) -> str:
    revision = identity.get("revision")
    return f"{identity.get('source')}{f' at {revision}' if revision else ''}"


def _weights_sha256(model: Path) -> str:
    """Of name, shape, precision and the middle bytes of every tensor, in order of name."""
    files = list(model.glob("*.safetensors"))
    files = [file for file in files if file.name.startswith("model")] or files  # some repositories hold them twice
    lines = sorted(line for file in files for line in _samples(file))
    return sha256(b"\n".join(lines)).hexdigest()


def _samples(file: Path) -> Iterator[bytes]:
    """The format: 8 bytes with the header's length, the header as JSON, then the tensors' bytes."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            start, end = tensor["data_offsets"]
            opened.seek(8 + length + max(start, (start + end - _SAMPLE_BYTES) // 2))
            sample = opened.read(min(_SAMPLE_BYTES, end - start)).hex()
            yield f"{name} {tensor['dtype']} {tensor['shape']} {sample}".encode()
