"""What an artefact store can do: the protocol that s3:// and file:// both speak.

Keys are made by `hone.storage.keys` and by nothing else; every store checks the keys it is given. A prefix names what
lies below it, as a directory does: `job-1` never matches `job-10`. The empty prefix is the root of the store.

Every method raises StorageUnavailable (sending it again may help) or StorageError (a person has to look); reading
what is not there raises NotFound.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

OnBytes = Callable[[int], None]
"""Called with the bytes moved since the last call, a negative number when a part is sent again; from any thread."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total), one call at a time, from any thread."""


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """Keys of an S3 store, given by hand; absent, the usual AWS chain applies (variables, files, workload identity)."""

    access_key: str
    secret_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """One object of a listing."""

    key: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Versioned:
    """A small object and the version that `replace` compares."""

    data: bytes
    version: str


class ArtifactStore(Protocol):
    """Objects under keys. Safe to use from several threads."""

    @property
    def uri(self) -> str:
        """Root of this store, without a slash at its end: what `open_store` takes. Holds no secret."""

    def url(self, key: str) -> str:
        """The address of one key, for messages and for `open_store`."""

    def local_path(self, key: str) -> Path | None:
        """Where the object or directory lies on this machine; None for a remote store."""

    def put_file(self, path: Path, key: str, *, sha256: str, on_bytes: OnBytes | None = None) -> None:
        """Store a file whose digest is known, in place of what was there. Raises IntegrityError when the file changed
        meanwhile and the store can tell; `verify_directory` always can."""

    def get_file(self, key: str, path: Path, *, sha256: str | None = None, on_bytes: OnBytes | None = None) -> None:
        """Fetch an object; the file appears whole or not at all. Raises IntegrityError when its digest is not
        `sha256`."""

    def put_bytes(self, key: str, data: bytes) -> None:
        """Store a small object, in place of what was there."""

    def get_bytes(self, key: str) -> bytes:
        """Read a small object. Raises NotFound."""

    def read_chunks(self, key: str) -> Generator[bytes, None, None]:
        """Read an object of any size; close the generator when it is not read to its end. Raises NotFound."""

    def holds(self, key: str, *, size_bytes: int, sha256: str) -> bool:
        """Whether the object is there with these bytes, as cheaply as the store can tell: to skip what was sent
        already. An S3 store believes the digest written beside the object; only reading proves it."""

    def create(self, key: str, data: bytes) -> bool:
        """Store a small object unless the key is taken; of several callers exactly one gets True."""

    def get_versioned(self, key: str) -> Versioned | None:
        """Read a pointer with its version; None when there is none."""

    def replace(self, key: str, data: bytes, *, version: str) -> bool:
        """Replace a pointer if it still has this version; of several callers with one version exactly one gets True.
        Equal bytes have equal versions, so a pointer's data should never return to an earlier value."""

    def list_objects(self, prefix: str = "") -> Iterator[StoredObject]:
        """Everything below the prefix, in order of key."""

    def delete(self, prefix: str) -> int:
        """Remove the object of this key and everything below it, manifests first; the number of objects removed.
        An interrupted deletion can be repeated. The root is refused."""

    def presign(self, key: str, *, expires_s: int) -> str | None:
        """A URL that downloads the object without credentials for a while; None when the store serves no HTTP."""

    def probe(self) -> None:
        """Write, read, conditionally write and remove a small object, so that every cause of failure shows before a
        job starts."""

    def close(self) -> None:
        """Close connections. The store is not used again."""
