"""The s3:// store against a real S3 server (versitygw over a directory)."""

import base64
import hashlib
import json
import os
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest

from hone.errors import (
    IntegrityError,
    InvalidRequest,
    NotFound,
    StorageError,
    StorageUnavailable,
    TemporaryError,
)
from hone.machine import Planner
from hone.plan import Hardware
from hone.storage import (
    MANIFEST,
    ArtifactStore,
    Credentials,
    JobLayout,
    download_directory,
    open_store,
    sha256_of,
    upload_directory,
    verify_directory,
)

from .servers import S3Server, free_port

PART_BYTES = 5 << 20  # the smallest that S3 allows
ADAPTER = JobLayout("default", "sft-abcde").adapter


@pytest.fixture(autouse=True)
def no_ambient_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the developer's own AWS set-up plays a part; no metadata service is asked for credentials."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))


def connect(server: S3Server, uri: str, **options: Any) -> ArtifactStore:
    keys = Credentials(access_key=server.access_key, secret_key=server.secret_key)
    options = {"endpoint": server.endpoint, "credentials": keys, "part_bytes": PART_BYTES, **options}
    return open_store(uri, **options)


@pytest.fixture
def store(s3_server: S3Server, bucket: Path) -> Iterator[ArtifactStore]:
    store = connect(s3_server, f"s3://{bucket.name}/team/artifacts")
    yield store
    store.close()


@pytest.fixture
def client(s3_server: S3Server) -> Iterator[Any]:
    """A client that is not ours, to look at what really lies in the bucket."""
    client = boto3.client(
        "s3",
        endpoint_url=s3_server.endpoint,
        aws_access_key_id=s3_server.access_key,
        aws_secret_access_key=s3_server.secret_key,
        region_name="us-east-1",
    )
    yield client
    client.close()


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """One file of three parts, two small ones, one in a subdirectory with a name that has to be escaped."""
    directory = tmp_path / "outputs"
    (directory / "1 pooling").mkdir(parents=True)
    (directory / "adapter_model.safetensors").write_bytes(os.urandom(2 * PART_BYTES + 1))
    (directory / "adapter_config.json").write_text("{}")
    (directory / "1 pooling" / "config ü.json").write_text('{"a": 1}')
    (directory / "empty").touch()
    return directory


def test_directory_comes_back_as_it_was(store: ArtifactStore, outputs: Path, tmp_path: Path) -> None:
    sent: list[tuple[int, int]] = []
    fetched: list[tuple[int, int]] = []
    manifest = upload_directory(store, outputs, ADAPTER, progress=lambda *now: sent.append(now))
    total = sum(path.stat().st_size for path in outputs.rglob("*") if path.is_file())
    assert sent[-1] == (total, total)
    assert download_directory(store, ADAPTER, tmp_path / "copy", progress=lambda *now: fetched.append(now)) == manifest
    assert fetched[-1] == (total, total)
    for path in outputs.rglob("*"):
        if path.is_file():
            assert (tmp_path / "copy" / path.relative_to(outputs)).read_bytes() == path.read_bytes()


def test_address_of_a_directory_opens_as_a_store(s3_server: S3Server, store: ArtifactStore, outputs: Path) -> None:
    manifest = upload_directory(store, outputs, ADAPTER)
    direct = connect(s3_server, store.url(ADAPTER))
    assert verify_directory(direct, "") == manifest
    direct.close()


def test_big_file_goes_in_parts_whose_digests_the_server_checked(
    store: ArtifactStore, bucket: Path, client: Any, outputs: Path
) -> None:
    upload_directory(store, outputs, ADAPTER)
    big = (outputs / "adapter_model.safetensors").read_bytes()
    parts = [big[start : start + PART_BYTES] for start in range(0, len(big), PART_BYTES)]
    assert len(parts) == 3
    composite = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
    key = f"team/artifacts/{ADAPTER}/adapter_model.safetensors"
    head = client.head_object(Bucket=bucket.name, Key=key, ChecksumMode="ENABLED")
    assert head["ChecksumType"] == "COMPOSITE"
    assert head["ChecksumSHA256"].removesuffix("-3") == base64.b64encode(composite).decode()
    assert head["Metadata"]["sha256"] == hashlib.sha256(big).hexdigest()


def test_small_file_has_the_digest_that_the_server_checked(
    store: ArtifactStore, bucket: Path, client: Any, outputs: Path
) -> None:
    upload_directory(store, outputs, ADAPTER)
    key = f"team/artifacts/{ADAPTER}/adapter_config.json"
    head = client.head_object(Bucket=bucket.name, Key=key, ChecksumMode="ENABLED")
    assert base64.b64decode(head["ChecksumSHA256"]).hex() == sha256_of(outputs / "adapter_config.json")


def test_interrupted_upload_sends_only_what_is_missing(store: ArtifactStore, bucket: Path, outputs: Path) -> None:
    big = outputs / "adapter_model.safetensors"
    store.put_file(big, f"{ADAPTER}/{big.name}", sha256=sha256_of(big))
    before = (bucket / "team/artifacts" / ADAPTER / big.name).stat().st_mtime_ns
    with pytest.raises(IntegrityError, match=r"not complete: it has no MANIFEST\.json"):
        verify_directory(store, ADAPTER)
    upload_directory(store, outputs, ADAPTER)
    assert (bucket / "team/artifacts" / ADAPTER / big.name).stat().st_mtime_ns == before


def test_file_altered_after_an_interrupted_upload_is_sent_again(store: ArtifactStore, outputs: Path) -> None:
    config = outputs / "adapter_config.json"
    store.put_file(config, f"{ADAPTER}/{config.name}", sha256=sha256_of(config))
    config.write_text("[]")  # as long as before
    upload_directory(store, outputs, ADAPTER)
    assert store.get_bytes(f"{ADAPTER}/{config.name}") == b"[]"


def test_interrupted_download_fetches_only_what_is_missing(store: ArtifactStore, outputs: Path, tmp_path: Path) -> None:
    upload_directory(store, outputs, ADAPTER)
    copy = tmp_path / "copy"
    download_directory(store, ADAPTER, copy)
    kept, cut, gone = copy / "adapter_model.safetensors", copy / "adapter_config.json", copy / "empty"
    before = kept.stat().st_mtime_ns
    cut.write_text("{")
    gone.unlink()
    download_directory(store, ADAPTER, copy)
    assert (kept.stat().st_mtime_ns, cut.read_text(), gone.exists()) == (before, "{}", True)


def test_upload_of_the_same_files_again_is_accepted_and_keeps_the_manifest(store: ArtifactStore, outputs: Path) -> None:
    assert upload_directory(store, outputs, ADAPTER) == upload_directory(store, outputs, ADAPTER)


def test_complete_directory_is_never_replaced(store: ArtifactStore, outputs: Path) -> None:
    manifest = upload_directory(store, outputs, ADAPTER)
    (outputs / "adapter_config.json").write_text("[]")
    with pytest.raises(StorageError, match="complete already"):
        upload_directory(store, outputs, ADAPTER)
    assert verify_directory(store, ADAPTER) == manifest


def test_transfer_ends_when_its_progress_raises(store: ArtifactStore, outputs: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise InterruptedByUser

    class InterruptedByUser(Exception):
        pass

    with pytest.raises(InterruptedByUser):
        upload_directory(store, outputs, ADAPTER, progress=interrupt)
    upload_directory(store, outputs, ADAPTER)
    with pytest.raises(InterruptedByUser):
        download_directory(store, ADAPTER, tmp_path / "copy", progress=interrupt)
    assert [path.name for path in (tmp_path / "copy").rglob("*") if path.is_file()] in ([], ["empty"])


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_one_altered_byte_is_refused_by_name(
    store: ArtifactStore, bucket: Path, outputs: Path, tmp_path: Path, name: str
) -> None:
    upload_directory(store, outputs, ADAPTER)
    with (bucket / "team/artifacts" / ADAPTER / name).open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))
    with pytest.raises(IntegrityError, match=name):
        verify_directory(store, ADAPTER)
    with pytest.raises(IntegrityError, match=name):
        download_directory(store, ADAPTER, tmp_path / "copy")
    assert not (tmp_path / "copy" / name).exists()
    assert not (tmp_path / "copy" / MANIFEST).exists()


def test_deleted_file_is_missed_by_name(store: ArtifactStore, outputs: Path) -> None:
    upload_directory(store, outputs, ADAPTER)
    store.delete(f"{ADAPTER}/adapter_config.json")
    with pytest.raises(IntegrityError, match=r"adapter_config\.json is missing"):
        verify_directory(store, ADAPTER)


def test_directory_with_another_digest_than_was_recorded_is_refused(store: ArtifactStore, outputs: Path) -> None:
    manifest = upload_directory(store, outputs, ADAPTER)
    assert verify_directory(store, ADAPTER, digest=manifest.digest) == manifest
    with pytest.raises(IntegrityError, match=MANIFEST):
        verify_directory(store, ADAPTER, digest="0" * 64)


def test_what_was_never_written_is_not_found(store: ArtifactStore) -> None:
    with pytest.raises(NotFound):
        verify_directory(store, ADAPTER)
    with pytest.raises(NotFound):
        store.get_bytes("nothing")
    assert store.get_versioned("nothing") is None
    assert store.delete("nothing") == 0


def race(writers: int, write: Any) -> list[int]:
    """Let several writers start at one moment; the numbers of those that won."""
    barrier = threading.Barrier(writers)

    def run(number: int) -> bool:
        barrier.wait()
        return bool(write(number))

    with ThreadPoolExecutor(writers) as pool:
        results = list(pool.map(run, range(writers)))
    return [number for number, won in enumerate(results) if won]


@pytest.mark.parametrize("round_", range(5))
def test_of_concurrent_creations_exactly_one_wins(store: ArtifactStore, round_: int) -> None:
    winners = race(8, lambda number: store.create(f"pointer-{round_}", f"writer {number}".encode()))
    assert len(winners) == 1
    assert store.get_bytes(f"pointer-{round_}") == f"writer {winners[0]}".encode()


@pytest.mark.parametrize("round_", range(5))
def test_of_concurrent_replacements_of_one_version_exactly_one_wins(store: ArtifactStore, round_: int) -> None:
    assert store.create("pointer", b"attempt 1")
    current = store.get_versioned("pointer")
    assert current is not None
    winners = race(8, lambda number: store.replace("pointer", f"writer {number}".encode(), version=current.version))
    assert len(winners) == 1
    assert store.get_bytes("pointer") == f"writer {winners[0]}".encode()


def test_replacement_of_what_is_not_there_is_refused(store: ArtifactStore) -> None:
    assert not store.replace("pointer", b"attempt 2", version='"0123456789abcdef0123456789abcdef"')
    assert store.get_versioned("pointer") is None


def test_prefix_names_a_directory_and_not_a_beginning(store: ArtifactStore) -> None:
    for key in ("ns/job-1/a", "ns/job-1/b/c", "ns/job-10/a"):
        store.put_bytes(key, b"12")
    assert [entry.key for entry in store.list_objects("ns/job-1")] == ["ns/job-1/a", "ns/job-1/b/c"]
    assert [entry.size_bytes for entry in store.list_objects()] == [2, 2, 2]
    assert store.delete("ns/job-1") == 2
    assert [entry.key for entry in store.list_objects()] == ["ns/job-10/a"]


def test_presigned_url_downloads_without_credentials(store: ArtifactStore) -> None:
    store.put_bytes("ns/file", b"content")
    url = store.presign("ns/file", expires_s=60)
    assert url is not None
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.read() == b"content"


def test_probe_of_a_good_store_is_silent_and_leaves_nothing(store: ArtifactStore) -> None:
    store.probe()
    assert list(store.list_objects()) == []


@pytest.mark.parametrize(
    ("access_key", "secret_key", "says"),
    [
        ("nobody", "made-up-secret", ["'nobody'", "AWS_ACCESS_KEY_ID"]),
        ("test-access", "made-up-secret", ["'test-access'", "secret", "AWS_SECRET_ACCESS_KEY"]),
    ],
)
def test_probe_names_wrong_credentials_and_no_secret(
    s3_server: S3Server, bucket: Path, access_key: str, secret_key: str, says: list[str]
) -> None:
    wrong = Credentials(access_key=access_key, secret_key=secret_key, session_token=None)
    store = connect(s3_server, f"s3://{bucket.name}", credentials=wrong)
    with pytest.raises(StorageError) as caught:
        store.probe()
    store.close()
    assert [text for text in [*says, s3_server.endpoint] if text not in str(caught.value)] == []
    assert "made-up-secret" not in f"{caught.value!r} {caught.value} {caught.value.__cause__} {wrong!r}"


def test_probe_names_absent_credentials(s3_server: S3Server, bucket: Path) -> None:
    store = connect(s3_server, f"s3://{bucket.name}", credentials=None)
    with pytest.raises(StorageError, match=r"no S3 credentials.*AWS_ACCESS_KEY_ID"):
        store.probe()
    store.close()


def test_probe_names_a_missing_bucket(s3_server: S3Server) -> None:
    store = connect(s3_server, "s3://never-made/prefix")
    with pytest.raises(StorageError, match=r"no bucket 'never-made' at .*HONE_STORE"):
        store.probe()
    store.close()


def test_probe_of_an_endpoint_that_is_down_is_temporary_and_quick(s3_server: S3Server) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    store = connect(s3_server, "s3://some-bucket", endpoint=endpoint)
    started = time.monotonic()
    with pytest.raises(StorageUnavailable, match=rf"{endpoint} does not answer .*AWS_ENDPOINT_URL_S3"):
        store.probe()
    assert time.monotonic() - started < 5
    store.close()


def test_endpoint_and_credentials_come_from_the_environment(
    s3_server: S3Server, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    store = open_store(f"s3://{bucket.name}")
    store.probe()
    store.close()


def test_endpoint_that_is_no_url_is_refused(s3_server: S3Server) -> None:
    with pytest.raises(StorageError, match="'not a url' is not a URL"):
        connect(s3_server, "s3://some-bucket", endpoint="not a url")


class Proxy(ThreadingHTTPServer):
    """Stands before the server and spoils answers on purpose."""

    daemon_threads = True

    def __init__(self, target: S3Server) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.target = target
        self.lose_answers_to: str | None = None
        """Method whose next request is carried out and answered with 500."""
        self.busy = False
        """Answer 503 SlowDown to everything."""
        self.cut_answers = 0
        """So many answers to GET end in the middle."""
        self.ignored_condition = ""
        """Header whose refusal (412) is answered as a success, as servers do that do not know it."""


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.busy:
            return self._answer(503, {}, b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>")
        url = f"{self.server.target.endpoint}{self.path}"
        request = urllib.request.Request(url, data=body or None, headers=dict(self.headers), method=self.command)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                status, got, data = answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            with error:
                status, got, data = error.code, dict(error.headers), error.read()
        if self.server.lose_answers_to == self.command:
            self.server.lose_answers_to = None
            status, got, data = 500, {}, b"<Error><Code>InternalError</Code><Message>lost</Message></Error>"
        if status == 412 and self.server.ignored_condition in self.headers:
            status, got, data = 200, {"ETag": '"0123456789abcdef0123456789abcdef"'}, b""
        self._answer(status, got, data)

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in {"content-length", "connection", "transfer-encoding", "date", "server"}:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET" and self.server.cut_answers and len(data) > 1:
            self.server.cut_answers -= 1
            data = data[: len(data) // 2]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    with Proxy(s3_server) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield proxy
        proxy.shutdown()
        thread.join()


@pytest.fixture
def spoiled(s3_server: S3Server, bucket: Path, proxy: Proxy) -> Iterator[ArtifactStore]:
    store = connect(s3_server, f"s3://{bucket.name}", endpoint=f"http://127.0.0.1:{proxy.server_port}")
    yield store
    store.close()


def test_creation_whose_answer_got_lost_is_still_known_as_ours(spoiled: ArtifactStore, proxy: Proxy) -> None:
    proxy.lose_answers_to = "PUT"
    assert spoiled.create("pointer", b"mine")
    assert proxy.lose_answers_to is None
    assert not spoiled.create("pointer", b"mine")


def test_download_that_breaks_off_goes_on_from_there(
    spoiled: ArtifactStore, proxy: Proxy, outputs: Path, tmp_path: Path
) -> None:
    big = outputs / "adapter_model.safetensors"
    spoiled.put_file(big, "ns/big", sha256=sha256_of(big))
    proxy.cut_answers = 3
    moved: list[int] = []
    spoiled.get_file("ns/big", tmp_path / "copy", sha256=sha256_of(big), on_bytes=moved.append)
    assert proxy.cut_answers == 0
    assert sum(moved) == big.stat().st_size


def test_download_that_always_breaks_off_is_a_temporary_error(
    spoiled: ArtifactStore, proxy: Proxy, outputs: Path, tmp_path: Path
) -> None:
    big = outputs / "adapter_model.safetensors"
    spoiled.put_file(big, "ns/big", sha256=sha256_of(big))
    proxy.cut_answers = 1000
    with pytest.raises(StorageUnavailable, match="does not answer"):
        spoiled.get_file("ns/big", tmp_path / "copy", sha256=sha256_of(big))
    assert list(tmp_path.glob("*copy*")) == list(tmp_path.glob(".hone-*")) == []


def test_server_that_asks_to_slow_down_is_a_temporary_error(spoiled: ArtifactStore, proxy: Proxy) -> None:
    proxy.busy = True
    with pytest.raises(TemporaryError, match="SlowDown"):
        spoiled.probe()


@pytest.mark.parametrize("condition", ["If-None-Match", "If-Match"])
def test_probe_refuses_a_server_that_ignores_conditions(spoiled: ArtifactStore, proxy: Proxy, condition: str) -> None:
    proxy.ignored_condition = condition
    with pytest.raises(StorageError, match="ignores conditional writes"):
        spoiled.probe()


def test_an_adapter_in_a_bucket_is_planned_with_the_shape_of_its_base(
    s3_server: S3Server, bucket: Path, make_spec: Any, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    files = {
        "base/config.json": (inputs / "model" / "config.json").read_text(),
        "adapter/adapter_config.json": json.dumps(config),
        "adapter/hone_base.json": json.dumps({"source": f"s3://{bucket.name}/base"}),
    }
    for name, text in files.items():
        (bucket / name).parent.mkdir(exist_ok=True)
        (bucket / name).write_text(text)
    hardware = Hardware(profiles={}, cpu_cores=2, memory_bytes=8 << 30)
    planner = Planner(hardware, endpoint=s3_server.endpoint, region="us-east-1")
    planned = planner(make_spec(model={"source": f"s3://{bucket.name}/adapter"}))
    assert planned.spec.adapter is not None
    assert planned.spec.adapter.lora.rank == 4
    assert planned.plan.trainable_parameters == 2 * 4 * (64 + 64)
    with pytest.raises(InvalidRequest, match=r"config\.json cannot be read: there is none at s3://"):
        planner(make_spec(model={"source": f"s3://{bucket.name}/none"}))
