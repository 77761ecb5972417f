"""The artefact store: s3:// and file:// behind one small protocol, and directories that are complete only with a
manifest.

    store = open_store("s3://bucket/prefix")
    store.probe()
    job = JobLayout("default", "ultrachat-sft-x7k2p")
    manifest = upload_directory(store, Path("out"), job.adapter)
    download_directory(store, job.adapter, Path("elsewhere"), digest=manifest.digest)

Used by the service, the trainer and the client. Importing it loads no boto3; opening an s3:// store does.
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from hone.errors import UserError
from hone.storage.base import ArtifactStore, Credentials, OnBytes, Progress, StoredObject, Versioned
from hone.storage.directory import (
    download_directory,
    files_of,
    holds_file,
    read_manifest,
    send_files,
    upload_directory,
    verify_directory,
)
from hone.storage.file import FileStore
from hone.storage.keys import AttemptLayout, JobLayout, WriterLayout, check_key, join_key, join_path
from hone.storage.local import sha256_of
from hone.storage.manifest import MANIFEST, Manifest, ManifestFile

__all__ = [
    "MANIFEST",
    "ArtifactStore",
    "AttemptLayout",
    "Credentials",
    "FileStore",
    "JobLayout",
    "Manifest",
    "ManifestFile",
    "OnBytes",
    "Progress",
    "StoredObject",
    "Versioned",
    "WriterLayout",
    "download_directory",
    "files_of",
    "holds_file",
    "join_key",
    "join_path",
    "open_store",
    "read_manifest",
    "send_files",
    "sha256_of",
    "upload_directory",
    "verify_directory",
]


def open_store(
    uri: str,
    *,
    endpoint: str | None = None,
    region: str | None = None,
    credentials: Credentials | None = None,
    part_bytes: int | None = None,
) -> ArtifactStore:
    """Open the store at `s3://bucket/prefix` or `file:///directory`; nothing is contacted yet (`probe` does that).

    `endpoint`, `region`, `credentials` and `part_bytes` (size of multipart parts, at least 5 MiB) are for s3://;
    absent ones come from the AWS_* variables and files. Raises UserError when the address is none, or an option does
    not belong to its scheme.
    """
    parts = urlsplit(uri)
    if parts.query or parts.fragment or parts.username is not None:
        raise UserError("A store address has no query, fragment or user.", fix="Give credentials by AWS_* variables.")
    if parts.scheme == "s3":
        return _open_s3(uri, endpoint=endpoint, region=region, credentials=credentials, part_bytes=part_bytes)
    if parts.scheme != "file" or parts.netloc not in {"", "localhost"} or not parts.path.startswith("/"):
        raise _not_an_address(uri)
    if endpoint or region or credentials or part_bytes:
        raise UserError(
            f"{uri!r} is a directory: it has no endpoint, region, credentials or parts.", fix="Leave them out."
        )
    path = unquote(parts.path)
    if "\0" in path or ".." in Path(path).parts:
        raise _not_an_address(uri)
    return FileStore(Path(path))


def _open_s3(
    uri: str, *, endpoint: str | None, region: str | None, credentials: Credentials | None, part_bytes: int | None
) -> ArtifactStore:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    prefix = prefix.rstrip("/")
    if not bucket or (prefix and not _is_key(prefix)):
        raise _not_an_address(uri)
    from hone.storage.s3 import DEFAULT_PART_BYTES, S3Store  # imports boto3, which takes a while

    return S3Store(
        bucket,
        prefix,
        endpoint=endpoint,
        region=region,
        credentials=credentials,
        part_bytes=part_bytes or DEFAULT_PART_BYTES,
    )


def _is_key(text: str) -> bool:
    try:
        check_key(text)
    except UserError:
        return False
    return True


def _not_an_address(uri: str) -> UserError:
    return UserError(f"{uri!r} is not the address of a store.", fix="Write s3://bucket/prefix or file:///directory.")
