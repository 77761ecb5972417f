"""The artefact store on S3 or a server that speaks it: s3://bucket/prefix.

Every upload carries SHA-256, per part for multipart, which the server checks before it accepts; the digest of the
whole file is written beside the object as metadata. Set a lifecycle rule (AbortIncompleteMultipartUpload) on the
bucket: a killed upload leaves its parts. boto3 is imported here and only when an s3:// store is opened.
"""

import os
import secrets
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import boto3
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import ClientError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError
from s3transfer.exceptions import CancelledError
from s3transfer.futures import TransferFuture
from s3transfer.subscribers import BaseSubscriber

from hone.errors import NotFound, StorageError, StorageUnavailable, UserError
from hone.storage.base import Credentials, OnBytes, StoredObject, Versioned
from hone.storage.keys import check_key
from hone.storage.local import CHUNK_BYTES, os_errors_as_storage, write_chunks
from hone.storage.manifest import MANIFEST
from hone.storage.probe import probe_store
from hone.storage.s3_errors import Place, answer_to_error, code_of, s3_errors_as_storage

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ObjectIdentifierTypeDef

DEFAULT_PART_BYTES = 32 << 20
_DELETE_BATCH = 1000  # what DeleteObjects takes
_PROBE_ATTEMPTS = 2  # a wrong address should show within seconds
_CONDITIONAL_ATTEMPTS = 5
_READ_ATTEMPTS = 5


class S3Store:
    """Keys are object keys below one prefix of one bucket."""

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str | None = None,
        region: str | None = None,
        credentials: Credentials | None = None,
        part_bytes: int = DEFAULT_PART_BYTES,
        max_attempts: int = 5,
    ) -> None:
        self._bucket, self._prefix = bucket, prefix
        self._endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        self._region, self._credentials, self._part_bytes = region, credentials, part_bytes
        with s3_errors_as_storage(lambda: self._place(self.uri)):
            self._client = self._connect(max_attempts)
        self._transfers = create_transfer_manager(
            self._client,
            TransferConfig(multipart_threshold=part_bytes, multipart_chunksize=part_bytes, max_concurrency=8),
        )

    @property
    def uri(self) -> str:
        return self.url("")

    def url(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._full(key)}".rstrip("/")

    def local_path(self, key: str) -> None:
        return None

    def put_file(self, path: Path, key: str, *, sha256: str, on_bytes: OnBytes | None = None) -> None:
        with os_errors_as_storage(path), self._errors(key):
            watcher = _Watcher(on_bytes)
            transfer = self._transfers.upload(
                str(path),
                self._bucket,
                self._full(key),
                extra_args={"ChecksumAlgorithm": "SHA256", "Metadata": {"sha256": sha256}},
                subscribers=[watcher],
            )
            watcher.wait(transfer)

    def get_file(self, key: str, path: Path, *, sha256: str | None = None, on_bytes: OnBytes | None = None) -> None:
        write_chunks(path, self.read_chunks(key), source=self.url(key), sha256=sha256, on_bytes=on_bytes)

    def put_bytes(self, key: str, data: bytes) -> None:
        with self._errors(key):
            self._client.put_object(Bucket=self._bucket, Key=self._full(key), Body=data, ChecksumAlgorithm="SHA256")

    def get_bytes(self, key: str) -> bytes:
        return b"".join(self.read_chunks(key))

    def read_chunks(self, key: str) -> Generator[bytes, None, None]:
        done = 0
        again: dict[str, Any] = {}
        for attempts_left in reversed(range(_READ_ATTEMPTS)):
            with self._errors(key):
                answer = self._client.get_object(Bucket=self._bucket, Key=self._full(key), **again)
            end = done + answer["ContentLength"]
            broken = _BROKEN_STREAM if attempts_left else ()
            # The client repeats requests, not a body that broke off: go on from where it did, in the same object.
            with suppress(*broken), self._errors(key, unmapped=broken), closing(answer["Body"]) as body:
                for chunk in body.iter_chunks(CHUNK_BYTES):
                    done += len(chunk)
                    yield chunk
            if done == end:
                return
            again = {"Range": f"bytes={done}-", "IfMatch": answer["ETag"]}

    def holds(self, key: str, *, size_bytes: int, sha256: str) -> bool:
        try:
            with self._errors(key):
                head = self._client.head_object(Bucket=self._bucket, Key=self._full(key))
        except NotFound:
            return False
        return head["ContentLength"] == size_bytes and head["Metadata"].get("sha256") == sha256

    def create(self, key: str, data: bytes) -> bool:
        return self._put_conditionally(key, data, {"IfNoneMatch": "*"})

    def get_versioned(self, key: str) -> Versioned | None:
        try:
            with self._errors(key):
                answer = self._client.get_object(Bucket=self._bucket, Key=self._full(key))
                with answer["Body"] as body:
                    return Versioned(data=body.read(), version=answer["ETag"])
        except NotFound:
            return None

    def replace(self, key: str, data: bytes, *, version: str) -> bool:
        return self._put_conditionally(key, data, {"IfMatch": version})

    def list_objects(self, prefix: str = "") -> Iterator[StoredObject]:
        start = self._full(prefix)
        strip = len(self._prefix) + 1 if self._prefix else 0
        with self._errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=f"{start}/" if start else ""
            )
            for page in pages:
                for entry in page.get("Contents", []):
                    yield StoredObject(key=entry["Key"][strip:], size_bytes=entry["Size"])

    def delete(self, prefix: str) -> int:
        if not prefix:
            raise UserError(f"The root of {self.uri} is not deleted.", fix="Name a prefix.")
        keys = [entry.key for entry in self.list_objects(prefix)]
        if self._exists(prefix):
            keys.append(prefix)
        keys.sort(key=lambda key: not key.endswith(MANIFEST))
        for start in range(0, len(keys), _DELETE_BATCH):
            self._delete_batch(keys[start : start + _DELETE_BATCH])
        return len(keys)

    def presign(self, key: str, *, expires_s: int) -> str | None:
        with self._errors(key):
            return self._client.generate_presigned_url(
                "get_object", Params={"Bucket": self._bucket, "Key": self._full(key)}, ExpiresIn=expires_s
            )

    def probe(self) -> None:
        hasty = S3Store(
            self._bucket,
            self._prefix,
            endpoint=self._endpoint,
            region=self._region,
            credentials=self._credentials,
            max_attempts=_PROBE_ATTEMPTS,
        )
        try:
            probe_store(hasty)
        finally:
            hasty.close()

    def close(self) -> None:
        self._transfers.shutdown()
        self._client.close()

    def _connect(self, max_attempts: int) -> "S3Client":
        session = boto3.Session()
        keys: dict[str, Any] = {}
        if self._credentials:
            keys["aws_access_key_id"] = self._credentials.access_key
            keys["aws_secret_access_key"] = self._credentials.secret_key
            keys["aws_session_token"] = self._credentials.session_token
        config = Config(
            connect_timeout=5,
            read_timeout=60,
            retries={"mode": "standard", "total_max_attempts": max_attempts},
            max_pool_connections=32,
            signature_version="s3v4",  # else presigned URLs would be of version 2
            # A server of one's own rarely has a DNS name for each bucket.
            s3={"addressing_style": "path" if self._endpoint else "auto"},
        )
        region = self._region or session.region_name or "us-east-1"
        try:
            return session.client("s3", endpoint_url=self._endpoint, region_name=region, config=config, **keys)
        except ValueError as error:
            raise StorageError(
                f"S3 endpoint {self._endpoint!r} is not a URL.", fix="Write it as http://host:port or https://host."
            ) from error

    def _put_conditionally(self, key: str, data: bytes, condition: dict[str, str]) -> bool:
        writer = secrets.token_hex(16)
        for attempt in range(_CONDITIONAL_ATTEMPTS):
            try:
                with self._errors(key, unmapped_codes=_LOST_OR_UNCLEAR):
                    self._client.put_object(
                        Bucket=self._bucket,
                        Key=self._full(key),
                        Body=data,
                        ChecksumAlgorithm="SHA256",
                        Metadata={"writer": writer},
                        **cast(Any, condition),
                    )
                return True
            except ClientError as error:
                if code_of(error) != "ConditionalRequestConflict":
                    # After a repeated request the object may be in the way of itself: the first answer got lost.
                    repeated = error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0 or attempt > 0
                    return repeated and self._writer(key) == writer
            time.sleep(0.05 * 2**attempt)  # S3 says: two writers met, try again
        raise StorageUnavailable(f"{self.url(key)}: too many writers at once.", fix="Send it again later.")

    def _writer(self, key: str) -> str | None:
        try:
            with self._errors(key):
                head = self._client.head_object(Bucket=self._bucket, Key=self._full(key))
        except NotFound:
            return None
        return head["Metadata"].get("writer")

    def _exists(self, key: str) -> bool:
        try:
            with self._errors(key):
                self._client.head_object(Bucket=self._bucket, Key=self._full(key))
        except NotFound:
            return False
        return True

    def _delete_batch(self, keys: list[str]) -> None:
        objects: list[ObjectIdentifierTypeDef] = [{"Key": self._full(key)} for key in keys]
        with self._errors(keys[0]):
            answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True})
        for error in answer.get("Errors", []):
            place = self._place(f"s3://{self._bucket}/{error.get('Key', '')}")
            raise answer_to_error(error.get("Code", ""), error.get("Message", ""), place)

    def _full(self, key: str) -> str:
        if key:
            check_key(key)
        return "/".join(part for part in (self._prefix, key) if part)

    def _place(self, url: str) -> Place:
        return Place(bucket=self._bucket, endpoint=self._endpoint or "AWS", access_key=self._access_key(), url=url)

    def _access_key(self) -> str:
        """The id only, for messages."""
        if self._credentials:
            return self._credentials.access_key
        return os.environ.get("AWS_ACCESS_KEY_ID", "")

    def _errors(
        self, key: str, *, unmapped: tuple[type[Exception], ...] = (), unmapped_codes: frozenset[str] = frozenset()
    ) -> AbstractContextManager[None]:
        return s3_errors_as_storage(
            lambda: self._place(self.url(key)), unmapped=unmapped, unmapped_codes=unmapped_codes
        )


_BROKEN_STREAM = (ReadTimeoutError, ResponseStreamingError, IncompleteReadError)
_LOST_OR_UNCLEAR = frozenset({"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchKey", "404"})


class _Watcher(BaseSubscriber):
    """Passes progress on. What that raises ends the transfer by cancelling it: s3transfer leaks its file otherwise."""

    def __init__(self, on_bytes: OnBytes | None) -> None:
        self._on_bytes = on_bytes
        self._raised: BaseException | None = None

    def on_progress(self, future: TransferFuture, bytes_transferred: int, **kwargs: Any) -> None:
        if self._on_bytes is None or self._raised:
            return
        try:
            self._on_bytes(bytes_transferred)
        except BaseException as error:
            self._raised = error
            future.cancel()

    def wait(self, transfer: TransferFuture) -> None:
        """Return when the transfer is done; raise what ended it."""
        try:
            transfer.result()
        except CancelledError:
            if self._raised is None:
                raise
        if self._raised:
            raise self._raised
