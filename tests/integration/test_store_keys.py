"""The rights that docs/operations.md gives a tenant's key for the store: enough for a trainer, and no way to others."""

import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from hone.errors import StorageError
from hone.storage import ArtifactStore, Credentials, open_store

from .servers import S3Server, find_tool, run_s3

PAGE = Path(__file__).parents[2] / "docs/operations.md"
PART_BYTES = 5 * 1024**2


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server with users of its own, and the bucket of the page."""
    program = find_tool("versitygw")
    if program is None:
        pytest.skip("versitygw is not there: `make servers` builds it")
    users = tmp_path_factory.mktemp("users")
    with run_s3(program, tmp_path_factory.mktemp("s3"), "--iam-dir", str(users)) as server:
        for user in ("team-a", "service"):
            admin = ["admin", "--access", server.access_key, "--secret", server.secret_key]
            make = ["create-user", "--access", user, "--secret", f"{user}-secret", "--role", "user"]
            subprocess.run([program, *admin, "--endpoint-url", server.endpoint, *make], check=True, timeout=30)
        server.make_bucket("models")
        _allow(server)
        yield server


def _allow(server: S3Server) -> None:
    """The page's policy for team-a, and for the service with `hone/*`, as it says."""
    text = re.findall(r"^```json\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[0]
    policy = json.loads(text)
    of_service = json.loads(text.replace("hone/team-a/*", "hone/*"))["Statement"]
    for user, statements in (("team-a", policy["Statement"]), ("service", of_service)):
        for statement in statements:
            statement["Principal"] = {"AWS": [user]}
    policy["Statement"] += of_service
    root = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
    )
    root.put_bucket_policy(Bucket="models", Policy=json.dumps(policy))
    root.close()


def _open(server: S3Server, user: str) -> ArtifactStore:
    keys = Credentials(access_key=user, secret_key=f"{user}-secret")
    return open_store("s3://models/hone", endpoint=server.endpoint, credentials=keys, part_bytes=PART_BYTES)


def test_a_tenants_key_is_enough_for_what_a_trainer_does(server: S3Server, tmp_path: Path) -> None:
    store = _open(server, "team-a")
    assert store.get_versioned("team-a/job/current") is None
    assert store.create("team-a/job/current", b"1")
    assert not store.create("team-a/job/current", b"2")
    found = store.get_versioned("team-a/job/current")
    assert found is not None
    assert store.replace("team-a/job/current", b"2", version=found.version)
    large = tmp_path / "large"
    large.write_bytes(b"x" * (2 * PART_BYTES + 1))
    digest = hashlib.sha256(large.read_bytes()).hexdigest()
    store.put_file(large, "team-a/job/model/large", sha256=digest)
    assert store.holds("team-a/job/model/large", size_bytes=large.stat().st_size, sha256=digest)
    assert not store.holds("team-a/job/model/small", size_bytes=1, sha256=digest)
    assert [entry.key for entry in store.list_objects("team-a/job/model")] == ["team-a/job/model/large"]
    assert store.delete("team-a/job/model") == 1
    store.close()


def test_a_tenants_key_reads_and_writes_nothing_of_another_tenant(server: S3Server) -> None:
    service, tenant = _open(server, "service"), _open(server, "team-a")
    service.put_bytes("team-b/job/current", b"1")
    for forbidden in (
        lambda: tenant.get_bytes("team-b/job/current"),
        lambda: tenant.put_bytes("team-b/job/current", b"2"),
        lambda: tenant.delete("team-b/job"),
    ):
        with pytest.raises(StorageError, match="may not do this"):
            forbidden()
    assert service.get_bytes("team-b/job/current") == b"1"
    service.close()
    tenant.close()


def test_the_services_key_passes_the_probe(server: S3Server) -> None:
    store = _open(server, "service")
    store.probe()
    store.close()
