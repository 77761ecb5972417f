"""Outputs of a job, straight from the artefact store with the caller's own credentials; every file is verified."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hone.errors import NotFound
from hone.job import Output
from hone.storage import ArtifactStore, Manifest, download_directory, open_store, read_manifest, verify_directory

Progress = Callable[[int, int], None]


def download(outputs: Sequence[Output], directory: Path, *, progress: Progress | None = None) -> list[Path]:
    """Fetch each output into `directory/<kind>`; the directories. `progress` gets bytes done and in total, of all.

    Raises IntegrityError, StorageError, StorageUnavailable, and NotFound where the store is another machine's disk.
    """
    total, done, paths = sum(output.size_bytes for output in outputs), 0, []
    for output in outputs:
        path = directory / output.kind
        _download(output, path, _shifted(progress, done, total))
        done += output.size_bytes
        paths.append(path)
    return paths


def manifest_of(output: Output) -> Manifest:
    """Which files an output has, without fetching them; raises as `download` does."""
    with _store_of(output) as (store, prefix):
        return read_manifest(store, prefix, digest=output.sha256)


def present(output: Output, directory: Path, *, progress: Progress | None = None) -> Path:
    """Where an output lies on this machine, every file verified: in a file:// store itself, else in `directory`, where
    it is fetched to. Raises what `download` raises."""
    if not output.uri.startswith("file://"):
        _download(output, directory, progress)
        return directory
    with _store_of(output) as (store, prefix):
        verify_directory(store, prefix, digest=output.sha256, progress=progress)
    return Path(unquote(urlsplit(output.uri).path))


def _download(output: Output, path: Path, progress: Progress | None) -> None:
    with _store_of(output) as (store, prefix):
        download_directory(store, prefix, path, digest=output.sha256, progress=progress)


@contextmanager
def _store_of(output: Output) -> Iterator[tuple[ArtifactStore, str]]:
    """The store that an output lies in, and its prefix there."""
    root, _, prefix = output.uri.rpartition("/")
    endpoint = os.environ.get("HONE_STORE_ENDPOINT") or None
    store = open_store(root, endpoint=endpoint if root.startswith("s3://") else None)
    try:
        yield store, prefix
    except NotFound as error:
        if not output.uri.startswith("file://"):
            raise
        raise NotFound(
            f"{output.uri} is not on this machine.",
            fix="Download where the service runs, or give the service an s3:// store (HONE_STORE).",
        ) from error


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)
