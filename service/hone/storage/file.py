"""The artefact store on a directory of this machine: file:///directory.

Needs hard links and flock, which local file systems and NFSv4 have; the probe says so where they are missing. An
object is written under a temporary name, synced and renamed, so a crash leaves the old content or the new, and at
worst an unlisted `.hone-tmp-…`.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from hone.errors import NotFound, UserError
from hone.storage.base import OnBytes, StoredObject, Versioned
from hone.storage.keys import RESERVED, check_key
from hone.storage.local import new_file, os_errors_as_storage, read_chunks, sha256_of, sync, write_chunks
from hone.storage.manifest import MANIFEST
from hone.storage.probe import probe_store

_LOCK = f"{RESERVED}lock"


class FileStore:
    """Keys are relative paths below one directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def uri(self) -> str:
        return self._root.as_uri()

    def url(self, key: str) -> str:
        return self.local_path(key).as_uri()

    def local_path(self, key: str) -> Path:
        return self._root / check_key(key) if key else self._root

    def put_file(self, path: Path, key: str, *, sha256: str, on_bytes: OnBytes | None = None) -> None:
        chunks = self._read(path)
        write_chunks(self.local_path(key), chunks, source=str(path), sha256=sha256, on_bytes=on_bytes)

    def get_file(self, key: str, path: Path, *, sha256: str | None = None, on_bytes: OnBytes | None = None) -> None:
        write_chunks(path, self.read_chunks(key), source=self.url(key), sha256=sha256, on_bytes=on_bytes)

    def put_bytes(self, key: str, data: bytes) -> None:
        with new_file(self.local_path(key)) as temporary:
            temporary.write_bytes(data)

    def get_bytes(self, key: str) -> bytes:
        path = self._existing(key)
        with os_errors_as_storage(path):
            return path.read_bytes()

    def read_chunks(self, key: str) -> Generator[bytes, None, None]:
        return self._read(self._existing(key))

    def holds(self, key: str, *, size_bytes: int, sha256: str) -> bool:
        path = self.local_path(key)
        with os_errors_as_storage(path):
            return path.is_file() and path.stat().st_size == size_bytes and sha256_of(path) == sha256

    def create(self, key: str, data: bytes) -> bool:
        try:
            with new_file(self.local_path(key), exclusive=True) as temporary:
                temporary.write_bytes(data)
        except FileExistsError:
            return False
        return True

    def get_versioned(self, key: str) -> Versioned | None:
        try:
            data = self.get_bytes(key)
        except NotFound:
            return None
        return Versioned(data=data, version=_version(data))

    def replace(self, key: str, data: bytes, *, version: str) -> bool:
        path = self.local_path(key)
        with self._locked(path.parent):
            current = self.get_versioned(key)
            if current is None or current.version != version:
                return False
            self.put_bytes(key, data)
            return True

    def list_objects(self, prefix: str = "") -> Iterator[StoredObject]:
        top = self.local_path(prefix)
        with os_errors_as_storage(top):
            found = [
                (Path(directory, name).relative_to(self._root).as_posix(), Path(directory, name).stat().st_size)
                for directory, _, names in os.walk(top)
                for name in names
                if not name.startswith(RESERVED)
            ]
        for key, size_bytes in sorted(found):
            yield StoredObject(key=key, size_bytes=size_bytes)

    def delete(self, prefix: str) -> int:
        if not prefix:
            raise UserError(f"The root of {self.uri} is not deleted.", fix="Name a prefix.")
        path = self.local_path(prefix)
        with os_errors_as_storage(path):
            if path.is_file():
                path.unlink()
                sync(path.parent)
                return 1
            if not path.is_dir():
                return 0
            num_objects = sum(1 for _ in self.list_objects(prefix))
            for manifest in sorted(path.rglob(MANIFEST)):
                manifest.unlink()
                sync(manifest.parent)
            shutil.rmtree(path)
            sync(path.parent)
        return num_objects

    def presign(self, key: str, *, expires_s: int) -> str | None:
        return None

    def probe(self) -> None:
        probe_store(self)

    def close(self) -> None:
        """Nothing is open between calls."""

    def _read(self, path: Path) -> Generator[bytes, None, None]:
        with os_errors_as_storage(path):
            yield from read_chunks(path)

    def _existing(self, key: str) -> Path:
        path = self.local_path(key)
        with os_errors_as_storage(path):
            if not path.is_file():
                raise NotFound(f"{path} does not exist.")
        return path

    @contextmanager
    def _locked(self, directory: Path) -> Iterator[None]:
        with os_errors_as_storage(directory):
            directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
