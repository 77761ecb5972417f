"""The probe that every store runs before a job starts: what a job will need of it, done once with a few bytes."""

import secrets

from hone.errors import IntegrityError, StorageError
from hone.storage.base import ArtifactStore
from hone.storage.keys import RESERVED

_SERVERS = "AWS S3, MinIO, Ceph and versitygw have them in current versions."


def probe_store(store: ArtifactStore) -> None:
    """Write, read back, write conditionally, remove. Raises StorageUnavailable, StorageError or IntegrityError."""
    key = f"{RESERVED}probe-{secrets.token_hex(8)}"
    data = secrets.token_bytes(64)
    if not store.create(key, data):
        raise StorageError(f"{store.uri} says that a name never used before is taken.", fix=_SERVERS)
    try:
        if store.get_bytes(key) != data:
            raise IntegrityError(f"{store.uri} gave back other bytes than were written.", fix="Check its disks.")
        # A server that ignores the condition would let a late attempt overwrite the outputs of a newer one.
        if store.create(key, data) or store.replace(key, data, version="0" * 32):
            raise StorageError(f"{store.uri} ignores conditional writes (If-None-Match, If-Match).", fix=_SERVERS)
    finally:
        store.delete(key)
