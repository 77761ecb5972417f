"""Files on a local disk that appear whole or not at all, and OS errors turned into sentences.

Used by the file store, and by every store for what it downloads.
"""

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from hone.errors import HoneError, IntegrityError, NotFound, StorageError, StorageUnavailable
from hone.storage.keys import RESERVED

CHUNK_BYTES = 1 << 20


@contextmanager
def new_file(path: Path, *, exclusive: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, its content is on disk under `path`.

    Temporary file in the same directory, fsync, rename, fsync of the directory: after a crash at any moment `path`
    holds the old content or the new. With `exclusive` a `path` that exists raises FileExistsError (link instead of
    rename).
    """
    _make_directory(path.parent)
    temporary = path.parent / f"{RESERVED}tmp-{secrets.token_hex(8)}"
    try:
        with os_errors_as_storage(path, expected=FileExistsError if exclusive else None):
            yield temporary
            sync(temporary)
            if exclusive:
                os.link(temporary, path)
            else:
                temporary.replace(path)
            sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _make_directory(path: Path) -> None:
    with os_errors_as_storage(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # /proc and its like: there, and closed to new names
            raise StorageError(f"{path} cannot be made.", fix="Set HONE_STORE to another directory.") from error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_chunks(path: Path) -> Generator[bytes, None, None]:
    """The file in pieces of a megabyte."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def write_chunks(
    path: Path,
    chunks: Generator[bytes, None, None],
    *,
    source: str,
    sha256: str | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Write what comes from `source` as a new file. Raises IntegrityError, and leaves none, when its digest differs."""
    digest = hashlib.sha256()
    with new_file(path) as temporary:
        # Closed here, not when garbage is collected: a connection may hang on it.
        with temporary.open("wb") as file, closing(chunks):
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                if on_bytes:
                    on_bytes(len(chunk))
        if sha256 is not None and digest.hexdigest() != sha256:
            raise mismatch(source, found=digest.hexdigest(), expected=sha256)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def mismatch(where: str, *, found: str, expected: str) -> IntegrityError:
    """What to raise when bytes are not those that were promised."""
    return IntegrityError(
        f"{where} has sha256 {found}, expected {expected}.",
        fix="It was altered or cut short: write it again from its source.",
    )


@contextmanager
def os_errors_as_storage(path: Path, *, expected: type[OSError] | None = None) -> Iterator[None]:
    """Map OSError, once, here. An `expected` one passes: it is an answer, not a failure."""
    try:
        yield
    except OSError as error:
        if expected and isinstance(error, expected):
            raise
        raise _mapped(error, path) from error


def _mapped(error: OSError, path: Path) -> HoneError:
    where = str(path)
    reason = error.strerror or str(error)
    match error.errno:
        case errno.ENOENT:
            return NotFound(f"{where} does not exist.")
        case errno.ENOSPC | errno.EDQUOT:
            return StorageError(
                f"The disk of {where} is full ({_free(path)} free).",
                fix="Free some space (`hone prune` removes old runs), or set HONE_STORE or HONE_HOME to another disk.",
            )
        case errno.EACCES | errno.EPERM:
            return StorageError(
                f"User {os.geteuid()} may not write or read {where}: {reason}.",
                fix="Give this user the right to it, or set HONE_STORE to a directory that it owns.",
            )
        case errno.EROFS:
            return StorageError(
                f"{where} is on a read-only file system.", fix="Mount it writable, or set HONE_STORE elsewhere."
            )
        case errno.ENOTDIR | errno.EISDIR | errno.EEXIST:
            return StorageError(f"{where} is in the way: {reason}.", fix="Name a directory that can hold the store.")
        case errno.ESTALE | errno.ETIMEDOUT | errno.EHOSTDOWN:
            return StorageUnavailable(f"The file system of {where} does not answer: {reason}.")
    return StorageError(f"{where}: {reason}.", fix="See the system's log, or set HONE_STORE to another directory.")


def _free(path: Path) -> str:
    for place in (path, *path.parents):
        with suppress(OSError):
            return f"{shutil.disk_usage(place).free / 2**20:.1f} MiB"
    return "nothing"
