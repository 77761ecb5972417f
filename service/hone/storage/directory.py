"""Directories of files in the store: sent and fetched in parallel, resumed, and complete only with their manifest.

Called by the trainer for checkpoints and outputs, and by the client for downloads. The manifest is written last and
only if there is none, so a directory is never complete by halves and a complete one is never replaced. Nothing but
reading every byte proves what a store holds (checksums beside an object are as old as its upload), so that is what
verifying does.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import TypeVar

from hone.errors import IntegrityError, NotFound, StorageError
from hone.storage.base import ArtifactStore, Progress
from hone.storage.keys import RESERVED, join_path
from hone.storage.local import mismatch, new_file, os_errors_as_storage, sha256_of
from hone.storage.manifest import MANIFEST, Manifest, ManifestFile, parse_manifest

DEFAULT_WORKERS = 4

Item = TypeVar("Item")


def upload_directory(
    store: ArtifactStore,
    directory: Path,
    prefix: str,
    *,
    progress: Progress | None = None,
    workers: int = DEFAULT_WORKERS,
    verify: bool = True,
    elsewhere: Sequence[ManifestFile] = (),
) -> Manifest:
    """Send every file of a directory, then its manifest, then read all of it back.

    Files that the store holds already, by size and digest, are not sent again: an interrupted call can be repeated.
    `verify=False` leaves the reading back to the caller; `elsewhere` are files that others have sent to the same
    prefix, which belong to it too. Raises StorageError when the prefix holds a complete
    directory with other files, before anything is sent, and when the directory holds anything but plain files.
    """
    own = files_of(directory, workers=workers)
    files = tuple(sorted([*own, *elsewhere]))
    manifest = _complete_with(store, prefix, files)
    send_files(store, directory, prefix, own, progress=progress, workers=workers)
    if manifest is None:
        manifest = Manifest(files=files, created=datetime.now(UTC).isoformat(timespec="seconds"))
        if not store.create(join_path(prefix, MANIFEST), manifest.to_json()):
            # Another writer was faster. _complete_with raises unless it wrote the same files.
            manifest = _complete_with(store, prefix, files) or manifest
    if verify:
        verify_directory(store, prefix, digest=manifest.digest, workers=workers)
    return manifest


def send_files(
    store: ArtifactStore,
    directory: Path,
    prefix: str,
    files: Sequence[ManifestFile],
    *,
    progress: Progress | None = None,
    workers: int = DEFAULT_WORKERS,
) -> None:
    """Send some files of a directory, those that the store does not hold; complete they are with a manifest only."""
    tally = _Tally(sum(file.size for file in files), progress)

    def send(file: ManifestFile) -> None:
        key = join_path(prefix, file.path)
        if holds_file(store, prefix, file):
            tally.add(file.size)
        else:
            store.put_file(directory / file.path, key, sha256=file.sha256, on_bytes=tally.add)

    _in_parallel(send, files, workers=workers, tally=tally)


def holds_file(store: ArtifactStore, prefix: str, file: ManifestFile) -> bool:
    """Whether the store holds it, by size and digest."""
    return store.holds(join_path(prefix, file.path), size_bytes=file.size, sha256=file.sha256)


def download_directory(
    store: ArtifactStore,
    prefix: str,
    directory: Path,
    *,
    digest: str | None = None,
    progress: Progress | None = None,
    workers: int = DEFAULT_WORKERS,
) -> Manifest:
    """Fetch every file of a complete directory, and its manifest last.

    Files that are there already, by size and digest, are not fetched again. Each file appears whole and verified or
    not at all. `digest`, when given, is what the manifest must have. Raises NotFound, or IntegrityError that names
    the file.
    """
    manifest = read_manifest(store, prefix, digest=digest)
    tally = _Tally(manifest.size_bytes, progress)

    def fetch(file: ManifestFile) -> None:
        target = directory / file.path
        with os_errors_as_storage(target):
            there = target.is_file() and target.stat().st_size == file.size and sha256_of(target) == file.sha256
        if there:
            tally.add(file.size)
            return
        try:
            store.get_file(join_path(prefix, file.path), target, sha256=file.sha256, on_bytes=tally.add)
        except NotFound as error:
            raise _missing(store, prefix, file) from error

    _in_parallel(fetch, manifest.files, workers=workers, tally=tally)
    with new_file(directory / MANIFEST) as temporary:
        temporary.write_bytes(manifest.to_json())
    return manifest


def verify_directory(
    store: ArtifactStore,
    prefix: str,
    *,
    digest: str | None = None,
    progress: Progress | None = None,
    workers: int = DEFAULT_WORKERS,
) -> Manifest:
    """Read every byte of a directory and compare it with its manifest.

    Raises NotFound when nothing is there, IntegrityError that names the file when something is missing or altered.
    Files that the manifest does not list are ignored, here and by `download_directory`.
    """
    manifest = read_manifest(store, prefix, digest=digest)
    tally = _Tally(manifest.size_bytes, progress)

    def check(file: ManifestFile) -> None:
        key = join_path(prefix, file.path)
        found = sha256()
        try:
            with closing(store.read_chunks(key)) as chunks:
                for chunk in chunks:
                    found.update(chunk)
                    tally.add(len(chunk))
        except NotFound as error:
            raise _missing(store, prefix, file) from error
        if found.hexdigest() != file.sha256:
            raise mismatch(store.url(key), found=found.hexdigest(), expected=file.sha256)

    _in_parallel(check, manifest.files, workers=workers, tally=tally)
    return manifest


def read_manifest(store: ArtifactStore, prefix: str, *, digest: str | None = None) -> Manifest:
    """The manifest of a directory, without reading its files.

    Raises NotFound when nothing is there, IntegrityError when files are there without a manifest or its digest is not
    `digest`.
    """
    key = join_path(prefix, MANIFEST)
    try:
        data = store.get_bytes(key)
    except NotFound as error:
        where = store.url(prefix)
        if next(iter(store.list_objects(prefix)), None) is None:
            raise NotFound(f"There is nothing at {where}.") from error
        raise IntegrityError(
            f"{where} is not complete: it has no {MANIFEST}.",
            fix="Its upload was interrupted: repeat it, or delete it.",
        ) from error
    manifest = parse_manifest(data, source=store.url(key))
    if digest is not None and manifest.digest != digest:
        raise mismatch(store.url(key), found=manifest.digest, expected=digest)
    return manifest


def _complete_with(store: ArtifactStore, prefix: str, files: tuple[ManifestFile, ...]) -> Manifest | None:
    """The manifest that is there, if any. Raises StorageError when it lists other files than these."""
    key = join_path(prefix, MANIFEST)
    try:
        manifest = parse_manifest(store.get_bytes(key), source=store.url(key))
    except NotFound:
        return None
    if manifest.files != files:
        raise StorageError(
            f"{store.url(prefix)} is complete already, and holds other files (of {manifest.created}).",
            fix="Outputs are never replaced: write under another job or attempt, or delete it first.",
        )
    return manifest


def files_of(directory: Path, *, workers: int = DEFAULT_WORKERS) -> tuple[ManifestFile, ...]:
    """Every file below a directory. Raises StorageError where anything but plain files is in it, or nothing."""
    found: list[ManifestFile] = []

    def hash_file(path: str) -> None:
        source = directory / path
        with os_errors_as_storage(source):
            found.append(ManifestFile(path=path, size=source.stat().st_size, sha256=sha256_of(source)))

    _in_parallel(hash_file, _plain_files(directory), workers=workers)
    return tuple(sorted(found))


def _plain_files(directory: Path) -> list[str]:
    """Relative paths of all files, sorted; a link could name anything on this machine, so it is refused."""
    found = []
    with os_errors_as_storage(directory):
        for parent, directories, names in os.walk(directory, onerror=_raise):
            for name in [*directories, *names]:
                path = Path(parent, name)
                if path.is_symlink() or not (path.is_dir() or path.is_file()):
                    raise StorageError(f"{path} is not a plain file.", fix="Outputs hold files and directories only.")
            found += [Path(parent, name) for name in names if not name.startswith(RESERVED)]
    paths = sorted(path.relative_to(directory).as_posix() for path in found)
    paths = [path for path in paths if path != MANIFEST]
    if not paths:
        raise StorageError(f"{directory} holds no file to store.", fix="Write the outputs first.")
    return paths


def _raise(error: OSError) -> None:
    raise error


def _missing(store: ArtifactStore, prefix: str, file: ManifestFile) -> IntegrityError:
    return IntegrityError(
        f"{store.url(join_path(prefix, file.path))} is missing, and the manifest lists it.",
        fix="It was deleted after the upload: write the directory again from its source.",
    )


def _in_parallel(
    work: Callable[[Item], None], items: Iterable[Item], *, workers: int, tally: "_Tally | None" = None
) -> None:
    """Do all of it on a few threads; the first failure, or an interrupt, stops the rest and is raised."""
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="hone-storage")
    try:
        for future in as_completed([pool.submit(work, item) for item in items]):
            future.result()
    except BaseException as error:
        if tally:
            tally.stop(error)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class _Tally:
    """Bytes done of a total, counted from several threads."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress, self._lock = 0, total, progress, Lock()
        self._stopped_by: BaseException | None = None

    def add(self, num_bytes: int) -> None:
        """Count, and tell who asked. Once a transfer failed this raises its error in every other, to end them too."""
        with self._lock:
            if self._stopped_by:
                raise self._stopped_by
            self._done += num_bytes
            try:
                if self._progress:
                    self._progress(self._done, self._total)
            except BaseException as error:
                self._stopped_by = error
                raise

    def stop(self, error: BaseException) -> None:
        """End every transfer that still counts."""
        with self._lock:
            self._stopped_by = self._stopped_by or error
