"""The manifest of a directory: which files belong to it, with size and SHA-256. A directory without one is not
complete."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from hone.errors import IntegrityError, UserError
from hone.storage.keys import join_path

MANIFEST = "MANIFEST.json"
SCHEMA = 1

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, order=True)
class ManifestFile:
    """One file of a directory."""

    path: str
    """Relative, with `/` between names."""
    size: int
    """Bytes."""
    sha256: str
    """Of the whole file, in lower-case hex."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What MANIFEST.json says; `files` are in order of path."""

    files: tuple[ManifestFile, ...]
    created: str
    """ISO 8601, UTC."""
    schema: int = SCHEMA

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which stands for every byte of the directory: what is recorded of a checkpoint."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def to_json(self) -> bytes:
        """The bytes of MANIFEST.json; equal manifests give equal bytes."""
        data = {"schema": self.schema, "created": self.created, "files": [asdict(file) for file in self.files]}
        return json.dumps(data, indent=1, ensure_ascii=False).encode() + b"\n"


def parse_manifest(data: bytes, *, source: str) -> Manifest:
    """Read MANIFEST.json, trusting nothing in it: its paths become files. Raises IntegrityError that names `source`."""
    try:
        content = json.loads(data)
        if content["schema"] != SCHEMA:
            raise ValueError(f"it has schema {content['schema']!r}, this version reads schema {SCHEMA}")
        files = tuple(sorted(_file(entry) for entry in content["files"]))
        manifest = Manifest(files=files, created=str(content["created"]))
    except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise IntegrityError(f"{source} is not a manifest: {error}", fix="Write the directory again.") from error
    paths = [file.path for file in files]
    if len(set(paths)) != len(paths) or MANIFEST in paths:
        raise IntegrityError(f"{source} lists a file twice, or itself.", fix="Write the directory again.")
    return manifest


def _file(entry: dict[str, Any]) -> ManifestFile:
    path, size, sha256 = entry["path"], entry["size"], entry["sha256"]
    join_path("", path)  # refuses a path that leaves the directory
    if type(size) is not int or size < 0 or not _SHA256.fullmatch(sha256):
        raise ValueError(f"file {path!r} has size {size!r} and sha256 {sha256!r}")
    return ManifestFile(path=path, size=size, sha256=sha256)
